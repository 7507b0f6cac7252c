"""The section `[rollout]`: who draws the images of a training. Nothing here imports torch."""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from adascope_fast.serving.settings import address, variable
from adascope_fast.settings import Positive, PositiveOrZero, Section, Text


class Local(Section):
    """The training itself draws its images."""

    name: Literal["local"] = "local"


class Remote(Section):
    """A server draws them, here or elsewhere: `adascope-fast rollout-server`, or another engine behind its protocol."""

    name: Literal["remote"] = "remote"
    url: Text = "http://127.0.0.1:8410"
    """Address of the server, as it prints it."""
    token_env: Text = "ADASCOPE_FAST_ROLLOUT_TOKEN"
    """Environment variable with the server's token, which is written into no file."""
    timeout: Positive = 600.0
    """Seconds in which a request must be answered: the weights, or `train.rollout_batch` images."""
    patience: PositiveOrZero = 600.0
    """Seconds for which a server that does not answer is waited for."""
    parallel: Annotated[int, Field(ge=1, le=64)] = 2
    """Requests at once: one is on its way while another is drawn."""
    max_drift: Positive = 0.01
    """Largest difference between the server's log-probabilities and those of the first update, before any weight has
    moved; beyond it the run stops."""

    @field_validator("url")
    @classmethod
    def _is_an_address(cls, url: str) -> str:
        address(url, "rollout")
        return url

    @field_validator("token_env")
    @classmethod
    def _is_a_variable(cls, name: str) -> str:
        return variable(name, "rollout", "ADASCOPE_FAST_ROLLOUT_TOKEN")

"""The section `[rollout]`: who draws the images of a training. Nothing here imports torch."""

from typing import ClassVar, Literal

from adascope_fast.serving.settings import Asking
from adascope_fast.settings import Positive, Section, Text


class Local(Section):
    """The training itself draws its images."""

    name: Literal["local"] = "local"


class Remote(Asking):
    """A server draws them, here or elsewhere: `adascope-fast rollout-server`, or another engine behind its protocol."""

    section: ClassVar[str] = "rollout"

    name: Literal["remote"] = "remote"
    url: Text = "http://127.0.0.1:8410"
    """Address of the server, as it prints it."""
    token_env: Text = "ADASCOPE_FAST_ROLLOUT_TOKEN"
    """Environment variable with the server's token, which is written into no file."""
    timeout: Positive = 600.0
    """Seconds in which a request must be answered: the weights, or `train.rollout_batch` images."""
    max_drift: Positive = 0.01
    """Largest difference between the server's log-probabilities and those of the first update, before any weight has
    moved; beyond it the run stops."""

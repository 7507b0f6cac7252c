"""Sections of the rewards: the keys of `[reward]`, by `reward.name`. Nothing here imports torch."""

import re
from typing import Annotated, Any, ClassVar, Literal, Self
from urllib.parse import SplitResult, urlsplit

from pydantic import Field, field_validator, model_validator

from adascope_fast.settings import Images, Own, Positive, PositiveOrZero, Section, Text, imported, show


class SceneAttributes(Section):
    """Share of a scene caption's attributes that the image satisfies, in [0, 1], by classical image analysis."""

    implementation: ClassVar[str] = "adascope_fast.rewards.scene_attributes:SceneAttributes"

    name: Literal["scene_attributes"] = "scene_attributes"


class JpegCompressibility(Section):
    """Minus the kilobytes of the image as a JPEG of quality 95."""

    name: Literal["jpeg_compressibility"] = "jpeg_compressibility"

    def build(self, **context: object) -> object:
        """The function itself."""
        return imported("adascope_fast.rewards.jpeg:jpeg_compressibility")


class JpegIncompressibility(Section):
    """The kilobytes of the image as a JPEG of quality 95."""

    name: Literal["jpeg_incompressibility"] = "jpeg_incompressibility"

    def build(self, **context: object) -> object:
        """The function itself."""
        return imported("adascope_fast.rewards.jpeg:jpeg_incompressibility")


class ClipSimilarity(Section):
    """Cosine of image and prompt by a CLIP, in [-1, 1]."""

    name: Literal["clip_similarity"] = "clip_similarity"
    clip: Text = "scenes-clip"
    """`scenes-clip` (embedded), the folder of a CLIPModel, or a Hugging Face repository."""

    def build(self, **context: object) -> object:
        """The CLIP, loaded."""
        return imported("adascope_fast.rewards.clip:ClipSimilarity").load(self.clip)


class Judge(Section):
    """Stars that people give to each image on a local page, which the training waits for; in [0, 1]."""

    implementation: ClassVar[str] = "adascope_fast.rewards.judged:Judged"

    name: Literal["judge"] = "judge"
    question: Literal[
        "structural_faithfulness", "aesthetic_appeal", "fine_detail", "semantic_alignment", "prompt_responsiveness"
    ] = "aesthetic_appeal"
    """What the stars are for."""
    votes_per_image: Annotated[int, Field(ge=1, le=100)] = 1
    """Different people who rate each image; their mean counts."""
    host: Text = "127.0.0.1"
    """Address of this machine where the page is served; 0.0.0.0 for all of them."""
    port: Annotated[int, Field(ge=0, le=65_535)] = 0
    """Port of the page; 0: a free one."""
    out: Text | None = None
    """Folder of the votes; absent: `judge` in the run's folder."""


class Remote(Section):
    """Scores of a reward that another process serves, here or elsewhere: `adascope-fast reward-server`."""

    implementation: ClassVar[str] = "adascope_fast.rewards.remote.client:Remote"

    name: Literal["remote"] = "remote"
    url: Text = "http://127.0.0.1:8400"
    """Address of the server, as it prints it."""
    token_env: Text = "ADASCOPE_FAST_REWARD_TOKEN"
    """Environment variable with the server's token, which is written into no file."""
    timeout: Positive = 120.0
    """Seconds in which a request must be answered."""
    patience: PositiveOrZero = 600.0
    """Seconds for which a server that does not answer is waited for."""
    batch: Images = 32
    """Images of a request."""
    encoding: Literal["safetensors", "png"] = "safetensors"
    """Of the images: exactly as they are, or smaller and rounded to 8 bits."""
    parallel: Annotated[int, Field(ge=1, le=64)] = 2
    """Requests at once."""

    @field_validator("url")
    @classmethod
    def _is_an_address(cls, url: str) -> str:
        address(url)
        return url

    @field_validator("token_env")
    @classmethod
    def _is_a_variable(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ValueError(
                "reward.token_env must be the name of an environment variable, got another text, which is not shown: "
                "it may be the token; export ADASCOPE_FAST_REWARD_TOKEN=... and leave reward.token_env out"
            )
        return name


class Mixed(Section):
    """Weighted sum of several rewards, each with its defaults; the curve of each is logged."""

    name: Literal["mixed"] = "mixed"
    parts: dict[str, Annotated[float, Field(ge=-1e6, le=1e6)]] = Field(
        examples=[{"jpeg_compressibility": 1.0, "clip_similarity": 0.5}]
    )
    """Weights of rewards, by what `reward.name` would be: the name of one that is here, or `module:object`."""

    @field_validator("parts", mode="before")
    @classmethod
    def _are_numbers_by_name(cls, parts: Any) -> Any:
        numbers = parts.values() if isinstance(parts, dict) else [parts]
        wrong = [value for value in numbers if isinstance(value, bool) or not isinstance(value, int | float)]
        if wrong or not isinstance(parts, dict):
            value = show(wrong[0] if wrong else parts)
            raise ValueError(
                f"reward.parts must be a table of rewards and their weights, got {value}; write for example "
                f"reward.parts = {{jpeg_compressibility = 1.0, clip_similarity = 0.5}}"
            )
        return parts

    @model_validator(mode="after")
    def _are_several_rewards(self) -> Self:
        if len(self.parts) < 2:
            raise ValueError(
                f"reward.parts must name two rewards or more, got {len(self.parts)}; name another, or set reward.name "
                f"to the one"
            )
        for name, weight in self.parts.items():
            reward_named(name)
            if weight == 0:
                raise ValueError(
                    f"a weight of reward.parts must not be 0, got it for {name!r:.80}; leave the reward out"
                )
        return self

    def build(self, **context: object) -> object:
        """The rewards, loaded."""
        return imported("adascope_fast.rewards.mixed:Mixed").of(self.parts)


class OwnReward(Own):
    """One of your own: `name` is `module:object`, other keys are its arguments."""

    named_by: ClassVar[str] = "reward.name"


def address(url: str) -> SplitResult:
    """A server's address in parts; ValueError unless it is http or https, a host, and perhaps a port and a path."""
    rule = "reward.url must be http://HOST:PORT or https://HOST:PORT"
    if "@" in url:
        raise ValueError(f"{rule}, got one with a name or password; leave it out, reward.token_env names the token")
    try:
        parts = urlsplit(url)
        is_right = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is none, a bracket without its other
        raise ValueError(f"{rule}, got {show(url)}; correct it") from None
    if not is_right or not re.fullmatch(r"[!-~]+", url) or "?" in url or "#" in url:
        raise ValueError(f"{rule}, got {show(url)}; write it so, as the server printed it")
    return parts


def reward_named(name: str) -> Section:
    """The section with its defaults that `reward.name` chooses; ValueError if there is none."""
    if ":" in name:
        return OwnReward(name=name)
    known = {choice.model_fields["name"].default: choice for choice in _ALONE}
    if name not in known:
        raise ValueError(
            f"reward.parts must have names of rewards ({', '.join(known)}) or module:object, got {name!r:.80}; "
            f"choose one of them"
        )
    return known[name]()


def asks_people(reward: Section) -> bool:
    """Whether people are waited for: an image that is not finished is not shown to them."""
    return isinstance(reward, Judge) or (isinstance(reward, Mixed) and "judge" in reward.parts)


_ALONE: tuple[type[Section], ...] = (
    SceneAttributes,
    JpegCompressibility,
    JpegIncompressibility,
    ClipSimilarity,
    Judge,
    Remote,
)

"""Sections of the rewards: the keys of `[reward]`, by `reward.name`. Nothing here imports torch."""

import os
import re
from importlib.util import find_spec
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from adascope_fast.serving.settings import Asking
from adascope_fast.settings import (
    Images,
    Own,
    Positive,
    Section,
    Share,
    ShareOrZero,
    Text,
    imported,
    show,
)


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


class _OnDevice(Section):
    """Of a reward that is a model."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """What the model computes in; scores are float32 whatever it is."""
    device: Text = "auto"
    """Where the model is: `auto` (where the images are), `cpu`, `cuda`, or one of several GPUs, as `cuda:1`."""
    batch: Images = 16
    """Images at a time; a score does not depend on it."""

    @field_validator("device")
    @classmethod
    def _is_a_device(cls, device: str) -> str:
        if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", device):
            raise ValueError(
                f'reward.device must be auto, cpu, cuda or cuda:NUMBER, got {show(device)}; set for example "cuda:1"'
            )
        return device

    def _options(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "device": self.device, "batch": self.batch}


def _made_here(model: str, kind: str) -> str:
    """The folder or repository; ValueError for a folder `weights/...` that is not there, for which no hub is asked."""
    if model.startswith("weights/") and not os.path.isdir(model):
        raise ValueError(
            f"reward.model of {kind} must be the folder that import-weights wrote, got {show(model)}, which is not "
            f"there; make it with: adascope-fast import-weights {kind} FILE... --out {model}"
        )
    return model


class ClipSimilarity(_OnDevice):
    """Cosine of image and prompt by a CLIP, in [-1, 1]."""

    name: Literal["clip_similarity"] = "clip_similarity"
    clip: Text = "scenes-clip"
    """`scenes-clip` (embedded), the folder of a CLIPModel, or a Hugging Face repository."""

    def build(self, **context: object) -> object:
        """The CLIP, loaded."""
        return imported("adascope_fast.rewards.clip:ClipSimilarity").load(self.clip, **self._options())


class PickScore(_OnDevice):
    """PickScore (2305.01569): what people would choose, by a CLIP; about 17 to 23."""

    name: Literal["pick_score"] = "pick_score"
    model: Text = "yuvalkirstain/PickScore_v1"
    """The folder of its CLIPModel in safetensors with tokenizer, or a Hugging Face repository."""
    scale: Literal["percent", "unit"] = "percent"
    """`percent`: exp(logit_scale) times the cosine, as published; `unit`: the cosine."""

    def build(self, **context: object) -> object:
        """The CLIP, loaded."""
        return imported("adascope_fast.rewards.pick_score:PickScore").load(
            self.model, scale=self.scale, **self._options()
        )


class _Imported(_OnDevice):
    """Of one whose weights `import-weights` wrote."""

    def _place(self) -> str:
        raise NotImplementedError

    def examine(self) -> None:
        """ValueError where the folder of its weights is not there."""
        self._place()


class Hpsv2(_Imported):
    """HPSv2 (2306.09341): what people would prefer, the cosine by a CLIP; about 0.2 to 0.35."""

    name: Literal["hpsv2"] = "hpsv2"
    version: Literal["2.0", "2.1"] = "2.0"
    """Which weights they are; refused where those of the folder are the other."""
    model: Text | None = None
    """The folder that `import-weights` wrote; absent: weights/hpsv2 for 2.0 and weights/hpsv2.1 for 2.1."""

    @field_validator("version", mode="before")
    @classmethod
    def _may_be_a_number(cls, version: Any) -> Any:
        return str(version) if isinstance(version, float) else version

    def _place(self) -> str:
        kind = "hpsv2" if self.version == "2.0" else "hpsv2.1"
        return _made_here(self.model or f"weights/{kind}", kind)

    def build(self, **context: object) -> object:
        """The CLIP, loaded."""
        load = imported("adascope_fast.rewards.hps:Hps").load
        return load(self._place(), version=self.version, **self._options())


class Aesthetic(_Imported):
    """LAION's aesthetic predictor V2: how people would rate the image, about 1 to 10; the prompt does not matter."""

    name: Literal["aesthetic"] = "aesthetic"
    model: Text = "weights/aesthetic"
    """The folder that `import-weights` wrote, or a Hugging Face repository of one."""
    clip: Text = "openai/clip-vit-large-patch14"
    """The CLIP that it was trained on: a folder of its CLIPModel in safetensors, or a Hugging Face repository."""

    def _place(self) -> str:
        return _made_here(self.model, "aesthetic")

    def build(self, **context: object) -> object:
        """The CLIP and the layers, loaded."""
        load = imported("adascope_fast.rewards.aesthetic:Aesthetic").load
        return load(self._place(), clip=self.clip, **self._options())


class ImageReward(_Imported):
    """ImageReward (2304.05977): what people would prefer, by BLIP; about -2 to 2."""

    name: Literal["image_reward"] = "image_reward"
    model: Text = "weights/image_reward"
    """The folder that `import-weights` wrote, or a Hugging Face repository of one."""

    def _place(self) -> str:
        return _made_here(self.model, "image_reward")

    def build(self, **context: object) -> object:
        """The networks, loaded."""
        return imported("adascope_fast.rewards.image_reward:ImageReward").load(self._place(), **self._options())


OCR_NOT_INSTALLED = (
    "reward ocr needs rapidocr and onnxruntime, which are not installed; pip install 'adascope-fast[ocr]'"
)


class Ocr(Section):
    """1 - edit distance of the text that the prompt quotes from the text that is read, in [0, 1]; on the CPU."""

    implementation: ClassVar[str] = "adascope_fast.rewards.ocr:Ocr"

    name: Literal["ocr"] = "ocr"

    def examine(self) -> None:
        """ValueError where what reads is not installed."""
        if not all(find_spec(package) for package in ("onnxruntime", "rapidocr")):
            raise ValueError(OCR_NOT_INSTALLED)


class GenEval(_OnDevice):
    """Share of the objects, counts, colours and positions in the prompt's metadata that a detector finds (2310.11513).

    The prompt file is a .jsonl with GenEval's `include` and `exclude` beside `prompt`.
    """

    name: Literal["geneval"] = "geneval"
    model: Text = "PekingU/rtdetr_r50vd"
    """An object detector of transformers, with labels of its own or with words (OWL-ViT, OWLv2)."""
    clip: Text = "openai/clip-vit-large-patch14"
    """The CLIP that tells colours: a folder of its CLIPModel in safetensors, or a Hugging Face repository."""
    strict: bool = False
    """1 where the image has all attributes and 0 elsewhere, as GenEval counts; else the share that it has."""
    threshold: ShareOrZero = 0.3
    """Confidence above which an object counts."""
    counting_threshold: ShareOrZero = 0.9
    """The same for prompts whose `tag` is "counting"."""
    max_overlap: Share = 1.0
    """Of two boxes of a class that overlap by more than this the less confident one is left out; 1 keeps all."""

    def build(self, **context: object) -> object:
        """The detector and the CLIP, loaded."""
        return imported("adascope_fast.rewards.geneval:GenEval").load(
            self.model,
            clip=self.clip,
            is_strict=self.strict,
            threshold=self.threshold,
            counting_threshold=self.counting_threshold,
            max_overlap=self.max_overlap,
            **self._options(),
        )


LARGEST_WEIGHT = 1e6


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


class Remote(Asking):
    """Scores of a reward that another process serves, here or elsewhere: `adascope-fast reward-server`."""

    implementation: ClassVar[str] = "adascope_fast.rewards.remote.client:Remote"
    section: ClassVar[str] = "reward"

    name: Literal["remote"] = "remote"
    url: Text = "http://127.0.0.1:8400"
    """Address of the server, as it prints it."""
    token_env: Text = "ADASCOPE_FAST_REWARD_TOKEN"
    """Environment variable with the server's token, which is written into no file."""
    timeout: Positive = 120.0
    """Seconds in which a request must be answered."""
    batch: Images = 32
    """Images of a request."""
    encoding: Literal["safetensors", "png"] = "safetensors"
    """Of the images: exactly as they are, or smaller and rounded to 8 bits."""


class Mixed(Section):
    """Weighted sum of several rewards; the curve of each is logged."""

    name: Literal["mixed"] = "mixed"
    parts: dict[str, float | dict[str, Any]] = Field(examples=[{"jpeg_compressibility": 1.0, "clip_similarity": 0.5}])
    """By what `reward.name` would be (the name of one that is here, or `module:object`): its weight, -1e6 to 1e6, or a
    table of its `weight` and its own keys, such as {weight = 1.0, model = "weights/pick_score"}."""

    @field_validator("parts", mode="before")
    @classmethod
    def _are_weights_by_name(cls, parts: Any) -> Any:
        example = "write for example reward.parts = {jpeg_compressibility = 1.0, clip_similarity = {weight = 0.5}}"
        if not isinstance(parts, dict):
            raise ValueError(f"reward.parts must be a table of rewards and their weights, got {show(parts)}; {example}")
        for name, part in parts.items():
            weight = part.get("weight") if isinstance(part, dict) else part
            if isinstance(part, dict) and weight is None:
                raise ValueError(
                    f"a table in reward.parts must have a weight, got {show(part)} for {name!r:.80}; {example}"
                )
            if isinstance(weight, bool) or not isinstance(weight, int | float):
                raise ValueError(
                    f"reward.parts must be a table of rewards and their weights, got {show(weight)}; {example}"
                )
            if not abs(weight) <= LARGEST_WEIGHT or weight == 0:
                raise ValueError(
                    f"a weight of reward.parts must not be 0 and lie within -1e6 and 1e6, got {weight} for "
                    f"{name!r:.80}; leave the reward out, or set another weight"
                )
        return parts

    @model_validator(mode="after")
    def _are_several_rewards(self) -> Self:
        if len(self.parts) < 2:
            raise ValueError(
                f"reward.parts must name two rewards or more, got {len(self.parts)}; name another, or set reward.name "
                f"to the one"
            )
        self.sections()
        return self

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each part."""
        return {name: float(part["weight"] if isinstance(part, dict) else part) for name, part in self.parts.items()}

    def sections(self) -> dict[str, Section]:
        """The section of each part; ValueError where a name or a key of one is wrong."""
        keys = {name: part if isinstance(part, dict) else {} for name, part in self.parts.items()}
        return {
            name: reward_named(name, **{key: value for key, value in own.items() if key != "weight"})
            for name, own in keys.items()
        }

    def examine(self) -> None:
        """ValueError where a part's own is not there."""
        for section in self.sections().values():
            section.examine()

    def build(self, **context: object) -> object:
        """The rewards, loaded."""
        made = {name: section.build(**context) for name, section in self.sections().items()}
        return imported("adascope_fast.rewards.mixed:Mixed")(made, self.weights)


class OwnReward(Own):
    """One of your own: `name` is `module:object`, other keys are its arguments."""

    named_by: ClassVar[str] = "reward.name"


def reward_named(name: str, **keys: Any) -> Section:
    """The section that `reward.name` chooses, with these keys in place of defaults; ValueError if there is none."""
    known = {choice.model_fields["name"].default: choice for choice in _ALONE}
    if ":" not in name and name not in known:
        raise ValueError(
            f"reward.parts must have names of rewards ({', '.join(known)}) or module:object, got {name!r:.80}; "
            f"choose one of them"
        )
    try:
        return known.get(name, OwnReward).model_validate({"name": name, **keys})
    except ValidationError as error:
        raise ValueError(_wrong_key(name, known.get(name, OwnReward), error)) from None


def asks_people(reward: Section) -> bool:
    """Whether people are waited for: an image that is not finished is not shown to them."""
    return isinstance(reward, Judge) or (isinstance(reward, Mixed) and "judge" in reward.parts)


def _wrong_key(name: str, section: type[Section], error: ValidationError) -> str:
    """What is wrong with a part's keys, in one line."""
    problem = error.errors()[0]
    place = ".".join(map(str, ("reward.parts", name, *problem["loc"])))
    if problem["type"] == "extra_forbidden":
        others = ", ".join(key for key in section.model_fields if key != "name") or "none"
        return f"unknown key {place} = {show(problem['input'])}; the keys of {name} besides weight: {others}"
    if problem["type"] == "value_error":
        said = str(problem.get("ctx", {}).get("error", problem["msg"]))
        return said.replace("reward.", f"reward.parts.{name}.", 1) if said.startswith("reward.") else said
    return f"{place} is not valid, got {show(problem['input'])}: {problem['msg']}; correct it, or take its default"


_ALONE: tuple[type[Section], ...] = (
    SceneAttributes,
    JpegCompressibility,
    JpegIncompressibility,
    ClipSimilarity,
    PickScore,
    Hpsv2,
    Aesthetic,
    ImageReward,
    Ocr,
    GenEval,
    Judge,
    Remote,
)

"""What is compared: an arm is a trained run, its base model, any other model, a LoRA, or a folder of images.

`[NAME=]SOURCE` names one. A run brings its base model along, once for all runs of it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from adascope_fast import backbones, images
from adascope_fast.backbones import PipelineBackbone
from adascope_fast.comparison.sources import NAME, RULE, refuse_nothing, split
from adascope_fast.config import Config
from adascope_fast.reporting.files import is_run, json_object, text_of
from adascope_fast.training.draw import load_run
from adascope_fast.training.run_folder import load_config, load_run_files

Kind = Literal["run", "base", "model", "adapter", "images"]


@dataclass(frozen=True)
class Arm:
    """One of the things that are compared."""

    name: str
    kind: Kind
    place: str
    """Folder or model."""
    base: str | None = None
    """The name of the arm that it was trained from, if that is among them."""
    model: str | None = None
    """What an adapter is added to."""
    config: Config | None = field(default=None, compare=False, repr=False)
    """Of a run, or of the run that a base model comes from."""

    @property
    def is_trained(self) -> bool:
        """Whether it has a base among the arms."""
        return self.base is not None


def arms_of(sources: Sequence[str], *, model: str | None = None, with_base: bool = True) -> list[Arm]:
    """The arms that the sources name, base models first.

    Args:
        model: what adapters belong to.
        with_base: whether a run's base model, and that of an adapter, are arms too.

    Raises:
        ValueError: a source is nothing of these, or two arms have one name.
    """
    given = [_arm(source, model) for source in sources]
    origins: dict[str, Arm] = {}
    for arm in given:
        if key := _key_of_base(arm):
            origins.setdefault(key, arm)
    names = {key: "base" if len(origins) == 1 else f"base-{number}" for number, key in enumerate(origins, 1)}
    arms: list[Arm] = []
    for key, arm in origins.items() if with_base else ():
        place = arm.model if arm.config is None else arm.config.model.name
        arms.append(Arm(names[key], "base", str(place), config=arm.config))
    arms += [replace(arm, base=names.get(_key_of_base(arm)) if with_base else None) for arm in given]
    for arm in arms:
        same = [other for other in arms if other.name.lower() == arm.name.lower()]
        if len(same) > 1:
            places = " and ".join(one.place for one in same)
            raise ValueError(f"each arm must have a name of its own, got {arm.name!r} for {places}; write NAME=SOURCE")
    return arms


def _arm(source: str, model: str | None) -> Arm:
    refuse_nothing(source)
    name, place = split(source)
    path = Path(place)
    called = name or re.sub(r"[^\w.+-]+", "-", path.resolve().name if path.exists() else place).strip("-.")
    if not NAME.fullmatch(called):
        raise ValueError(f"an arm's name has letters, digits and _.+-, got {called!r} of {source!r}; write NAME=SOURCE")
    if path.is_dir() and is_run(path):
        return Arm(called, "run", place, config=load_config(path))
    if path.is_dir() and not (path / "model_index.json").is_file():
        if any(path.glob("*.safetensors")):
            return Arm(called, "adapter", place, model=_model_of(source, model))
        if any(file.suffix.lower() in images.ENDINGS for file in path.iterdir()):
            return Arm(called, "images", place)
        raise ValueError(f"{RULE}, got the folder {place!r}, which is none of these; check the path")
    if path.suffix == ".safetensors" and model is not None:
        return Arm(called, "adapter", place, model=_model_of(source, model))
    try:
        backbones.check(place)
    except ValueError as error:
        raise ValueError(f"{RULE}, got {place!r}: {' '.join(str(error).split())}") from None
    return Arm(called, "model", place)


def _model_of(source: str, model: str | None) -> str:
    if model is None:
        raise ValueError(f"a LoRA needs the model that it belongs to, got {source!r} alone; add --model MODEL")
    backbones.check(model)
    return model


def _key_of_base(arm: Arm) -> str:
    """What is equal for arms of one base model, empty for those that have none."""
    if arm.config is not None:
        return repr(_options(arm.config) | {"name": arm.config.model.name})
    return repr(arm.model) if arm.model else ""


def _options(config: Config) -> dict[str, Any]:
    """Of `backbones.load`: what the images of a base model depend on."""
    names = ("base", "revision", "variant", "dtype", "resolution", "embedded_guidance", "max_sequence_length")
    return {name: getattr(config.model, name) for name in names}


def load(arm: Arm) -> PipelineBackbone:
    """The model of an arm; ValueError for a folder of images, and where weights are not found."""
    if arm.kind == "run":
        return load_run(Path(arm.place))[1]
    if arm.kind == "adapter":
        return backbones.load(str(arm.model), adapter=Path(arm.place))
    if arm.kind == "images":
        raise ValueError(f"{arm.name!r} is a folder of images, which draws none; name a model")
    return backbones.load(arm.place, **({} if arm.config is None else _options(arm.config)))


def identity(arm: Arm) -> list[str]:
    """What tells an arm's weights from others, without reading them: the sums of a run's newest checkpoint, or the
    sizes and times of a local model's files."""
    told = [arm.kind, arm.place, arm.model or "", _key_of_base(arm)]
    if arm.kind == "run":
        found = load_run_files(Path(arm.place)).checkpoint
        return [*told, "" if found is None else f"{found.next_iteration} {found.digest}"]
    for place in filter(None, (arm.place, arm.model)):
        path = Path(place)
        files = sorted(path.rglob("*.safetensors")) if path.is_dir() else [path] if path.is_file() else []
        told += [f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]
    return told


def history_of(arm: Arm) -> list[dict[str, Any]]:
    """The evaluations in the course of a run, oldest first; empty for what is no run."""
    points = _evaluation(arm).get("history")
    return [point for point in points if isinstance(point, dict)] if isinstance(points, list) else []


def spread_of(arm: Arm) -> dict[str, Any]:
    """The base model's spread as a run's first evaluation recorded it; empty where none did."""
    before = _evaluation(arm).get("before")
    spread = before.get("spread") if isinstance(before, dict) else None
    return spread if isinstance(spread, dict) else {}


def _evaluation(arm: Arm) -> dict[str, Any]:
    return json_object(text_of(Path(arm.place) / "evaluation.json")) if arm.kind == "run" else {}

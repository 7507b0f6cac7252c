"""What every arm's process does alike: iterations until the CPU seconds are spent, and the weights at even marks.

An arm gets the file of its `Setting` as its first argument and writes into `setting.out`:

    weights/00007.safetensors    the adapter after 7 iterations, by the names of peft's state dict
    points.jsonl                 a line for each: iteration, cpu_seconds, pairs, images, reward of the rollout
    finished.json                versions and where the time went; written last

CPU seconds are the process's, user and system, of rollout, reward and update; loading and writing are not counted.
Nobody measures the held-out reward here: `held_out.py` does, for all arms. Imports torch and safetensors alone, so that
it also runs in TRL's environment.
"""

import importlib.util
import json
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

PACKAGE = Path(__file__).parents[3] / "adascope_fast"
PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "trl", "numpy", "scipy")
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
"""The layers to which TRL adds its LoRA; it does not ask."""


@dataclass(frozen=True)
class Setting:
    """What is the same for all arms, and what is tuned."""

    out: str
    model: str
    """A diffusers folder."""
    prompts: list[str]
    """Captions to train on."""
    other_prompt: str
    """One that is not trained on, for an arm that cannot do without."""
    seed: int
    seconds: float
    """CPU seconds of training after which no iteration is begun."""
    marks: int
    """Points at which weights are kept, evenly over the seconds."""
    learning_rate: float
    updates: int
    """Optimiser steps of an iteration, each on its share of the images."""
    max_iterations: int = 100_000
    num_steps: int = 10
    guidance_scale: float = 1.01
    noise: float = 1.0
    """DDIM's eta."""
    groups: int = 6
    """Captions of an iteration."""
    group_size: int = 8
    """Images of each of them."""
    lora_rank: int = 4
    clip_range: float = 5e-3
    buffer_size: int = 32
    min_count: int = 8
    """Rewards of a caption from which on its own statistics are taken: its first group is enough."""
    changes: list[str] = field(default_factory=list)
    """`section.field=value` of our configuration; other arms have none."""

    @classmethod
    def of_arguments(cls) -> "Setting":
        """The one whose file is on the command line."""
        return cls(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))

    @property
    def images(self) -> int:
        """Of an iteration."""
        return self.groups * self.group_size

    def captions(self) -> Callable[[], list[str]]:
        """What gives the captions of the next iteration, each group_size times in a row."""
        drawn = random.Random(self.seed)
        return lambda: [text for text in drawn.sample(self.prompts, self.groups) for _ in range(self.group_size)]


class Kept:
    """Where an arm keeps its weights and seconds as it goes."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.iteration, self.cpu_seconds, self.pairs, self.images = 0, 0.0, 0, 0
        self._folder, self._next = Path(setting.out), 1
        (self._folder / "weights").mkdir(parents=True, exist_ok=True)
        (self._folder / "points.jsonl").write_text("")

    @property
    def is_spent(self) -> bool:
        """Whether no iteration is begun any more."""
        return self.cpu_seconds >= self.setting.seconds or self.iteration >= self.setting.max_iterations

    def add(self, *, cpu_seconds: float, pairs: int, images: int) -> bool:
        """An iteration is over; whether its weights are to be kept."""
        self.iteration, self.cpu_seconds = self.iteration + 1, self.cpu_seconds + cpu_seconds
        self.pairs, self.images = self.pairs + pairs, self.images + images
        passed = int(self.cpu_seconds * self.setting.marks / self.setting.seconds)
        is_mark = passed >= self._next
        self._next = max(self._next, passed + 1)
        return is_mark or self.is_spent

    def keep(self, weights: Mapping[str, Tensor], *, reward: float) -> None:
        """Write the weights, then the point that names them."""
        file = self._folder / "weights" / f"{self.iteration:05d}.safetensors"
        save_file({name: value.detach().cpu().clone().contiguous() for name, value in weights.items()}, file)
        point = {name: getattr(self, name) for name in ("iteration", "cpu_seconds", "pairs", "images")}
        with (self._folder / "points.jsonl").open("a") as lines:
            lines.write(json.dumps(point | {"reward": reward}) + "\n")

    def finish(self, **told: Any) -> None:
        """Say that the run is whole."""
        partial = self._folder / "finished.json.partial"
        partial.write_text(json.dumps({"versions": versions(), **told}, indent=1) + "\n")
        partial.rename(self._folder / "finished.json")


def train(
    setting: Setting, iterate: Callable[[list[str]], tuple[int, float]], weights: Callable[[], Mapping[str, Tensor]]
) -> None:
    """Iterate until the seconds are spent.

    Args:
        iterate: one rollout with its update on these captions; (pairs trained, mean reward).
        weights: the adapter as it is.
    """
    kept, captions = Kept(setting), setting.captions()
    while not kept.is_spent:
        started = time.process_time()
        pairs, reward = iterate(captions())
        seconds = time.process_time() - started
        if kept.add(cpu_seconds=seconds, pairs=pairs, images=setting.images):
            kept.keep(weights(), reward=reward)
    kept.finish()


def scene_attributes() -> Callable[[Tensor, Sequence[str]], Tensor]:
    """The reward, from its own file and that of the captions: TRL's environment does not have the package."""
    known = sys.modules.copy()
    try:
        for name in ("adascope_fast", "adascope_fast.prompts"):
            if name not in sys.modules:
                sys.modules[name] = ModuleType(name)  # what its import looks for, without what it would bring along
        if "adascope_fast.prompts.scenes" not in sys.modules:
            _load("adascope_fast.prompts.scenes", PACKAGE / "prompts" / "scenes.py")
        found = _load("scene_attributes_alone", PACKAGE / "rewards" / "scene_attributes.py")
    finally:
        for name in ("adascope_fast", "adascope_fast.prompts", "adascope_fast.prompts.scenes"):
            if name not in known:
                sys.modules.pop(name, None)
    return found.SceneAttributes()


def _load(name: str, file: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def versions() -> dict[str, str]:
    """Of what an arm runs on."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found | {"torch": str(torch.__version__)}  # with its build

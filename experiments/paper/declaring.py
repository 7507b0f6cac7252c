"""What an experiment of the paper is: arms that are trained alike but for what they say, and what is shown of them.

A file of `declared/` has one `EXPERIMENT`. Adding one is writing such a file; `run.py` finds it.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from adascope_fast.config import Config
from experiments.paper.arms import ADASCOPE, CHECKOUT, HERE
from experiments.runs import NUM_TUNING_CAPTIONS, TUNING_CAPTIONS

DDPO = ("algorithm.clip_range=5e-3", "algorithm.min_count=8")
BALANCED = ("algorithm.step_weight=balanced",)
EVERY_STEP = ("selector.name=every_step",)
RATES = (3e-3, 1e-2)

FORWARD_S, UPDATE_S, RECORD_S, START_S = 0.0031, 0.0063, 0.016, 12.0
"""CPU seconds of a rollout's and of an update's row (an image's step), of a record of a set of preferences, and of a
process's start; about, to plan."""

Drawing = Callable[[Mapping[str, Sequence[Path]], Path], dict[str, Any]]


@dataclass(frozen=True)
class Arm:
    """One way to train.

    `changes` may name {fraction}, {length}, {start} and {end} of the interval that the arm `like` trained on that seed.
    """

    changes: tuple[str, ...]
    against: str | None = None
    """The arm that it is compared with."""
    like: str | None = None
    config: str = "scenes.toml"
    captions: str | None = None
    """A regular expression: captions of the train set that it trains on, and of the held-out set that judge it."""
    judged_by: str | None = None
    """Another for the held-out set."""
    preferences: tuple[str, ...] | None = None
    """Arguments of `adascope-fast make-preferences`, for what is trained on a set of them."""
    is_of_scenes: bool = False
    """Whether its thresholds or captions are the embedded models' own, so that it says nothing of another model."""

    def patterns(self) -> dict[str, str] | None:
        """The regular expression of each part; None: all captions."""
        if self.captions is None:
            return None
        return {"train": self.captions, "held_out": self.judged_by or self.captions}


@dataclass(frozen=True)
class Experiment:
    """A question of the paper, asked of the embedded models."""

    title: str
    paper: str
    """Where the paper asks it."""
    arms: dict[str, Arm]
    seeds: tuple[int, ...] = (0, 1, 2)
    common: tuple[str, ...] = ()
    """Changes of every arm."""
    tuning_captions: Path = CHECKOUT / TUNING_CAPTIONS
    rates: tuple[float, ...] = ()
    """Learning rates, of which each arm gets the best of a tuning of its own; without, all have the configuration's."""
    gain: float = 0.05
    """Gain of the held-out reward to which times are told."""
    drawing: Drawing | None = None
    """More than the table and the curves: gets the run folders of each arm and where a picture goes."""
    trains: bool = True
    """Whether rewards are compared; without, a run is there to be sensed, and `drawing` shows all of it."""
    evaluated: tuple[str, ...] = ()
    """Arms that `adascope-fast evaluate` compares with their base, on the first seed."""
    notes: tuple[str, ...] = field(default=())
    """What is to be known about the table."""

    def __post_init__(self) -> None:
        named = {name for arm in self.arms.values() for name in (arm.against, arm.like) if name} | set(self.evaluated)
        if missing := sorted(named - set(self.arms)):
            raise ValueError(f"arms are compared with arms of the same experiment, got {', '.join(missing)}; add them")
        if any(arm.captions and not arm.is_of_scenes for arm in self.arms.values()):
            raise ValueError("captions by a pattern are those of the embedded models; set is_of_scenes of such arms")
        if self.rates and any(arm.like or arm.captions for arm in self.arms.values()):
            raise ValueError("arms that are like another, or have captions of their own, are not tuned; remove rates")
        if not self.trains and self.drawing is None:
            raise ValueError("an experiment that trains nothing is shown by its drawing alone, got none; give it one")


QUICK = (
    "sampler.num_steps=6", "train.iterations=2", "train.checkpoint_every=1", "train.prompts_per_iteration=1",
    "train.samples_per_prompt=4", "evaluation.num_prompts=2", "evaluation.samples_per_prompt=2", "evaluation.every=1",
)  # fmt: skip


def on(experiment: Experiment, config: Path, thresholds: tuple[float, float], tuning: Path | None) -> Experiment:
    """The same experiment with a configuration of your own: its model, prompts, reward and sizes.

    Args:
        config: takes the place of the embedded model's.
        thresholds: kappa and phi_end that suit it, as `adascope-fast calibrate` proposes; ranges of steps keep their
            share of the steps.
        tuning: captions that rates are tuned on, neither trained on nor held out.

    Raises:
        ValueError: nothing is left without the arms that are of the embedded models, or there is nothing to tune on.
    """
    kept = {name: arm for name, arm in experiment.arms.items() if not arm.is_of_scenes}
    if not kept:
        raise ValueError("its arms have captions or thresholds of the embedded models alone; choose another experiment")
    if experiment.rates and tuning is None:
        raise ValueError("its learning rates are tuned, on captions of their own; name a file of them with --tuning")
    own = dict(zip(ADASCOPE[1:], (f"selector.{k}={v:g}" for k, v in zip(KEYS, thresholds, strict=True)), strict=True))
    steps = Config.load(config).sampler.num_steps

    def changed(name: str, arm: Arm) -> Arm:
        changes = [own.get(change, change) for change in arm.changes]
        return replace(arm, config=str(config.resolve()), changes=(*changes, *scaled(experiment, name, steps)))

    arms = {name: changed(name, arm) for name, arm in kept.items()}
    evaluated = tuple(name for name in experiment.evaluated if name in arms)
    return replace(experiment, arms=arms, evaluated=evaluated, tuning_captions=tuning or experiment.tuning_captions)


KEYS = ("kappa", "phi_end")


def scaled(experiment: Experiment, name: str, steps: int) -> list[str]:
    """The range of steps that an arm names, as large a share of another number of steps."""
    named = [change.partition("=") for change in experiment.arms[name].changes]
    ranges = {key: value for key, _, value in named if key in ("selector.start", "selector.end") and "{" not in value}
    return [f"{key}={round(int(value) * steps / steps_of(experiment, name))}" for key, value in ranges.items()]


def settings_of(
    experiment: Experiment,
    name: str,
    seed: int,
    work: Path,
    interval: Mapping[str, Any] | None = None,
    *,
    changes: Sequence[str] = (),
) -> tuple[Path, Path, list[str]]:
    """(run folder, configuration, changes of it); arms of whatever experiment with the same ones share a run.

    Args:
        interval: what `like` trained, for the names in braces.
        changes: more of them: the rate that was tuned, and what makes it smaller.
    """
    arm = experiment.arms[name]
    config = HERE / arm.config
    settings = [
        *experiment.common,
        *(change.format(**(interval or {})) for change in arm.changes),
        f"run.seed={seed}",
        *changes,
    ]
    for part, pattern in (arm.patterns() or {}).items():
        settings.append(f"prompts.{part}={captions_file(work, part, pattern)}")
    if arm.preferences is not None:
        settings.append(f"algorithm.preferences={preferences_folder(work, arm, changes)}")
    folder = work / f"{seed}-{short(Config.load(config, settings).to_toml())}"
    return folder, config, [f"run.folder={folder}", *settings]


def captions_file(work: Path, part: str, pattern: str) -> Path:
    """Where the captions of a part lie that match."""
    return work / f"captions-{part}-{short(pattern)}.txt"


def preferences_folder(work: Path, arm: Arm, changes: Sequence[str]) -> Path:
    """Where the preferences lie that an arm is trained on; others where `changes` make it small."""
    kind = short(f"{arm.config} {arm.preferences} {QUICK[0] in changes}")
    return work / f"preferences-{kind}"


def tuning_changes(experiment: Experiment, name: str, rate: float, changes: Sequence[str]) -> list[str]:
    """What makes a run of an arm one of its tuning: half as long, judged on captions that are not reported."""
    iterations = config_of(experiment, name, changes).train.iterations
    chosen = [f"train.learning_rate={rate:g}", f"train.iterations={max(1, iterations // 2)}", "evaluation.every=0"]
    chosen += [f"prompts.held_out={relative(experiment.tuning_captions)}"]
    return [*changes, *chosen, *([] if changes else [f"evaluation.num_prompts={NUM_TUNING_CAPTIONS}"])]


def short(text: str) -> str:
    """Ten letters that stand for a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def config_of(experiment: Experiment, name: str, changes: Sequence[str] = ()) -> Config:
    """What an arm has of `sampler`, `train` and `evaluation`."""
    arm, sections = experiment.arms[name], ("sampler.", "train.", "evaluation.")
    if arm.preferences is None:  # else it needs the set, which is not made yet
        sections = (*sections, "algorithm.")
    known = [one for one in (*experiment.common, *arm.changes, *changes) if one.startswith(sections)]
    return Config.load(HERE / arm.config, known)


def steps_of(experiment: Experiment, name: str) -> int:
    """Denoising steps of an arm."""
    return config_of(experiment, name).sampler.num_steps


def cpu_seconds(experiment: Experiment) -> float:
    """About what all of it takes, evaluations counted."""
    total = 0.0
    for name, arm in experiment.arms.items():
        config = config_of(experiment, name)
        train, evaluation, steps = config.train, config.evaluation, config.sampler.num_steps
        rows = 1 if config.sampler.guidance_scale == 1 else 2
        images = train.iterations * train.prompts_per_iteration * train.samples_per_prompt * steps * rows
        share = 1.0 if "selector.name=every_step" in arm.changes else 0.6
        looks = 2 + (train.iterations // evaluation.every - 1 if evaluation.every else 0)
        judged = looks * evaluation.num_prompts * evaluation.samples_per_prompt * steps * rows
        total += START_S + judged * FORWARD_S
        if arm.preferences is None:
            total += images * (FORWARD_S + share * UPDATE_S)
        else:
            total += train.iterations * train.prompts_per_iteration * RECORD_S
    runs = len(experiment.seeds) + len(experiment.rates) / 2
    return total * runs + 60.0 * len(experiment.evaluated)


def interval_of(folder: Path) -> dict[str, Any]:
    """Mean interval that a finished run trained, for arms that are `like` it."""
    stats = [json.loads(line) for line in (folder / "stats.jsonl").read_text().splitlines()]
    chosen = [record["selector"] for record in stats]
    steps = int(Config.load(folder / "config.toml").sampler.num_steps)
    fraction = sum(one["fraction"] for one in chosen) / len(chosen)
    length = max(1, round(fraction * steps))
    start = round(sum(one["mean_start"] for one in chosen) / len(chosen))
    start = min(start, steps - length)
    return {"fraction": f"{fraction:.4f}", "length": length, "start": start, "end": start + length}


def relative(path: Path) -> str:
    """A path as commands have it."""
    return str(path.relative_to(CHECKOUT)) if path.is_relative_to(CHECKOUT) else str(path)

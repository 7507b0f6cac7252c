"""Where AdaScope would train, before anything is trained: the curves of one rollout, and thresholds for an interval.

Axes: `b` samples, `t` denoising steps, noisiest first; states 0..t, t the image. Values of a prompt are means over its
pictures; what is shown is the mean over prompts, with the standard deviation between prompts as the band.

The paper's Figure 1 for a model and a reward of one's own: the reward and the structure of the decoded guesses, and the
uncertainty of each step, measured (1 - correlation of the latents around it) and by Theorem 2.
"""

import random
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import Tensor

from adascope_fast import rewards
from adascope_fast.adascope.interval_rule import finite_mean, host
from adascope_fast.adascope.selector import AdaScope
from adascope_fast.adascope.sensing import Curves, DecodedSensor
from adascope_fast.adascope.settings import KNEES, PAPER, SATURATION, Latent, RewardOnly
from adascope_fast.adascope.settings import AdaScope as AdaScopeSettings
from adascope_fast.config import Config, ConfigError
from adascope_fast.rollout import EncodedPrompts, OwnNoise, SharedStart, Trajectory, rollout
from adascope_fast.theory import ideal_chain, measured_correlation, schedule_correlation
from adascope_fast.training.building import selector_of, sensor_of
from adascope_fast.training.monitoring.progress import Progress
from adascope_fast.training.trainer import Trainer

KAPPAS = np.geomspace(0.01, 2.0, 54)
PHIS = np.geomspace(0.001, 0.7, 66)
NUM_SPLITS = 4
"""How often the prompts are halved to see how sure the thresholds are."""


@dataclass(frozen=True)
class Decision:
    """What a pair of thresholds decides on the rollout: the interval over prompts, and the reasons counted."""

    kappa: float
    phi_end: float
    mean_start: float
    mean_end: float
    std_start: float
    std_end: float
    fraction: float
    reasons: dict[str, int]
    intervals: list[list[int]]


@dataclass(frozen=True)
class Halves:
    """How sure proposed thresholds are: those of random halves of the prompts, and what they do on the other half.

    The thresholds as (lowest, highest) over the halves; the misses as means of the distance, in steps, between the aim
    and the mean start and end of the half that the thresholds were not chosen on.
    """

    num: int
    kappa: tuple[float, float]
    phi_end: tuple[float, float]
    miss_start: float
    miss_end: float


@dataclass(frozen=True)
class Calibration:
    """Curves of a rollout that nothing was trained on, the interval as configured, and thresholds for `target`.

    `theory` is Theorem 2's uncertainty of each step, `sampler` that of this very sampler with the ideal denoiser, both
    for data of variance 1. A curve is {"mean": [...], "std": [...]} over prompts, at the states (t + 1 values) or the
    steps (t); None where it is not finite.
    """

    num_steps: int
    num_prompts: int
    samples_per_prompt: int
    reward: str
    model: str
    seed: int
    structure: str
    preference: str
    curves: dict[str, dict[str, list[float | None]]]
    theory: list[float]
    sampler: list[float]
    configured: Decision
    proposed: Decision
    target: tuple[float, float]
    """(start, end) that the proposed thresholds aim at, as shares of the steps."""
    aim: str
    """Where the end of the target comes from."""
    halves: Halves | None
    """None with a single prompt."""
    seconds: float

    def values(self) -> dict[str, Any]:
        """All of it, as JSON."""
        return asdict(self)

    def text(self) -> str:
        """Lines for people."""
        one, other = self.configured, self.proposed
        lines = [
            f"{self.num_prompts} prompts x {self.samples_per_prompt} pictures, {self.num_steps} steps, "
            f"run.seed = {self.seed}, {self.seconds:.1f} s; intervals as mean over prompts +- standard deviation",
            f"as configured   {_line(one)}",
            f"for steps {self.target[0] * self.num_steps:.1f} to {self.target[1] * self.num_steps:.1f} of "
            f"{self.num_steps}: selector.kappa={other.kappa:.3g} selector.phi_end={other.phi_end:.3g}",
            f"  they end      {self.aim}",
            f"  they give     {_line(other)}",
            *([_sureness(self.halves)] if self.halves is not None else []),
        ]
        return "\n".join(lines)


def calibrate(
    config: Config,
    *,
    num_prompts: int,
    start: float = PAPER[0],
    end: float | None = None,
    saturation: float | None = None,
    stride: int = 1,
    trainer: Callable[[Config], Trainer] = Trainer,
    progress: Progress | None = None,
) -> Calibration:
    """Sample `num_prompts` prompts as an iteration of `config` would, and look at them with AdaScope.

    Args:
        num_prompts: each with `train.samples_per_prompt` pictures.
        start: of the mean interval that the proposed thresholds aim at, as a share of the steps.
        end: the same; None: where the reward saturates.
        saturation: the share of the reward's gain since the start that is still to come at that end; None: 0.2, or the
            paper's end where the reward of the guesses does not rise.
        stride: states between two that are decoded and given to the reward.
        trainer: makes the trainer, for a reward or prompts of your own.
        progress: what tells how far it is; None: it is quiet.
    """
    started, progress = time.perf_counter(), progress or Progress(quiet=True)
    if config.sampler.num_steps < 4:
        raise ConfigError(
            f"a rollout of {config.sampler.num_steps} steps is trained whole, there is nothing to calibrate; "
            f"set sampler.num_steps to 4 or more"
        )
    selector, sensing = _looking(config)
    train = config.train.model_copy(update={"prompts_per_iteration": num_prompts, "update": "replay"})
    sampler = config.sampler.model_copy(update={"tail_share": 1.0})
    sections = {"selector": selector, "sensing": sensing, "train": train, "sampler": sampler}
    made = trainer(config.model_copy(update=sections))
    if num_prompts > len(set(made.train_prompts)):
        raise ConfigError(
            f"a calibration looks at different prompts, got {num_prompts} of {len(set(made.train_prompts))}; "
            f"ask for fewer, or add some to prompts.train"
        )
    made.prepare()
    adascope = selector_of(made.config, sensor_of(made.config, made.backbone, made.reward))  # keeps nothing on disk
    assert isinstance(adascope, AdaScope)
    prompts = made.prompts_of(0)
    with progress.stage("sampling", len(prompts) * sampler.num_steps) as on_step:
        trajectory = _sample(made, prompts, on_step)
    with progress.stage("sensing"):
        seen = Seen.by(adascope, trajectory)
    states = len(range(0, trajectory.num_steps, stride)) + 1
    with progress.stage("judging unfinished images", len(prompts) * states, "image") as on_images:

        def score(images: Tensor, texts: list[str]) -> Tensor:
            scores = rewards.score_guesses(made.reward, images, texts)
            on_images(len(images))
            return scores

        judged = DecodedSensor(made.backbone.decode, score, stride=stride)(trajectory)
    curves = _curves(trajectory, seen.curves, judged)
    end, aim = _end(curves["reward"]["mean"], start, end, saturation)
    target = start, end
    is_decoded = isinstance(sensing, RewardOnly)  # semantic sensing too
    configured = _decide(adascope, seen, adascope.kappa, adascope.phi_end)
    with progress.stage("looking for thresholds", len(KAPPAS) + len(PHIS)) as on_step:
        proposed = _proposed(adascope, seen, target, on_step)
    return Calibration(
        num_steps=trajectory.num_steps,
        num_prompts=num_prompts,
        samples_per_prompt=len(prompts) // num_prompts,
        reward=config.reward.name,
        model=config.model.name,
        seed=config.run.seed,
        structure="similarity of text and picture" if seen.curves.volatility is None else "1 - correlation of guesses",
        preference=f"{config.reward.name} of the decoded guess" if is_decoded else "correlation with the final latent",
        curves=curves,
        theory=(1 - schedule_correlation(trajectory.schedule)).tolist(),
        sampler=(1 - ideal_chain(trajectory.schedule, 1.0).correlation).tolist(),
        configured=configured,
        proposed=proposed,
        target=target,
        aim=aim,
        halves=_halves(adascope, seen, target, config.run.seed),
        seconds=time.perf_counter() - started,
    )


def _end(
    reward: Sequence[float | None], start: float, end: float | None, saturation: float | None
) -> tuple[float, str]:
    """(the end to aim at, as a share of the steps; where it comes from)."""
    if end is not None:
        return end, "where they were asked to"
    left = SATURATION if saturation is None else saturation
    try:
        place = _saturated(reward, start, left)
    except ConfigError as error:
        if saturation is not None:
            raise
        return max(PAPER[1], start), f"where the paper's do; {error}"
    return place, f"where {left:.0%} of the gain in the reward of the guesses is still to come"


def _saturated(reward: Sequence[float | None], start: float, left: float) -> float:
    """The share of the steps after which `left` of the mean reward's gain since `start` is still to come.

    Straight between states; the first place from which on no more than that is left. At least one step is trained.

    Raises:
        ConfigError: the reward of the guesses does not rise.
    """
    values = np.array(reward, dtype=np.float64)
    t = len(values) - 1
    low = float(np.interp(start * t, np.arange(t + 1), values))
    gain = values[-1] - low
    if not gain > 0:
        raise ConfigError(
            f"the reward of the guesses saturates nowhere, it went from {low:.4g} at step {start * t:.1f} to "
            f"{values[-1]:.4g} at the last; give --end, or another --start"
        )
    remaining = (values[-1] - values) / gain
    last = int(np.flatnonzero(remaining > left)[-1])  # all of it is left at the start, nothing at the last state
    place = last + (remaining[last] - left) / (remaining[last] - remaining[last + 1])
    return min(max(place, start * t + 1), t) / t


def _looking(config: Config) -> tuple[AdaScopeSettings, Latent | RewardOnly]:
    """AdaScope and what it senses, as configured; the defaults where another selector is. This rollout decides."""
    if not isinstance(config.selector, AdaScopeSettings):
        return AdaScopeSettings(), Latent()
    if config.selector.rule not in KNEES:
        raise ConfigError(
            "a calibration proposes selector.kappa and selector.phi_end, which have a meaning with selector.rule = "
            f'"knee" or "knee_causal", got "{config.selector.rule}"; set selector.rule = "knee"'
        )
    keys: dict[str, Any] = config.selector.keys() | {"mask_source": "current"}
    shared = {name: value for name, value in keys.items() if name in AdaScopeSettings.model_fields}
    return AdaScopeSettings(**shared), config.sensing or Latent()


def _sample(made: Trainer, prompts: list[str], on_step: Callable[[int], None]) -> Trajectory:
    schedule = made.algorithm.schedule(made.schedule)
    with made.accelerator.autocast():
        return rollout(
            made.backbone,
            schedule,
            EncodedPrompts.of(made.backbone, prompts),
            prompts,
            guidance_scale=made.config.sampler.guidance_scale,
            noise=OwnNoise(made.config.run.seed),
            batch=made.config.train.rollout_batch,
            shared=SharedStart.of(prompts, schedule) if made.algorithm.shares_noise else None,
            on_step=on_step,
        )


@dataclass(frozen=True)
class Seen:
    """What a rollout showed AdaScope: the curves of its samples, and of its steps what a decision needs."""

    curves: Curves
    prompts: list[str]
    num_steps: int
    log_snr: Any
    trainable: Any

    @classmethod
    def by(cls, adascope: AdaScope, trajectory: Trajectory) -> "Seen":
        """A trajectory as the selector's own sensor sees it."""
        schedule = trajectory.schedule
        curves = adascope.sensor(trajectory)
        return cls(curves, trajectory.prompts, trajectory.num_steps, schedule.log_snr, schedule.trainable)

    def of(self, prompts: Collection[str]) -> "Seen":
        """The part of some prompts."""
        rows = [row for row, prompt in enumerate(self.prompts) if prompt in prompts]
        parts = {name: part[rows] for name, part in self.curves._asdict().items() if part is not None}
        return Seen(Curves(**parts), [self.prompts[row] for row in rows], self.num_steps, self.log_snr, self.trainable)


def _curves(trajectory: Trajectory, sensed: Curves, judged: Curves) -> dict[str, dict[str, list[float | None]]]:
    structure = sensed.structure.diff(dim=1) if sensed.structure is not None else sensed.volatility
    assert structure is not None
    parts = {"structure": structure, "preference": sensed.preference, "reward": judged.preference}
    rows: dict[str, list[int]] = {}
    for row, prompt in enumerate(trajectory.prompts):
        rows.setdefault(prompt, []).append(row)
    shown = {
        name: np.stack([finite_mean(host(values)[own]) for own in rows.values()]) for name, values in parts.items()
    }
    shown["uncertainty"] = np.stack([1 - host(measured_correlation(trajectory.latents[own])) for own in rows.values()])
    return {name: _summary(values) for name, values in shown.items()}


def _summary(prompts: np.ndarray) -> dict[str, list[float | None]]:
    finite = prompts[np.isfinite(prompts).all(1)]
    if not len(finite):
        nothing: list[float | None] = [None] * prompts.shape[1]
        return {"mean": nothing, "std": nothing}
    return {"mean": finite.mean(0).tolist(), "std": finite.std(0).tolist()}


def _decide(adascope: AdaScope, seen: Seen, kappa: float, phi: float) -> Decision:
    fresh = adascope.fresh(kappa=float(kappa), phi_end=float(phi))
    given: dict[str, Any] = {"log_snr": seen.log_snr, "trainable": seen.trainable}
    if fresh.rule == "knee_causal":
        fresh.decide(seen.curves, seen.prompts, **given)  # the scale of the curves is known from then on
    fresh.decide(seen.curves, seen.prompts, **given)
    told = fresh.telemetry()
    starts, ends = np.array(told["intervals"]).T
    return Decision(
        kappa=float(kappa),
        phi_end=float(phi),
        mean_start=float(starts.mean()),
        mean_end=float(ends.mean()),
        std_start=float(starts.std()),
        std_end=float(ends.std()),
        fraction=told["fraction"],
        reasons=told["reasons"],
        intervals=told["intervals"],
    )


def _proposed(
    adascope: AdaScope,
    seen: Seen,
    target: tuple[float, float],
    on_step: Callable[[int], None] = lambda count: None,
) -> Decision:
    """The thresholds whose mean interval comes nearest: first kappa, which alone moves the start, then phi.

    A fallback looks at no threshold and lies near the paper's interval, so it costs as much as missing by all steps.
    """
    t = seen.num_steps

    def decided(kappa: float, phi: float) -> Decision:
        decision = _decide(adascope, seen, kappa, phi)
        on_step(1)
        return decision

    starts = [decided(kappa, adascope.phi_end) for kappa in KAPPAS]
    kappa = min(starts, key=lambda one: abs(one.mean_start - target[0] * t) + t * _fallbacks(one)).kappa
    ends = [decided(kappa, phi) for phi in PHIS]
    return min(ends, key=lambda one: abs(one.mean_end - target[1] * t) + t * _fallbacks(one))


def _halves(adascope: AdaScope, seen: Seen, target: tuple[float, float], seed: int) -> Halves | None:
    """Thresholds of each half of random splits of the prompts, tried on the other half."""
    prompts, draw = list(dict.fromkeys(seen.prompts)), random.Random(seed)
    if len(prompts) < 2:
        return None
    chosen, tried = [], []
    for _ in range(NUM_SPLITS):
        first = set(draw.sample(prompts, len(prompts) // 2))
        parts = [seen.of(first), seen.of(set(prompts) - first)]
        for one, other in (parts, parts[::-1]):
            chosen.append(_proposed(adascope, one, target))
            tried.append(_decide(adascope, other, chosen[-1].kappa, chosen[-1].phi_end))
    kappas, phis = [one.kappa for one in chosen], [one.phi_end for one in chosen]
    start, end = (share * seen.num_steps for share in target)
    return Halves(
        num=len(chosen),
        kappa=(min(kappas), max(kappas)),
        phi_end=(min(phis), max(phis)),
        miss_start=float(np.mean([abs(one.mean_start - start) for one in tried])),
        miss_end=float(np.mean([abs(one.mean_end - end) for one in tried])),
    )


def _sureness(halves: Halves) -> str:
    kappa, phi_end = (f"{low:.3g} to {high:.3g}" for low, high in (halves.kappa, halves.phi_end))
    return (
        f"  how sure      on {halves.num} random halves of the prompts kappa was {kappa}, phi_end {phi_end}; "
        f"on the other half they missed the aim by {halves.miss_start:.1f} and {halves.miss_end:.1f} steps"
    )


def _fallbacks(decision: Decision) -> float:
    """Share of the decisions that fell back."""
    fell = sum(count for reason, count in decision.reasons.items() if reason.startswith("fallback"))
    return fell / len(decision.intervals)


def _line(decision: Decision) -> str:
    counted = ", ".join(f"{reason} {count}" for reason, count in sorted(decision.reasons.items()))
    return (
        f"[{decision.mean_start:.1f} +- {decision.std_start:.1f}, {decision.mean_end:.1f} +- {decision.std_end:.1f}), "
        f"{decision.fraction:.0%} of the steps; {counted}"
    )

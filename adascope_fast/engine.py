"""One iteration of reinforcement learning: rollout, reward, advantage, selection, step-sparse update.

Skipped steps cost no forward and no backward: the chosen (sample, step) pairs are packed into dense microbatches, each
row with its own timestep. `b` samples, `t` steps, `n` chosen pairs.

How it differs from ddpo-pytorch and TRL: the loss is divided by the number of pairs of an update, so the microbatch
cannot matter; the number of optimiser updates is fixed, so a selector changes the cost and not the schedule; the first
update of an iteration takes its own log-probability as the old one (no parameter has moved, so the ratio is 1 exactly).
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Float32
from torch import Tensor, nn

from adascope_fast import ops
from adascope_fast.algorithms import Algorithm
from adascope_fast.backbones.protocol import Backbone
from adascope_fast.rollout import EncodedPrompts, predict, rollout
from adascope_fast.schedules import Schedule
from adascope_fast.timesteps import TimestepSelector
from adascope_fast.trajectory import StepBatch, Trajectory

Score = Callable[[Tensor, list[str]], Float32[Tensor, " b"]]


@dataclass(frozen=True)
class Settings:
    """How an iteration is carried out. Batches change memory and speed, never the result beyond rounding."""

    guidance_scale: float
    rollout_batch: int
    microbatch: int
    updates_per_iteration: int
    max_grad_norm: float


@dataclass
class Report:
    """What one iteration did, in the words of the field; `seconds` by part."""

    values: dict[str, Any]
    seconds: dict[str, float] = field(default_factory=dict)


class Engine:
    """Trains `backbone` on `score` with `algorithm`, at the steps that `selector` keeps.

    Args:
        backward: how a loss is differentiated; accelerate's `backward` for mixed precision.
        autocast: context in which the denoiser runs.
        progress: called with (part, done, total) as an iteration advances.
    """

    def __init__(
        self,
        backbone: Backbone,
        schedule: Schedule,
        algorithm: Algorithm,
        selector: TimestepSelector,
        score: Score,
        optimizer: torch.optim.Optimizer,
        settings: Settings,
        *,
        backward: Callable[[Tensor], None] = torch.Tensor.backward,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        progress: Callable[[str, int, int], None] = lambda part, done, total: None,
    ) -> None:
        self.backbone, self.schedule, self.algorithm = backbone, schedule, algorithm
        self.selector, self.score, self.optimizer, self.settings = selector, score, optimizer, settings
        self._backward, self._autocast, self._progress = backward, autocast, progress
        self._parameters = backbone.trainable_parameters()
        self._seconds: dict[str, float] = {}

    def step(self, encoded: EncodedPrompts, prompts: list[str], *, iteration: int, seed: int) -> Report:
        """One iteration on `prompts`, one picture each (repeat one for a group). `seed` fixes all its randomness."""
        self._seconds = {}
        generator = torch.Generator(self.schedule.coef.device).manual_seed(seed)
        with self._part("rollout"):
            trajectory = self._rollout(encoded, prompts, generator)
        with self._part("reward"):
            images = self.backbone.decode(trajectory.latents[:, -1])
            rewards = self.score(images, prompts)
            advantages = self.algorithm.advantage(rewards, prompts, trajectory.num_steps)
            if self.algorithm.step_weight is not None:
                advantages = advantages * self.algorithm.step_weight(self.schedule)
        with self._part("sensing"):
            keep = self.selector(trajectory, iteration)
        with self._part("update"):
            values = self.update(encoded, trajectory, keep, advantages, generator)
        values |= {
            "reward_mean": rewards.mean().item(),
            "reward_std": rewards.std(correction=0).item(),
            "fraction_trained": values["pairs_trained"] / keep.numel(),
            "selector": self.selector.telemetry(),
        }
        return Report(values, dict(self._seconds))

    def _rollout(self, encoded: EncodedPrompts, prompts: list[str], generator: torch.Generator) -> Trajectory:
        total, done = len(prompts) * self.schedule.num_steps, 0

        def on_step(num_samples: int) -> None:
            nonlocal done
            done += num_samples
            self._progress("rollout", done, total)

        with self._autocast():
            return rollout(
                self.backbone,
                self.schedule,
                encoded,
                prompts,
                guidance_scale=self.settings.guidance_scale,
                generator=generator,
                batch=self.settings.rollout_batch,
                on_step=on_step,
            )

    def update(
        self,
        encoded: EncodedPrompts,
        trajectory: Trajectory,
        keep: Bool[Tensor, "b t"],
        advantages: Float[Tensor, "b t"],
        generator: torch.Generator,
    ) -> dict[str, Any]:
        """The iteration's optimiser updates on the kept pairs, in an order drawn from `generator`; their statistics."""
        num_updates = self.settings.updates_per_iteration
        pairs = trajectory.pairs(keep)
        if len(pairs) < num_updates:
            raise ValueError(
                f"each of the {num_updates} updates needs a (picture, step) pair, the selector kept {len(pairs)}; "
                f"lower train.updates_per_iteration or keep more steps"
            )
        order = torch.randperm(len(pairs), generator=generator, device=pairs.device)
        sums = torch.zeros(5, device=pairs.device)
        deviation = torch.zeros((), device=pairs.device)
        norms, num_skipped, done = [], 0, 0
        for number, chosen in enumerate(pairs[order].tensor_split(num_updates)):
            # The first update comes before any parameter moved, so log_prob is old_log_prob.
            for part in chosen.split(self.settings.microbatch):
                micro = trajectory.gather(part)
                statistics, drift = self._accumulate(
                    encoded, micro, advantages[part[:, 0], part[:, 1]], len(chosen), on_policy=number == 0
                )
                sums += statistics
                deviation = torch.maximum(deviation, drift)
                done += len(part)
                self._progress("update", done, len(pairs))
            norm = nn.utils.clip_grad_norm_(self._parameters, self.settings.max_grad_norm).item()
            if norm == norm and norm != float("inf"):
                self.optimizer.step()
                norms.append(norm)
            else:
                num_skipped += 1
            self.optimizer.zero_grad(set_to_none=True)
        loss, approx_kl, clipfrac, rollout_drift, nonfinite = (sums / len(pairs)).tolist()
        return {
            "loss": loss,
            "approx_kl": approx_kl,
            "clipfrac": clipfrac,
            "rollout_drift": rollout_drift,
            "nonfinite": round(nonfinite * len(pairs)),
            "ratio_max_deviation": deviation.item(),
            "grad_norm": sum(norms) / len(norms) if norms else float("nan"),
            "updates_skipped": num_skipped,
            "pairs_trained": len(pairs),
        }

    def _accumulate(
        self, encoded: EncodedPrompts, micro: StepBatch, advantage: Tensor, divisor: int, *, on_policy: bool
    ) -> tuple[Float32[Tensor, "5"], Float32[Tensor, ""]]:
        """Add a microbatch's gradient; sums of (loss, approx_kl, clipfrac, drift, nonfinite), max |ratio - 1|."""
        log_prob = self.log_prob(encoded, micro)
        old_log_prob = log_prob.detach() if on_policy else micro.old_log_prob
        loss, ratio = self.algorithm.objective(log_prob, old_log_prob, advantage)
        self._backward(loss.sum() / divisor)
        with torch.no_grad():
            off = (ratio - 1).abs()
            high = self.algorithm.clip_range_high or self.algorithm.clip_range
            clipped = (ratio < 1 - self.algorithm.clip_range) | (ratio > 1 + high)
            statistics = torch.stack(
                [
                    loss.detach().sum(),
                    0.5 * (log_prob - old_log_prob).square().sum(),
                    clipped.float().sum(),
                    (log_prob - micro.old_log_prob).abs().sum(),
                    (~loss.isfinite()).float().sum(),
                ]
            )
            return statistics, off.max()

    def log_prob(self, encoded: EncodedPrompts, micro: StepBatch) -> Float32[Tensor, " n"]:
        """Log-probability of the pairs under the policy as it is now, differentiable in its parameters."""
        scale = self.settings.guidance_scale
        with self._autocast():
            output, without = predict(self.backbone, encoded, micro.sample, micro.timestep, micro.prompt_index, scale)
        return ops.guided_transition_log_prob(micro.sample, output, without, scale, micro.prev_sample, micro.coef)

    @contextmanager
    def _part(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.schedule.coef.is_cuda:
            torch.cuda.synchronize()
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

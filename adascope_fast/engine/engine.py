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
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor, nn

from adascope_fast import ops
from adascope_fast.algorithms.attribution import similarity_gains
from adascope_fast.algorithms.policy_gradient import Algorithm
from adascope_fast.backbone import Backbone
from adascope_fast.backbones.folding import Folding
from adascope_fast.engine.acceleration import halving
from adascope_fast.engine.one_pass import OnePass
from adascope_fast.engine.per_sample import PerSampleGradients
from adascope_fast.engine.scoring import Score, Scoring
from adascope_fast.engine.statistics import UpdateStatistics, as_json
from adascope_fast.rollout import Denoising, EncodedPrompts, StepBatch, Trajectory, predict, rollout
from adascope_fast.schedules import Schedule
from adascope_fast.schedules.tail import Tails
from adascope_fast.selectors.protocol import TimestepSelector
from adascope_fast.theory import measured_uncertainty

ROWS_THAT_PAY = 64
"""Rows of a training forward up to which more of them are cheaper each (a quarter on a CPU, from 16 to 64)."""


@dataclass(frozen=True)
class Settings:
    """How an iteration is carried out. Batches change memory and speed, never the result beyond rounding.

    `microbatch` None is the rollout's batch, or what makes 64 rows of a forward if that is more; both batches are
    halved where memory runs out. `update` "one_pass" saves the replay's forward pass, see `engine.one_pass`;
    `fold_adapter` adds LoRA to float32 base weights while nothing is differentiated. `tail_share` below 1 replaces the
    steps after a sample's last trained one by that share of them, of a second-order ODE solver; they have to be known
    beforehand, and a rollout that the selector looks at is sampled in full.
    """

    guidance_scale: float
    rollout_batch: int
    microbatch: int | None = None
    updates_per_iteration: int = 1
    max_grad_norm: float = 1.0
    update: Literal["replay", "one_pass"] = "replay"
    fold_adapter: bool = False
    tail_share: float = 1.0

    def check(self, algorithm: Algorithm) -> None:
        """ValueError where `algorithm` cannot be carried out like this."""
        if self.update == "one_pass" and (self.updates_per_iteration != 1 or algorithm.kl_weight):
            raise ValueError(
                "one_pass makes one update an iteration, without KL, got "
                f"{self.updates_per_iteration} updates and kl_weight = {algorithm.kl_weight}; use update = 'replay'"
            )
        is_early = self.update == "one_pass" or self.tail_share < 1
        if is_early and not algorithm.attribution.is_known_ahead:
            raise ValueError(
                "one_pass and a tail_share below 1 need the weights before the rollout, and "
                f"{algorithm.attribution.weights!r} is known after it; use weights 'uniform' or 'discount', or "
                f"update = 'replay' and tail_share = 1"
            )


@dataclass
class Report:
    """What one iteration did, in the words of the field; `seconds` by part."""

    values: dict[str, Any]
    seconds: dict[str, float] = field(default_factory=dict)


class Engine:
    """Trains `backbone` on `score` with `algorithm`, at the steps that `selector` keeps.

    Args:
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
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        progress: Callable[[str, int, int], None] = lambda part, done, total: None,
    ) -> None:
        settings.check(algorithm)
        self.backbone, self.schedule, self.algorithm = backbone, schedule, algorithm
        self.selector, self.score, self.optimizer, self.settings = selector, score, optimizer, settings
        self.rollout_batch = settings.rollout_batch
        self.microbatch = settings.microbatch or usual_microbatch(settings.rollout_batch, settings.guidance_scale)
        self._autocast, self._progress = autocast, progress
        self._parameters = backbone.trainable_parameters()
        self._seconds: dict[str, float] = {}

    def step(self, encoded: EncodedPrompts, prompts: list[str], *, iteration: int, seed: int) -> Report:
        """One iteration on `prompts`, one picture each (repeat one for a group). `seed` fixes all its randomness."""
        self._seconds = {}
        is_one_pass = self.settings.update == "one_pass"
        schedule = self.selector.sampler(self.schedule, iteration)
        generator = torch.Generator(self.schedule.coef.device).manual_seed(seed)
        with self._part("sensing"):
            saves = self.settings.tail_share < 1 and not self.selector.senses(iteration)
            keep = self._ahead(prompts, schedule, iteration) if is_one_pass or saves else None
            tails = Tails.of(schedule, keep, self.settings.tail_share) if saves and keep is not None else None
        with Scoring(self.backbone, self.score, prompts) as scoring:
            with self._part("rollout"):
                trajectory, gradients = self._rollout(
                    encoded, prompts, schedule, generator, scoring, keep=keep if is_one_pass else None, tails=tails
                )
            with self._part("reward"):
                rewards = scoring.rewards()
                advantages = self.algorithm.advantage(rewards, prompts, trajectory.num_steps)
        with self._part("sensing"):
            chosen = self.selector(trajectory, iteration)
            if keep is None:
                keep = self.algorithm.attribution.steps(chosen, schedule.trainable)
            keep = keep.to(chosen.device)
            pairs, weights = trajectory.pairs(keep), self._weights(keep, schedule, trajectory).to(advantages.device)
            uncertainty = measured_uncertainty(trajectory)
        with self._part("update"):
            if gradients is None:
                statistics = self._replay(encoded, trajectory, pairs, advantages * weights, generator)
            else:
                statistics = self._apply(gradients, advantages, pairs, weights)
            values = statistics.read(len(pairs))
        values |= {
            "reward_mean": rewards.mean().item(),
            "reward_std": rewards.std(correction=0).item(),
            "fraction_trained": len(pairs) / chosen.numel(),
            "forwards_sampled": trajectory.log_prob.numel() if tails is None else tails.num_forwards,
            "microbatch": self.microbatch,
            "selector": self.selector.telemetry(),
            "steps": {"uncertainty": as_json(uncertainty)} | statistics.by_step(),
        }
        return Report(values, dict(self._seconds))

    def update(
        self,
        encoded: EncodedPrompts,
        trajectory: Trajectory,
        keep: Bool[Tensor, "b t"],
        advantages: Float[Tensor, "b t"],
        generator: torch.Generator,
    ) -> dict[str, Any]:
        """The iteration's optimiser updates on the kept pairs, in an order drawn from `generator`; their statistics."""
        pairs = trajectory.pairs(keep)
        return self._replay(encoded, trajectory, pairs, advantages, generator).read(len(pairs))

    def log_prob(self, encoded: EncodedPrompts, micro: StepBatch) -> Float32[Tensor, " n"]:
        """Log-probability of the pairs under the policy as it is now, differentiable in its parameters."""
        output, without = self._outputs(encoded, micro)
        scale = self.settings.guidance_scale
        return ops.guided_transition_log_prob(micro.sample, output, without, scale, micro.prev_sample, micro.coef)

    def _rollout(
        self,
        encoded: EncodedPrompts,
        prompts: list[str],
        schedule: Schedule,
        generator: torch.Generator,
        scoring: Scoring,
        *,
        keep: Bool[Tensor, "b t"] | None,
        tails: Tails | None,
    ) -> tuple[Trajectory, PerSampleGradients | None]:
        total = len(prompts) * schedule.num_steps if tails is None else tails.num_forwards
        start = generator.get_state()
        scale = self.settings.guidance_scale
        folding = Folding(self.backbone.denoiser) if self.settings.fold_adapter else None

        def attempt(batch: int) -> tuple[Trajectory, PerSampleGradients | None]:
            done, advance = 0, None
            generator.set_state(start)
            scoring.clear()
            if keep is not None:
                denoising = Denoising(self.backbone, schedule, encoded, scale)
                gradients = PerSampleGradients(self.backbone.denoiser, self._parameters, len(prompts))
                weights = self._weights(keep, schedule)
                advance = OnePass(denoising, keep.cpu(), weights, gradients, self.microbatch, folding)

            def on_step(num_samples: int) -> None:
                nonlocal done
                done += num_samples
                self._progress("rollout", done, total)

            with self._autocast(), folding or nullcontext():
                trajectory = rollout(
                    self.backbone,
                    schedule,
                    encoded,
                    prompts,
                    guidance_scale=scale,
                    generator=generator,
                    batch=batch,
                    advance=advance,
                    tails=tails,
                    on_step=on_step,
                    on_batch=scoring.submit,
                )
            return trajectory, None if advance is None else advance.gradients

        result, self.rollout_batch = halving(attempt, self.rollout_batch, "train.rollout_batch")
        return result

    def _replay(
        self,
        encoded: EncodedPrompts,
        trajectory: Trajectory,
        pairs: Int64[Tensor, "n 2"],
        advantages: Float[Tensor, "b t"],
        generator: torch.Generator,
    ) -> UpdateStatistics:
        """The updates; nothing in here waits for the device unless the optimiser cannot skip a step by itself."""
        num_updates = self.settings.updates_per_iteration
        if len(pairs) < num_updates:
            raise ValueError(
                f"each of the {num_updates} updates needs a (picture, step) pair, the selector kept {len(pairs)}; "
                f"lower train.updates_per_iteration or keep more steps"
            )
        order = torch.randperm(len(pairs), generator=generator, device=pairs.device)
        statistics, done = UpdateStatistics(trajectory.num_steps), 0
        for number, chosen in enumerate(pairs[order].tensor_split(num_updates)):
            before = done

            def attempt(microbatch: int, chosen: Tensor = chosen, before: int = before, number: int = number) -> list:
                nonlocal done
                self.optimizer.zero_grad(set_to_none=True)
                done, parts = before, []
                for part in chosen.tensor_split(-(-len(chosen) // microbatch)):  # of equal size, or one less
                    micro, advantage = trajectory.gather(part), advantages[part[:, 0], part[:, 1]]
                    # The first update comes before any parameter moved, so log_prob is old_log_prob.
                    parts.append(self._accumulate(encoded, micro, advantage, len(chosen), on_policy=number == 0))
                    done += len(part)
                    self._progress("update", done, len(pairs))
                return parts

            parts, self.microbatch = halving(attempt, self.microbatch, "train.microbatch")
            statistics.add(parts, self._optimizer_step())
        return statistics

    def _accumulate(
        self, encoded: EncodedPrompts, micro: StepBatch, advantage: Tensor, divisor: int, *, on_policy: bool
    ) -> dict[str, Float32[Tensor, " n"]]:
        """Add a microbatch's gradient; what it tells of each pair."""
        output, without = self._outputs(encoded, micro)
        outputs = [value for value in (output, without) if value is not None]
        loss, stats, *gradients = self.algorithm.training_step(
            micro.sample,
            output,
            micro.prev_sample,
            micro.coef,
            None if on_policy else micro.old_log_prob,
            advantage,
            output_uncond=without,
            guidance_scale=self.settings.guidance_scale,
            ref_output=self._reference(encoded, micro) if self.algorithm.kl_weight else None,
            scale=1 / divisor,
        )
        given = [gradient for gradient in gradients if gradient is not None]
        torch.autograd.backward(outputs, given)
        norms = torch.stack([torch.linalg.vector_norm(gradient.flatten(1).float(), dim=1) for gradient in given])
        return stats | {
            "loss": loss,
            "rollout_drift": (stats["log_prob"] - micro.old_log_prob).abs(),
            "step": micro.step_index,
            "output_gradient": norms.square().sum(0).sqrt() * divisor,
        }

    def _apply(
        self,
        gradients: PerSampleGradients,
        advantages: Float[Tensor, "b t"],
        pairs: Int64[Tensor, "n 2"],
        weights: Float[Tensor, "b t"],
    ) -> UpdateStatistics:
        """The one update of a one-pass iteration: each sample's gradient times the slope of its loss at ratio 1."""
        log_prob = torch.zeros(len(advantages), device=advantages.device, requires_grad=True)
        loss, _ = self.algorithm.objective(log_prob, log_prob.detach(), advantages[:, 0])
        (slope,) = torch.autograd.grad(loss.sum(), log_prob)
        for parameter, gradient in zip(self._parameters, gradients.weighted(slope), strict=True):
            parameter.grad = gradient / len(pairs)
        sample, step = pairs.unbind(1)
        losses = (loss.detach()[sample] * weights[sample, step]).float()
        statistics = UpdateStatistics(weights.shape[1])
        statistics.add([{"loss": losses, "step": step}], self._optimizer_step())
        return statistics

    def _optimizer_step(self) -> Float32[Tensor, ""]:
        """One update with the gradient cut to its largest norm, none if that norm is not finite; the norm."""
        norm = nn.utils.clip_grad_norm_(self._parameters, self.settings.max_grad_norm)
        if self.optimizer.defaults.get("fused"):  # skips by itself, on the device
            self.optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
            self.optimizer.step()
        elif norm.isfinite():
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm.float()

    def _ahead(self, prompts: list[str], schedule: Schedule, iteration: int) -> Bool[Tensor, "b t"]:
        keep = self.selector.ahead(prompts, schedule, iteration)
        if keep is None:
            raise ValueError(
                "one_pass and a tail_share below 1 need the steps before the rollout, and this selector decides after "
                "it; set selector.mask_source = 'previous', or train.update = 'replay' and sampler.tail_share = 1"
            )
        return self.algorithm.attribution.steps(keep, schedule.trainable)

    def _weights(
        self, keep: Bool[Tensor, "b t"], schedule: Schedule, trajectory: Trajectory | None = None
    ) -> Float32[Tensor, "b t"]:
        """What multiplies the advantages: the attribution, and the algorithm's weight of each step; on the device."""
        attribution, gains, make = self.algorithm.attribution, None, self.algorithm.step_weight
        if trajectory is not None and not attribution.is_known_ahead:
            gains = similarity_gains(trajectory) if attribution.weights == "similarity" else self.selector.gains()
        weights = attribution.credit(keep.to(schedule.coef.device), gains)
        return weights if make is None else weights * make(schedule)

    def _outputs(self, encoded: EncodedPrompts, micro: StepBatch) -> tuple[Tensor, Tensor | None]:
        scale = self.settings.guidance_scale
        with self._autocast():
            return predict(self.backbone, encoded, micro.sample, micro.timestep, micro.prompt_index, scale)

    @torch.no_grad()
    def _reference(self, encoded: EncodedPrompts, micro: StepBatch) -> Tensor:
        with self.backbone.reference_policy():
            return ops.guide(*self._outputs(encoded, micro), self.settings.guidance_scale)

    @contextmanager
    def _part(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.schedule.coef.is_cuda:
            torch.cuda.synchronize()
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start


def usual_microbatch(rollout_batch: int, guidance_scale: float) -> int:
    """Pairs of a training forward where none are asked for; guidance makes two rows of each."""
    return max(rollout_batch, ROWS_THAT_PAY // (1 if guidance_scale == 1 else 2))

"""What an algorithm's `collect` is given: rollouts and their rewards, branched ones, and the images of a set.

`b` samples, `t` steps. The engine lends its model, batches, memory and accelerations, and reads here what an update
needs besides the samples: steps that were decided before the rollout, and gradients that were taken in it.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool
from torch import Tensor

from adascope_fast.algorithms.algorithm import Policy, Samples
from adascope_fast.algorithms.policy_gradient import PolicyGradient
from adascope_fast.backbones.folding import Folding
from adascope_fast.engine.acceleration import halving
from adascope_fast.engine.one_pass import OnePass
from adascope_fast.engine.per_sample import PerSampleGradients
from adascope_fast.engine.policy import ModelPolicy
from adascope_fast.engine.recorded import STEP
from adascope_fast.engine.scoring import RewardOfGuess, Scoring
from adascope_fast.rollout import (
    Branches,
    Branching,
    Denoising,
    EncodedPrompts,
    PreferenceModel,
    SharedStart,
    Stills,
    StoredImage,
    Trajectory,
    rollout,
)
from adascope_fast.schedules import Schedule
from adascope_fast.schedules.tail import Tails

if TYPE_CHECKING:
    from adascope_fast.engine.engine import Engine


class NothingFiniteError(Exception):
    """No image of a rollout is finite."""


class Collection:
    """What `collect` is given: rollouts and their rewards. Keeps what the update needs of them."""

    def __init__(
        self,
        engine: "Engine",
        policy: ModelPolicy,
        encoded: EncodedPrompts,
        prompts: list[str],
        schedule: Schedule,
        generator: torch.Generator,
        iteration: int,
    ) -> None:
        self.prompts, self.num_updates = prompts, engine.settings.num_updates
        self.policy: Policy = policy
        self.keep: Bool[Tensor, "b t"] | None = None
        """The steps to train, where they were decided before the rollout."""
        self.gradients: PerSampleGradients | None = None
        self.num_forwards = self.num_dropped = 0
        self.schedule, self.iteration = schedule, iteration
        self._engine, self._encoded, self._generator = engine, encoded, generator

    def __call__(self, prompts: list[str] | None = None) -> Samples:
        """A trajectory and a reward for each prompt; None: for the iteration's."""
        return self._collect(self.prompts if prompts is None else prompts, None)

    def branched(
        self,
        where: Bool[Tensor, " t"],
        *,
        num_candidates: int,
        margin: float,
        temperature: float,
        preference: PreferenceModel | None,
    ) -> Samples:
        """See `algorithms.Collector`."""
        engine, prompts = self._engine, self.prompts
        scores = RewardOfGuess(engine.backbone, engine.score) if preference is None else preference
        known = engine.selector.ahead(prompts, self.schedule, self.iteration)
        chosen = torch.ones(len(prompts), len(where), dtype=torch.bool) if known is None else known.cpu()
        if engine._recording is not None:
            engine._recording.graphs.refuse(STEP, "its candidates are judged on the way")

        def branching(denoising: Denoising) -> Branching:
            return Branching(
                denoising,
                chosen & where.cpu(),
                prompts,
                scores,
                num_candidates=num_candidates,
                margin=margin,
                temperature=temperature,
                generator=self._generator,
            )

        return self._collect(prompts, branching)

    def _collect(self, prompts: list[str], branching: Callable[[Denoising], Branching] | None) -> Samples:
        engine, schedule = self._engine, self.schedule
        is_one_pass = engine.settings.update == "one_pass"
        share = engine.sampler.tail_share
        with engine._part("sensing"):
            saves = share < 1 and not engine.selector.senses(self.iteration)
            self.keep = self._ahead(prompts) if is_one_pass or saves else None
            tails = Tails.of(schedule, self.keep, share) if saves and self.keep is not None else None
            shared = SharedStart.of(prompts, schedule, tails) if engine.algorithm.shares_noise else None
        num_forwards = len(prompts) * schedule.num_steps if tails is None else tails.num_forwards
        num_forwards -= 0 if shared is None else shared.num_saved
        with Scoring(engine.backbone, engine.score, prompts) as scoring:
            with engine._part("rollout"):
                keep = self.keep if is_one_pass else None
                ways: dict[str, Any] = {"tails": tails, "shared": shared, "branching": branching, "total": num_forwards}
                trajectory, branches = self._rollout(prompts, scoring, keep, **ways)
            with engine._part("reward"):
                rewards = scoring.rewards()
                parts = scoring.parts
        self.num_forwards += num_forwards
        weights = getattr(engine.score, "weights", {})
        return self._finite(Samples(trajectory, rewards, branches, parts, weights))

    def stills(self, images: Sequence[StoredImage], prompts: list[str], told: list[str]) -> Stills:
        """See `algorithms.Collector`."""
        device = self.schedule.coef.device
        with self._engine._part("rollout"):
            latents = self._engine._images(images, device)
        return Stills(latents, self.schedule, prompts, self._encoded.index(told, device))

    def sensed(self, prompts: list[str]) -> Trajectory:
        """A rollout of each distinct prompt, for the selector to look at; nobody judges it."""
        with self._engine._part("rollout"):
            distinct = list(dict.fromkeys(prompts))
            total = len(distinct) * self.schedule.num_steps
            trajectory, _ = self._rollout(distinct, None, None, total=total)
        self.num_forwards += total
        return trajectory

    def _finite(self, samples: Samples) -> Samples:
        """The samples whose image is finite; the others leave the iteration, and the groups that they were drawn for.

        Raises:
            NothingFiniteError: there are none.
        """
        is_finite = samples.rewards.isfinite()
        if bool(is_finite.all()):
            return samples
        rows = is_finite.nonzero()[:, 0]
        self.num_dropped += len(is_finite) - len(rows)
        if not len(rows):
            raise NothingFiniteError
        if self.keep is not None:
            self.keep = self.keep[rows.to(self.keep.device)]
        if self.gradients is not None:
            self.gradients.keep(rows)
        branches = None if samples.branches is None else samples.branches.rows(rows)
        parts = {name: scores[rows] for name, scores in samples.parts.items()}
        kept = samples.trajectory.rows(rows), samples.rewards[rows], branches, parts
        return Samples(*kept, samples.weights)

    def _ahead(self, prompts: list[str]) -> Bool[Tensor, "b t"]:
        keep = self._engine.selector.ahead(prompts, self.schedule, self.iteration)
        if keep is None:
            raise ValueError(
                "one_pass and a tail_share below 1 need the steps before the rollout, and this selector decides after "
                "it; set selector.mask_source = 'previous', or train.update = 'replay' and sampler.tail_share = 1"
            )
        return self._engine.algorithm.steps(keep, self.schedule.trainable)

    def _rollout(
        self,
        prompts: list[str],
        scoring: Scoring | None,
        keep: Bool[Tensor, "b t"] | None,
        *,
        total: int,
        tails: Tails | None = None,
        shared: SharedStart | None = None,
        branching: Callable[[Denoising], Branching] | None = None,
    ) -> tuple[Trajectory, Branches | None]:
        engine, schedule = self._engine, self.schedule
        start, scale = self._generator.get_state(), engine.sampler.guidance_scale
        recording = engine._recording
        folding = None
        if engine.folds_adapter:
            folding = Folding(engine.backbone.denoiser) if recording is None else recording.folding
        kind = engine.algorithm.log_prob_kind(schedule)
        denoising, tables = Denoising(engine.backbone, schedule, self._encoded, scale, kind), None
        if recording is not None and schedule.multistep is not None:
            recording.graphs.refuse(STEP, f"{schedule.kind} looks back at the guess of the step before")
        elif recording is not None and branching is None:
            denoising = recording.denoising(denoising, len(prompts))
            tables = denoising.flat.tables()
        branched: Branching | None = None

        def attempt(batch: int) -> Trajectory:
            nonlocal branched
            branched = None if branching is None else branching(denoising)
            done, advance = 0, branched or denoising
            self._generator.set_state(start)
            if scoring is not None:
                scoring.clear()
            if keep is not None:
                assert isinstance(engine.algorithm, PolicyGradient)
                self.gradients = PerSampleGradients(engine.backbone.denoiser, engine._parameters, len(prompts))
                advance = OnePass(
                    denoising,
                    keep.cpu(),
                    engine.algorithm.weights(keep, schedule),
                    self.gradients,
                    engine.microbatch,
                    folding,
                    engine.train_guidance,
                )

            def on_step(num_samples: int) -> None:
                nonlocal done
                done += num_samples
                engine._progress("rollout", done, total)

            with engine._autocast(), folding or nullcontext():
                return rollout(
                    engine.backbone,
                    schedule,
                    self._encoded,
                    prompts,
                    guidance_scale=scale,
                    generator=self._generator,
                    batch=batch,
                    kind=kind,
                    advance=advance,
                    tails=tails,
                    shared=shared,
                    tables=tables,
                    on_step=on_step,
                    on_batch=None if scoring is None else scoring.submit,
                )

        freeing = engine._freeing(attempt)
        trajectory, engine.rollout_batch = halving(freeing, engine.rollout_batch, "train.rollout_batch")
        if branched is not None:
            self.num_forwards += branched.num_guesses
            return trajectory, branched.branches
        return trajectory if tables is None else trajectory.copied(), None

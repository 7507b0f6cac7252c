"""What an algorithm's `collect` is given: rollouts and their rewards, branched ones, and the images of a set.

`b` samples, `t` steps. The engine lends its model, batches, memory and accelerations, and reads here what an update
needs besides the samples: steps that were decided before the rollout, and gradients that were taken in it.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from adascope_fast.algorithms.algorithm import Policy, Samples
from adascope_fast.algorithms.policy_gradient import PolicyGradient
from adascope_fast.backbones.folding import Folding
from adascope_fast.distributed import bounds_of, most_batches
from adascope_fast.engine.one_pass import OnePass
from adascope_fast.engine.per_sample import PerSampleGradients
from adascope_fast.engine.policy import ModelPolicy
from adascope_fast.engine.recorded import STEP
from adascope_fast.engine.scoring import RewardOfGuess, Scoring
from adascope_fast.reference import Kind
from adascope_fast.rollout import (
    Branches,
    Branching,
    Denoising,
    EncodedPrompts,
    OwnNoise,
    PreferenceModel,
    SharedStart,
    Spread,
    SpreadBranches,
    SpreadTrajectory,
    Stills,
    StoredImage,
    Trajectory,
    rollout,
)
from adascope_fast.schedules import Schedule
from adascope_fast.schedules.tail import Tails

if TYPE_CHECKING:
    from adascope_fast.engine.engine import Engine


class Sampling(Protocol):
    """What draws the samples of a rollout elsewhere: `remote_rollout.RemoteRollout`."""

    def __call__(
        self,
        prompts: Sequence[str],
        prompt_index: Int64[Tensor, " b"],
        schedule: Schedule,
        *,
        seeds: Sequence[int],
        start_seeds: Sequence[int],
        guidance_scale: float,
        kind: Kind,
        batch: int,
        on_batch: Callable[[slice, Tensor], object],
    ) -> Trajectory:
        """A trajectory of each prompt, `batch` at once; see there."""
        ...


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
        noise: OwnNoise,
        iteration: int,
    ) -> None:
        self.prompts, self.num_updates = prompts, engine.settings.num_updates
        self.policy: Policy = policy
        self.keep: Bool[Tensor, "b t"] | None = None
        """The steps to train, where they were decided before the rollout."""
        self.gradients: PerSampleGradients | None = None
        self.num_forwards = self.num_dropped = 0
        """Of this rank; of all."""
        self.schedule, self.iteration = schedule, iteration
        self._engine, self._encoded, self._noise = engine, encoded, noise
        self._num_rollouts = 0
        self._ranks = engine.ranks
        self.bounds: list[int] = []
        """Rank r has samples bounds[r] to bounds[r + 1] of those that were collected last."""

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
            own = self.own
            return Branching(
                denoising,
                chosen[own] & where.cpu(),
                prompts[own],
                scores,
                num_candidates=num_candidates,
                margin=margin,
                temperature=temperature,
                noise=self._noise.of_use(-2 - self._num_rollouts),
                numbers=range(own.start, own.stop),
            )

        return self._collect(prompts, branching)

    @property
    def own(self) -> slice:
        """This rank's samples of those that were collected last."""
        return slice(*self.bounds[self._ranks.rank : self._ranks.rank + 2])

    def whole(self, values: Tensor | None) -> Tensor | None:
        """Rows of this rank's samples and of all others'."""
        return None if values is None else self._ranks.whole(values, self.bounds)

    def chosen(self, trajectory: Trajectory) -> Bool[Tensor, "b t"]:
        """The selector's steps of all samples. Where it looks at a rollout it is shown this rank's."""
        engine = self._engine
        if not isinstance(trajectory, SpreadTrajectory):
            return engine.selector(trajectory, self.iteration)
        if not engine.selector.senses(self.iteration):
            keep = engine.selector.ahead(trajectory.prompts, trajectory.schedule, self.iteration)
            if keep is not None:
                return keep.to(trajectory.device)
        return self._ranks.whole(engine.selector(trajectory.local, self.iteration), trajectory.bounds)

    def _collect(self, prompts: list[str], branching: Callable[[Denoising], Branching] | None) -> Samples:
        engine, schedule = self._engine, self.schedule
        is_one_pass = engine.settings.update == "one_pass"
        share, own = engine.sampler.tail_share, self._deal(len(prompts))
        with engine._part("sensing"):
            saves = share < 1 and not engine.selector.senses(self.iteration)
            self.keep = self._ahead(prompts) if is_one_pass or saves else None
            tails = Tails.of(schedule, self.keep, share) if saves and self.keep is not None else None
            shared = SharedStart.of(prompts, schedule, tails, own) if engine.algorithm.shares_noise else None
            tails = None if tails is None else tails.rows(own)
        mine = prompts[own]
        num_forwards = len(mine) * schedule.num_steps if tails is None else tails.num_forwards
        num_forwards -= 0 if shared is None else shared.num_saved
        with Scoring(engine.backbone, engine.score, mine) as scoring:
            with engine._part("rollout"):
                keep = self.keep[own] if is_one_pass and self.keep is not None else None
                ways: dict[str, Any] = {"tails": tails, "shared": shared, "branching": branching, "total": num_forwards}
                trajectory, branches = self._rollout(mine, scoring, keep, **ways)
            with engine._part("reward"):
                rewards = scoring.rewards()
                parts = scoring.parts
        self.num_forwards += num_forwards
        weights = getattr(engine.score, "weights", {})
        samples = self._finite(Samples(trajectory, rewards, branches, parts, weights))
        return samples if self._ranks.is_alone else self._spread(samples)

    def stills(self, images: Sequence[StoredImage], prompts: list[str], told: list[str]) -> Stills:
        """See `algorithms.Collector`."""
        device, own = self.schedule.coef.device, self._deal(len(prompts), needs_all=False)
        with self._engine._part("rollout"):
            found = torch.empty(0, *self._engine.backbone.latent_shape, device=device)
            if images[own]:
                found = self._engine._images(images[own], device)
        latents: Any = found if self._ranks.is_alone else Spread.of(found, self.bounds, self._ranks)
        return Stills(latents, self.schedule, prompts, self._encoded.index(told, device))

    def sensed(self, prompts: list[str]) -> Trajectory:
        """A rollout of each distinct prompt, for the selector to look at; nobody judges it."""
        bounds = self.bounds
        with self._engine._part("rollout"):
            distinct = list(dict.fromkeys(prompts))
            own = self._deal(len(distinct), needs_all=False)
            total = len(distinct[own]) * self.schedule.num_steps
            trajectory, _ = self._rollout(distinct[own], None, None, total=total)
        self.num_forwards += total
        nothing = Samples(trajectory, torch.zeros(len(trajectory.prompts), device=trajectory.device))
        found = trajectory if self._ranks.is_alone else self._spread(nothing).trajectory
        self.bounds = bounds
        return found

    def _deal(self, count: int, *, needs_all: bool = True) -> slice:
        """This rank's samples of `count`."""
        batch = self._engine.settings.rollout_batch
        self.bounds = bounds_of(count, batch, self._ranks.size, needs_all=needs_all)
        return self.own

    def _finite(self, samples: Samples) -> Samples:
        """The samples whose image is finite; the others leave the iteration, and the groups that they were drawn for.

        Raises:
            NothingFiniteError: there are none.
        """
        own, ranks = self.own, self._ranks
        whole = ranks.whole(samples.rewards.isfinite(), self.bounds)
        if bool(whole.all()):
            return samples
        rows = whole.nonzero()[:, 0]
        self.num_dropped += len(whole) - len(rows)
        self.bounds = [int((rows < bound).sum()) for bound in self.bounds]
        if not len(rows):
            raise NothingFiniteError
        if self.keep is not None:
            self.keep = self.keep[rows.to(self.keep.device)]
        rows = whole[own].nonzero()[:, 0]
        if self.gradients is not None:
            self.gradients.keep(rows)
        branches = None if samples.branches is None else samples.branches.rows(rows)
        parts = {name: scores[rows] for name, scores in samples.parts.items()}
        kept = samples.trajectory.rows(rows), samples.rewards[rows], branches, parts
        return Samples(*kept, samples.weights)

    def _spread(self, samples: Samples) -> Samples:
        """The samples of all ranks: what is a number of each is told to every rank, in one message."""
        own, ranks, bounds = samples.trajectory, self._ranks, self.bounds
        told = ranks.objects((own.prompts, sorted(samples.parts)))
        prompts = [prompt for part, _ in told for prompt in part]
        names = next((names for _, names in told if names), [])  # a rank without samples has none
        t, device = own.num_steps, own.device
        columns: dict[str, Tensor] = {"log_prob": own.log_prob, "rewards": samples.rewards[:, None]}
        columns |= {name: getattr(own, name) for name in ("x0_correlation", "sample_correlation")}
        columns |= {f"part {name}": samples.parts[name][:, None] for name in names if name in samples.parts}
        widths = {"log_prob": t, "rewards": 1, "x0_correlation": t, "sample_correlation": t}
        widths |= {f"part {name}": 1 for name in names}
        nothing = torch.zeros(len(own.prompts), t, device=device)
        mine = torch.cat([columns.get(name, nothing[:, :width]).float() for name, width in widths.items()], 1)
        whole = dict(zip(widths, ranks.whole(mine, bounds).split(list(widths.values()), 1), strict=True))
        numbers = {name: whole[name].contiguous() for name in ("log_prob", "x0_correlation", "sample_correlation")}
        numbers["prompt_index"] = self._encoded.index(prompts, device)
        trajectory: Any = SpreadTrajectory.of(own, bounds, ranks, prompts, numbers)
        branches: Any = None if samples.branches is None else SpreadBranches.of(samples.branches, bounds, ranks)
        parts = {name: whole[f"part {name}"][:, 0].contiguous() for name in names}
        return Samples(trajectory, whole["rewards"][:, 0].contiguous(), branches, parts, samples.weights)

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
        noise, scale = self._noise.of_use(self._num_rollouts), engine.sampler.guidance_scale
        self._num_rollouts += 1
        if engine.remote is not None:
            self._refuse_remote({"one_pass": keep, "sampler.tail_share": tails, "a branched rollout": branching})
            return self._drawn_elsewhere(engine.remote, prompts, scoring, noise, total=total, shared=shared), None
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
                    noise=noise,
                    batch=batch,
                    numbers=range(self.own.start, self.own.stop),
                    num_batches=most_batches(self.bounds, batch) if self._ranks.are_in_step else None,
                    kind=kind,
                    advance=advance,
                    tails=tails,
                    shared=shared,
                    tables=tables,
                    on_step=on_step,
                    on_batch=None if scoring is None else scoring.submit,
                )

        trajectory, engine.rollout_batch = engine.halving(attempt, engine.rollout_batch, "train.rollout_batch")
        if branched is not None:
            self.num_forwards += branched.num_guesses
            return trajectory, branched.branches
        return trajectory if tables is None else trajectory.copied(), None

    def _drawn_elsewhere(
        self,
        remote: Sampling,
        prompts: list[str],
        scoring: Scoring | None,
        noise: OwnNoise,
        *,
        total: int,
        shared: SharedStart | None,
    ) -> Trajectory:
        """A rollout that another process draws, each sample from the seed of its noise."""
        engine, schedule, done = self._engine, self.schedule, 0
        if engine._recording is not None:
            engine._recording.graphs.refuse(STEP, "its steps are taken by a rollout server")
        numbers = range(self.own.start, self.own.stop)

        def on_batch(rows: slice, latents: Tensor) -> None:
            nonlocal done
            done += (rows.stop - rows.start) * schedule.num_steps
            engine._progress("rollout", min(done, total), total)
            if scoring is not None:
                scoring.submit(rows, latents)

        return remote(
            prompts,
            self._encoded.index(prompts, schedule.coef.device),
            schedule,
            seeds=[noise.seed(number) for number in numbers],
            start_seeds=[noise.seed(number) for number in (numbers if shared is None else shared.first)],
            guidance_scale=engine.sampler.guidance_scale,
            kind=engine.algorithm.log_prob_kind(schedule),
            batch=engine.rollout_batch,
            on_batch=on_batch,
        )

    def _refuse_remote(self, ways: dict[str, Any]) -> None:
        """ValueError for a rollout that only this process can draw."""
        asked = [name for name, value in ways.items() if value is not None]
        asked += ["a multistep solver"] if self.schedule.multistep is not None else []
        if asked:
            raise ValueError(
                f"a rollout server takes each step of the sampler in its turn, got {' and '.join(asked)}; set "
                f'rollout.name = "local"'
            )

"""One iteration of reinforcement learning: collect, reward, select, and a step-sparse update.

Skipped steps cost no forward and no backward: the chosen rows are packed into dense microbatches, each row with its own
timestep. `b` samples, `t` steps, `n` rows, such as (sample, step) pairs. What a row is and what its loss is, is the
algorithm's business.

How it differs from ddpo-pytorch and TRL: the loss is divided by the number of rows of an update, so the microbatch
cannot matter; the number of optimiser updates is fixed, so a selector changes the cost and not the schedule; the first
update of an iteration takes its own log-probability as the old one (no parameter has moved, so the ratio is 1 exactly).
"""

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float32, Int64
from torch import Tensor, nn

from adascope_fast.algorithms.algorithm import Algorithm, Context, Rows, Samples
from adascope_fast.algorithms.policy_gradient import PolicyGradient
from adascope_fast.backbone import Backbone, Reward
from adascope_fast.distributed import Ranks, dealt
from adascope_fast.distributed.sharded import sum_gradients, whole
from adascope_fast.engine.acceleration import halving, peak_memory
from adascope_fast.engine.collection import Collection, NothingFiniteError, Sampling
from adascope_fast.engine.graphs import Graphs
from adascope_fast.engine.optimizer import Rate
from adascope_fast.engine.per_sample import PerSampleGradients
from adascope_fast.engine.policy import ModelPolicy
from adascope_fast.engine.recorded import Recording, halved_parts
from adascope_fast.engine.settings import Updates
from adascope_fast.engine.statistics import UpdateStatistics, as_json
from adascope_fast.rollout import (
    EncodedPrompts,
    ImageCache,
    OwnNoise,
    Stills,
    Trajectory,
)
from adascope_fast.schedules import Schedule
from adascope_fast.schedules.settings import Sampler
from adascope_fast.selectors.best_worst import best_and_worst
from adascope_fast.selectors.protocol import TimestepSelector
from adascope_fast.theory import measured_uncertainty

T = TypeVar("T")


@dataclass
class IterationStatistics:
    """What one iteration did, in the words of the field; `seconds` by part."""

    values: dict[str, Any]
    seconds: dict[str, float] = field(default_factory=dict)
    rewards: Float32[Tensor, " b"] = field(default_factory=lambda: torch.zeros(0))
    """Of the finite images; none where an algorithm learns from a set."""


PARTS = ("rollout", "reward", "sensing", "update")
"""Of an iteration's seconds."""


@dataclass(frozen=True)
class Update:
    """An optimiser step's rows that have an effect, and the number of all its rows, which its loss is divided by."""

    rows: Int64[Tensor, " m"]
    divisor: int


class Engine:
    """Trains `backbone` on `score` with `algorithm`, at the steps that `selector` keeps.

    Args:
        schedule: the sampler's table, on the device of the backbone.
        settings: how updates are made; the section `[train]` is one.
        sampler: guidance, and the tail of a rollout; None: the defaults.
        folds_adapter: the rollout runs on weights that have the adapter in them.
        autocast: context in which the denoiser runs.
        progress: called with (part, done, total) as an iteration advances.
        graphs: what steps of a rollout and microbatches of an update are recorded by; None: they are not.
        rate: learning rate of an update by its number in the run, skipped ones included; None: the optimiser's own.
        ranks: the processes of the run: each samples and trains a share; None: those that torch.distributed knows.
    """

    def __init__(
        self,
        backbone: Backbone,
        schedule: Schedule,
        algorithm: Algorithm,
        selector: TimestepSelector,
        score: Reward,
        optimizer: torch.optim.Optimizer,
        settings: Updates,
        *,
        sampler: Sampler | None = None,
        folds_adapter: bool = False,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        progress: Callable[[str, int, int], None] = lambda part, done, total: None,
        graphs: Graphs | None = None,
        rate: Rate | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.ranks = Ranks() if ranks is None else ranks
        self.sampler = Sampler() if sampler is None else sampler
        refuse(algorithm, settings, self.sampler)
        if self.ranks.are_in_step:
            refuse_in_step(algorithm, settings, self.sampler)
        algorithm.suit(backbone)
        self.backbone, self.schedule, self.algorithm = backbone, schedule, algorithm
        self.selector, self.score, self.optimizer, self.settings = selector, score, optimizer, settings
        self.folds_adapter = folds_adapter
        self.remote: Sampling | None = None
        """What draws the rollouts in place of this process."""
        self.rollout_batch = settings.rollout_batch
        self.microbatch = settings.usual_microbatch(self.sampler.guidance_scale)
        self._autocast, self._progress, self._rate = autocast, progress, rate
        self._next_update = 0
        self._parameters = backbone.trainable_parameters()
        self._images = ImageCache(backbone)
        self._recording = None if graphs is None else Recording(graphs, backbone, algorithm, self._parameters)
        self._seconds: dict[str, float] = {}
        self._own_rows: list[int] = []
        self._rows_trained = 0

    @property
    def train_guidance(self) -> str:
        """Outputs that carry gradient under guidance: as configured, else the algorithm's own."""
        return self.sampler.train_guidance or self.algorithm.train_guidance

    def step(self, encoded: EncodedPrompts, prompts: list[str], *, iteration: int, seed: int) -> IterationStatistics:
        """One iteration on `prompts`, one image each (repeat one for a group). `seed` fixes all its randomness.

        For an algorithm that learns from a set, the prompts are those that its `draw` gave.
        """
        self._seconds, self._own_rows, self._rows_trained = {}, [], 0
        self._next_update = iteration * self.settings.num_updates
        self.ranks.take_cost()  # what was told between iterations is none of this one's
        schedule = self.algorithm.schedule(self.selector.sampler(self.schedule, iteration))
        if self._recording is not None:
            self._recording.start()
        generator = torch.Generator(self.schedule.coef.device).manual_seed(seed)
        policy, noise = self.policy(encoded, schedule), OwnNoise(seed)
        collection = Collection(self, policy, encoded, prompts, schedule, noise, iteration)
        try:
            samples = self.algorithm.collect(collection)
        except NothingFiniteError:
            return self._nothing(collection)
        chosen, trajectory = self._chosen(samples, collection)
        with self._part("sensing"):
            keep = collection.keep
            if keep is None:
                keep = self.algorithm.steps(chosen, schedule.trainable)
            keep = keep.to(chosen.device)
            if self.settings.best_worst_k is not None:
                assert isinstance(samples, Samples)  # `refuse` sees to it
                rows = best_and_worst(samples.rewards, samples.prompts, self.settings.best_worst_k)
                keep = keep & rows[:, None].to(keep.device)
            if collection.num_dropped and self._too_few(keep):
                return self._nothing(collection)
            self._refuse_too_few(keep)
            measured = {} if trajectory is None else {"uncertainty": as_json(measured_uncertainty(trajectory))}
        context = Context(
            policy,
            keep,
            generator,
            lambda: collection.whole(self.selector.gains()),
            self.settings.num_updates,
            max(1, self.microbatch),
            self.ranks,
            noise.of_use(-1),
        )
        with self._part("update"):
            per_row = 1
            if collection.gradients is None:
                rows = self.algorithm.batch(samples, context)
                per_row = rows.num_forwards
                statistics = self._replay(policy, rows, schedule.num_steps, generator, collection.bounds)
            else:
                assert isinstance(samples, Samples)
                statistics = self._apply(collection.gradients, samples, context, schedule, collection.own)
            values = dict(statistics.read())
        rewards, parts = (samples.rewards, samples.parts) if isinstance(samples, Samples) else (None, {})
        values |= {
            "reward_mean": None if rewards is None else rewards.mean().item(),
            "reward_std": None if rewards is None else rewards.std(correction=0).item(),
            "fraction_trained": per_row * values["pairs_trained"] / (chosen.numel() * self.settings.inner_epochs),
            **({"reward_parts": _means(parts)} if parts else {}),
            "samples_dropped": collection.num_dropped,
            "forwards_sampled": self._of_all_ranks(collection.num_forwards),
            "microbatch": self.microbatch,
            "selector": self.selector.telemetry(),
            "steps": measured | statistics.by_step(),
        }
        seconds = dict.fromkeys(PARTS, 0.0) | self._seconds
        values |= self._told_by_ranks(seconds, collection.num_forwards)
        return IterationStatistics(values, seconds, *([] if rewards is None else [rewards]))

    def _chosen(
        self, samples: Samples | Stills, collection: Collection
    ) -> tuple[Bool[Tensor, "b t"], Trajectory | None]:
        """The selector's steps, and the rollout that it has seen.

        Pictures of a set have the steps that the selector chooses for their prompts before any rollout; where it
        senses, or cannot choose yet, each of the prompts is sampled once for it.
        """
        if isinstance(samples, Samples):
            with self._part("sensing"):
                return collection.chosen(samples.trajectory), samples.trajectory
        chosen = None
        with self._part("sensing"):
            if not self.selector.senses(collection.iteration):
                chosen = self.selector.ahead(samples.prompts, samples.schedule, collection.iteration)
        if chosen is not None:
            return chosen.to(samples.latents.device), None
        sensed = collection.sensed(samples.prompts)
        with self._part("sensing"):
            keep = collection.chosen(sensed)
            row = {prompt: number for number, prompt in enumerate(sensed.prompts)}
            rows = torch.tensor([row[prompt] for prompt in samples.prompts], device=keep.device)
            return keep[rows], sensed

    def _of_all_ranks(self, count: int) -> int:
        return sum(self.ranks.objects(count))

    def _told_by_ranks(self, seconds: dict[str, float], num_forwards: int) -> dict[str, Any]:
        """What the iteration cost each rank; of several, how uneven the pairs lay before they were dealt.

        Args:
            num_forwards: of this rank's rollouts.
        """
        ranks, known = self.ranks, sum(seconds.values())
        exchange, num_bytes = ranks.take_cost()
        told = ranks.objects(
            {
                "seconds": {name: round(part, 4) for name, part in seconds.items()},
                "exchange_seconds": round(exchange, 4),
                "idle_share": round(exchange / known, 4) if known else 0.0,
                "bytes_sent": num_bytes,
                "forwards_sampled": num_forwards,
                "rows_trained": self._rows_trained,
                "peak_memory_mb": round(peak_memory(self.schedule.coef.device) / 2**20),
            }
        )
        if ranks.is_alone:
            return {"ranks": told}
        mean = sum(self._own_rows) / ranks.size
        return {"ranks": told, "imbalance": max(self._own_rows) / mean - 1 if mean else 0.0}

    def _nothing(self, collection: Collection) -> IterationStatistics:
        """An iteration that had too few finite images to learn from: nothing has changed."""
        nothing = UpdateStatistics(self.schedule.num_steps)
        values = nothing.read() | {
            "updates_skipped": self.settings.num_updates,
            "reward_mean": math.nan,
            "reward_std": math.nan,
            "loss": math.nan,
            "fraction_trained": 0.0,
            "samples_dropped": collection.num_dropped,
            "forwards_sampled": self._of_all_ranks(collection.num_forwards),
            "microbatch": self.microbatch,
            "selector": {},
            "steps": {},
        }
        seconds = dict.fromkeys(PARTS, 0.0) | self._seconds
        return IterationStatistics(values | self._told_by_ranks(seconds, collection.num_forwards), seconds)

    def policy(self, encoded: EncodedPrompts, schedule: Schedule) -> ModelPolicy:
        """The model as a loss sees it."""
        if self._recording is not None:
            encoded, schedule = self._recording.held(encoded, schedule)
        return ModelPolicy(
            self.backbone,
            schedule,
            encoded,
            guidance_scale=self.sampler.guidance_scale,
            train_guidance=self.train_guidance,
            autocast=self._autocast,
        )

    def update(self, policy: ModelPolicy, rows: Rows, num_steps: int, generator: torch.Generator) -> dict[str, Any]:
        """The iteration's optimiser updates on `rows`, in an order drawn from `generator`; their statistics.

        Of a process alone: what several hold is known to `step`.
        """
        return self._replay(policy, rows, num_steps, generator).read()

    def planned(self, rows: Rows, generator: torch.Generator) -> list[Update]:
        """The updates of an iteration: every epoch goes through all rows once, in an order drawn from `generator`."""
        num_updates, device = self.settings.updates_per_iteration, self.schedule.coef.device
        updates = []
        for _ in range(self.settings.inner_epochs):
            if self.settings.minibatch == "samples":
                chunks = _by_samples(rows.sample_index, num_updates, generator)
            else:
                order = torch.randperm(len(rows), generator=generator, device=device)
                chunks = order.tensor_split(num_updates)
            for chunk in chunks:
                live = chunk if rows.is_live is None else chunk[rows.is_live[chunk]]
                updates.append(Update(live, len(chunk)))
        return updates

    def _refuse_too_few(self, keep: Bool[Tensor, "b t"]) -> None:
        """ValueError where the updates cannot all have something to train; ties may leave them less, or nothing."""
        if message := self._too_few(keep):
            raise ValueError(message)

    def _too_few(self, keep: Bool[Tensor, "b t"]) -> str:
        num_updates, num_pairs = self.settings.updates_per_iteration, int(keep.sum())
        if num_pairs < num_updates:
            return (
                f"each of the {num_updates} updates needs an (image, step) pair, the selector kept {num_pairs}; "
                f"lower train.updates_per_iteration or keep more steps"
            )
        num_samples = int(keep.any(1).sum())
        if self.settings.minibatch == "samples" and num_samples < num_updates:
            return (
                f"minibatches of whole images need one for each update, got {num_samples} images for {num_updates} "
                f'updates; lower train.updates_per_iteration, or set train.minibatch = "pairs"'
            )
        return ""

    def _replay(
        self,
        policy: ModelPolicy,
        rows: Rows,
        num_steps: int,
        generator: torch.Generator,
        bounds: Sequence[int] = (),
    ) -> UpdateStatistics:
        """The updates; after their plan nothing here waits for the device, if the optimiser can skip a step itself.

        Args:
            bounds: of the samples of each rank; a rank trains as many rows as the others, its own first.
        """
        updates = self.planned(rows, generator)
        num_forwards, recording = rows.num_forwards, self._recording
        cut = even_parts if recording is None or not recording.records_updates else halved_parts
        if self.ranks.are_in_step:
            cut = self._parts_in_step
        total = sum(len(update.rows) for update in updates) // self.ranks.size
        statistics, done = UpdateStatistics(num_steps, self.ranks), 0
        for number, update in enumerate(updates):
            before, (mine, weight) = done, self._share(rows, update, bounds)

            def attempt(
                microbatch: int,
                mine: Rows = mine,
                weight: float = weight,
                update: Update = update,
                before: int = before,
                number: int = number,
            ) -> list:
                nonlocal done
                self._clear_gradients()
                done, parts = before, []
                pieces = cut(len(mine), max(1, microbatch // num_forwards))
                for piece, part in enumerate(pieces):
                    sum_gradients(self.backbone.denoiser, now=piece + 1 == len(pieces))
                    # The first update comes before any parameter moved, so log_prob is old_log_prob.
                    scale = weight / update.divisor
                    parts.append(self._accumulate(policy, mine.take(part), scale, is_on_policy=number == 0))
                    done += part.stop - part.start
                    self._progress("update", done, total)
                return parts

            self._rows_trained += len(mine) * num_forwards if weight else 0
            if len(mine):
                parts, self.microbatch = self.halving(attempt, self.microbatch, "train.microbatch")
            else:
                parts = []
            for parameter in self._parameters:
                if parameter.grad is None:  # all without effect, or none is this rank's: its gradient is zero
                    parameter.grad = torch.zeros_like(parameter)
            if not self.ranks.are_in_step:  # a model that ranks share has added them up in its backward passes
                self.ranks.add([parameter.grad for parameter in self._parameters if parameter.grad is not None])
            told = parts if weight else []
            statistics.add(told, self._optimizer_step(), num_skipped=update.divisor - len(update.rows))
        return statistics

    def _share(self, rows: Rows, update: Update, bounds: Sequence[int]) -> tuple[Rows, float]:
        """What this rank trains of an update, and the weight of it.

        Where ranks call one model in step, one without rows has a row of weight 0, to call it as often as the others.
        """
        if self.ranks.is_alone:
            return rows.ordered(update.rows), 1.0
        if not hasattr(rows, "held"):
            raise ValueError(
                f"the rows of {self.algorithm.name} must have a method `held` to be trained by several processes, got "
                f"{type(rows).__name__} without; see algorithms.Rows, or start one process"
            )
        sample, ends = rows.sample_index[update.rows], torch.tensor(bounds[1:], device=update.rows.device)
        shares, self._own_rows = dealt(update.rows, torch.searchsorted(ends, sample, right=True), self.ranks.size)
        is_idle = not len(shares[self.ranks.rank])
        if self.ranks.are_in_step and len(update.rows):
            shares = [share if len(share) else update.rows[:1] for share in shares]
        return rows.held(shares, self.ranks.rank), 0.0 if is_idle else 1.0

    def _parts_in_step(self, length: int, size: int) -> list[slice]:
        """As `even_parts`, and as many on a rank with a row less."""
        lengths = self.ranks.objects(length)
        return even_parts(length, size, count=min(-(-max(lengths) // size), min(lengths)))

    def _accumulate(
        self, policy: ModelPolicy, rows: Any, scale: float, *, is_on_policy: bool
    ) -> dict[str, Float32[Tensor, " n"]]:
        """Add a microbatch's gradient; what it tells of each row."""

        def add_gradient(rows: Any, scale: Any) -> dict[str, Tensor]:
            return self._add_gradient(policy, rows, scale, is_on_policy=is_on_policy)

        if self._recording is None or not self._recording.records_updates:
            return add_gradient(rows, scale)
        return self._recording.microbatch(add_gradient, rows, scale=scale, host=is_on_policy, fixed=policy.tensors())

    def _add_gradient(
        self, policy: ModelPolicy, rows: Any, scale: Any, *, is_on_policy: bool
    ) -> dict[str, Float32[Tensor, " n"]]:
        policy.clear()
        loss = self.algorithm.loss(policy, rows, is_on_policy=is_on_policy, scale=scale)
        gradients = loss.gradients
        if gradients is None:
            gradients = torch.autograd.grad(loss.values.sum() * scale, policy.leaves())
        policy.backward(gradients)
        policy.clear()
        told = loss.statistics | {"loss": loss.values.detach()}
        if "output_gradient" in told:
            return told
        norms = torch.stack([torch.linalg.vector_norm(gradient.flatten(1).float(), dim=1) for gradient in gradients])
        squares = norms.square().sum(0).view(-1, len(loss.values)).sum(0)  # a row may be several of the denoiser's
        return told | {"output_gradient": squares.sqrt() / scale}

    def halving(self, attempt: Callable[[int], T], size: int, name: str) -> tuple[T, int]:
        """`attempt(size)`, with half the size as often as memory runs out; ranks that are in step do not part."""
        if self.ranks.are_in_step:
            return attempt(size), size
        return halving(self._freeing(attempt), size, name)

    def _freeing(self, attempt: Callable[[int], T]) -> Callable[[int], T]:
        """`attempt`; if memory runs out, the graphs give up theirs."""

        def freed(size: int) -> T:
            try:
                return attempt(size)
            except torch.OutOfMemoryError:
                if self._recording is not None:
                    self._recording.graphs.forget()
                raise

        return freed

    def _clear_gradients(self) -> None:
        if self._recording is None:
            self.optimizer.zero_grad(set_to_none=True)
        else:
            self._recording.gradients.clear()

    def _apply(
        self, gradients: PerSampleGradients, samples: Samples, context: Context, schedule: Schedule, own: slice
    ) -> UpdateStatistics:
        """The one update of a one-pass iteration: each sample's gradient times the slope of its loss at ratio 1."""
        assert isinstance(self.algorithm, PolicyGradient)
        loss, slope = self.algorithm.slopes(samples, context)
        pairs = samples.trajectory.pairs(context.keep)
        weights = self.algorithm.weights(context.keep, schedule)
        self._rows_trained = int(context.keep[own].sum())
        found = [gradient / len(pairs) for gradient in gradients.weighted(slope[own])]
        self.ranks.add(found)
        for parameter, gradient in zip(self._parameters, found, strict=True):
            parameter.grad = gradient
        sample, step = pairs.unbind(1)
        losses = (loss[sample] * weights[sample, step]).float()
        statistics = UpdateStatistics(samples.trajectory.num_steps)
        statistics.add([{"loss": losses, "step": step}], self._optimizer_step())
        return statistics

    def _optimizer_step(self) -> Float32[Tensor, ""]:
        """One update with the gradient cut to its largest norm, none if that norm is not finite; the norm."""
        norm = whole(nn.utils.clip_grad_norm_(self._parameters, self.settings.max_grad_norm))
        if self._rate is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = self._rate(self._next_update)
        self._next_update += 1
        if self.optimizer.defaults.get("fused"):  # skips by itself, on the device
            self.optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
            self.optimizer.step()
        elif norm.isfinite():
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm.float()

    @contextmanager
    def _part(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.schedule.coef.device.type != "cpu":
            torch.accelerator.synchronize()
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start


def refuse_in_step(algorithm: Algorithm, settings: Updates, sampler: Sampler) -> None:
    """ValueError where ranks would call a model that is spread over them a different number of times."""
    for is_so, what, instead in (
        (settings.update == "one_pass", 'train.update = "one_pass"', 'set train.update = "replay"'),
        (sampler.tail_share < 1, f"sampler.tail_share = {sampler.tail_share:g}", "set sampler.tail_share = 1"),
        (algorithm.shares_noise, 'algorithm.initial_noise = "group"', 'set algorithm.initial_noise = "own"'),
        (algorithm.branches, f'algorithm.name = "{algorithm.name}"', "choose another algorithm"),
    ):
        if is_so:
            raise ValueError(
                f"processes that share one model (FSDP, ZeRO-3) call it alike, and with {what} each calls it as its "
                f"own images need; {instead}, or give each process the whole model"
            )


def refuse(algorithm: Algorithm, settings: Updates, sampler: Sampler) -> None:
    """ValueError where `algorithm` cannot be carried out like this."""
    if settings.best_worst_k is not None:
        if settings.update == "one_pass":
            raise ValueError(
                "the best and worst images are known after the rollout, in which one_pass trains all of them, got "
                f"train.best_worst_k = {settings.best_worst_k}; set train.update = 'replay', or remove it"
            )
        if algorithm.preferences is not None:
            raise ValueError(
                f"{algorithm.name} learns from a set, whose images have no rewards, got train.best_worst_k = "
                f"{settings.best_worst_k}; remove it"
            )
    if settings.update == "one_pass":
        if type(algorithm) is not PolicyGradient:
            raise ValueError(
                f"one_pass is for policy gradients whose advantage weighs a whole sample, got {algorithm.name}; "
                "use update = 'replay'"
            )
        if settings.num_updates != 1 or algorithm.kl_weight:
            raise ValueError(
                "one_pass makes one update an iteration, without KL, got "
                f"{settings.num_updates} updates and kl_weight = {algorithm.kl_weight}; use update = 'replay'"
            )
    if (settings.update == "one_pass" or sampler.tail_share < 1) and not algorithm.is_known_ahead:
        raise ValueError(
            "one_pass and a tail_share below 1 need the weights before the rollout, and the attribution of "
            f"{algorithm.name} is known after it; use attribution 'uniform' or 'discount', or update = 'replay' and "
            f"tail_share = 1"
        )


def _means(parts: dict[str, Tensor]) -> dict[str, float]:
    return {name: scores.mean().item() for name, scores in parts.items()}


def even_parts(length: int, size: int, *, count: int | None = None) -> list[slice]:
    """Slices of at most `size` rows that differ by one row at most; `count` of them where that is given."""
    count = -(-length // size) if count is None else count
    starts = [number * (length // count) + min(number, length % count) for number in range(count + 1)]
    return [slice(start, stop) for start, stop in itertools.pairwise(starts)]


def _by_samples(
    sample_index: Int64[Tensor, " n"], num_updates: int, generator: torch.Generator
) -> list[Int64[Tensor, " m"]]:
    """Rows of whole samples for each update, samples and rows in an order drawn from `generator`."""
    samples = sample_index.unique()
    device = sample_index.device
    mixed = samples[torch.randperm(len(samples), generator=generator, device=device)]
    order = torch.randperm(len(sample_index), generator=generator, device=device)
    return [order[torch.isin(sample_index[order], part)] for part in mixed.tensor_split(num_updates)]

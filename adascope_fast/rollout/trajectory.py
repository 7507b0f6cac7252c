"""What a rollout leaves behind, and the dense batch of (sample, step) pairs that training makes of it.

`b` samples, `t` steps, `n` packed pairs; latents keep their own trailing shape.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor, nn

from adascope_fast.reference.rows import picked
from adascope_fast.schedules import Schedule


@dataclass(frozen=True)
class StepBatch:
    """`n` pairs of a sample and a step, each with its own timestep: what one update trains on.

    The latents stay where the rollout put them: an operation is given `transition`, and reads them there.
    """

    states: Float[Tensor, "m *latent"]
    """All states of all samples, one after another."""
    rows: Int64[Tensor, " n"]
    """The state that enters each pair's step; the next one is where the step led."""
    timestep: Float32[Tensor, " n"]
    coef: Float32[Tensor, "n 3"]
    old_log_prob: Float32[Tensor, " n"]
    sample_index: Int64[Tensor, " n"]
    step_index: Int64[Tensor, " n"]
    prompt_index: Int64[Tensor, " n"]

    @property
    def sample(self) -> Float[Tensor, "n *latent"]:
        """The latents that enter each step: what the denoiser is shown. A copy."""
        return picked(self.states, self.rows)

    @property
    def prev_sample(self) -> Float[Tensor, "n *latent"]:
        """The latents that each step led to. A copy."""
        return picked(self.states, self.rows + 1)

    @property
    def transition(self) -> dict[str, Tensor]:
        """`sample`, `prev_sample` and `rows` of an operation: tables, and what is meant of them."""
        return {"sample": self.states[:-1], "prev_sample": self.states[1:], "rows": self.rows}

    def packed(self) -> "StepBatch":
        """The same with the states of these pairs alone, from tables that need not stay."""
        ends = torch.stack([self.rows, self.rows + 1], 1).flatten()
        starts = torch.arange(0, len(ends), 2, device=ends.device)
        return replace(self, states=picked(self.states, ends), rows=starts)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: Tensor | slice) -> "StepBatch":
        each = {name: value[rows] for name, value in self.__dict__.items() if name != "states"}
        return StepBatch(states=self.states, **each)


class Recorded:
    """What is known of the steps of samples, wherever their latents are."""

    log_prob: Float32[Tensor, "b t"]
    schedule: Schedule
    prompts: list[str]
    prompt_index: Int64[Tensor, " b"]

    @property
    def num_steps(self) -> int:
        return self.log_prob.shape[1]

    def pairs(self, keep: Bool[Tensor, "b t"]) -> Int64[Tensor, "n 2"]:
        """The chosen (sample, step) pairs, sample by sample. A deterministic step is refused: it has no log_prob."""
        trainable = self.schedule.trainable.to(keep.device)
        if bool((keep & ~trainable).any()):
            step = int((keep & ~trainable).any(0).nonzero()[0, 0])
            usable = trainable.nonzero()[:, 0].tolist()
            span = f"{usable[0]}..{usable[-1]}" if usable else "none"
            raise ValueError(
                f"step {step} is deterministic (std = 0), so it has no log_prob and cannot be trained; "
                f"raise eta or noise_level, or keep the selector to steps {span}"
            )
        return keep.nonzero()

    def _batch(self, states: Tensor, rows: Tensor, sample: Tensor, step: Tensor) -> StepBatch:
        return StepBatch(
            states=states,
            rows=rows,
            timestep=self.schedule.timesteps[step],
            coef=self.schedule.coef[step],
            old_log_prob=self.log_prob[sample, step],
            sample_index=sample,
            step_index=step,
            prompt_index=self.prompt_index[sample],
        )


@dataclass(frozen=True)
class Trajectory(Recorded):
    """A rollout of `b` samples over `t` steps.

    `latents[:, i]` enters step i and `latents[:, t]` is the final picture's; `log_prob[:, i]` is that of
    `latents[:, i + 1]`, NaN where the step is deterministic; `x0[:, i]` is the guided prediction of the final latent.
    """

    latents: Float[Tensor, "b t+1 *latent"]
    x0: Float[Tensor, "b t *latent"]
    log_prob: Float32[Tensor, "b t"]
    schedule: Schedule
    prompts: list[str]
    prompt_index: Int64[Tensor, " b"]
    x0_correlation: Float32[Tensor, "b t"] | None = None
    """Of each guess with the next one; the last has none. None where the rollout did not tell."""
    sample_correlation: Float32[Tensor, "b t"] | None = None
    """Of the latents that enter each step with those that leave it."""

    def rows(self, samples: Int64[Tensor, " m"]) -> "Trajectory":
        """The trajectories of some samples alone."""
        told = self.x0_correlation, self.sample_correlation
        return Trajectory(
            picked(self.latents, samples),
            picked(self.x0, samples),
            self.log_prob[samples],
            self.schedule,
            [self.prompts[sample] for sample in samples.tolist()],
            self.prompt_index[samples],
            *(None if table is None else table[samples] for table in told),
        )

    def copied(self) -> "Trajectory":
        """The same in memory of its own, where tables are to be written again."""
        tables = {name: value.clone() for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tables)

    @property
    def device(self) -> torch.device:
        return self.latents.device

    def over(self, compute: Callable[["Trajectory", slice], Tensor]) -> Tensor:
        """What `compute` gives of the samples, a row for each, and which they are; of several ranks, each its own."""
        return compute(self, slice(0, len(self.prompts)))

    def finals(self) -> Float[Tensor, "b *latent"]:
        """The final latents, by number of the sample."""
        return self.latents[:, -1]

    def guess(self, sample: Int64[Tensor, " n"], step: Int64[Tensor, " n"]) -> Float[Tensor, "n *latent"]:
        """The guesses at some pairs. A copy."""
        return self.x0[sample, step]

    def gather(self, pairs: Int64[Tensor, "n 2"]) -> StepBatch:
        """The batch of the given (sample, step) pairs, in their order."""
        sample, step = pairs.unbind(1)
        return self._batch(self.latents.flatten(0, 1), sample * self.latents.shape[1] + step, sample, step)


@dataclass(frozen=True)
class Tables:
    """What the steps of a rollout write to, each its own column; the fields of `Trajectory`."""

    latents: Float[Tensor, "b t+1 *latent"]
    """Of states that are yet to come, the noise of the step that leads to them."""
    x0: Float[Tensor, "b t *latent"]
    log_prob: Float32[Tensor, "b t"]
    x0_correlation: Float32[Tensor, "b t"]
    sample_correlation: Float32[Tensor, "b t"]

    @classmethod
    def of(cls, noise: Float[Tensor, "b t+1 *latent"], denoiser: nn.Module) -> "Tables":
        """Tables for a rollout with that noise, in the layout of the outputs of `denoiser`; the rest is NaN."""
        b, t = noise.shape[0], noise.shape[1] - 1
        is_last = noise.dim() == 5 and gives_channels_last(denoiser)
        if is_last:
            noise = noise.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, (b, t + 1))
        height, width = noise.shape[-2:]
        shape = (b, t, height, width, noise.shape[2]) if is_last else (b, t, *noise.shape[2:])
        x0 = noise.new_full(shape, torch.nan)
        numbers = noise.new_full((3, b, t), torch.nan, dtype=torch.float32)
        return cls(noise, x0.permute(0, 1, 4, 2, 3) if is_last else x0, *numbers)

    def again(self, noise: Float[Tensor, "b t+1 *latent"]) -> "Tables":
        """These tables, for another rollout with that noise."""
        self.latents.copy_(noise)
        for table in (self.x0, self.log_prob, self.x0_correlation, self.sample_correlation):
            table.fill_(torch.nan)
        return self

    def sample(self, at: slice | Int64[Tensor, " m"], step: int) -> Float[Tensor, "m *latent"]:
        """The latents of some samples that enter a step; a view where the samples follow one another."""
        return self.latents[at, step] if isinstance(at, slice) else picked(self.latents[:, step], at)


def gives_channels_last(model: nn.Module) -> bool:
    """Whether a model's convolutions have their channels last, or cut patches of one element; its outputs have then."""
    weights = [layer.weight for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    is_last = any(w.is_contiguous(memory_format=torch.channels_last) and not w.is_contiguous() for w in weights)
    return is_last or (len(weights) > 0 and all(w.shape[2:].numel() == 1 for w in weights))

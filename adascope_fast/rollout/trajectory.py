"""What a rollout leaves behind, and the dense batch of (sample, step) pairs that training makes of it.

`b` samples, `t` steps, `n` packed pairs; latents keep their own trailing shape.
"""

from dataclasses import dataclass

from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from adascope_fast.schedules import Schedule


@dataclass(frozen=True)
class StepBatch:
    """`n` pairs of a sample and a step, each with its own timestep: what one update trains on."""

    sample: Float[Tensor, "n *latent"]
    prev_sample: Float[Tensor, "n *latent"]
    timestep: Float32[Tensor, " n"]
    coef: Float32[Tensor, "n 3"]
    old_log_prob: Float32[Tensor, " n"]
    sample_index: Int64[Tensor, " n"]
    step_index: Int64[Tensor, " n"]
    prompt_index: Int64[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.sample)

    def __getitem__(self, rows: Tensor | slice) -> "StepBatch":
        return StepBatch(**{name: value[rows] for name, value in self.__dict__.items()})


@dataclass(frozen=True)
class Trajectory:
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

    @property
    def num_steps(self) -> int:
        return self.log_prob.shape[1]

    def rows(self, samples: Int64[Tensor, " m"]) -> "Trajectory":
        """The trajectories of some samples alone."""
        return Trajectory(
            self.latents[samples],
            self.x0[samples],
            self.log_prob[samples],
            self.schedule,
            [self.prompts[sample] for sample in samples.tolist()],
            self.prompt_index[samples],
        )

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

    def gather(self, pairs: Int64[Tensor, "n 2"]) -> StepBatch:
        """The batch of the given (sample, step) pairs, in their order."""
        sample, step = pairs.unbind(1)
        return StepBatch(
            sample=self.latents[sample, step],
            prev_sample=self.latents[sample, step + 1],
            timestep=self.schedule.timesteps[step],
            coef=self.schedule.coef[step],
            old_log_prob=self.log_prob[sample, step],
            sample_index=sample,
            step_index=step,
            prompt_index=self.prompt_index[sample],
        )

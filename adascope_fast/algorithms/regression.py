"""Regression on the model's own images, noised anew: AWM (Xue et al. 2025, 2509.25050). No trajectory is trained.

`b` samples, `t` steps of the sampler, `n` (sample, noise level) rows. The noised latent is signal * x0 + sigma * noise;
the target is the output with which the model would have guessed x0 exactly: noise - x0 for flows, the noise for epsilon
models, whatever the schedule's x0 table says.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from adascope_fast import ops
from adascope_fast.algorithms import settings
from adascope_fast.algorithms.advantages import GroupRelative
from adascope_fast.algorithms.algorithm import Algorithm, Context, Loss, Policy, Samples
from adascope_fast.backbone import Ema
from adascope_fast.schedules import Schedule


@dataclass(frozen=True)
class Noised:
    """`n` images at a noise level each."""

    x0: Float[Tensor, "b *latent"]
    noise: Float[Tensor, "n *latent"]
    sample_index: Int64[Tensor, " n"]
    step: Int64[Tensor, " n"]
    prompt_index: Int64[Tensor, " b"]
    schedule: Schedule
    advantage: Float[Tensor, " n"]
    old_log_prob: Float[Tensor, " n"] | None = None
    is_live: Bool[Tensor, " n"] | None = None
    num_forwards: int = 1
    place: Int64[Tensor, " n"] | None = None
    """Where each row's noise lies; None: in order."""

    def __len__(self) -> int:
        return len(self.step)

    def ordered(self, rows: Int64[Tensor, " m"]) -> "Noised":
        """These rows, in their order."""
        old = None if self.old_log_prob is None else self.old_log_prob[rows]
        each = {name: getattr(self, name)[rows] for name in ("sample_index", "step", "advantage")}
        return replace(self, **each, old_log_prob=old, is_live=None, place=rows)

    def take(self, rows: Int64[Tensor, " m"] | slice) -> "NoisedBatch":
        """The noised latents of some rows, and what the model should have said of them."""
        sample, step = self.sample_index[rows], self.step[rows]
        x0, noise = self.x0[sample].float(), self.noise[rows if self.place is None else self.place[rows]]
        signal, sigma = (level.to(x0.device, torch.float32)[step] for level in self.schedule.levels())
        of_x, of_output = self.schedule.x0_coef[step].unbind(1)
        ones = [1] * (x0.dim() - 1)
        noised = signal.view(-1, *ones) * x0 + sigma.view(-1, *ones) * noise
        target = (x0 - of_x.view(-1, *ones) * noised) / of_output.view(-1, *ones)
        return NoisedBatch(
            sample=noised,
            target=target,
            timestep=self.schedule.timesteps[step],
            level=sigma,
            step=step,
            prompt_index=self.prompt_index[sample],
            advantage=self.advantage[rows],
            old_log_prob=None if self.old_log_prob is None else self.old_log_prob[rows],
        )


@dataclass(frozen=True)
class NoisedBatch:
    """What a loss is given of `n` rows; `level` is sigma, AWM's t for flows."""

    sample: Float32[Tensor, "n *latent"]
    target: Float32[Tensor, "n *latent"]
    timestep: Float32[Tensor, " n"]
    level: Float32[Tensor, " n"]
    step: Int64[Tensor, " n"]
    prompt_index: Int64[Tensor, " n"]
    advantage: Float[Tensor, " n"]
    old_log_prob: Float[Tensor, " n"] | None


@dataclass(kw_only=True)
class Awm(Algorithm):
    """See `settings.Awm`."""

    settings: settings.Awm
    _ema: Ema | None = field(default=None, init=False, repr=False)
    _saved: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def schedule(self, schedule: Schedule) -> Schedule:
        """The sampler as it is; all its steps have noise levels to train at, deterministic ones too."""
        return replace(schedule, is_noised=True)

    @property
    def is_repeatable(self) -> bool:
        """See `Algorithm`."""
        return True

    def batch(self, samples: Samples, context: Context) -> Noised:
        """`num_draws` noise levels of each image among its kept steps, and noise for each."""
        trajectory, policy = samples.trajectory, context.policy
        device = trajectory.latents.device
        scaled = GroupRelative(self.settings.advantage_scale, self.settings.advantage_clip)
        advantages = scaled(samples.rewards, samples.prompts, 1)[:, 0] / self.settings.advantage_clip
        sample, step = drawn_steps(context.keep, self.settings.num_draws, context.generator)
        noise = torch.randn((len(step), *trajectory.latents.shape[2:]), generator=context.generator, device=device)
        advantage = advantages[sample]
        has_penalty = self.settings.kl_weight > 0 or self.settings.ema_kl_weight > 0
        rows = Noised(
            trajectory.latents[:, -1],
            noise,
            sample,
            step,
            trajectory.prompt_index,
            trajectory.schedule,
            advantage,
            is_live=None if has_penalty else advantage != 0,
        )
        self._follow(policy)
        if context.num_updates > 1:  # the policy will have moved: what it says now is what ratios are to
            rows = replace(rows, old_log_prob=self._old_log_prob(policy, rows, context.microbatch))
        return rows

    def loss(self, policy: Policy, rows: NoisedBatch, *, is_on_policy: bool, scale: float) -> Loss:
        """PPO's clipped loss of the matching likelihood's ratio, and the penalties."""
        where = rows.sample, rows.timestep, rows.prompt_index
        average = None
        if self.settings.ema_kl_weight and self._ema is not None:
            with self._ema.applied():  # before the output that is differentiated: it exchanges weights in place
                average = policy.frozen(*where)
        output = policy.output(*where)
        log_prob = self.log_prob(output, rows)
        old_log_prob = log_prob.detach() if is_on_policy or rows.old_log_prob is None else rows.old_log_prob
        values, ratio = ops.clipped_policy_loss(
            log_prob, old_log_prob, rows.advantage, clip_range=self.settings.clip_range
        )
        told = {"step": rows.step, "ratio": ratio}
        if self.settings.kl_weight:
            kl = mean_square(output.float() - policy.reference(*where, is_guided=False))
            values, told["kl"] = values + self.settings.kl_weight * kl, kl.detach()
        if average is not None:
            values = values + self.settings.ema_kl_weight * mean_square(output.float() - average)
        told["approx_kl"] = 0.5 * (log_prob.detach() - old_log_prob).square()
        told["clipfrac"] = ((ratio - 1).abs() > self.settings.clip_range).float()
        told["nonfinite"] = (~log_prob.detach().isfinite()).float()
        return Loss(values, told)

    def log_prob(self, output: Float[Tensor, "n *latent"], rows: NoisedBatch) -> Float[Tensor, " n"]:
        """-w(t) E of the output's mean squared error E, differentiable in the output."""
        return matching_log_prob(
            mean_square(output - rows.target), rows.level, self.settings.weighting, power=self.settings.huber_power
        )

    def _old_log_prob(self, policy: Policy, rows: Noised, microbatch: int) -> Float[Tensor, " n"]:
        parts = []
        for part in torch.arange(len(rows), device=rows.step.device).split(microbatch):
            batch = rows.take(part)
            parts.append(self.log_prob(policy.frozen(batch.sample, batch.timestep, batch.prompt_index), batch))
        return torch.cat(parts)

    def _follow(self, policy: Policy) -> None:
        """Move the average towards the policy; its decay is min(0.3, 0.001 n) in iteration n, as in the original."""
        if not self.settings.ema_kl_weight:
            return
        if self._ema is None:
            self._ema = Ema(policy.parameters(), 0.3, growth=0.001)
            if self._saved:
                self._ema.load(self._saved)
                self._saved = {}
        self._ema.update()

    def tensors(self) -> dict[str, Tensor]:
        """The moving average of the policy."""
        return dict(self._saved) if self._ema is None else self._ema.tensors()

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Continue from `tensors`."""
        self._saved, self._ema = dict(tensors), None


def drawn_steps(
    keep: Bool[Tensor, "b t"], count: int, generator: torch.Generator
) -> tuple[Int64[Tensor, " n"], Int64[Tensor, " n"]]:
    """(sample, step) of `count` different kept steps of each sample; all of them where it has fewer."""
    draw = torch.rand(keep.shape, generator=generator, device=keep.device)
    order = draw.masked_fill(~keep, 2.0).argsort(1)[:, :count]
    sample, column = keep.gather(1, order).nonzero().unbind(1)
    return sample, order[sample, column]


def mean_square(difference: Float[Tensor, "n *latent"]) -> Float32[Tensor, " n"]:
    """Mean over the elements of each row of the squares, in float32."""
    return difference.float().flatten(1).square().mean(1)


def matching_log_prob(
    error: Float[Tensor, " n"], level: Float[Tensor, " n"], weighting: str, *, power: float = 0.25
) -> Float[Tensor, " n"]:
    """-w(t) E: "uniform" -E, "t" -t E, "t2" -t^2 E, "huber" -t (sqrt(E + 1e-10) - 1e-5), "ghuber" to another power.

    Args:
        error: E, the mean squared error of the output.
        level: t.
        power: p of "ghuber", -(t / p) ((E + 1e-10)^p - 1e-10^p).
    """
    if weighting == "uniform":
        return -error
    if weighting == "t":
        return -level * error
    if weighting == "t2":
        return -level.square() * error
    if weighting == "huber":
        return -level * ((error + 1e-10).sqrt() - 1e-5)
    return -(level / power) * ((error + 1e-10).pow(power) - 1e-10**power)


def awm(**keys: Any) -> Awm:
    """AWM with the keys of `settings.Awm`."""
    return settings.Awm(**keys).build()


def awm_of(section: settings.Awm) -> Awm:
    """The algorithm that its section describes."""
    return Awm(
        name=section.name,
        settings=section,
        train_guidance=section.train_guidance,
        needs_reference=section.needs_reference,
    )

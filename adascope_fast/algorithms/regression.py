"""Regression on the model's own images, noised anew: AWM (2509.25050) and DiffusionNFT (2509.16117).

`b` samples, `t` steps of the sampler, `n` (sample, noise level) rows. No trajectory is trained. The noised latent is
signal * x0 + sigma * noise; the target is the output with which the model would have guessed x0 exactly: noise - x0 for
flows, the noise for epsilon models, whatever the schedule's x0 table says.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from adascope_fast import ops
from adascope_fast.algorithms import settings
from adascope_fast.algorithms.advantages import GroupRelative
from adascope_fast.algorithms.algorithm import Algorithm, Collector, Context, Loss, Policy, Samples
from adascope_fast.backbone import Ema
from adascope_fast.reference.rows import per_row
from adascope_fast.rollout import OwnNoise, Spread
from adascope_fast.schedules import Schedule


@dataclass(frozen=True)
class Noised:
    """`n` images at a noise level each."""

    x0: Float[Tensor, "b *latent"] | Spread
    noise: Float[Tensor, "n *latent"] | OwnNoise
    """Where images are spread over ranks, what it will be drawn by."""
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

    @classmethod
    def of(cls, x0: Any, noise: OwnNoise, sample_index: Tensor, step: Tensor, *rest: Any, **keys: Any) -> "Noised":
        """With noise for each row that depends neither on the other rows nor on the rank that asks for it."""
        drawn = noise.of(range(len(step)), x0.shape[1:], step.device) if isinstance(x0, Tensor) else noise
        return cls(x0, drawn, sample_index, step, *rest, **keys)

    def __len__(self) -> int:
        return len(self.step)

    def ordered(self, rows: Int64[Tensor, " m"]) -> "Noised":
        """These rows, in their order."""
        old = None if self.old_log_prob is None else self.old_log_prob[rows]
        each = {name: getattr(self, name)[rows] for name in ("sample_index", "step", "advantage")}
        return replace(self, **each, old_log_prob=old, is_live=None, place=rows)

    def held(self, shares: Sequence[Int64[Tensor, " m"]], rank: int) -> "Noised":
        """These rows with their images and their noise."""
        assert isinstance(self.x0, Spread)
        assert isinstance(self.noise, OwnNoise)
        x0 = self.x0.brought([self.sample_index[share] for share in shares])
        noise = self.noise.of(shares[rank].tolist(), x0.shape[1:], self.step.device)
        return replace(self.ordered(shares[rank]), x0=x0, noise=noise, place=None)

    def take(self, rows: Int64[Tensor, " m"] | slice) -> "NoisedBatch":
        """The noised latents of some rows, and what they were made of."""
        sample, step = self.sample_index[rows], self.step[rows]
        assert isinstance(self.noise, Tensor), "`held` draws it"
        x0, noise = self.x0[sample].float(), self.noise[rows if self.place is None else self.place[rows]]
        signal, sigma = (level.to(x0.device, torch.float32)[step] for level in self.schedule.levels())
        return NoisedBatch(
            sample=per_row(signal, x0) * x0 + per_row(sigma, x0) * noise,
            x0=x0,
            x0_coef=self.schedule.x0_coef[step],
            timestep=self.schedule.timesteps[step],
            level=sigma,
            step=step,
            prompt_index=self.prompt_index[sample],
            advantage=self.advantage[rows],
            old_log_prob=None if self.old_log_prob is None else self.old_log_prob[rows],
        )


@dataclass(frozen=True)
class NoisedBatch:
    """What a loss is given of `n` rows; `level` is sigma, the t of flows."""

    sample: Float32[Tensor, "n *latent"]
    x0: Float32[Tensor, "n *latent"]
    x0_coef: Float32[Tensor, "n 2"]
    timestep: Float32[Tensor, " n"]
    level: Float32[Tensor, " n"]
    step: Int64[Tensor, " n"]
    prompt_index: Int64[Tensor, " n"]
    advantage: Float[Tensor, " n"]
    old_log_prob: Float[Tensor, " n"] | None

    @property
    def target(self) -> Float32[Tensor, "n *latent"]:
        """What the model should have said: the output whose guess is x0."""
        of_x, of_output = (per_row(part, self.x0) for part in self.x0_coef.unbind(1))
        return (self.x0 - of_x * self.sample) / of_output

    @property
    def where(self) -> tuple[Tensor, Tensor, Tensor]:
        """What a policy is asked about."""
        return self.sample, self.timestep, self.prompt_index


@dataclass(kw_only=True)
class _Noising(Algorithm):
    """What both share: noise levels among the kept steps, scaled advantages, and a moving average of the policy."""

    settings: Any
    _ema: Ema | None = field(default=None, init=False, repr=False)
    _saved: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def schedule(self, schedule: Schedule) -> Schedule:
        """The sampler as it is; all its steps have noise levels to train at, deterministic ones too."""
        return replace(schedule, is_noised=True)

    @property
    def is_repeatable(self) -> bool:
        """See `Algorithm`."""
        return True

    def average(self, policy: Policy, rows: NoisedBatch) -> Float32[Tensor, "n *latent"]:
        """What the moving average says of the rows, without gradient.

        It exchanges weights in place, so it comes before the output that is differentiated.
        """
        assert self._ema is not None, "`collect` makes it"
        with self._ema.applied():
            return policy.frozen(*rows.where).float()

    def tensors(self) -> dict[str, Tensor]:
        """The moving average of the policy."""
        return dict(self._saved) if self._ema is None else self._ema.tensors()

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Continue from `tensors`."""
        self._saved, self._ema = dict(tensors), None

    def _new_average(self, policy: Policy) -> Ema:
        raise NotImplementedError

    def _follow(self, collector: Collector) -> Ema:
        """Move the average towards the policy. In the first iteration it is the policy."""
        if self._ema is None:
            self._ema = self._new_average(collector.policy)
            if self._saved:
                self._ema.load(self._saved)
                self._saved = {}
        self._ema.update(collector.num_updates)
        return self._ema

    def _drawn(self, samples: Samples, context: Context) -> Noised:
        trajectory = samples.trajectory
        scaled = GroupRelative(self.settings.advantage_scale, self.settings.advantage_clip)
        advantages = scaled(samples.rewards, samples.prompts, 1)[:, 0] / self.settings.advantage_clip
        sample, step = noise_levels(context.keep, self.settings.num_draws, context.generator)
        return Noised.of(
            trajectory.finals(),
            context.noise,
            sample,
            step,
            trajectory.prompt_index,
            trajectory.schedule,
            advantages[sample],
        )

    def _kl(self, policy: Policy, output: Tensor, rows: NoisedBatch) -> Float32[Tensor, " n"]:
        """Mean squared difference from the reference policy's output, differentiable in the output."""
        return mean_square(output.float() - policy.reference(*rows.where, is_guided=False))


@dataclass(kw_only=True)
class Awm(_Noising):
    """See `settings.Awm`."""

    settings: settings.Awm

    def collect(self, collector: Collector) -> Samples:
        """The policy's own images."""
        if self.settings.has_average:
            self._follow(collector)
        return collector()

    def batch(self, samples: Samples, context: Context) -> Noised:
        """`num_draws` noise levels of each image among its kept steps, and noise for each."""
        rows = self._drawn(samples, context)
        if self.settings.kl_weight == 0 and not self.settings.has_average:
            rows = replace(rows, is_live=rows.advantage != 0)
        if context.num_updates > 1:  # the policy will have moved: what it says now is what ratios are to
            rows = replace(rows, old_log_prob=self._old_log_prob(context, rows))
        return rows

    def loss(self, policy: Policy, rows: NoisedBatch, *, is_on_policy: bool, scale: float) -> Loss:
        """PPO's clipped loss of the matching likelihood's ratio, and the penalties."""
        average = self.average(policy, rows) if self.settings.has_average else None
        output = policy.output(*rows.where)
        log_prob = self.log_prob(output, rows)
        old_log_prob = log_prob.detach() if is_on_policy or rows.old_log_prob is None else rows.old_log_prob
        values, ratio = ops.clipped_policy_loss(
            log_prob, old_log_prob, rows.advantage, clip_range=self.settings.clip_range
        )
        told = {"step": rows.step, "ratio": ratio}
        if self.settings.kl_weight:
            kl = self._kl(policy, output, rows)
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

    def _old_log_prob(self, context: Context, rows: Noised) -> Float[Tensor, " n"]:
        return context.of_all(rows, lambda batch: self.log_prob(context.policy.frozen(*batch.where), batch))

    def _new_average(self, policy: Policy) -> Ema:
        return Ema(policy.parameters(), 0.3, growth=0.001)


@dataclass(kw_only=True)
class DiffusionNft(_Noising):
    """See `settings.DiffusionNft`."""

    settings: settings.DiffusionNft

    def collect(self, collector: Collector) -> Samples:
        """Images of the policy's moving average."""
        with self._follow(collector).applied():
            return collector()

    def batch(self, samples: Samples, context: Context) -> Noised:
        """The kept steps of each image, or `num_draws` of them, and noise for each."""
        return self._drawn(samples, context)

    def loss(self, policy: Policy, rows: NoisedBatch, *, is_on_policy: bool, scale: float) -> Loss:
        """The negative-aware loss, and the difference from the reference policy."""
        keys = self.settings
        old = self.average(policy, rows)
        output = policy.output(*rows.where)
        values = keys.advantage_clip * negative_aware_loss(
            output.float(), old, rows.sample, rows.x0, rows.x0_coef, (rows.advantage + 1) / 2, beta=keys.beta
        )
        told = {"step": rows.step, "nonfinite": (~values.detach().isfinite()).float()}
        if keys.kl_weight:
            kl = self._kl(policy, output, rows)
            values, told["kl"] = values + keys.kl_weight * kl, kl.detach()
        return Loss(values, told)

    def _new_average(self, policy: Policy) -> Ema:
        decay, growth, delay = {"none": (0.0, 0.0, 0), "type_1": (0.5, 0.001, 0), "type_2": (0.999, 0.0075, 75)}[
            self.settings.ema_decay_type
        ]
        return Ema(policy.parameters(), decay, growth=growth, delay=delay)


def noise_levels(
    keep: Bool[Tensor, "b t"], num_draws: int | None, generator: torch.Generator
) -> tuple[Int64[Tensor, " n"], Int64[Tensor, " n"]]:
    """(sample, step) of each row: one step from each of `num_draws` equal parts of a sample's kept steps.

    A sample with fewer of them has each once. None: every kept step.
    """
    if num_draws is None:
        sample, step = keep.nonzero().unbind(1)
        return sample, step
    b, device = len(keep), keep.device
    bounds = torch.arange(num_draws + 1, device=device) * keep.sum(1, keepdim=True) // num_draws  # [b, num_draws + 1]
    width = bounds.diff(dim=1)
    dtype = torch.float32 if device.type == "mps" else torch.float64  # which mps has not
    share = torch.rand((b, num_draws), generator=generator, device=device, dtype=dtype)
    sample, part = (width > 0).nonzero().unbind(1)
    rank = bounds[sample, part] + (share * width).long()[sample, part]
    kept_first = (~keep).long().argsort(dim=1, stable=True)
    return sample, kept_first[sample, rank]


def negative_aware_loss(
    output: Float[Tensor, "n *latent"],
    old_output: Float[Tensor, "n *latent"],
    sample: Float[Tensor, "n *latent"],
    x0: Float[Tensor, "n *latent"],
    x0_coef: Float[Tensor, "n 2"],
    optimality: Float[Tensor, " n"],
    *,
    beta: float,
) -> Float[Tensor, " n"]:
    """(r D(x0+) + (1 - r) D(x0-)) / beta, with D the squared distance from x0 over the absolute one, taken as fixed.

    A guess is affine in the output, so the guesses x0+- of v_old +- beta (v - v_old) are those of v_old and as much
    to either side.

    Args:
        output: v, at the noised `sample`.
        old_output: v_old; no gradient flows to it.
        x0: what was noised.
        x0_coef: weights of (sample, output) in the guess of x0.
        optimality: r in [0, 1].
    """
    of_x, of_output = (per_row(part, x0) for part in x0_coef.unbind(1))
    guess = of_x * sample + of_output * old_output.detach()
    change = beta * of_output * (output - old_output.detach())

    def distance(guess: Tensor) -> Tensor:
        error = (guess - x0).flatten(1)
        return error.square().mean(1) / error.detach().abs().mean(1).clamp(min=1e-5)

    return (optimality * distance(guess + change) + (1 - optimality) * distance(guess - change)) / beta


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
    return Awm(**_shared(section))


def diffusion_nft(**keys: Any) -> DiffusionNft:
    """DiffusionNFT with the keys of `settings.DiffusionNft`."""
    return settings.DiffusionNft(**keys).build()


def diffusion_nft_of(section: settings.DiffusionNft) -> DiffusionNft:
    """The algorithm that its section describes."""
    return DiffusionNft(**_shared(section))


def _shared(section: Any) -> dict[str, Any]:
    return {
        "name": section.name,
        "settings": section,
        "train_guidance": section.train_guidance,
        "needs_reference": section.needs_reference,
    }

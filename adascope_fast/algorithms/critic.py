"""Policy gradients whose baseline is a value critic: DPOK (2305.16381), and TDPO with its neuron reset (2402.08552).

`b` samples, `t` steps, `n` (sample, step) pairs, `f` features. A critic sees the noisy latent (averaged to 8 x 8 at
most), the prompt's embedding (averaged over its tokens) and the timestep, and predicts the standardised reward of the
image that comes of them. TDPO's may see the picture that the noisy latent decodes to instead, as the original's does.
"""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float32
from torch import Tensor, nn

from adascope_fast.algorithms import settings
from adascope_fast.algorithms.advantages import Whiten, tracked
from adascope_fast.algorithms.algorithm import Context, Samples
from adascope_fast.algorithms.objectives import Clipped, clipped_value_loss
from adascope_fast.algorithms.policy_gradient import PolicyGradient, clipped, shared_by
from adascope_fast.backbone import in_double
from adascope_fast.loading import load_optimizer_tensors, optimizer_tensors, prefixed, select
from adascope_fast.rollout import Trajectory

SIDE = 8  # of the latents that the critic sees


@dataclass(kw_only=True)
class WithCritic(PolicyGradient):
    """A policy gradient with a critic, which is made at its first use and resumes where it was."""

    _critic: nn.Sequential | None = field(default=None, init=False, repr=False)
    _optimizer: torch.optim.Optimizer | None = field(default=None, init=False, repr=False)
    _saved: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    @abstractmethod
    def layers(self, num_features: int) -> nn.Sequential:
        """A critic as it begins; what is random in it is drawn from torch's generator."""

    @abstractmethod
    def optimizer(self, critic: nn.Sequential) -> torch.optim.Optimizer:
        """What trains it."""

    def _made(self, num_features: int, device: torch.device) -> nn.Sequential:
        if self._critic is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                self._critic = self.layers(num_features).to(device)
            self._optimizer = self.optimizer(self._critic)
            if self._saved:
                self._critic.load_state_dict(select(self._saved, "critic"))
                load_optimizer_tensors(self._optimizer, select(self._saved, "optimizer"))
                self._saved = {}
        return self._critic

    def tensors(self) -> dict[str, Tensor]:
        """Critic and its optimiser's moments."""
        if self._critic is None or self._optimizer is None:
            return dict(self._saved)
        found = prefixed(self._critic.state_dict(), "critic")
        return found | prefixed(optimizer_tensors(self._optimizer), "optimizer")

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Continue from `tensors`; the critic is made at its next use, when the size of a latent is known."""
        self._saved, self._critic, self._optimizer = dict(tensors), None, None


@dataclass(kw_only=True)
class Dpok(WithCritic):
    """A policy gradient with the critic's estimate as the baseline of each step."""

    settings: settings.Dpok
    _buffer: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def advantages(self, samples: Samples, context: Context) -> Float[Tensor, "b t"]:
        """Standardised reward minus the critic's estimate at each step, after the critic has learned of the samples."""
        trajectory = samples.trajectory
        target = self.advantage(samples.rewards, samples.prompts, 1)[:, 0]
        seen = trajectory.over(lambda own, _: features(own, context))
        critic = self._made(seen.shape[-1], seen.device)
        self._remember(seen, target)
        self._train(context.generator)
        with torch.no_grad():
            values = critic(seen)[..., 0]
        return (target[:, None] - values).clamp(-self.settings.advantage_clip, self.settings.advantage_clip)

    def _remember(self, seen: Float32[Tensor, "b t f"], target: Float32[Tensor, " b"]) -> None:
        new = {"seen": seen, "target": target}
        old = {name: self._buffer.get(name, value[:0]).to(value.device) for name, value in new.items()}
        self._buffer = {name: torch.cat([old[name], new[name]])[-self.settings.buffer_size :] for name in new}

    def _train(self, generator: torch.Generator) -> None:
        assert self._critic is not None
        assert self._optimizer is not None
        seen, target = self._buffer["seen"], self._buffer["target"]
        m, t = seen.shape[:2]
        for _ in range(self.settings.value_steps):
            draw = torch.randint(
                m * t, (min(self.settings.value_batch, m * t),), generator=generator, device=seen.device
            )
            rows, wanted = seen.flatten(0, 1)[draw], target[draw // t]
            with torch.enable_grad():
                loss = F.mse_loss(self._critic(rows)[:, 0], wanted)
                self._optimizer.zero_grad(set_to_none=True)
                loss.backward()
            self._optimizer.step()

    def layers(self, num_features: int) -> nn.Sequential:
        """The critic, which is zero at first: its output layer starts at 0."""
        layers = [nn.Linear(num_features, self.settings.value_width), nn.SiLU()]
        layers += [nn.Linear(self.settings.value_width, self.settings.value_width), nn.SiLU()]
        output = nn.Linear(self.settings.value_width, 1)
        nn.init.zeros_(output.weight)
        nn.init.zeros_(output.bias)
        return nn.Sequential(*layers, output)

    def optimizer(self, critic: nn.Sequential) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(critic.parameters(), lr=self.settings.value_learning_rate)

    def tensors(self) -> dict[str, Tensor]:
        """Critic, its optimiser's moments, and what it is trained on."""
        return super().tensors() | prefixed(self._buffer, "buffer")

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Continue from `tensors`."""
        super().load_tensors(tensors)
        self._buffer = select(tensors, "buffer")


WIDTHS = (1024, 128, 64, 16, 1)
DROPOUT = (0.2, 0.2, 0.1, 0.0, 0.0)
"""Of TDPO's critic: units of its layers, and the share of them that is left out in training."""
WEIGHT_DECAY, MAX_GRAD_NORM = 1e-4, 1.0
"""Of its optimiser, as in the original."""


@dataclass(kw_only=True)
class Tdpo(WithCritic):
    """A policy gradient whose advantages are temporal: what a step's return is above the critic's estimate of it."""

    settings: settings.Tdpo
    encode: Callable[[Tensor], Tensor] | None = None
    """Vectors [n, f] of pictures [n, 3, h, w], which the critic sees in place of latents."""
    _num_iterations: int = field(default=0, init=False, repr=False)

    def advantages(self, samples: Samples, context: Context) -> Float[Tensor, "b t"]:
        """Temporal rewards, standardised over the kept steps; then the critic learns of these, and may be reset."""
        final = self.advantage(samples.rewards, samples.prompts, 1)[:, 0]
        seen = self._seen(samples, context)
        critic, keep = self._made(seen.shape[-1], seen.device), context.keep.to(seen.device)
        with torch.no_grad():
            values = critic(seen)[..., 0]
        target = returns(final.to(seen.device), samples.trajectory.num_steps, self.settings.gamma)
        self._learn(seen[keep], values[keep], target[keep], context.generator)
        self._num_iterations += 1
        if self.settings.reset_every and self._num_iterations % self.settings.reset_every == 0:
            self._reset(seen[keep])
        clip = self.settings.advantage_clip
        return standardised(target - values, keep).clamp(-clip, clip)

    def _seen(self, samples: Samples, context: Context) -> Float32[Tensor, "b t f"]:
        if self.settings.critic_features == "latents":
            return samples.trajectory.over(lambda own, _: features(own, context))
        if self.encode is None:
            raise ValueError(
                'critic_features = "images" needs an encoder of pictures, got none; give algorithm.encode one, such as '
                "ClipSimilarity.load(...).embed_images, or name algorithm.critic_clip in a configuration"
            )
        return samples.trajectory.over(lambda own, rows: self._of_images(own, context.keep[rows], context))

    def _of_images(self, own: Trajectory, keep: Bool[Tensor, "m t"], context: Context) -> Float32[Tensor, "m t f"]:
        """Vectors of the pictures that the kept states decode to, zero elsewhere; of one rank's samples."""
        assert self.encode is not None
        latents, size = own.latents[:, :-1], context.microbatch
        sample, step = keep.to(latents.device).nonzero().unbind(1)
        if not len(sample):  # nothing is kept of them: one state tells how long a vector is
            sample = step = torch.zeros(1, dtype=torch.int64, device=latents.device)
        parts = [latents[b, t] for b, t in zip(sample.split(size), step.split(size), strict=True)]
        found = torch.cat([self.encode(context.policy.decode(part)).float() for part in parts])
        seen = found.new_zeros(*latents.shape[:2], found.shape[1])
        seen[sample, step] = found
        return seen * keep.to(seen.device)[..., None]

    def _learn(
        self,
        seen: Float32[Tensor, "n f"],
        old: Float32[Tensor, " n"],
        target: Float32[Tensor, " n"],
        generator: torch.Generator,
    ) -> None:
        """Go through the pairs once, in parts."""
        assert self._critic is not None
        assert self._optimizer is not None
        order = torch.randperm(len(seen), generator=generator, device=seen.device)
        for part in order.tensor_split(min(self.settings.value_steps, len(order))):
            with torch.enable_grad():
                x = seen[part]
                for layer, share in zip(self._critic, DROPOUT, strict=True):
                    x = layer(x)
                    if share:
                        drawn = torch.rand(x.shape, generator=generator, device=x.device)
                        x = x * (drawn >= share) / (1 - share)
                loss = clipped_value_loss(x[:, 0], old[part], target[part], self.settings.value_clip).mean()
                self._optimizer.zero_grad(set_to_none=True)
                loss.backward()
            nn.utils.clip_grad_norm_(self._critic.parameters(), MAX_GRAD_NORM)
            self._optimizer.step()

    @torch.no_grad()
    def _reset(self, seen: Float32[Tensor, "n f"]) -> None:
        """Draw the weights to and from the neurons that are to be reset anew, and forget their moments."""
        assert self._critic is not None
        assert self._optimizer is not None
        generator, std = torch.Generator().manual_seed(self._num_iterations), 1 / (seen.shape[1] + 1)
        moments, masks, x = self._optimizer.state, [], seen
        for layer in self._critic[:-1]:
            x = layer(x)
            is_active = is_active_neuron(x)
            masks.append(is_active if self.settings.reset_neurons == "active" else ~is_active)
        for number, mask in enumerate(masks):
            incoming: Any = self._critic[number]
            outgoing: Any = self._critic[number + 1]
            for weight, own in ((incoming.weight, mask[:, None]), (outgoing.weight, mask[None])):
                drawn = std * torch.randn(weight.shape, generator=generator).to(weight)
                weight.copy_(torch.where(own, drawn, weight))
            incoming.bias.masked_fill_(mask, 0)
            for name in ("exp_avg", "exp_avg_sq"):
                moments[incoming.weight][name].masked_fill_(mask[:, None], 0)
                moments[incoming.bias][name].masked_fill_(mask, 0)
                moments[outgoing.weight][name].masked_fill_(mask[None], 0)

    def layers(self, num_features: int) -> nn.Sequential:
        """The original's critic, which has no nonlinearity: weights of std 1 / (f + 1), biases of 0."""
        layers = [nn.Linear(*sizes) for sizes in zip((num_features, *WIDTHS), WIDTHS, strict=False)]
        for layer in layers:
            nn.init.normal_(layer.weight, std=1 / (num_features + 1))
            nn.init.zeros_(layer.bias)
        return nn.Sequential(*layers)

    def optimizer(self, critic: nn.Sequential) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(
            critic.parameters(), lr=self.settings.value_learning_rate, weight_decay=WEIGHT_DECAY, foreach=False
        )

    def state_dict(self) -> dict[str, Any]:
        """That of the advantage, and how often the critic has learned."""
        return super().state_dict() | {"num_iterations": self._num_iterations}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self._num_iterations = int(state["num_iterations"])
        super().load_state_dict({name: value for name, value in state.items() if name != "num_iterations"})


def returns(final: Float[Tensor, " b"], num_steps: int, gamma: float) -> Float[Tensor, "b t"]:
    """Discounted return of each step, where the last one alone is rewarded."""
    left = in_double(torch.arange(num_steps - 1, -1, -1, device=final.device))
    return final[:, None] * (gamma**left).to(final.dtype).to(final.device)


def standardised(values: Float[Tensor, "b t"], keep: Bool[Tensor, "b t"]) -> Float[Tensor, "b t"]:
    """(value - mean) / (std + 1e-8) over the kept ones, with the population's std; 0 elsewhere."""
    kept = in_double(values[keep])
    whole = (in_double(values) - kept.mean()) / (kept.std(correction=0) + 1e-8)
    return torch.where(keep, whole.to(values.dtype).to(values.device), 0.0)


def is_active_neuron(activation: Float[Tensor, "n k"]) -> Bool[Tensor, " k"]:
    """Neurons whose mean positive activation over the mean of all of them is above 0; the others are dormant."""
    score = activation.relu().mean(0)
    return score / (score.mean() + 1e-9) > 0


def features(trajectory: Trajectory, context: Context) -> Float32[Tensor, "b t f"]:
    """What the critic sees of each state that enters a step; zeros for states that were not sampled."""
    latents, timesteps = trajectory.latents[:, :-1], trajectory.schedule.timesteps
    b, t = latents.shape[:2]
    side = min(SIDE, *latents.shape[-2:])
    small = F.adaptive_avg_pool2d(latents.flatten(0, 1).float().nan_to_num(0.0, 0.0, 0.0), side).view(b, t, -1)
    text = [part.float().flatten(1, -2).mean(1) if part.dim() > 2 else part.float() for part in _floating(context)]
    said = torch.cat(text, 1)[trajectory.prompt_index]
    time = timesteps.float()[:, None] / 1000
    angles = time * torch.tensor([1.0, 2.0, 4.0, 8.0], device=time.device) * torch.pi
    clock = torch.cat([time, angles.sin(), angles.cos()], 1)
    return torch.cat([small, said[:, None].expand(b, t, -1), clock[None].expand(b, t, -1)], 2)


def _floating(context: Context) -> list[Tensor]:
    return [part for part in context.policy.condition().values() if part.is_floating_point()]


def dpok(**keys: Any) -> Dpok:
    """DPOK with the keys of `settings.Dpok`."""
    return settings.Dpok(**keys).build()


def dpok_of(section: settings.Dpok) -> Dpok:
    """The algorithm that its section describes."""
    return Dpok(
        **shared_by(section),
        advantage=Whiten(advantage_clip=float("inf")),
        objective=Clipped(section.clip_range, section.clip_range_high, "dpok"),
        settings=section,
    )


def tdpo(**keys: Any) -> Tdpo:
    """TDPO with the keys of `settings.Tdpo`; by default TDPO-R."""
    return settings.Tdpo(**keys).build()


def tdpo_of(section: settings.Tdpo) -> Tdpo:
    """The algorithm that its section describes."""
    return Tdpo(
        **shared_by(section),
        advantage=tracked(section, advantage_clip=float("inf")),
        objective=clipped(section),
        settings=section,
    )

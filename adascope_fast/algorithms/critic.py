"""DPOK (Fan et al. 2023, 2305.16381): a policy gradient whose baseline is a value critic, with a two-sided clip and KL.

`b` samples, `t` steps. The critic sees the noisy latent (averaged to 8 x 8 at most), the prompt's embedding (averaged
over its tokens) and the timestep, and predicts the standardised reward of the image that comes of them.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32
from torch import Tensor, nn

from adascope_fast.algorithms import settings
from adascope_fast.algorithms.advantages import Whiten
from adascope_fast.algorithms.algorithm import Context, Samples
from adascope_fast.algorithms.objectives import Clipped
from adascope_fast.algorithms.policy_gradient import PolicyGradient, shared_by
from adascope_fast.loading import load_optimizer_tensors, optimizer_tensors, prefixed, select

SIDE = 8  # of the latents that the critic sees


@dataclass(kw_only=True)
class Dpok(PolicyGradient):
    """A policy gradient with the critic's estimate as the baseline of each step."""

    settings: settings.Dpok
    _critic: nn.Sequential | None = field(default=None, init=False, repr=False)
    _optimizer: torch.optim.Adam | None = field(default=None, init=False, repr=False)
    _buffer: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    _saved: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def advantages(self, samples: Samples, context: Context) -> Float[Tensor, "b t"]:
        """Standardised reward minus the critic's estimate at each step, after the critic has learned of the samples."""
        trajectory = samples.trajectory
        target = self.advantage(samples.rewards, samples.prompts, 1)[:, 0]
        seen = features(trajectory.latents[:, :-1], trajectory.schedule.timesteps, context, trajectory.prompt_index)
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

    def _made(self, num_features: int, device: torch.device) -> nn.Sequential:
        """The critic, which is zero at first: its output layer starts at 0."""
        if self._critic is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                layers = [nn.Linear(num_features, self.settings.value_width), nn.SiLU()]
                layers += [nn.Linear(self.settings.value_width, self.settings.value_width), nn.SiLU()]
                output = nn.Linear(self.settings.value_width, 1)
            nn.init.zeros_(output.weight)
            nn.init.zeros_(output.bias)
            self._critic = nn.Sequential(*layers, output).to(device)
            self._optimizer = torch.optim.Adam(self._critic.parameters(), lr=self.settings.value_learning_rate)
            self._restore()
        return self._critic

    def tensors(self) -> dict[str, Tensor]:
        """Critic, its optimiser's moments, and what it is trained on."""
        if self._critic is None or self._optimizer is None:
            return dict(self._saved)
        found = prefixed(self._critic.state_dict(), "critic") | prefixed(self._buffer, "buffer")
        return found | prefixed(optimizer_tensors(self._optimizer), "optimizer")

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Continue from `tensors`; the critic is made at its next use, when the size of a latent is known."""
        self._saved, self._critic, self._optimizer = dict(tensors), None, None
        self._buffer = select(tensors, "buffer")

    def _restore(self) -> None:
        assert self._critic is not None
        assert self._optimizer is not None
        if not self._saved:
            return
        self._critic.load_state_dict(select(self._saved, "critic"))
        load_optimizer_tensors(self._optimizer, select(self._saved, "optimizer"))
        self._saved = {}


def features(
    latents: Float[Tensor, "b t *latent"], timesteps: Float32[Tensor, " t"], context: Context, prompt_index: Tensor
) -> Float32[Tensor, "b t f"]:
    """What the critic sees of each state that enters a step; zeros for states that were not sampled."""
    b, t = latents.shape[:2]
    side = min(SIDE, *latents.shape[-2:])
    small = F.adaptive_avg_pool2d(latents.flatten(0, 1).float().nan_to_num(0.0, 0.0, 0.0), side).view(b, t, -1)
    text = [part.float().flatten(1, -2).mean(1) if part.dim() > 2 else part.float() for part in _floating(context)]
    said = torch.cat(text, 1)[prompt_index]
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

"""How a step-aware preference model learns: Bradley-Terry on pairs of images of a prompt, noised to the same level.

As SPO trains its own from pairs of Pick-a-Pic, with two differences: the images are the model's, ranked by a reward,
and every two images of a prompt that the reward tells apart are a pair. Each image of a pair has its own noise.

Axes: `b` images, `p` pairs, `s` states of a rollout that follow a step, `n` noised images.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int64
from torch import Tensor, nn

from adascope_fast.backbone import Condition, take
from adascope_fast.preferences.model import StepAwareModel
from adascope_fast.reference.rows import per_row
from adascope_fast.rollout import Candidates, EncodedPrompts
from adascope_fast.schedules import Schedule


@dataclass(frozen=True)
class RatedImages:
    """Images with their rewards, and the noise that the states of a rollout have."""

    clean: Float[Tensor, "b *latent"]
    rewards: Float32[Tensor, " b"]
    prompt_index: Int64[Tensor, " b"]
    condition: Condition
    schedule: Schedule

    @classmethod
    def of(
        cls, clean: Tensor, rewards: Tensor, prompts: list[str], encoded: EncodedPrompts, schedule: Schedule
    ) -> "RatedImages":
        """Of images whose prompts are all encoded."""
        return cls(clean, rewards, encoded.index(prompts, clean.device), encoded.condition, schedule)

    def pairs(self) -> Int64[Tensor, "p 2"]:
        """(better, worse): every two images of a prompt whose rewards differ."""
        is_better = self.rewards[:, None] > self.rewards[None, :]
        return (is_better & (self.prompt_index[:, None] == self.prompt_index[None, :])).nonzero()

    def levels(self) -> tuple[Float32[Tensor, " s"], Float32[Tensor, " s"], Float32[Tensor, " s"]]:
        """(signal, sigma, timestep) of the states that steps lead to: the last is the image."""
        signal, sigma = (level[1:].to(self.clean.device, torch.float32) for level in self.schedule.levels())
        ends = signal.new_ones(1), signal.new_zeros(1), signal.new_zeros(1)
        parts = zip((signal, sigma, self.schedule.timesteps[1:].float()), ends, strict=True)
        return tuple(torch.cat(part) for part in parts)  # type: ignore[return-value]

    def noised(self, images: Int64[Tensor, " n"], state: Int64[Tensor, " n"], noise: Tensor) -> Candidates:
        """Some images as noisy as these states."""
        signal, sigma, timestep = (level[state] for level in self.levels())
        clean = self.clean[images].float()
        sample = per_row(signal, clean) * clean + per_row(sigma, clean) * noise
        return Candidates(sample, timestep, take(self.condition, self.prompt_index[images]), [], lambda: sample)


def fit(
    model: StepAwareModel,
    judged: RatedImages,
    *,
    num_steps: int,
    batch: int,
    learning_rate: float,
    generator: torch.Generator,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> None:
    """Train `model` with AdamW on `num_steps` batches of `batch` pairs, each at a state drawn for it.

    ValueError where the reward tells no two images of a prompt apart.
    """
    pairs = judged.pairs()
    if not len(pairs):
        raise ValueError(
            "a preference model learns from images of a prompt that the reward tells apart, got none; ask for more "
            "images with --samples and --prompts, or use another reward"
        )
    model.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.05)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=num_steps + 1)
    device, num_states = judged.clean.device, judged.schedule.num_steps
    for step in range(num_steps):
        chosen = pairs[torch.randint(len(pairs), (batch,), generator=generator, device=device)].T.flatten()
        state = torch.randint(num_states, (batch,), generator=generator, device=device).repeat(2)
        noise = torch.randn((2 * batch, *judged.clean.shape[1:]), generator=generator, device=device)
        better, worse = model(judged.noised(chosen, state, noise)).view(2, -1)
        loss = F.softplus(worse - better).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        on_step(step, loss.item())
    model.requires_grad_(False).eval()


@torch.no_grad()
def held_out_accuracy(
    model: StepAwareModel, judged: RatedImages, *, batch: int, generator: torch.Generator
) -> tuple[list[float], int]:
    """(share of the pairs that are ranked as the reward does, at each state from noise to image; number of pairs)."""
    pairs, found = judged.pairs(), []
    device = judged.clean.device
    for state in range(judged.schedule.num_steps):
        right = 0
        for part in pairs.split(batch):
            noise = torch.randn((2 * len(part), *judged.clean.shape[1:]), generator=generator, device=device)
            at = torch.full((2 * len(part),), state, device=device)
            better, worse = model(judged.noised(part.T.flatten(), at, noise)).view(2, -1)
            right += int((better > worse).sum())
        found.append(right / max(1, len(pairs)))
    return found, len(pairs)

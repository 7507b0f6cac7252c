"""TRL's mathematics as one would write it today in plain diffusers, peft and PyTorch, with nothing of ours.

The loop of bench/baselines/eager.py (SDPA attention, guidance in one call, no sync in rollout and update, one denoiser
call a timestep, every step trained), with DDPO's statistics by caption and several updates of an iteration.
"""

import statistics
from collections import defaultdict, deque
from dataclasses import replace
from pathlib import Path
from sys import path

import torch
from loop import Setting, scene_attributes, train
from peft.utils import get_peft_model_state_dict
from torch import Tensor

path.insert(0, str(Path(__file__).parents[3] / "bench" / "baselines"))
import common  # pyright: ignore[reportMissingImports]
from eager import Eager  # pyright: ignore[reportMissingImports]


class ByCaption:
    """(reward - mean) / (std + 1e-6) over the last rewards of the same caption, of the batch where they are few."""

    def __init__(self, buffer_size: int, min_count: int) -> None:
        self._min_count = min_count
        self._rewards: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=buffer_size))

    def __call__(self, captions: list[str], rewards: Tensor) -> Tensor:
        """Remember these, then compare each with those of its caption."""
        batch = rewards.tolist()
        for caption, reward in zip(captions, batch, strict=True):
            self._rewards[caption].append(reward)
        found = []
        for caption, reward in zip(captions, batch, strict=True):
            known = self._rewards[caption] if len(self._rewards[caption]) >= self._min_count else batch
            found.append((reward - statistics.fmean(known)) / (statistics.pstdev(known) + 1e-6))
        return torch.tensor(found).clamp(-5, 5)


class EagerDdpo(Eager):
    """Rollout, reward and updates of an iteration."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(
            common.Setting(
                folder=setting.model, family="sd", num_steps=setting.num_steps, batch=setting.images,
                guidance_scale=setting.guidance_scale, noise=setting.noise, lora_rank=setting.lora_rank,
                learning_rate=setting.learning_rate, clip_range=setting.clip_range, seed=setting.seed,
            )
        )  # fmt: skip
        self._updates = setting.updates
        self.reward = scene_attributes()
        self.advantages = ByCaption(setting.buffer_size, setting.min_count)

    def learn(self, captions: list[str]) -> tuple[int, float]:
        """One iteration; (pairs trained, mean reward)."""
        num_steps, count = self.setting.num_steps, len(captions)
        condition = self.encode(captions)
        latents, log_prob = self.rollout(condition, count, self.noisy)
        rewards = self.reward(self.decode(latents[:, -1]), captions)
        advantage = self.advantages(captions, rewards)
        for rows in torch.randperm(count).chunk(self._updates):
            both = rows if self.setting.guidance_scale == 1 else torch.cat([rows, rows + count])
            mine = [value[both] for value in condition]
            self.backward(mine, latents[rows], log_prob[rows], advantage[rows], self.noisy, range(num_steps))
            torch.nn.utils.clip_grad_norm_(self.parameters, self.setting.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return count * num_steps, rewards.mean().item()


def main() -> None:
    """Train once."""
    setting = Setting.of_arguments()
    torch.set_num_threads(1)
    torch.manual_seed(setting.seed)
    loop = EagerDdpo(replace(setting))
    train(setting, loop.learn, lambda: get_peft_model_state_dict(loop.denoiser))


if __name__ == "__main__":
    main()

"""This engine, as its own command trains: the configuration of the setting, with what sets an arm apart."""

import logging
from pathlib import Path
from typing import Any

from loop import Kept, Setting
from safetensors.torch import load_file

from adascope_fast import Config, Trainer
from adascope_fast.training.checkpoint import TENSORS, select


def configuration(setting: Setting) -> Config:
    """What the setting says in our words; the held-out reward is not measured here, so it is told of one image."""
    values: dict[str, dict[str, Any]] = {
        "run": {"folder": str(Path(setting.out) / "run"), "seed": setting.seed},
        "model": {"name": setting.model, "lora_rank": setting.lora_rank, "ema_decay": 0},
        "reward": {"name": "scene_attributes"},
        "sampler": {"num_steps": setting.num_steps, "guidance_scale": setting.guidance_scale},
        "train": {
            "iterations": setting.max_iterations,
            "prompts_per_iteration": setting.groups,
            "samples_per_prompt": setting.group_size,
            "learning_rate": setting.learning_rate,
            "updates_per_iteration": setting.updates,
            "minibatch": "samples",
            "rollout_batch": setting.images,
            "microbatch": setting.images,
            "keep_checkpoints": 1,
            "device": "cpu",
        },
        "evaluation": {"num_prompts": 1, "samples_per_prompt": 1, "grid_prompts": 1},
        "log": {"trackers": []},
    }
    return Config.model_validate(values).changed(setting.changes)


class Keeps:
    """Follows a run: keeps the weights at the marks and ends it when the seconds are spent."""

    def __init__(self, setting: Setting) -> None:
        self.kept, self.seconds = Kept(setting), {}
        self._is_wanted, self._reward = False, 0.0

    def on_iteration(self, record: dict[str, Any]) -> str | None:
        """`record` is the iteration's line of the log."""
        for part, seconds in record["seconds"].items():
            self.seconds[part] = self.seconds.get(part, 0.0) + seconds
        self._reward = record["reward_mean"]
        self._is_wanted = self.kept.add(
            cpu_seconds=record["cpu_seconds"], pairs=record["pairs_trained"], images=self.kept.setting.images
        )
        return "stop" if self.kept.is_spent else None

    def on_checkpoint(self, path: Path) -> None:
        """Written after every iteration; `add` says which are kept."""
        if self._is_wanted:
            self.kept.keep(select(load_file(path / TENSORS), "adapter"), reward=self._reward)


def main() -> None:
    """Train once."""
    setting = Setting.of_arguments()
    logging.disable(logging.WARNING)
    keeps = Keeps(setting)
    trainer = Trainer(
        configuration(setting), train_prompts=setting.prompts, held_out_prompts=[setting.other_prompt],
        callbacks=[keeps], quiet=True,
    )  # fmt: skip
    trainer.train(overwrite=True)
    keeps.kept.finish(wall_seconds=keeps.seconds)


if __name__ == "__main__":
    main()

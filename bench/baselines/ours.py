"""Ours, as `Trainer` sets it up from a configuration; options: "config", the keys that differ, section by section."""

from typing import Any

import torch
from common import Clock, NotBuiltError, Setting, Variant, load_reward, serve
from pydantic import ValidationError

from adascope_fast.algorithms.policy_gradient import Pairs
from adascope_fast.config import Config
from adascope_fast.engine.engine import Engine
from adascope_fast.rollout import OwnNoise, PromptCache, rollout
from adascope_fast.selectors.simple import EveryStep, StaticRange
from adascope_fast.training.trainer import Trainer


class Ours(Variant):
    """One `Engine.step`: encode, rollout, reward, selection, update."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        torch.backends.cuda.matmul.allow_tf32 = True  # as TRL and the eager loop have it
        trainer = Trainer(
            configuration(setting), reward=load_reward(), train_prompts=["a"], held_out_prompts=["b"], quiet=True
        )
        trainer.prepare()
        self.backbone, self.engine = trainer.backbone, trainer.engine
        self.encode = PromptCache(trainer.backbone)
        self._number = 0

    def iterate(self, prompts: list[str], keep: tuple[int, int] | None, clock: Clock) -> dict[str, Any]:
        """One iteration on one picture of each prompt."""
        every = EveryStep(last_step="train")  # as TRL and the eager loop, on flows too
        self.engine.selector = every if keep is None else StaticRange(start=keep[0], end=keep[1])
        time_parts(self.engine, clock)
        with clock("encode"):
            encoded = self.encode(prompts)
        report = self.engine.step(encoded, prompts, iteration=self._number, seed=self._number)
        self._number += 1
        values = report.values
        return {
            "images": len(prompts),
            "pairs": values["pairs_trained"],
            "forwards": values["forwards_sampled"],
            "ratio_deviation": values["ratio_max_deviation"],
            "rollout_drift": values.get("rollout_drift"),
        }

    def sweep(self, prompts: list[str], keeps: list[list[int]]) -> list[Clock]:
        """One rollout, then `Engine.update` on each interval."""
        engine, setting, clocks = self.engine, self.setting, []
        encoded, generator = self.encode(prompts), torch.Generator(setting.device).manual_seed(setting.seed)
        trajectory = rollout(
            self.backbone,
            engine.schedule,
            encoded,
            prompts,
            guidance_scale=setting.guidance_scale,
            noise=OwnNoise(setting.seed),
            batch=setting.batch,
        )
        for start, end in keeps:
            keep = torch.zeros_like(trajectory.log_prob, dtype=torch.bool)
            keep[:, start:end] = True
            advantages = torch.randn(trajectory.log_prob.shape, generator=generator, device=setting.device)
            clocks.append(Clock(setting.device))
            with clocks[-1]("update"):
                pairs = trajectory.pairs(keep)
                rows = Pairs(trajectory, pairs, advantages[pairs[:, 0], pairs[:, 1]], None)
                engine.update(engine.policy(encoded, engine.schedule), rows, trajectory.num_steps, generator)
        return clocks

    def tokens(self, prompt: str) -> list[int]:
        """Padded to the model's length."""
        tokenizer = self.backbone.pipeline.tokenizer
        return tokenizer(prompt, padding="max_length", max_length=tokenizer.model_max_length).input_ids


def configuration(setting: Setting) -> Config:
    """The configuration of a setting; NotBuiltError where it names a key that does not exist."""
    values: dict[str, dict[str, Any]] = {
        "model": {"name": setting.folder, "lora_rank": setting.lora_rank, "dtype": setting.dtype},
        "reward": {"name": "jpeg_compressibility"},
        "sampler": {"num_steps": setting.num_steps, "guidance_scale": setting.guidance_scale},
        "algorithm": {"name": "ddpo", "clip_range": setting.clip_range},
        "selector": {"name": "every_step", "last_step": "train"},
        "train": {
            "prompts_per_iteration": setting.batch,
            "samples_per_prompt": 1,
            "rollout_batch": setting.batch,
            # On the CPU a forward of several timesteps is the faster; a GPU is busy with one.
            "microbatch": setting.batch * (1 if setting.device == "cuda" else 5),
            "learning_rate": setting.learning_rate,
            "max_grad_norm": setting.max_grad_norm,
            "mixed_precision": "bf16" if setting.dtype == "bfloat16" else "no",
            "device": setting.device,
        },
        "log": {"trackers": []},
    }
    values["sampler"]["noise_level" if setting.family == "sd3" else "eta"] = setting.noise
    for section, keys in setting.options.get("config", {}).items():
        values.setdefault(section, {}).update(keys)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        unknown = [one["loc"] for one in error.errors() if one["type"] == "extra_forbidden"]
        if unknown:  # a place is (section, choice where there is one, key)
            keys = ", ".join(f"{place[0]}.{place[-1]}" for place in unknown)
            raise NotBuiltError(f"not built: no key {keys}") from None
        raise


def time_parts(engine: Engine, clock: Clock) -> None:
    """Have the engine's parts timed by `clock` too: the engine's own report has no CPU seconds."""
    engine._part = clock  # type: ignore[method-assign]


if __name__ == "__main__":
    serve(Ours)

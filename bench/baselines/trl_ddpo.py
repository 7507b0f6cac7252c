"""B0: `trl==0.23.1`, DDPOTrainer as shipped, the last release that has it. Runs in TRL's own environment.

Only options of its own are used: `mixed_precision="no"` in float32, and `accelerator_kwargs={"cpu": True}` where there
is no GPU. LoRA (rank 4 on the attention projections) is built into `DefaultDDPOStableDiffusionPipeline`. The subclass
below measures time and the ratio; it changes nothing that is computed.
"""

import tempfile
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from common import Clock, NotBuiltError, Setting, Variant, load_reward, serve
from transformers_4 import for_transformers_4
from trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline


class Timed(DDPOTrainer):
    """TRL's trainer with a clock around its parts."""

    clock: Clock
    deviation: torch.Tensor

    def _generate_samples(self, *args: Any, **kwargs: Any) -> Any:
        with self.clock("rollout"):
            return super()._generate_samples(*args, **kwargs)

    def _train_batched_samples(self, *args: Any, **kwargs: Any) -> Any:
        with self.clock("update"):
            return super()._train_batched_samples(*args, **kwargs)

    def loss(self, advantages: torch.Tensor, clip_range: float, ratio: torch.Tensor) -> torch.Tensor:
        self.deviation = torch.maximum(self.deviation, (ratio.detach() - 1).abs().max())
        return super().loss(advantages, clip_range, ratio)


class TrlDdpo(Variant):
    """One epoch of TRL: `batch` pictures, one optimiser step."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        if setting.family != "sd":
            raise NotBuiltError("TRL's DDPO trains Stable Diffusion 1.x and 2.x")
        if setting.lora_rank != 4:
            raise NotBuiltError(f"TRL's LoRA has rank 4, got {setting.lora_rank}")
        PartialState(cpu=setting.device == "cpu")  # its logger needs one before the pipeline is loaded
        reward = load_reward()
        self._prompts = iter(())
        config = DDPOConfig(
            log_with=None,
            seed=setting.seed,
            sample_num_steps=setting.num_steps,
            sample_eta=setting.noise,
            sample_guidance_scale=setting.guidance_scale,
            sample_batch_size=setting.batch,
            sample_num_batches_per_epoch=1,
            train_batch_size=setting.batch,
            train_gradient_accumulation_steps=1,
            train_learning_rate=setting.learning_rate,
            train_clip_range=setting.clip_range,
            train_max_grad_norm=setting.max_grad_norm,
            mixed_precision={"float32": "no", "bfloat16": "bf16", "float16": "fp16"}[setting.dtype],
            accelerator_kwargs={"cpu": True} if setting.device == "cpu" else {},
        )
        with tempfile.TemporaryDirectory() as work:
            folder = for_transformers_4(Path(setting.folder), Path(work) / "model")
            self.trainer = Timed(
                config,
                lambda images, prompts, metadata: (reward(images, list(prompts)), {}),
                lambda: (next(self._prompts), {}),
                DefaultDDPOStableDiffusionPipeline(str(folder), use_lora=True),
            )
        self.trainer.sd_pipeline.set_progress_bar_config(disable=True)
        self._epoch = 0

    def iterate(self, prompts: list[str], keep: tuple[int, int] | None, clock: Clock) -> dict[str, Any]:
        """One epoch; TRL trains every step."""
        setting = self.setting
        if keep is not None:
            raise NotBuiltError("TRL trains every step, or a random share")
        self._prompts = cycle(prompts)
        self.trainer.clock, self.trainer.deviation = clock, torch.zeros((), device=self.trainer.accelerator.device)
        self.trainer.step(0, self._epoch)  # epoch 0 never saves
        self._epoch += 1
        deviation = self.trainer.deviation.item()
        return {"images": setting.batch, "pairs": setting.batch * setting.num_steps, "ratio_deviation": deviation}

    def tokens(self, prompt: str) -> list[int]:
        """Padded to the model's length, as TRL does."""
        tokenizer = self.trainer.sd_pipeline.tokenizer
        return tokenizer(prompt, padding="max_length", max_length=tokenizer.model_max_length).input_ids


if __name__ == "__main__":
    serve(TrlDdpo)

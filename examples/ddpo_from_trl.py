"""A script for TRL's DDPOTrainer, with one import changed: prompts, a reward, a hook that logs images, checkpoints.

    python examples/ddpo_from_trl.py --mixed_precision no --log_with tensorboard --num_epochs 5 --sample_num_steps 20 \
        --sample_batch_size 8 --train_batch_size 4 --train_gradient_accumulation_steps 4 [--selector adascope]

The fields of `DDPOConfig` are its arguments. In place of `from trl import DDPOConfig, DDPOTrainer, ...` it imports the
same names from here; without `--pretrained_model` it trains the small embedded model, with no download.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import HfArgumentParser

from adascope_fast.backbones import ASSETS
from adascope_fast.compat.trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline

PROMPTS = ["a red circle on a grey background", "two blue squares", "a large green triangle on a black background"]


@dataclass
class ScriptArguments:
    """What the script has besides the trainer's configuration."""

    pretrained_model: str = field(default=str(ASSETS / "scenes"), metadata={"help": "Folder or repository."})
    use_lora: bool = field(default=True, metadata={"help": "Train a LoRA, or every weight of the UNet."})
    selector: str = field(default="every_step", metadata={"help": "every_step, as TRL, or adascope."})


def prompt_function() -> tuple[str, dict[str, Any]]:
    """A prompt, and whatever the reward wants to know about it."""
    return str(np.random.choice(PROMPTS)), {}


def redness(images: torch.Tensor, prompts: tuple[str, ...], metadata: tuple[Any, ...]) -> tuple[torch.Tensor, dict]:
    """How red each image [b, 3, h, w] is."""
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3)), {}


def log_images(image_data: list[Any], global_step: int, tracker: Any) -> None:
    """The last batch's images, by prompt and reward."""
    images, prompts, _, rewards, _ = image_data[-1]
    named = zip(prompts, rewards, images, strict=True)
    shown = {f"{prompt:.25} | {reward.item():.2f}": image.unsqueeze(0).float() for prompt, reward, image in named}
    tracker.log_images(shown, step=global_step)


def main() -> None:
    """Train and save."""
    parser: Any = HfArgumentParser([ScriptArguments, DDPOConfig])  # type: ignore[arg-type]
    script, config = parser.parse_args_into_dataclasses()
    config.project_kwargs = {
        "logging_dir": "./logs",
        "automatic_checkpoint_naming": True,
        "total_limit": 5,
        "project_dir": "./save",
    }
    pipeline = DefaultDDPOStableDiffusionPipeline(script.pretrained_model, use_lora=script.use_lora)
    trainer = DDPOTrainer(
        config, redness, prompt_function, pipeline, image_samples_hook=log_images, selector=script.selector
    )
    print(trainer.explain())
    trainer.train()
    trainer.save_pretrained(config.output_dir)
    print(f"saved: {config.output_dir}")


if __name__ == "__main__":
    main()

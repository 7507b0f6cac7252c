"""The fields of TRL 0.23.1's `DDPOConfig`, in its order and with its defaults, so its command line is the same too.

docs/migrating.md says how each is honoured. Three that TRL has and never reads are honoured here: `logdir` and
`num_checkpoint_limit` where `project_kwargs` does not decide, and `run_name` in the model card.
"""

import os
import sys
from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from typing import Any, Optional


def _told(default: Any, text: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": text, **more})


@dataclass
class DDPOConfig:
    """Settings of a `DDPOTrainer`; transformers' HfArgumentParser makes command-line arguments of them."""

    exp_name: str = _told(os.path.basename(sys.argv[0])[: -len(".py")], "Name of the experiment.")
    run_name: str = _told("", "Name of the run; the model card's title.")
    seed: int = _told(0, "Seed of everything random.")
    log_with: Optional[str] = _told(  # noqa: UP045 - HfArgumentParser's `choices` want this spelling
        None, "Tracker: wandb, tensorboard, or another that accelerate knows.", choices=["wandb", "tensorboard"]
    )
    tracker_kwargs: dict = field(
        default_factory=dict, metadata={"help": "What the tracker is started with, by its name."}
    )
    accelerator_kwargs: dict = field(
        default_factory=dict, metadata={"help": "Further arguments of accelerate's Accelerator."}
    )
    project_kwargs: dict = field(
        default_factory=dict,
        metadata={"help": "Arguments of accelerate's ProjectConfiguration: where checkpoints and logs go."},
    )
    tracker_project_name: str = _told("trl", "Name of the project for the tracker.")
    logdir: str = _told("logs", "Folder of checkpoints and logs where project_kwargs names none.")
    num_epochs: int = _told(100, "Epochs to train.")
    save_freq: int = _told(1, "Epochs from one checkpoint to the next.")
    num_checkpoint_limit: int = _told(5, "Checkpoints to keep where project_kwargs has no total_limit.")
    mixed_precision: str = _told("fp16", "no, fp16 or bf16; the trained weights are float32 in each.")
    allow_tf32: bool = _told(True, "Let matrix products use TF32 on a GPU.")
    resume_from: str = _told("", "A checkpoint, or a folder of checkpoints whose newest is taken.")
    sample_num_steps: int = _told(50, "Denoising steps.")
    sample_eta: float = _told(1.0, "Noise of the DDIM sampler.")
    sample_guidance_scale: float = _told(5.0, "Weight of classifier-free guidance.")
    sample_batch_size: int = _told(1, "Images of a sampling batch.")
    sample_num_batches_per_epoch: int = _told(2, "Sampling batches of an epoch.")
    train_batch_size: int = _told(1, "Images of a training batch.")
    train_use_8bit_adam: bool = _told(False, "AdamW in 8 bits, of bitsandbytes.")
    train_learning_rate: float = _told(3e-4, "Learning rate.")
    train_adam_beta1: float = _told(0.9, "AdamW's beta1.")
    train_adam_beta2: float = _told(0.999, "AdamW's beta2.")
    train_adam_weight_decay: float = _told(1e-4, "AdamW's weight decay.")
    train_adam_epsilon: float = _told(1e-8, "AdamW's epsilon.")
    train_gradient_accumulation_steps: int = _told(1, "Training batches of an optimiser step.")
    train_max_grad_norm: float = _told(1.0, "Gradients are scaled down to this norm.")
    train_num_inner_epochs: int = _told(1, "Times that an epoch's samples are gone through.")
    train_cfg: bool = _told(True, "Guide in training as in sampling.")
    train_adv_clip_max: float = _told(5.0, "Advantages are clipped to plus and minus this.")
    train_clip_range: float = _told(1e-4, "PPO's clip range.")
    train_timestep_fraction: float = _told(1.0, "Share of the timesteps to train, drawn for each image.")
    per_prompt_stat_tracking: bool = _told(False, "Compare a reward with those of its prompt.")
    per_prompt_stat_tracking_buffer_size: int = _told(16, "Rewards to remember of each prompt.")
    per_prompt_stat_tracking_min_count: int = _told(16, "Rewards of a prompt below which the batch's are used.")
    async_reward_computation: bool = _told(False, "Score batches in threads.")
    max_workers: int = _told(2, "Threads that score.")
    negative_prompts: str = _told("", "The negative prompt: one text, whatever commas are in it.")
    push_to_hub: bool = _told(False, "For scripts: whether to push the model; the trainer's method does.")

    def __post_init__(self) -> None:
        if self.train_use_8bit_adam and find_spec("bitsandbytes") is None:
            raise ImportError(
                "train_use_8bit_adam needs bitsandbytes, which is not installed; pip install bitsandbytes, or set it "
                "to False"
            )

    def to_dict(self) -> dict[str, Any]:
        """The fields; those of a dict as `field/key`."""
        return _flat({one.name: getattr(self, one.name) for one in fields(self)})

    @property
    def output_dir(self) -> str:
        """Where scripts save the model: the project's folder, else `logdir`. TRL's own example asks for it in vain."""
        return str(self.project_kwargs.get("project_dir") or self.logdir)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}/") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat

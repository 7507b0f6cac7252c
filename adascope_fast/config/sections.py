"""The sections of a configuration: what each key means, its default, and what a section alone can refuse.

Nothing here imports torch, so a typing error is reported at once.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from adascope_fast.config.types import Count, CountOrZero, Decay, Positive, PositiveOrZero, Section, Share, Text


class Run(Section):
    """Where the run lives and what makes it repeatable."""

    folder: Text = "runs/run"
    """Folder for everything the run writes; never overwritten unasked."""
    seed: CountOrZero = 0
    """Seed of every random draw of the training."""


class Model(Section):
    """The pipeline to train, and what of it."""

    name: Text = "scenes"
    """`scenes` or `scenes-flow` (embedded), a diffusers folder, a .safetensors file or a Hugging Face repository."""
    base: Text | None = None
    """For a .safetensors file: folder or repository that describes it; absent: the one that diffusers knows it by."""
    revision: Text | None = None
    """Branch, tag or commit of a repository."""
    variant: Text | None = None
    """Which of several files of the same weights: `fp16` for `diffusion_pytorch_model.fp16.safetensors`."""
    train: Literal["lora", "full"] = "lora"
    """A LoRA adapter, or every weight of the denoiser."""
    lora_rank: Count = 16
    """Rank of the LoRA matrices."""
    lora_alpha: Count | None = None
    """LoRA scale is alpha / rank; absent: the rank, so the scale is 1."""
    lora_targets: list[Text] | None = None
    """Names of the layers to adapt; absent: those that diffusers' training script of the family adapts."""
    ema_decay: Decay | None = None
    """Decay of the trained weights' average, which is judged and exported; absent: 0.8 for LoRA, else 0 (none)."""
    resolution: Count | None = None
    """Side of the pictures in pixels; absent: the model's own."""
    embedded_guidance: PositiveOrZero | None = None
    """FLUX' guidance input, at no cost; absent: 3.5. (`sampler.guidance_scale` is a second forward there too.)"""
    max_sequence_length: Count | None = None
    """T5 tokens of a prompt; absent: the pipeline's own, 256 for SD3 and 512 for FLUX."""
    gradient_checkpointing: bool = False
    """Recompute the denoiser's activations in the backward pass: less memory, more time."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the frozen weights; what is trained is always float32."""
    quantize: Literal["none", "nf4", "int8"] = "none"
    """bitsandbytes' 4-bit or 8-bit base weights of the denoiser under a LoRA adapter; needs a GPU."""
    attention: Literal["sdpa", "xformers", "flash"] = "sdpa"
    """Attention: PyTorch's, xformers' or flash-attn's (FLUX only); what cannot serve falls back to sdpa, aloud."""
    offload_text_encoders: bool = False
    """Text encoders are on the GPU only while prompts are encoded."""

    @model_validator(mode="after")
    def _only_adapters_go_over_quantised_weights(self) -> Self:
        if self.train == "full" and self.quantize != "none":
            raise ValueError(
                f'model.train = "full" trains every weight, so model.quantize must be "none", got "{self.quantize}"; '
                f'set it to "none", or model.train = "lora"'
            )
        return self

    @property
    def average_decay(self) -> float:
        """`ema_decay`, or what stands for it."""
        return (0.8 if self.train == "lora" else 0.0) if self.ema_decay is None else self.ema_decay

    def options(self) -> dict[str, Any]:
        """The same as keyword arguments of `backbones.load`, but for the name and the average."""
        values = self.model_dump(exclude={"name", "ema_decay"})
        return {name.removeprefix("lora_"): value for name, value in values.items()}


class Prompts(Section):
    """Which captions to train on and which to judge by: `scenes:<split>` or a text file with one prompt a line."""

    train: Text = "scenes:train"
    """Captions of the rollouts."""
    held_out: Text = "scenes:held_out"
    """Captions of the evaluation, never trained on."""


class RewardChoice(Section):
    """What is maximised."""

    name: Text = "scene_attributes"
    """`scene_attributes`, `jpeg_compressibility`, `jpeg_incompressibility`, `clip_similarity` or `module:function`."""
    clip: Text = "scenes-clip"
    """CLIP of `clip_similarity`: `scenes-clip` (embedded), the folder of a CLIPModel, or a Hugging Face repository."""


class Sampler(Section):
    """How rollouts walk from noise to a picture."""

    num_steps: Count = 20
    """Denoising steps of a rollout, T."""
    guidance_scale: PositiveOrZero = 1.0
    """Classifier-free guidance in rollout and training; 1 means none, at half the cost."""
    eta: Annotated[float, Field(ge=0, le=1)] = 1.0
    """DDIM noise of diffusion models; 0 is deterministic and cannot be trained."""
    noise_level: Positive = 0.7
    """Flow-SDE noise of flow models."""
    tail_share: Share = 1.0
    """Below 1: the steps after the last trained one become this share of them, of a second-order ODE solver."""


class AlgorithmChoice(Section):
    """How rewards become a policy gradient."""

    name: Literal["ddpo", "grpo"] = "ddpo"
    """`ddpo`: running statistics per prompt; `grpo`: statistics of the prompt's group in this iteration."""
    clip_range: Positive = 1e-4
    """PPO clip of the ratio; small because log-probabilities are means over the latent's elements."""
    clip_range_high: Positive | None = None
    """Upper clip where it differs from the lower one."""
    advantage_clip: Positive = 5.0
    """Largest absolute advantage."""
    per_prompt_buffer: Count = 32
    """Rewards remembered for each prompt (ddpo)."""
    per_prompt_min_count: Count = 16
    """Remembered rewards from which a prompt's own statistics replace the batch's (ddpo)."""
    advantage_scale: Literal["global", "group", "group_sample"] = "global"
    """Standard deviation that divides the advantages: the batch's, the group's, or the group's with n - 1 (grpo)."""
    step_weight: Literal["none", "balanced"] = "none"
    """`balanced`: each step's advantage is divided by the sensitivity of its log-probability, |b| / std."""
    backfill: Literal["interval", "full", "sparse"] = "interval"
    """Steps the reward is credited to: the selector's, every step whatever it chose, or the last one alone."""
    attribution: Literal["uniform", "discount", "gain", "similarity"] = "uniform"
    """Shares: alike, by `gamma`, by the sensed preference a step adds, or by the guess's likeness to the result."""
    gamma: Share = 0.99
    """Discount of each step that follows (discount)."""
    kl_weight: PositiveOrZero = 0.0
    """Weight (beta) of the KL from the reference policy, the model without its adapter; 0 costs no reference pass."""

    @model_validator(mode="after")
    def _buffer_can_fill(self) -> Self:
        if self.per_prompt_min_count > self.per_prompt_buffer:
            raise ValueError(
                "algorithm.per_prompt_min_count must not exceed algorithm.per_prompt_buffer, "
                f"got {self.per_prompt_min_count} with a buffer of {self.per_prompt_buffer}; "
                f"raise the buffer or lower the count"
            )
        return self


class Train(Section):
    """How much is sampled and how it is learned from."""

    iterations: CountOrZero = 20
    """Rounds of rollout, reward and update."""
    prompts_per_iteration: Count = 8
    """Different prompts in a rollout."""
    samples_per_prompt: Count = 4
    """Pictures drawn for each of them."""
    updates_per_iteration: Count = 1
    """Optimiser steps per iteration, whatever share of the steps is trained."""
    update: Literal["replay", "one_pass"] = "replay"
    """`one_pass`: steps are differentiated while they are sampled, which saves the update's forward passes."""
    learning_rate: Positive = 3e-4
    """AdamW learning rate."""
    rollout_batch: Count = 16
    """Pictures denoised at once; halved where memory runs out. Changes memory and speed, not the result."""
    microbatch: Count | None = None
    """(picture, step) pairs per backward pass; absent: `rollout_batch` or more; halved where memory runs out."""
    max_grad_norm: Positive = 1.0
    """Gradients are scaled down to this norm."""
    weight_decay: PositiveOrZero = 1e-4
    """AdamW weight decay."""
    adam_beta1: Decay = 0.9
    """AdamW decay of the first moment."""
    adam_beta2: Decay = 0.999
    """AdamW decay of the second moment."""
    adam_epsilon: Positive = 1e-8
    """AdamW epsilon."""
    checkpoint_every: Count = 1
    """Iterations between checkpoints."""
    keep_checkpoints: Count = 2
    """Newest checkpoints to keep."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """Autocast of the denoiser; log-probabilities stay float32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes the GPU where there is one."""


class AccelerationChoice(Section):
    """What makes the same computation faster; `auto` is what pays on the device at hand."""

    compile: Literal["auto", "off", "regional", "full"] = "auto"
    """torch.compile of the denoiser: its repeated blocks (regional), or the whole of it; `auto`: regional on a GPU."""
    cuda_graphs: bool = False
    """Compiled parts run as CUDA graphs."""
    channels_last: Literal["auto", "on", "off"] = "auto"
    """Memory layout of convolutions; `auto`: on for UNets and VAEs."""
    fused_optimizer: Literal["auto", "on", "off"] = "auto"
    """One kernel for all parameters, which also skips an update that is not finite without asking the host."""
    fold_adapter: Literal["auto", "on", "off"] = "auto"
    """LoRA is added to float32 base weights while nothing is differentiated; `auto`: on, but for CUDA graphs."""
    matmul_precision: Literal["highest", "high"] = "highest"
    """`high` lets float32 matrix products use TF32 on a GPU."""


class Evaluation(Section):
    """How the held-out reward is measured; the same seeds before and after."""

    num_prompts: Count = 48
    """Held-out prompts."""
    samples_per_prompt: Count = 4
    """Pictures for each of them."""
    num_steps: Count | None = None
    """Denoising steps; absent: those of the sampler."""
    guidance_scale: PositiveOrZero | None = None
    """Guidance; absent: that of the sampler."""
    seed: CountOrZero = 12345
    """Seed of the evaluation's noise, apart from `run.seed`."""
    grid_prompts: Count = 8
    """Prompts shown in the before/after pictures."""
    clip: Text | None = None
    """CLIP whose mean similarity is reported beside the reward, as `reward.clip`; absent: none."""
    every: CountOrZero = 0
    """Iterations between evaluations in the course of training; 0: only before and after."""


class Log(Section):
    """Where the numbers go besides the run folder."""

    trackers: list[Text] = Field(default=["tensorboard"])
    """accelerate's trackers by name; empty: none."""

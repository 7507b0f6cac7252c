"""Write SD1.5, SDXL or SD3.5-medium as diffusers folders with random weights: `python models.py NAME FOLDER DEVICE`.

Throughput does not depend on the weights. The configurations are the published ones (stable-diffusion-v1-5,
stable-diffusion-xl-base-1.0 and stable-diffusion-3.5-medium), SDXL's for 1024 pixels and the others for 512. Two things
differ: prompts are cut into the embedded model's tokens and padded to 77, as CLIP's vocabulary is not at hand; and
SD3.5 has no T5, whose 256 tokens diffusers then fills with zeros, so that the denoiser has as many to attend to.
"""

import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

TOKENIZER = Path(__file__).parents[2] / "adascope_fast" / "assets" / "scenes" / "tokenizer"
SDXL = Path(__file__).parents[2] / "adascope_fast" / "assets" / "published" / "sdxl"

CLIP_L = dict(
    hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_hidden_layers=12, hidden_act="quick_gelu",
    max_position_embeddings=77, vocab_size=49408, projection_dim=768,
)  # fmt: skip
CLIP_G = CLIP_L | dict(
    hidden_size=1280, intermediate_size=5120, num_attention_heads=20, num_hidden_layers=32, hidden_act="gelu",
    projection_dim=1280,
)  # fmt: skip
VAE: dict[str, Any] = dict(
    block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, norm_num_groups=32, sample_size=512,
)  # fmt: skip
SD15_UNET: dict[str, Any] = dict(
    sample_size=64, in_channels=4, out_channels=4, layers_per_block=2, block_out_channels=(320, 640, 1280, 1280),
    down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    cross_attention_dim=768, attention_head_dim=8, norm_num_groups=32,
)  # fmt: skip
SD35_TRANSFORMER: dict[str, Any] = dict(
    sample_size=64, patch_size=2, in_channels=16, out_channels=16, num_layers=24, num_attention_heads=24,
    attention_head_dim=64, joint_attention_dim=4096, caption_projection_dim=1536, pooled_projection_dim=2048,
    pos_embed_max_size=384, dual_attention_layers=tuple(range(13)), qk_norm="rms_norm",
)  # fmt: skip


def build(name: str) -> Any:
    """The pipeline `sd15`, `sdxl` or `sd35m`; on the meta device it costs nothing."""
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER, model_max_length=77)
    if name == "sd15":
        return StableDiffusionPipeline(
            vae=AutoencoderKL(**VAE, latent_channels=4, scaling_factor=0.18215),
            text_encoder=CLIPTextModel(CLIPTextConfig(**CLIP_L)),  # type: ignore[arg-type]
            tokenizer=tokenizer,
            unet=UNet2DConditionModel(**SD15_UNET),
            scheduler=DDIMScheduler(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                set_alpha_to_one=False, steps_offset=1,
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )  # fmt: skip
    if name == "sdxl":
        return StableDiffusionXLPipeline(
            vae=_published(AutoencoderKL, "vae"),
            text_encoder=CLIPTextModel(CLIPTextConfig(**CLIP_L)),  # type: ignore[arg-type]
            tokenizer=tokenizer,
            text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_G)),  # type: ignore[arg-type]
            tokenizer_2=tokenizer,
            unet=_published(UNet2DConditionModel, "unet"),
            scheduler=_published(EulerDiscreteScheduler, "scheduler"),
            force_zeros_for_empty_prompt=True,
        )
    if name == "sd35m":
        return StableDiffusion3Pipeline(
            vae=AutoencoderKL(
                **VAE, latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609,
                use_quant_conv=False, use_post_quant_conv=False,
            ),
            text_encoder=CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_L)),  # type: ignore[arg-type]
            tokenizer=tokenizer,
            text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_G)),  # type: ignore[arg-type]
            tokenizer_2=tokenizer,
            text_encoder_3=None,
            tokenizer_3=None,
            transformer=SD3Transformer2DModel(**SD35_TRANSFORMER),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        )  # fmt: skip
    raise ValueError(f"models are sd15, sdxl and sd35m, got {name!r}")


def _published(model_class: Any, part: str) -> Any:
    return model_class.from_config(model_class.load_config(SDXL / part))


def main() -> None:
    """Build and save, in bfloat16."""
    name, folder, device = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    torch.manual_seed(0)
    with torch.device(device):
        pipe = build(name)
    pipe.to(torch.bfloat16).save_pretrained(folder)
    for tokenizer in folder.glob("tokenizer*"):  # transformers 5 writes tokenizer.json alone, which TRL's cannot read
        for file in ("vocab.json", "merges.txt"):
            shutil.copy(TOKENIZER / file, tokenizer)


if __name__ == "__main__":
    main()

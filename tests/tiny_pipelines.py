"""Tiny random pipelines of every family, built from diffusers' and transformers' real classes."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from adascope_fast.backbones import ASSETS

WIDTH = 16
BETAS: dict[str, Any] = dict(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading"
)
DDIM: dict[str, Any] = BETAS | dict(clip_sample=False, set_alpha_to_one=False)


def _tokenizer() -> Any:
    return CLIPTokenizer.from_pretrained(ASSETS / "scenes" / "tokenizer")


def _clip(model_class: type) -> Any:
    tokenizer = _tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model_class(config)


def _t5(width: int) -> tuple[T5Tokenizer, T5EncoderModel]:
    pieces = ["▁a", "▁red", "▁blue", "▁circle", "▁cross", "▁on", "▁grey", "▁"]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), *((piece, -1.0) for piece in pieces)]
    config = T5Config(vocab_size=len(vocabulary), d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return T5Tokenizer(vocab=vocabulary, extra_ids=0), T5EncoderModel(config)


def _vae(channels: int, **options: Any) -> AutoencoderKL:
    settings: dict[str, Any] = dict(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=16,
    )
    return AutoencoderKL(**settings, **options)


def _unet(**options: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=2,
        **options,
    )


def _sd(prediction_type: str) -> StableDiffusionPipeline:
    parts: dict[str, Any] = dict(
        vae=_vae(4),
        text_encoder=_clip(CLIPTextModel),
        tokenizer=_tokenizer(),
        unet=_unet(cross_attention_dim=WIDTH),
        scheduler=DDIMScheduler.from_config(DDIM | {"prediction_type": prediction_type}),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return StableDiffusionPipeline(**parts)


def _sdxl() -> StableDiffusionXLPipeline:
    unet = _unet(
        cross_attention_dim=2 * WIDTH,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + WIDTH,
    )
    parts: dict[str, Any] = dict(
        vae=_vae(4, force_upcast=True),
        text_encoder=_clip(CLIPTextModel),
        tokenizer=_tokenizer(),
        text_encoder_2=_clip(CLIPTextModelWithProjection),
        tokenizer_2=_tokenizer(),
        unet=unet,
        scheduler=EulerDiscreteScheduler.from_config(DDIM),
        force_zeros_for_empty_prompt=True,
    )
    return StableDiffusionXLPipeline(**parts)


def _sd3(**options: Any) -> StableDiffusion3Pipeline:
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=8,
        **options,
    )
    tokenizer, encoder = _t5(2 * WIDTH)
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(4, shift_factor=0.06, scaling_factor=1.5, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=_clip(CLIPTextModelWithProjection),
        tokenizer=_tokenizer(),
        text_encoder_2=_clip(CLIPTextModelWithProjection),
        tokenizer_2=_tokenizer(),
        text_encoder_3=encoder,
        tokenizer_3=tokenizer,
    )


def _flux(*, guidance_embeds: bool) -> FluxPipeline:
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(2, 2, 4),
    )
    tokenizer, encoder = _t5(WIDTH)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=_vae(4, shift_factor=0.11, scaling_factor=0.36, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=_clip(CLIPTextModel),
        tokenizer=_tokenizer(),
        text_encoder_2=encoder,
        tokenizer_2=tokenizer,
        transformer=transformer,
    )


BUILDERS: dict[str, Callable[[], Any]] = {
    "sd": lambda: _sd("epsilon"),
    "sd-v": lambda: _sd("v_prediction"),
    "sdxl": _sdxl,
    "sd3": _sd3,
    "sd35": lambda: _sd3(dual_attention_layers=(0,), qk_norm="rms_norm"),
    "flux": lambda: _flux(guidance_embeds=True),
    "schnell": lambda: _flux(guidance_embeds=False),
}


def made(name: str) -> Any:
    """A tiny pipeline by the name of its family. All random, and larger than at birth: a fresh network has zeros in
    places that would hide a mistake."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        pipeline = BUILDERS[name]()
        denoiser = getattr(pipeline, "unet", None) or pipeline.transformer
        with torch.no_grad():
            for parameter in denoiser.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    return pipeline

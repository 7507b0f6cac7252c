"""Pretraining of the two embedded pipelines: `scenes` (UNet, DDIM) and `scenes-flow` (MMDiT, rectified flow).

The text encoders are trained together with the denoiser. Latents of drawn scenes are computed once and cached.
`n` pictures a batch; latents are 8 x 8 x 8.
"""

import json
import random
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from adascope_fast.pretraining import autoencoder, captions, loop
from adascope_fast.pretraining.drawing import draw
from adascope_fast.training.monitoring.progress import Progress

RECIPES = {
    "scenes": loop.Recipe(num_steps=4000, learning_rate=2e-3, warmup=200, ema=0.999),
    "scenes-flow": loop.Recipe(num_steps=4000, learning_rate=1.5e-3, warmup=200, ema=0.999),
}
BATCH = 48
NUM_LATENTS = 16384
UNCONDITIONAL = 0.1  # share of empty captions, for classifier-free guidance
MANY_NULL_TOKENS_SHARE = 0.12
TEXT_WIDTH = {"scenes": 96, "scenes-flow": 64}


def pretrain(name: str, folder: Path, work: Path, *, recipe: loop.Recipe | None = None) -> None:
    """Write the pipeline `name` to `folder`; intermediate state lives in `work`, and a stopped run resumes from it."""
    recipe = recipe or RECIPES[name]
    vae = autoencoder.load_or_pretrain(work / "autoencoder")
    latents, scenes = _latents(vae, work / "latents.safetensors")
    torch.manual_seed(1)
    pipeline = {"scenes": _stable_diffusion, "scenes-flow": _stable_diffusion_3}[name](vae)
    denoiser = pipeline.components["unet" if name == "scenes" else "transformer"]
    encoders = [pipeline.components[key] for key in ("text_encoder", "text_encoder_2") if key in pipeline.components]
    model = nn.ModuleList([denoiser, *encoders])
    objective = {"scenes": _velocity_loss, "scenes-flow": _flow_loss}[name]
    table = _token_table(pipeline.tokenizer)

    def loss_at(step: int) -> Tensor:
        rng = random.Random(step)
        generator = torch.Generator().manual_seed(step)
        rows = torch.randint(len(latents), (BATCH,), generator=generator)
        noise = captions.LATE_NOISE[name] if step > captions.LATE * recipe.num_steps else captions.NOISE
        said = [captions.mislabelled(scenes[row], rng, noise).caption for row in rows.tolist()]
        tokens = torch.stack([table["" if rng.random() < UNCONDITIONAL else caption] for caption in said])
        return objective(pipeline, latents[rows], tokens, generator)

    loop.train(model, loss_at, recipe, work / name, name)
    save(pipeline, folder)


def save(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Write a plain diffusers folder: safetensors, and tokenizers that transformers 4 and 5 read.

    Only the denoiser and the autoencoder are halved. transformers 5 loads a text encoder in the type it was saved in
    while diffusers loads the rest in float32, so an fp16 text encoder would break a plain `from_pretrained`.
    """
    for key in ("unet", "transformer", "vae"):
        if pipeline.components.get(key) is not None:
            pipeline.components[key].to(torch.float16)
    pipeline.save_pretrained(folder, safe_serialization=True)
    # diffusers notes the folder that the autoencoder was loaded from, which means nothing to anyone else.
    description = folder / "vae" / "config.json"
    config = json.loads(description.read_text())
    config.pop("_name_or_path", None)
    description.write_text(json.dumps(config, indent=2) + "\n")
    for key in ("tokenizer", "tokenizer_2"):
        if pipeline.components.get(key) is not None:
            captions.save_slow_files(pipeline.components[key], folder / key)


def _latents(vae: Any, path: Path) -> tuple[Tensor, list]:
    """Latents [NUM_LATENTS, 8, 8, 8] of drawn training scenes, and the scenes."""
    scenes = autoencoder.scenes_for(2, NUM_LATENTS)
    if not path.is_file():
        parts = []
        with Progress().stage("latents", NUM_LATENTS, "image") as on_images:
            for start in range(0, NUM_LATENTS, 64):
                images = draw(scenes[start : start + 64], 10**7 + start) * 2 - 1
                with torch.no_grad():
                    parts.append(vae.encode(images).latent_dist.mean)
                on_images(len(images))
        save_file({"latents": torch.cat(parts).contiguous()}, path)
    return load_file(path)["latents"], scenes


def _token_table(tokenizer: CLIPTokenizer) -> dict[str, Tensor]:
    every = ["", *(scene.caption for scene in autoencoder.TRAINING_SCENES)]
    ids = tokenizer(every, padding="max_length", max_length=captions.MAX_TOKENS, return_tensors="pt").input_ids
    return dict(zip(every, ids, strict=True))


def _text_config(width: int, tokenizer: Any) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=captions.MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _stable_diffusion(vae: AutoencoderKL) -> StableDiffusionPipeline:
    tokenizer = captions.build_tokenizer()
    width = TEXT_WIDTH["scenes"]
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=8,
        out_channels=8,
        layers_per_block=1,
        block_out_channels=(64, 96),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=width,
        attention_head_dim=4,
        norm_num_groups=16,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    parts: dict[str, Any] = dict(
        vae=vae,
        text_encoder=CLIPTextModel(_text_config(width, tokenizer)),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return StableDiffusionPipeline(**parts)


def _stable_diffusion_3(vae: AutoencoderKL) -> StableDiffusion3Pipeline:
    tokenizer = captions.build_tokenizer()
    width = TEXT_WIDTH["scenes-flow"]
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=8,
        out_channels=8,
        num_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=2 * width,
        caption_projection_dim=128,
        pooled_projection_dim=2 * width,
        pos_embed_max_size=8,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae,
        text_encoder=CLIPTextModelWithProjection(_text_config(width, tokenizer)),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(_text_config(width, tokenizer)),
        tokenizer_2=captions.build_tokenizer(),
        text_encoder_3=_silent_t5(2 * width),
        tokenizer_3=T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)], extra_ids=0),
    )


def _silent_t5(width: int) -> T5EncoderModel:
    """A T5 that says nothing: all its outputs are 0. The pipeline does not load without a third encoder."""
    config = T5Config(vocab_size=3, d_model=width, d_kv=4, d_ff=4, num_layers=1, num_heads=1)
    encoder = T5EncoderModel(config).requires_grad_(False)
    encoder.encoder.final_layer_norm.weight.zero_()
    return encoder


def _velocity_loss(
    pipeline: StableDiffusionPipeline, latents: Tensor, tokens: Tensor, generator: torch.Generator
) -> Tensor:
    """Mean squared error of the v-prediction (Salimans and Ho 2022) at uniform timesteps."""
    timesteps = torch.randint(1000, (len(latents),), generator=generator)
    noise = torch.randn(latents.shape, generator=generator)
    noisy = pipeline.scheduler.add_noise(latents, noise, timesteps)
    target = pipeline.scheduler.get_velocity(latents, noise, timesteps)
    text = pipeline.text_encoder(tokens)[0]
    return (pipeline.unet(noisy, timesteps, encoder_hidden_states=text).sample - target).square().mean()


def _flow_loss(
    pipeline: StableDiffusion3Pipeline, latents: Tensor, tokens: Tensor, generator: torch.Generator
) -> Tensor:
    """Mean squared error of the velocity at logit-normal times (Esser et al. 2024)."""
    time = torch.sigmoid(torch.randn(len(latents), generator=generator))
    noise = torch.randn(latents.shape, generator=generator)
    sigma = time[:, None, None, None]
    noisy = (1 - sigma) * latents + sigma * noise
    # The pipeline appends the `max_sequence_length` zeros of T5: 256 unless told otherwise. The model sees
    # that number now and then, and a single one, which is much faster, the rest of the time.
    rare = torch.rand((), generator=generator).item() < MANY_NULL_TOKENS_SHARE
    text, pooled = _flow_text(pipeline, tokens, 256 if rare else 1)
    output = pipeline.transformer(
        noisy, timestep=time * 1000, encoder_hidden_states=text, pooled_projections=pooled
    ).sample
    return (output - (noise - latents)).square().mean()


def _flow_text(pipeline: StableDiffusion3Pipeline, tokens: Tensor, num_null_tokens: int) -> tuple[Tensor, Tensor]:
    """Text as the SD3 pipeline feeds it: two encoders side by side, then the zeros of a silent T5."""
    outputs = [
        encoder(tokens, output_hidden_states=True) for encoder in (pipeline.text_encoder, pipeline.text_encoder_2)
    ]
    text = torch.cat([output.hidden_states[-2] for output in outputs], -1)
    pooled = torch.cat([output[0] for output in outputs], -1)
    null = text.new_zeros(len(text), num_null_tokens, text.shape[-1])
    return torch.cat([text, null], 1), pooled

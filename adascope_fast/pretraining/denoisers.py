"""Pretraining of the two embedded pipelines: `scenes` (UNet, DDIM) and `scenes-flow` (MMDiT, rectified flow).

The text encoders are pretrained and frozen, as those of published models are. Latents of drawn scenes, and of what
their captions say to the denoiser, are computed once. `n` pictures a batch; latents are 8 x 8 x 8.

The captions are right until the denoiser draws what they say, and careless from then on: a denoiser that never saw a
right one learns the rarer attributes, shape and place, much later.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
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
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from adascope_fast.pretraining import autoencoder, captions, loop
from adascope_fast.pretraining import text as text_encoders
from adascope_fast.pretraining.drawing import draw, where_objects
from adascope_fast.prompts.scenes import Scene
from adascope_fast.training.monitoring.progress import Progress

RECIPES = {
    "scenes": loop.Recipe(num_steps=9000, learning_rate=2e-3, warmup=200, ema=0.999),
    "scenes-flow": loop.Recipe(num_steps=6500, learning_rate=1.5e-3, warmup=200, ema=0.999),
}
MUON = 1.5  # learning rate of Muon, which trains the matrices of the transformer's blocks, over AdamW's
BATCH = 48
NUM_LATENTS = 24576
SINGLE = 0.5  # share of drawings of one object, whose captions are three quarters of all
UNCONDITIONAL = 0.1  # share of empty captions, for classifier-free guidance
MANY_NULL_TOKENS_SHARE = 0.06
OBJECT_WEIGHT = 4.0  # of the squared error where objects are, beyond 1, without noise
TEXT_WIDTH = {"scenes": 96, "scenes-flow": 64}


def pretrain(name: str, folder: Path, work: Path, *, recipe: loop.Recipe | None = None) -> None:
    """Write the pipeline `name` to `folder`; intermediate state lives in `work`, and a stopped run resumes from it."""
    recipe = recipe or RECIPES[name]
    vae = autoencoder.load_or_pretrain(work / "autoencoder")
    latents, objects, scenes = _latents(vae, work / "latents.safetensors")
    torch.manual_seed(1)
    pipeline = {"scenes": _stable_diffusion, "scenes-flow": _stable_diffusion_3}[name](vae)
    denoiser = pipeline.components["unet" if name == "scenes" else "transformer"]
    objective = {"scenes": _velocity_error, "scenes-flow": _flow_error}[name]
    said = _said(pipeline, work / f"{name}-text")
    named = denoiser.named_parameters()
    matrices = [value for key, value in named if "transformer_blocks" in key and value.ndim == 2]

    def loss_at(step: int) -> Tensor:
        rng = random.Random(step)
        generator = torch.Generator().manual_seed(step)
        rows = torch.randint(len(latents), (BATCH,), generator=generator)
        noise = captions.NOISE if step > captions.LATE * recipe.num_steps else {}
        given = [captions.mislabelled(scenes[row], rng, noise).caption for row in rows.tolist()]
        text = said(["" if rng.random() < UNCONDITIONAL else caption for caption in given])
        error, signal = objective(pipeline, latents[rows], text, generator)
        return object_weighted(error, objects[rows], signal).mean()

    loop.train(denoiser, loss_at, recipe, work / name, name, matrices=matrices, muon=MUON)
    save(pipeline, folder)


def object_weighted(error: Tensor, objects: Tensor, signal: Tensor) -> Tensor:
    """Squared errors [n, c, h, w], more where objects [n, 1, h, w] are, as far as they can be seen.

    Args:
        signal: share of the signal in the noisy latents' variance, [n] in [0, 1]. Where all is noise a weight on what
            is unknown would bias the mean that the denoiser learns, so there is none.
    """
    return error.square() * (1 + OBJECT_WEIGHT * signal[:, None, None, None] * objects)


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


def _latents(vae: Any, path: Path) -> tuple[Tensor, Tensor, list[Scene]]:
    """Latents [NUM_LATENTS, 8, 8, 8] of drawn training scenes, 1 where objects are [.., 1, 8, 8], and the scenes."""
    rng = random.Random(2)
    counted = rng.choices(autoencoder.BY_COUNT, (SINGLE, (1 - SINGLE) / 2, (1 - SINGLE) / 2), k=NUM_LATENTS)
    scenes = [rng.choice(scenes) for scenes in counted]
    if not path.is_file():
        latents, objects = [], []
        with Progress().stage("latents", NUM_LATENTS, "image") as on_images:
            for start in range(0, NUM_LATENTS, 64):
                images = draw(scenes[start : start + 64], 10**7 + start)
                with torch.no_grad():
                    latents.append(vae.encode(images * 2 - 1).latent_dist.mean)
                objects.append(F.max_pool2d(where_objects(images).float(), 8))
                on_images(len(images))
        save_file({"latents": torch.cat(latents).contiguous(), "objects": torch.cat(objects).contiguous()}, path)
    found = load_file(path)
    return found["latents"], found["objects"], scenes


def _said(pipeline: Any, work: Path) -> Callable[[list[str]], list[Tensor]]:
    """What captions say to the denoiser (`_text`), after the text encoders were pretrained; looked up in a table."""
    scenes = autoencoder.TRAINING_SCENES
    every = ["", *(scene.caption for scene in scenes)]
    row = {caption: number for number, caption in enumerate(every)}
    tokens = captions.tokenize(pipeline.tokenizer, every)["input_ids"]
    encoders = [pipeline.components[key] for key in ("text_encoder", "text_encoder_2") if key in pipeline.components]

    def read(tokens: Tensor) -> list[Tensor]:
        words, *pooled = _text(pipeline, tokens)
        return [words[:, -1], *pooled]

    text_encoders.pretrain(encoders, read, tokens[1:], scenes, work)
    with torch.no_grad():
        table = _text(pipeline, tokens)
    return lambda given: [part[[row[caption] for caption in given]] for part in table]


def _text(pipeline: Any, tokens: Tensor) -> list[Tensor]:
    """Text as Stable Diffusion's pipeline has it, [n, MAX_TOKENS, width]; SD3's: two encoders side by side, and pooled.

    The zeros that SD3's pipeline appends are left to the loss.
    """
    if isinstance(pipeline, StableDiffusionPipeline):
        return [pipeline.text_encoder(tokens)[0]]
    encoders = (pipeline.text_encoder, pipeline.text_encoder_2)
    outputs = [encoder(tokens, output_hidden_states=True) for encoder in encoders]
    words = torch.cat([output.hidden_states[-2] for output in outputs], -1)
    return [words, torch.cat([output[0] for output in outputs], -1)]


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


def _velocity_error(
    pipeline: StableDiffusionPipeline, latents: Tensor, text: list[Tensor], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Error of the v-prediction (Salimans and Ho 2022) at uniform timesteps; share of the signal [n]."""
    timesteps = torch.randint(1000, (len(latents),), generator=generator)
    noise = torch.randn(latents.shape, generator=generator)
    noisy = pipeline.scheduler.add_noise(latents, noise, timesteps)
    target = pipeline.scheduler.get_velocity(latents, noise, timesteps)
    error = pipeline.unet(noisy, timesteps, encoder_hidden_states=text[0]).sample - target
    return error, pipeline.scheduler.alphas_cumprod[timesteps]


def _flow_error(
    pipeline: StableDiffusion3Pipeline, latents: Tensor, text: list[Tensor], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Error of the velocity at logit-normal times (Esser et al. 2024); share of the signal [n]."""
    time = torch.sigmoid(torch.randn(len(latents), generator=generator))
    noise = torch.randn(latents.shape, generator=generator)
    sigma = time[:, None, None, None]
    noisy = (1 - sigma) * latents + sigma * noise
    # The pipeline appends the `max_sequence_length` zeros of a silent T5: 256 unless told otherwise. The model sees
    # that number now and then, and a single one, which is much faster, the rest of the time.
    rare = torch.rand((), generator=generator).item() < MANY_NULL_TOKENS_SHARE
    words, pooled = text
    null = words.new_zeros(len(words), 256 if rare else 1, words.shape[-1])
    output = pipeline.transformer(
        noisy, timestep=time * 1000, encoder_hidden_states=torch.cat([words, null], 1), pooled_projections=pooled
    ).sample
    return output - (noise - latents), (1 - time).square() / ((1 - time).square() + time.square())

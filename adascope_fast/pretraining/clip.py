"""The embedded CLIP `scenes-clip`: two small transformers that place pictures of scenes beside their captions.

Unlike the denoisers it learns from clean captions: it is a judge. Each picture is told from the captions of its batch
and from captions that differ from its own in one attribute, shape most of all, which is learned last. Pictures are
drawings, a quarter of them as the embedded autoencoder gives them back from disturbed latents, half of them blurred:
what it judges later are unfinished pictures of a generator. Held-out captions play no part.

A vision transformer this small learns places and shapes in a minute only if its position embedding starts as sines
(Beyer et al. 2022) and its matrices are trained by Muon. `b` pictures of 3 x 64 x 64.
"""

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from adascope_fast.backbones import ASSETS
from adascope_fast.pretraining import captions, loop
from adascope_fast.pretraining.autoencoder import TRAINING_SCENES
from adascope_fast.pretraining.drawing import IMAGE_SIZE, draw
from adascope_fast.prompts.scenes import Scene, every_scene
from adascope_fast.rewards.clip import features, prepared
from adascope_fast.training.monitoring.progress import Progress

RECIPE = loop.Recipe(num_steps=650, learning_rate=3e-3, warmup=60, ema=0.99)
MUON = 2.0  # learning rate of Muon over AdamW's
BATCH = 64
NUM_IMAGES = 12288
LATENT_NOISE = 0.3  # of the latents' standard deviation
MAX_BLUR, GRAIN = 1.2, 0.02  # pixels; of the values
PATCH, TEXT_WIDTH, VISION_WIDTH, PROJECTION = 8, 64, 96, 64
SINES = 0.2  # amplitude of the position embedding
MEAN = STD = (0.5, 0.5, 0.5)
HELD_OUT = [scene for scene in every_scene() if scene.is_held_out]
LATE_DRAW = 10**8
_ROW = {scene: row for row, scene in enumerate(TRAINING_SCENES)}


def build(tokenizer: Any) -> CLIPModel:
    """An untrained CLIP of 64 x 64 pictures and captions of at most 16 tokens, with 0.33M parameters."""
    shared = {"num_attention_heads": 4, "hidden_act": "relu"}
    text = dict(
        **shared,
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=1,
        max_position_embeddings=captions.MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = dict(
        **shared,
        hidden_size=VISION_WIDTH,
        intermediate_size=2 * VISION_WIDTH,
        num_hidden_layers=3,
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
    )
    scale = math.log(10.0)
    model: Any = CLIPModel(
        CLIPConfig(text_config=text, vision_config=vision, projection_dim=PROJECTION, logit_scale_init_value=scale)
    )
    model.vision_model.embeddings.position_embedding.weight.data[1:] = SINES * _sines(IMAGE_SIZE // PATCH, VISION_WIDTH)
    return model


def pretrain(folder: Path, work: Path, *, recipe: loop.Recipe = RECIPE, num_images: int = NUM_IMAGES) -> CLIPModel:
    """Write the CLIP to `folder` and return it; a stopped run resumes from `work`."""
    tokenizer = captions.build_tokenizer()
    images, scenes = _drawings(work / "pictures.safetensors", num_images)
    tokens = captions.tokenize(tokenizer, [scene.caption for scene in TRAINING_SCENES])
    torch.manual_seed(3)
    model = build(tokenizer)
    matrices = [value for name, value in model.named_parameters() if value.ndim == 2 and ".layers." in name]

    def loss_at(step: int) -> Tensor:
        rng, generator = random.Random(step), torch.Generator().manual_seed(step)
        rows = torch.randint(len(images), (BATCH,), generator=generator)
        shown, said = _mirrored(images[rows].float() / 255, [scenes[row] for row in rows.tolist()], rng)
        shown = torch.cat([_worn(shown[: BATCH // 2], generator), shown[BATCH // 2 :]])
        right = [_ROW[scene] for scene in said]
        near = [_ROW[scene] for one in said for scene in _neighbours(one, rng)]
        offered = torch.tensor(list(dict.fromkeys([*right, *near])))
        label = (offered == torch.tensor(right)[:, None]).int().argmax(1)
        seen = features(model, pixel_values=prepared(shown, IMAGE_SIZE, MEAN, STD))
        read = features(model, **{name: value[offered] for name, value in tokens.items()})
        return F.cross_entropy(model.logit_scale.exp().clamp(max=100) * seen @ read.T, label)

    loop.train(model, loss_at, recipe, work / "scenes-clip", "scenes-clip", matrices=matrices, muon=MUON)
    model.save_pretrained(folder, safe_serialization=True)
    image = {"image_mean": MEAN, "image_std": STD, "size": {"shortest_edge": IMAGE_SIZE}, "crop_size": IMAGE_SIZE}
    described = {"image_processor_type": "CLIPImageProcessor", "do_resize": True, "do_normalize": True, **image}
    (folder / "preprocessor_config.json").write_text(json.dumps(described, indent=2) + "\n")
    tokenizer.save_pretrained(folder)
    captions.save_slow_files(tokenizer, folder)
    return model


@torch.no_grad()
def given_back(
    vae: AutoencoderKL, images: Float[Tensor, "b 3 64 64"], noise: float, seed: int
) -> Float[Tensor, "b 3 64 64"]:
    """Pictures as the autoencoder gives them back, from latents with `noise` of their standard deviation added."""
    latents = vae.encode(images * 2 - 1).latent_dist.mean  # type: ignore[union-attr]
    latents += noise * torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
    return (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)  # type: ignore[union-attr]


def embedded_vae() -> AutoencoderKL:
    """The autoencoder of the embedded models; its latents have unit variance and no scale."""
    return AutoencoderKL.from_pretrained(ASSETS / "scenes" / "vae").requires_grad_(False).eval()


def _neighbours(scene: Scene, rng: random.Random) -> list[Scene]:
    """Training scenes that differ in one attribute: every other shape, sizes, counts and places now and then."""
    found = [replace(scene, shape=shape) for shape in captions.CHOICES["shape"] if shape != scene.shape]
    if rng.random() < 0.5:
        found.append(replace(scene, size="small" if scene.size == "large" else "large"))
    else:
        found.append(replace(scene, count=rng.choice(captions.CHOICES["count"]), position=None))
    if scene.count == 1:
        found += [replace(scene, position=place) for place in rng.choices(captions.CHOICES["position"], k=2)]
    return [other for other in found if other in _ROW]


def _mirrored(images: Tensor, scenes: list[Scene], rng: random.Random) -> tuple[Tensor, list[Scene]]:
    """Some pictures turned over sideways, with the scenes that they show then; none into a held-out scene."""
    images, said = images.clone(), list(scenes)
    for row, scene in enumerate(scenes):
        other = replace(scene, position={"left": "right", "right": "left"}.get(scene.position or "", scene.position))
        if rng.random() < 0.5 and other in _ROW:
            images[row], said[row] = images[row].flip(-1), other
    return images, said


def _worn(images: Float[Tensor, "b 3 h w"], generator: torch.Generator) -> Float[Tensor, "b 3 h w"]:
    """Pictures blurred by different widths, with grain."""
    b = len(images)
    width = MAX_BLUR * torch.rand(b, 1, generator=generator) + 1e-3
    kernel = torch.softmax(-torch.arange(-2.0, 3.0).square() / (2 * width.square()), 1).repeat_interleave(3, 0)
    rows = F.pad(images, (2, 2, 2, 2), mode="replicate").flatten(0, 1)[None]
    across = F.conv2d(rows, kernel[:, None, None, :], groups=3 * b)
    both = F.conv2d(across, kernel[:, None, :, None], groups=3 * b).view(images.shape)
    return both + GRAIN * torch.randn(images.shape, generator=generator)


def _sines(side: int, width: int) -> Float[Tensor, "n width"]:
    """Sines and cosines of the place of each of side^2 patches, across and down."""
    frequency = 100 ** -torch.linspace(0, 1, width // 4)
    down, across = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles = [place.flatten()[:, None] * frequency for place in (across, down)]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], 1)


def _drawings(path: Path, count: int) -> tuple[Tensor, list[Scene]]:
    """Drawn training scenes [count, 3, 64, 64] as bytes, the first quarter as given back, and the scenes."""
    rng = random.Random(5)
    scenes = [rng.choice(TRAINING_SCENES) for _ in range(count)]
    if not path.is_file():
        vae, parts = embedded_vae(), []
        with Progress().stage("pictures", count, "image") as on_images:
            for start in range(0, count, 64):
                part = _bytes(draw(scenes[start : start + 64], 2 * 10**7 + start))
                if start < count // 4:
                    part = _bytes(given_back(vae, part.float() / 255, LATENT_NOISE * (start // 64 % 2), start))
                parts.append(part)
                on_images(len(part))
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"pictures": torch.cat(parts)}, path)
    return load_file(path)["pictures"], scenes


def _bytes(images: Tensor) -> Tensor:
    return (images * 255).round().to(torch.uint8)

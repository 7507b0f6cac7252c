"""Small models of the classes that rewards are made of, with random weights, saved as their publishers save them."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from adascope_fast.pretraining import captions, clip

SIDE, PROJECTED = 32, 24
MEAN, STD = [0.3, 0.5, 0.6], [0.25, 0.3, 0.4]
PROMPTS = ["a large red circle in the centre on a grey background", "two small blue crosses on a white background", "a"]


def images(count: int = 3, side: int = SIDE) -> Tensor:
    """Of different colours with noise, in whole 255ths."""
    generator = torch.Generator().manual_seed(0)
    found = torch.rand(count, 3, 1, 1, generator=generator) * torch.rand(count, 3, side, side, generator=generator)
    return (found.sqrt() * 255).round() / 255


def save_clip(folder: Path, *, projected: int = PROJECTED, seed: int = 0) -> Path:
    """A CLIPModel in which every part matters, its tokenizer and its image processor."""
    tokenizer = captions.build_tokenizer()
    described = clip.build(tokenizer).config.to_dict()
    described["projection_dim"] = projected
    for tower in ("text_config", "vision_config"):
        described[tower]["projection_dim"] = projected
    described["vision_config"]["image_size"] = SIDE
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = CLIPModel(CLIPConfig.from_dict(described)).requires_grad_(False)
        for name, value in model.named_parameters():
            value += torch.randn_like(value) * (0.3 if value.ndim == 1 else 0.05) * (name != "logit_scale")
        model.logit_scale.fill_(4.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    captions.save_slow_files(tokenizer, folder)
    sizes: Any = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    CLIPImageProcessor(**sizes, image_mean=MEAN, image_std=STD).save_pretrained(folder)
    return folder

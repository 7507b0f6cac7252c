"""ImageReward.pt, BLIP in its authors' names, as transformers' two BLIP encoders and the stack of linear layers.

The widths of attention heads are in no file: 64 in both. The image tower's layer norms have an epsilon of 1e-6, which
is not transformers' default. Its two projections are of BLIP's training and are not used by the score.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adascope_fast.weights import tokenizers
from adascope_fast.weights.aesthetic import shapes
from adascope_fast.weights.files import layers_of, parted, refuse_others, save, save_processor, shapes_of, tensors_of

MOST_TOKENS = 35
BLOCK = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
ENDS = {
    "blip.visual_encoder.cls_token": "vision_model.embeddings.class_embedding",
    "blip.visual_encoder.pos_embed": "vision_model.embeddings.position_embedding",
    "blip.visual_encoder.patch_embed.proj.weight": "vision_model.embeddings.patch_embedding.weight",
    "blip.visual_encoder.patch_embed.proj.bias": "vision_model.embeddings.patch_embedding.bias",
    "blip.visual_encoder.norm.weight": "vision_model.post_layernorm.weight",
    "blip.visual_encoder.norm.bias": "vision_model.post_layernorm.bias",
}
UNUSED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")


def image_reward(files: Sequence[Path], folder: Path) -> None:
    """ImageReward from ImageReward.pt and BERT's vocabulary."""
    from transformers import BlipTextModel, BlipVisionModel

    path, others = parted(files)
    named = dict(renamed(tensors_of(path)))
    config = _config(path, named)
    with torch.device("meta"):
        parts = {
            "vision_model": BlipVisionModel(config.vision_config),
            "text_encoder": BlipTextModel(config.text_config, add_pooling_layer=False),
        }
    wanted = {
        f"{part}.{name}": tuple(value.shape)
        for part, model in parts.items()
        for name, value in model.state_dict().items()
    }
    refuse_others(path, named, wanted | shapes(config.text_config.hidden_size))
    tokenizers.bert(others, config.text_config.vocab_size, MOST_TOKENS, folder)
    config.save_pretrained(folder)
    save_processor(config.vision_config.image_size, folder)
    save(named, folder)


def renamed(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Each weight under its new name; those that are unknown keep theirs."""
    for name, value in tensors.items():
        if name.startswith(UNUSED):
            continue
        number, _, part = name.removeprefix("blip.visual_encoder.blocks.").partition(".")
        stem, _, kind = part.rpartition(".")
        if name in ENDS:
            yield ENDS[name], value
        elif name.startswith("blip.visual_encoder.blocks.") and stem in BLOCK:
            yield f"vision_model.encoder.layers.{number}.{BLOCK[stem]}.{kind}", value
        elif name.startswith("blip.text_encoder."):
            yield name.removeprefix("blip."), value
        elif name.startswith("mlp.layers."):
            yield name.removeprefix("mlp."), value
        else:
            yield name, value


def _config(path: Path, named: dict[str, Tensor]) -> Any:
    """A BlipConfig from the shapes of weights; ValueError where what says it is missing."""
    from transformers import BlipConfig

    shape = shapes_of(named, path, "the weights of ImageReward in its authors' names")
    width, _, patch, _ = shape("vision_model.embeddings.patch_embedding.weight", 4)
    _, places, _ = shape("vision_model.embeddings.position_embedding", 3)
    hidden, _ = shape("vision_model.encoder.layers.0.mlp.fc1.weight", 2)
    vocabulary, text_width = shape("text_encoder.embeddings.word_embeddings.weight", 2)
    length, _ = shape("text_encoder.embeddings.position_embeddings.weight", 2)
    text_hidden, _ = shape("text_encoder.encoder.layer.0.intermediate.dense.weight", 2)
    return BlipConfig(
        text_config={
            "vocab_size": vocabulary,
            "hidden_size": text_width,
            "encoder_hidden_size": width,
            "intermediate_size": text_hidden,
            "num_hidden_layers": layers_of(named, "text_encoder.encoder.layer."),
            "num_attention_heads": max(1, text_width // 64),
            "max_position_embeddings": length,
        },
        vision_config={
            "hidden_size": width,
            "intermediate_size": hidden,
            "num_hidden_layers": layers_of(named, "vision_model.encoder.layers."),
            "num_attention_heads": max(1, width // 64),
            "image_size": patch * round((places - 1) ** 0.5),
            "patch_size": patch,
            "layer_norm_eps": 1e-6,
        },
    )

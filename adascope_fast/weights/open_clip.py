"""CLIPs in open_clip's names as a transformers CLIPModel: HPSv2 and HPSv2.1, which are a ViT-H-14.

open_clip stacks query, key and value of an attention into one matrix, stores projections transposed, and has exact
GELU where OpenAI's models have the quick one. Widths of heads are in no file: 80 in the image tower of ViT-H (1280
wide), 64 elsewhere.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adascope_fast.weights import tokenizers
from adascope_fast.weights.files import layers_of, parted, refuse_others, save, save_processor, shapes_of, tensors_of

BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
ENDS = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
TRANSPOSED = {"text_projection": "text_projection.weight", "visual.proj": "visual_projection.weight"}
UNUSED = ("attn_mask",)
"""A buffer that older versions stored."""


def hpsv2(files: Sequence[Path], folder: Path) -> None:
    """HPSv2 from HPS_v2_compressed.pt and a CLIP tokenizer."""
    _convert(files, folder, "2.0")


def hpsv21(files: Sequence[Path], folder: Path) -> None:
    """HPSv2.1 from HPS_v2.1_compressed.pt and a CLIP tokenizer."""
    _convert(files, folder, "2.1")


def _convert(files: Sequence[Path], folder: Path, version: str) -> None:
    from transformers import CLIPModel

    path, others = parted(files)
    named = dict(renamed(tensors_of(path)))
    config = _config(path, named)
    with torch.device("meta"):
        wanted = {name: tuple(value.shape) for name, value in CLIPModel(config).state_dict().items()}
    refuse_others(path, named, wanted)
    text, vision = config.text_config, config.vision_config
    tokenizers.clip(others, text.vocab_size, text.max_position_embeddings, folder)
    config.hps_version = version
    config.save_pretrained(folder)
    save_processor(vision.image_size, folder)
    save(named, folder)


def renamed(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Each weight under transformers' name; those that are unknown keep theirs."""
    for name, value in tensors.items():
        if name in UNUSED:
            continue
        if name in ENDS:
            yield ENDS[name], value
        elif name in TRANSPOSED:
            yield TRANSPOSED[name], value.T
        else:
            yield from _of_block(name, value)


def _of_block(name: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    tower, _, rest = name.partition("transformer.resblocks.")
    number, _, part = rest.partition(".")
    if tower not in ("", "visual.") or not number.isdecimal():
        yield name, value
        return
    own = f"{'vision' if tower else 'text'}_model.encoder.layers.{number}"
    if part in ("attn.in_proj_weight", "attn.in_proj_bias"):
        kind = part.rpartition("_")[2]
        for one, third in zip("qkv", value.chunk(3), strict=False):
            yield f"{own}.self_attn.{one}_proj.{kind}", third
        return
    stem, _, kind = part.rpartition(".")
    yield (f"{own}.{BLOCK[stem]}.{kind}" if stem in BLOCK else name), value


def _config(path: Path, named: dict[str, Tensor]) -> Any:
    """A CLIPConfig from the shapes of weights; ValueError where what says it is missing."""
    from transformers import CLIPConfig

    shape = shapes_of(named, path, "the weights of a CLIP in open_clip's names")
    vocabulary, width = shape("text_model.embeddings.token_embedding.weight", 2)
    length, _ = shape("text_model.embeddings.position_embedding.weight", 2)
    hidden, _ = shape("text_model.encoder.layers.0.mlp.fc1.weight", 2)
    projected, _ = shape("text_projection.weight", 2)
    channels, _, patch, _ = shape("vision_model.embeddings.patch_embedding.weight", 4)
    places, _ = shape("vision_model.embeddings.position_embedding.weight", 2)
    vision_hidden, _ = shape("vision_model.encoder.layers.0.mlp.fc1.weight", 2)
    return CLIPConfig(
        text_config={
            "vocab_size": vocabulary,
            "hidden_size": width,
            "intermediate_size": hidden,
            "projection_dim": projected,
            "num_hidden_layers": layers_of(named, "text_model.encoder.layers."),
            "num_attention_heads": max(1, width // 64),
            "max_position_embeddings": length,
            "hidden_act": "gelu",
            "bos_token_id": vocabulary - 2,
            "eos_token_id": vocabulary - 1,
            "pad_token_id": vocabulary - 1,
        },
        vision_config={
            "hidden_size": channels,
            "intermediate_size": vision_hidden,
            "projection_dim": projected,
            "num_hidden_layers": layers_of(named, "vision_model.encoder.layers."),
            "num_attention_heads": max(1, channels // (80 if channels % 80 == 0 else 64)),
            "image_size": patch * round((places - 1) ** 0.5),
            "patch_size": patch,
            "hidden_act": "gelu",
        },
        projection_dim=projected,
    )

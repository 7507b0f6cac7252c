"""The model card of a trained pipeline."""

import os
from typing import Any

from huggingface_hub import ModelCardData

from adascope_fast.compat.trl.config import DDPOConfig
from adascope_fast.training.hub.markdown import card, escaped, table

PAPER = "https://arxiv.org/abs/2305.13301"


def model_card(
    config: DDPOConfig,
    *,
    tag_names: list[str],
    base_model: str | None = None,
    model_name: str | None = None,
    dataset_name: str | None = None,
    tags: str | list[str] | None = None,
) -> str:
    """README.md: metadata that the Hub reads, how the model was trained, and how to load it."""
    given = [tags] if isinstance(tags, str) else list(tags or [])
    on_hub = base_model if base_model is not None and not os.path.isdir(base_model) else None
    data: Any = ModelCardData(
        base_model=on_hub,
        library_name="diffusers",
        tags=sorted({*given, *tag_names}),
        datasets=[dataset_name] if dataset_name else None,
    )
    rows = [(name, escaped(getattr(config, name))) for name in vars(config) if name.startswith(("sample_", "train_"))]
    lines = [
        f"# {escaped(model_name or 'A diffusion model trained with DDPO')}",
        "",
        f"Trained with [DDPO]({PAPER})" + (f" from `{on_hub}`" if on_hub else "") + " by adascope_fast's DDPOTrainer"
        + (f" on {escaped(dataset_name)}" if dataset_name else "") + ".",
        "",
        *table(["setting", "value"], rows),
        "",
        "```python",
        "from diffusers import DiffusionPipeline",
        "",
        'pipeline = DiffusionPipeline.from_pretrained("this folder")',
        'pipeline.load_lora_weights("this folder")  # of a LoRA',
        "```",
    ]  # fmt: skip
    return card(data, lines)

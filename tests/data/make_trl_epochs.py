"""Record four epochs of TRL 0.23.1's DDPOTrainer on the embedded `scenes`, for `tests/compat/test_trl_epochs.py`.

    .venv-trl/bin/python tests/data/make_trl_epochs.py        (`make .venv-trl/.installed` makes that environment)

Writes `trl_epochs.json` (versions, what the trainer logged, and the rewards) and `trl_epochs.safetensors` (for each run
the change of every LoRA weight over the four epochs, in float16, which moves a cosine by about 1e-7).
"""

import inspect
import itertools
import json
import sys
import tempfile
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.tracking import GeneralTracker
from safetensors.torch import save_file

HERE = Path(__file__).parent
SCENES = HERE.parents[1] / "adascope_fast" / "assets" / "scenes"
sys.path.insert(0, str(HERE.parents[1] / "bench" / "baselines"))
from transformers_4 import for_transformers_4  # noqa: E402 # pyright: ignore[reportMissingImports]

PROMPTS = ("a red circle", "a blue square", "a red circle", "a small green triangle")
EPOCHS = 4
SETTINGS: dict[str, Any] = {
    "log_with": None,
    "seed": 3,
    "mixed_precision": "no",
    "accelerator_kwargs": {"cpu": True},
    "save_freq": 1000,
    "sample_num_steps": 4,
    "sample_batch_size": 4,
    "sample_num_batches_per_epoch": 2,
    "train_batch_size": 2,
    # Larger than the defaults: of a ratio within float32's rounding of the clip range either side is right.
    "train_learning_rate": 1e-3,
    "train_clip_range": 2e-3,
    "per_prompt_stat_tracking_buffer_size": 8,
    "per_prompt_stat_tracking_min_count": 3,
}


class Kept(GeneralTracker):
    """A tracker that keeps what it is given."""

    name = "kept"
    requires_logging_directory = False

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, Any]] = []

    @property
    def tracker(self) -> None:
        """There is none behind it."""

    def log(self, values: dict[str, Any], step: int | None = None, **ignored: Any) -> None:
        """Keep a row, arrays and tensors as numbers."""
        row = {name: value.tolist() if hasattr(value, "tolist") else value for name, value in values.items()}
        self.rows.append({"step": step, **row})


def runs() -> dict[str, dict[str, Any]]:
    """What differs: two updates or one, two inner epochs or one, tracking of prompts or none."""
    choices = itertools.product((1, 2), (1, 2), (False, True))
    return {
        f"updates_{updates}_inner_{inner}_{'tracked' if tracks else 'batch'}": {
            "train_gradient_accumulation_steps": 4 // updates,
            "train_num_inner_epochs": inner,
            "per_prompt_stat_tracking": tracks,
        }
        for updates, inner, tracks in choices
    }


def redness(images: torch.Tensor, prompts: tuple[str, ...], metadata: tuple[Any, ...]) -> tuple[torch.Tensor, dict]:
    """A reward that depends on each image alone."""
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3)), {}


def lora(unet: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of each trained weight."""
    return {name: value.detach().clone() for name, value in unet.named_parameters() if value.requires_grad}


def run(trl: Any, folder: Path, choices: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """What the trainer of `trl`, a module with TRL's names, logged, and by how much it moved each weight."""
    kept, prompts = Kept(), itertools.cycle(PROMPTS)
    config = trl.DDPOConfig(**SETTINGS | choices | {"log_with": kept})
    pipeline = trl.DefaultDDPOStableDiffusionPipeline(str(folder))
    trainer = trl.DDPOTrainer(config, redness, lambda: (next(prompts), {}), pipeline)
    pipeline.set_progress_bar_config(disable=True)
    before = lora(pipeline.unet)
    trainer.train(epochs=EPOCHS)
    return kept.rows, {name: value - before[name] for name, value in lora(pipeline.unet).items()}


def interface(trl: Any) -> dict[str, Any]:
    """Fields of the configuration with their defaults, and the arguments of what is called."""
    called = {
        "DDPOTrainer": ("__init__", "calculate_loss", "compute_rewards", "create_model_card", "loss", "step", "train"),
        "DefaultDDPOStableDiffusionPipeline": ("__init__",),
    }
    signatures = {
        f"{owner}.{name}": arguments(getattr(getattr(trl, owner), name))
        for owner, names in called.items()
        for name in names
    }
    from trl.models.modeling_sd_base import pipeline_step, scheduler_step  # pyright: ignore[reportMissingImports]

    signatures |= {"pipeline_step": arguments(pipeline_step), "scheduler_step": arguments(scheduler_step)}
    default = trl.DDPOConfig(exp_name="")
    return {"fields": {one.name: getattr(default, one.name) for one in fields(default)}, "signatures": signatures}


def arguments(called: Any) -> list[list[str]]:
    """Name, kind and default of each argument."""
    found = inspect.signature(called).parameters.values()
    return [[one.name, one.kind.name, "" if one.default is one.empty else repr(one.default)] for one in found]


def main() -> None:
    """Record them all."""
    import trl  # pyright: ignore[reportMissingImports]

    PartialState(cpu=True)  # TRL's logger needs one before the pipeline is loaded
    torch.set_num_threads(1)
    logged, tensors = {}, {}
    with tempfile.TemporaryDirectory() as work:
        folder = for_transformers_4(SCENES, Path(work) / "scenes")
        for name, choices in runs().items():
            logged[name], changes = run(trl, folder, choices)
            tensors |= {f"{name}/{weight}": change.half() for weight, change in changes.items()}
            print(name, logged[name][-1])
    versions = {name: version(name) for name in ("trl", "torch", "diffusers", "transformers", "peft", "accelerate")}
    told = {"versions": versions, "settings": SETTINGS, "prompts": PROMPTS, "epochs": EPOCHS, "logged": logged}
    told |= interface(trl)
    (HERE / "trl_epochs.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    save_file(tensors, HERE / "trl_epochs.safetensors")


if __name__ == "__main__":
    main()

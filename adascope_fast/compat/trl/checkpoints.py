"""Checkpoints of a `DDPOTrainer`: safetensors and JSON, where accelerate would put its own, and how a run goes on.

A resumed run repeats the one that was left alone bit for bit: weights, optimiser, statistics of prompts, the selector,
and the states of torch's, numpy's and Python's generators. TRL's own checkpoints hold pickled optimisers, which are not
read; their LoRA is, by naming the checkpoint as the pretrained model beside its base.
"""

import logging
import os
import random
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import ProjectConfiguration

from adascope_fast.compat.trl.config import DDPOConfig
from adascope_fast.loading import load_optimizer_tensors, optimizer_tensors, prefixed, select
from adascope_fast.training import checkpoint

logger = logging.getLogger(__name__)

PREFIX = "checkpoint_"


def project_of(config: DDPOConfig) -> ProjectConfiguration:
    """What `project_kwargs` says; `logdir` and `num_checkpoint_limit` where it does not."""
    given = dict(config.project_kwargs)
    given.setdefault("project_dir", config.logdir)
    given.setdefault("logging_dir", given["project_dir"])
    given.setdefault("total_limit", config.num_checkpoint_limit)
    return ProjectConfiguration(**given)


def find(config: DDPOConfig, project: ProjectConfiguration) -> Path | None:
    """The checkpoint to resume from, and the number of the next one into `project`; None: there is none to.

    Raises:
        ValueError: `resume_from` has none, or none that is whole.
    """
    if not config.resume_from:
        return None
    config.resume_from = os.path.normpath(os.path.expanduser(config.resume_from))
    given = Path(config.resume_from)
    candidates = [given] if PREFIX in given.name else _numbered(given)
    if not candidates or not all(one.is_dir() for one in candidates):
        raise ValueError(
            f"resume_from must be a checkpoint or a folder with some, and no checkpoints are found in {str(given)!r}; "
            f"they are in the folder checkpoints of the project"
        )
    why = []
    for one in reversed(candidates):
        try:
            checkpoint.load(one)
        except ValueError as error:
            why.append(f"{one.name}: {error}")
            continue
        for line in why:
            logger.warning("damaged checkpoint left out, %s; %s is used", line, one.name)
        config.resume_from, project.iteration = str(one), _number(one) + 1
        return one
    raise ValueError(
        f"resume_from needs a whole checkpoint of this trainer, and {'; '.join(why)}; of one that TRL wrote only the "
        f"LoRA can be used: put it beside the base model and leave resume_from out"
    )


def refuse_others(accelerator: Any, config: DDPOConfig, epochs: Iterable[int]) -> None:
    """ValueError where there are checkpoints of another run, or later ones than the one that is resumed."""
    project = accelerator.project_configuration
    others = [one for one in _numbered(_folder(project)) if _number(one) >= project.iteration]
    if others and any(epoch and epoch % config.save_freq == 0 for epoch in epochs):
        raise ValueError(
            f"a run writes checkpoints of its own from {PREFIX}{project.iteration} on, and {str(others[-1])!r} is "
            f"there already; set resume_from to the newest to go on, or another project_dir"
        )


def save(trainer: Any, epoch: int, global_step: int) -> Path:
    """Write a checkpoint in one rename, and what is trained beside it, as diffusers loads it; drop the oldest."""
    project = trainer.accelerator.project_configuration
    folder = _folder(project) / f"{PREFIX}{project.iteration}"
    python, numpy_state = random.getstate(), np.random.get_state(legacy=False)
    state = {
        "epoch": epoch,
        "global_step": global_step,
        "run_name": trainer.config.run_name,
        "exp_name": trainer.config.exp_name,
        "python": [python[0], list(python[1]), python[2]],
        "numpy": {**numpy_state, "state": {name: _listed(one) for name, one in numpy_state["state"].items()}},
        "statistics": trainer.stat_tracker.state_dict() if trainer.config.per_prompt_stat_tracking else None,
        "selector": None if trainer._selector is None else trainer._selector.state_dict(),
    }
    generators = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        generators["cuda"] = torch.cuda.get_rng_state()
    tensors = prefixed({str(number): one for number, one in enumerate(trainer.trainable_layers)}, "trained")
    tensors |= prefixed(optimizer_tensors(trainer.optimizer), "optimizer") | prefixed(generators, "generator")
    checkpoint.save(folder, tensors, state)
    trainer.sd_pipeline.save_checkpoint([trainer.sd_pipeline.unet], [], folder)
    project.iteration += 1
    if project.total_limit is not None:
        for old in _numbered(folder.parent)[: -project.total_limit or None]:
            shutil.rmtree(old)
    return folder


def restore(trainer: Any, folder: Path) -> tuple[int, int]:
    """Put a checkpoint back; the epoch to go on with, and the global step."""
    found = checkpoint.load(folder)
    trained, state = select(found.tensors, "trained"), found.state
    wanted = trainer.trainable_layers
    if [list(trained[str(number)].shape) for number in range(len(trained))] != [list(one.shape) for one in wanted]:
        raise ValueError(
            f"the checkpoint {str(folder)!r} must be of the same layers, got other shapes ({len(trained)} for "
            f"{len(wanted)} parameters); use the pipeline that it was trained with"
        )
    if (state["statistics"] is None) == trainer.config.per_prompt_stat_tracking:
        raise ValueError(
            f"a run goes on with the per_prompt_stat_tracking that it began with, got "
            f"{trainer.config.per_prompt_stat_tracking}; set it to {state['statistics'] is not None}"
        )
    with torch.no_grad():
        for number, parameter in enumerate(wanted):
            parameter.copy_(trained[str(number)])
    load_optimizer_tensors(trainer.optimizer, select(found.tensors, "optimizer"))
    if state["statistics"] is not None:
        trainer.stat_tracker.load_state_dict(state["statistics"])
    if state["selector"] is not None and trainer._selector is not None:
        trainer._selector.load_state_dict(state["selector"])
    generators = select(found.tensors, "generator")
    torch.set_rng_state(generators["torch"])
    if "cuda" in generators and torch.cuda.is_available():
        torch.cuda.set_rng_state(generators["cuda"])
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    own = state["numpy"]["state"]
    np.random.set_state(
        state["numpy"] | {"state": own | {"key": np.array(own["key"], dtype=np.uint32)}}  # type: ignore[arg-type]
    )
    return state["epoch"] + 1, state["global_step"]


def _folder(project: ProjectConfiguration) -> Path:
    return Path(project.project_dir or ".") / "checkpoints"


def _numbered(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    if not folder.is_dir():
        return []
    found = [one for one in folder.iterdir() if one.name.startswith(PREFIX) and one.name.split("_")[-1].isdigit()]
    return sorted(found, key=_number)


def _number(folder: Path) -> int:
    return int(folder.name.split("_")[-1])


def _listed(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value

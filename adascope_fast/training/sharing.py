"""How the processes of a run share its model, as accelerate's configuration says: whole on each, or in parts.

And what is refused of several: they must train the same thing, from the same checkpoint.
"""

import itertools
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin

from adascope_fast import rewards
from adascope_fast.config import Config, ConfigError
from adascope_fast.config.sections import Train
from adascope_fast.distributed import Ranks, bounds_of
from adascope_fast.distributed.sharded import shard
from adascope_fast.training.origin import Part
from adascope_fast.training.run_folder import versions

if TYPE_CHECKING:
    from adascope_fast.backbones import PipelineBackbone

WHOLE = "each process has the whole model"

logger = logging.getLogger(__name__)


def is_in_parts(accelerator: Accelerator, ranks: Ranks) -> bool:
    """Whether the model is to be spread over the processes."""
    # accelerate knows it by its plugin on GPUs, and by this variable alone where processes run on CPUs.
    return not ranks.is_alone and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def settled(config: Config, accelerator: Accelerator, ranks: Ranks) -> Config:
    """The configuration without what a model in parts cannot have, where that was left to choose.

    Raises:
        ConfigError: it was asked for by name.
    """
    if not is_in_parts(accelerator, ranks):
        return config
    plugin = _plugin(accelerator)
    if plugin.fsdp_version != 2:
        raise ConfigError(
            f"a model is spread over processes by FSDP2, got fsdp_version = {plugin.fsdp_version} of accelerate; set "
            f"it to 2 in its configuration, or start with: adascope-fast launch fsdp2"
        )
    if config.model.dtype == "float16":
        raise ConfigError(
            "a float16 model scales the gradient of each weight, which a model in parts cannot, got model.dtype = "
            '"float16"; set it to "bfloat16" or "float32"'
        )
    if config.train.mixed_precision == "fp16":
        raise ConfigError(
            "float16 autocast scales the gradient of each weight, which a model in parts cannot, got "
            'train.mixed_precision = "fp16"; set it to "bf16" or "no"'
        )
    if config.train.optimizer == "adamw_8bit":
        raise ConfigError(
            "moments of 8 bits are stored in blocks of whole weights, which a model in parts has not, got "
            'train.optimizer = "adamw_8bit" with FSDP; set it to "adamw"'
        )
    off: dict[str, Any] = {}
    for key in ("cuda_graphs", "channels_last", "fold_adapter"):
        if getattr(config.acceleration, key) == "on":
            raise ConfigError(
                f'acceleration.{key} needs the whole model on each process, got "on" with FSDP; set it to "auto"'
            )
        off[key] = "off"
    return config.model_copy(update={"acceleration": config.acceleration.model_copy(update=off)})


def share(backbone: "PipelineBackbone", accelerator: Accelerator, ranks: Ranks) -> str:
    """Spread the denoiser over the processes where accelerate says so, in place; in words what was done."""
    if ranks.is_alone:
        return "one process"
    if not is_in_parts(accelerator, ranks):
        return WHOLE
    plugin, device = _plugin(accelerator), accelerator.device
    options: dict[str, Any] = {}
    if plugin.cpu_offload and device.type != "cpu":
        from torch.distributed.fsdp import CPUOffloadPolicy  # a second to import

        options["offload_policy"] = CPUOffloadPolicy()
    if plugin.mixed_precision_policy is not None:
        options["mp_policy"] = plugin.mixed_precision_policy
    backbone.settle()  # weights are aligned before they are cut
    options["reshards"] = bool(plugin.reshard_after_forward)
    parts = shard(backbone.denoiser, device, **options)
    reference = backbone.weights.frozen()
    if reference is not None:
        shard(reference.to(device), device, **options)
    ranks.are_in_step = True
    kept = "" if options["reshards"] else ", which stay whole from a call to the next"
    return f"FSDP2: each process has a share of {parts} parts of the {backbone.denoiser_name}{kept}"


def refuse_other_engines() -> None:
    """ConfigError where accelerate is to use another engine than FSDP2 to share a model."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise ConfigError(
            "a model is shared by FSDP2, got DeepSpeed in accelerate's configuration, whose engine wants to make each "
            "update itself and whose checkpoints are pickles; for the same shares start with: adascope-fast launch "
            "zero2 (or zero3)"
        )
    if os.environ.get("ACCELERATE_USE_MEGATRON_LM", "false").lower() == "true":
        raise ConfigError("a model is shared by FSDP2, got Megatron-LM; start with: adascope-fast launch fsdp2")


def refuse_unlike(
    ranks: Ranks, config: Config, reward: rewards.Reward, parts: Mapping[str, Part], backbone: "PipelineBackbone"
) -> None:
    """ValueError where processes would train different things, OSError where their weights already differ."""
    if ranks.is_alone:
        return
    if not_shared := rewards.refuses_several(reward):
        raise ConfigError(
            f"each process asks the reward for its own images, and {not_shared}; start one process, or use another "
            f"reward"
        )
    ranks.refuse_difference("versions", versions())
    own = config.model_copy(update={"run": config.run.model_copy(update={"folder": "."})})
    ranks.refuse_difference("configuration", own.to_toml())
    for name, part in parts.items():
        ranks.refuse_difference(name, [part.name, part.digest])
    refuse_unlike_weights(ranks, backbone)


def refuse_unlike_weights(ranks: Ranks, backbone: "PipelineBackbone") -> None:
    """OSError where the trained weights are not the same on all ranks, which they are unless a device fails."""
    if ranks.is_alone or ranks.are_in_step:
        return
    sums = torch.stack([parameter.detach().double().sum() for parameter in backbone.trainable_parameters()])
    if (found := ranks.first_unlike(sums.tolist())) is not None:
        raise OSError(
            f"the trained weights must be the same in all processes, and those of rank {found[0]} are not those of "
            f"rank 0: a device computes otherwise; continue from the newest checkpoint without it"
        )


def tell_uneven(ranks: Ranks, train: Train) -> None:
    """A line where some processes have more to sample than others; ConfigError where one would have nothing."""
    count = train.prompts_per_iteration * train.samples_per_prompt
    bounds = bounds_of(count, train.rollout_batch, ranks.size)
    shares = [stop - start for start, stop in itertools.pairwise(bounds)]
    if max(shares) > min(shares) and ranks.is_first:
        logger.warning(
            "train.rollout_batch = %d deals %d images out unevenly, %d to %d for each of %d processes: some wait",
            *(train.rollout_batch, count, min(shares), max(shares), ranks.size),
        )


def refuse_elsewhere(path: Path, has_some: Sequence[bool]) -> None:
    """ConfigError where a run would be begun anew because its checkpoints are out of the first process's reach.

    Args:
        has_some: whether each rank finds any.
    """
    if any(has_some) and not has_some[0]:
        raise ConfigError(
            f"the first process goes on from the checkpoints of run.folder = {str(path)!r}, and they lie on the "
            f"machine of rank {has_some.index(True)}, not on that of rank 0; make that machine the first (torchrun "
            f"orders them by --local-addr), or let run.folder be on a file system that both have"
        )


def _plugin(accelerator: Accelerator) -> FullyShardedDataParallelPlugin:
    found = getattr(accelerator.state, "fsdp_plugin", None)
    return FullyShardedDataParallelPlugin() if found is None else found

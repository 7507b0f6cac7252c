"""How the processes of a run share its model, as accelerate's configuration says: whole on each, or in parts."""

import os
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from torch.distributed.fsdp import CPUOffloadPolicy

from adascope_fast.config import Config, ConfigError
from adascope_fast.distributed import Ranks
from adascope_fast.distributed.sharded import shard

if TYPE_CHECKING:
    from adascope_fast.backbones import PipelineBackbone

WHOLE = "each process has the whole model"


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


def _plugin(accelerator: Accelerator) -> FullyShardedDataParallelPlugin:
    found = getattr(accelerator.state, "fsdp_plugin", None)
    return FullyShardedDataParallelPlugin() if found is None else found

"""What of a denoiser is trained: a LoRA adapter or every weight; always in float32, whatever the rest is stored in."""

import copy
import difflib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from adascope_fast.distributed.sharded import all_whole, copy_into

ADAPTER = "adascope"


class Weights(Protocol):
    """The part of the denoiser that learns."""

    def reference(self, denoiser: nn.Module) -> Any:
        """Context that gives the denoiser as it was before training."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """The trained weights by name, exactly."""
        ...

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Put back what `tensors` gave."""
        ...

    def save(self, pipeline: DiffusionPipeline, folder: Path, tensors: dict[str, Tensor]) -> None:
        """Write what `tensors` gave so that plain diffusers reads it."""
        ...

    def metadata(self) -> dict[str, str]:
        """What a file of them says besides the tensors."""
        ...

    def merge(self) -> None:
        """Make the denoiser a plain trained one. Nothing is trained afterwards."""
        ...

    def frozen(self) -> nn.Module | None:
        """The second denoiser that the reference policy is, where it is one."""
        ...


class LoraWeights:
    """A LoRA adapter, zero at first, over frozen weights."""

    def __init__(
        self, denoiser: Any, component: str, *, rank: int, alpha: int | None, targets: Sequence[str], seed: int
    ) -> None:
        self.denoiser, self.component = denoiser, component
        self.lora = LoraConfig(r=rank, lora_alpha=alpha or rank, target_modules=list(targets), init_lora_weights=True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                denoiser.add_adapter(self.lora, ADAPTER)
            except ValueError as error:
                self._refuse_targets_of_nothing(targets)
                reason = str(error).split(". Currently")[0]
                raise ValueError(
                    f"model.lora_targets must name linear or convolution layers of the {component}, got "
                    f"{', '.join(sorted(targets))}: {reason}"
                ) from None
        self._refuse_targets_of_nothing(targets)
        for parameter in denoiser.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()

    def _refuse_targets_of_nothing(self, targets: Sequence[str]) -> None:
        """peft asks only that one of the names is found."""
        names = {name.removesuffix(".base_layer") for name, _ in self.denoiser.named_modules() if ".lora_" not in name}
        for target in targets:
            if not any(name == target or name.endswith(f".{target}") for name in names):
                depth = target.count(".") + 1
                known = sorted({".".join(name.split(".")[-depth:]) for name in names})
                close = difflib.get_close_matches(target, known, 1, 0)
                raise ValueError(
                    f"each of model.lora_targets must name layers of the {self.component}, got {target!r}, which names "
                    f"none; did you mean {close[0]!r}?"
                )

    @contextmanager
    def reference(self, denoiser: Any) -> Iterator[Any]:
        """The same module with its adapter off."""
        denoiser.disable_adapters()
        try:
            yield denoiser
        finally:
            denoiser.enable_adapters()

    def tensors(self) -> dict[str, Tensor]:
        """`lora_A` and `lora_B` of every adapted layer."""
        return all_whole(get_peft_model_state_dict(self.denoiser, adapter_name=ADAPTER))

    def load(self, tensors: dict[str, Tensor]) -> None:
        """ValueError where they are another adapter's."""
        advice = "use the model.name, model.lora_rank and model.lora_targets that it was trained with"
        _refuse_what_does_not_fit(tensors, self.tensors(), advice)
        if not isinstance(self.denoiser, FSDPModule):
            set_peft_model_state_dict(self.denoiser, tensors, adapter_name=ADAPTER)
            return
        for name, value in get_peft_model_state_dict(self.denoiser, adapter_name=ADAPTER).items():
            copy_into(value, tensors[name])

    def save(self, pipeline: Any, folder: Path, tensors: dict[str, Tensor]) -> None:
        """diffusers' LoRA format: `pipe.load_lora_weights(folder)`."""
        layers = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        pipeline.save_lora_weights(
            folder,
            **{f"{self.component}_lora_layers": layers, f"{self.component}_lora_adapter_metadata": self._settings()},
        )

    def metadata(self) -> dict[str, str]:
        """The rank, scale and layers, as diffusers writes them."""
        settings = {f"{self.component}.{name}": value for name, value in self._settings().items()}
        return {"lora_adapter_metadata": json.dumps(settings, indent=2, sort_keys=True)}

    def _settings(self) -> dict[str, Any]:
        settings = self.lora.to_dict()
        kept = {key: settings[key] for key in ("r", "lora_alpha", "lora_dropout", "use_dora", "use_rslora")}
        # JSON holds no sets, and peft's targets are one.
        return kept | {"target_modules": sorted(settings["target_modules"])}

    def frozen(self) -> None:
        """None: it is the same denoiser without its adapter."""

    def merge(self) -> None:
        """Add the adapter to the weights it adapts, and remove it."""
        self.denoiser.fuse_lora(adapter_names=[ADAPTER])
        self.denoiser.unload_lora()


class FullWeights:
    """Every weight of the denoiser. What it was before is kept only if asked for: it doubles the memory."""

    def __init__(self, denoiser: Any, component: str, *, keep_reference: bool) -> None:
        self.denoiser, self.component = denoiser.float(), component
        denoiser.requires_grad_(True)
        # The copy asks for gradients too, though it gets none: `F.linear` picks its product by that, and the products
        # round differently.
        self._base = copy.deepcopy(denoiser) if keep_reference else None

    @contextmanager
    def reference(self, denoiser: Any) -> Iterator[Any]:
        """The copy, on the device of the trained denoiser; nothing is differentiated."""
        if self._base is None:
            raise ValueError(
                'the reference policy of model.train = "full" is a second denoiser, and none was kept; '
                "load the model with keep_reference=True"
            )
        with torch.no_grad():
            yield self._base if isinstance(self._base, FSDPModule) else self._base.to(denoiser.device)

    def tensors(self) -> dict[str, Tensor]:
        """The whole state of the denoiser."""
        return all_whole(self.denoiser.state_dict())

    def load(self, tensors: dict[str, Tensor]) -> None:
        """ValueError where they are another model's."""
        _refuse_what_does_not_fit(tensors, self.tensors(), "use the model.name that it was trained with")
        for name, value in self.denoiser.state_dict().items():
            copy_into(value, tensors[name])

    def save(self, pipeline: DiffusionPipeline, folder: Path, tensors: dict[str, Tensor]) -> None:
        """A diffusers model folder: `UNet2DConditionModel.from_pretrained(folder, subfolder="unet")`, say."""
        denoiser: Any = self.denoiser
        if isinstance(self.denoiser, FSDPModule):  # its weights are on other ranks too
            plain: Any = type(self.denoiser).__mro__[2]  # what it was before it was spread
            denoiser = plain.from_config(denoiser.config)
            denoiser.load_state_dict(tensors)
        denoiser.save_pretrained(folder / self.component, safe_serialization=True)

    def frozen(self) -> nn.Module | None:
        """The copy of what it was."""
        return self._base

    def metadata(self) -> dict[str, str]:
        """None: they are a plain state."""
        return {}

    def merge(self) -> None:
        """It is a plain denoiser already."""


def _refuse_what_does_not_fit(given: dict[str, Tensor], wanted: dict[str, Tensor], advice: str) -> None:
    for name in sorted(given.keys() | wanted.keys()):
        has, wants = (list(part[name].shape) if name in part else "nothing" for part in (given, wanted))
        if has != wants:
            raise ValueError(f"the checkpoint does not fit this model: of {name} it has {has}, not {wants}; {advice}")

"""What was done to a loaded pipeline before it came here, and cannot be kept: refused by name, with the remedy.

Kept as they are, since backbones call the same modules: FreeU, slicing and tiling of the VAE, chunked feed-forward,
tokens of textual inversion, a shift set on the scheduler, components in types of their own. A safety checker is not
run.
"""

from collections.abc import Iterator
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from adascope_fast.backbones.weights import ADAPTER

ADAPTED = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
MERGE = "call pipe.fuse_lora(); pipe.unload_lora_weights() first"
ANEW = "load the pipeline anew without it"
PLAIN_PROCESSORS = {"AttnProcessor", "AttnProcessor2_0", "JointAttnProcessor2_0", "FluxAttnProcessor"}


def refuse_state(pipeline: Any, denoiser: str, *, train: str, adapted: str = "") -> None:
    """ValueError for state of a loaded pipeline under which a backbone would not be what `pipe(prompt)` is.

    Args:
        denoiser: name of the component that is trained.
        train: "lora" or "full".
        adapted: a component whose adapter stays.
    """
    for part, told, remedy in _obstacles(pipeline, denoiser, train, adapted):
        raise ValueError(f"the {part} of the pipeline must be plain, got {told}; {remedy}")


def _obstacles(pipeline: Any, denoiser: str, train: str, adapted: str) -> Iterator[tuple[str, str, str]]:
    """(component, what is on it, the remedy)."""
    if getattr(pipeline, "hf_device_map", None):
        yield "placement", f"a device map {pipeline.hf_device_map!r:.60}", "call pipe.reset_device_map() first"
    for part, module in pipeline.components.items():
        if isinstance(module, nn.Module):
            if part in ADAPTED and part != adapted:
                yield from _adapters(part, module)
            yield from _hooks(part, module)
    yield from _processors(denoiser, pipeline.components[denoiser])
    if train == "full" and getattr(pipeline.components[denoiser], "is_quantized", False):
        yield (
            denoiser,
            "quantised weights, which cannot all be trained",
            'set model.train = "lora", or load it without quantization_config',
        )


def _adapters(part: str, module: nn.Module) -> Iterator[tuple[str, str, str]]:
    names = sorted({name for layer in module.modules() if isinstance(layer, BaseTunerLayer)
                    for name in (*getattr(layer, "lora_A", {}), *layer.active_adapters)})  # fmt: skip
    if names or any(isinstance(layer, BaseTunerLayer) for layer in module.modules()):
        # Adapters that were fused keep their layers until they are unloaded.
        yield part, f"the adapter {', '.join(names) or 'of peft'}", ANEW if ADAPTER in names else MERGE
    if any(getattr(module, name, None) is not None for name in ("encoder_hid_proj", "image_proj")):
        yield part, "an IP-Adapter", "call pipe.unload_ip_adapter() first"


def _hooks(part: str, module: nn.Module) -> Iterator[tuple[str, str, str]]:
    for layer in module.modules():
        if hasattr(layer, "_hf_hook"):
            yield part, f"accelerate's {type(layer._hf_hook).__name__} (offload)", "call pipe.remove_all_hooks() first"
        registry: Any = getattr(layer, "_diffusers_hook", None)
        if registry is not None and registry.hooks:
            names = ", ".join(sorted(registry.hooks))
            yield part, f"diffusers' hook {names} (offload, cache or layerwise casting)", ANEW


def _processors(part: str, module: Any) -> Iterator[tuple[str, str, str]]:
    for processor in module.attn_processors.values():
        name = type(processor).__name__
        backend = getattr(processor, "_attention_backend", None)
        backend = getattr(backend, "value", backend)
        told = f"attention by {name}"
        if name.startswith("Fused"):
            yield part, told, "call pipe.unfuse_qkv_projections() first"
        elif "IPAdapter" in name:
            yield part, f"{told} (an IP-Adapter)", "call pipe.unload_ip_adapter() first"
        elif name.startswith("Sliced"):
            yield part, told, "call pipe.disable_attention_slicing() first"
        elif name.startswith("XFormers"):
            remedy = "call pipe.disable_xformers_memory_efficient_attention() first"
            yield part, told, f'{remedy}, and set model.attention = "xformers"'
        elif name not in PLAIN_PROCESSORS:
            yield part, told, ANEW
        if backend not in (None, "native"):
            remedy = f"call pipe.{part}.reset_attention_backend() first, and set model.attention"
            yield part, f"the attention backend {backend}", remedy

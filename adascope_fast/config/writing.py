"""A configuration as TOML with every key: a value, or a comment where none is set, with what the key then does.

TOML has no null, and reading the text back gives the same configuration.
"""

import re
from typing import TYPE_CHECKING, Any

import tomli_w

from adascope_fast.algorithms.settings import Spo
from adascope_fast.selectors.settings import LateStart
from adascope_fast.settings import Section, fields_of, show

if TYPE_CHECKING:
    from adascope_fast.config.tree import Config


def toml_of(config: "Config") -> str:
    """All sections that the configuration has, each key in the order of its class."""
    instead = _in_effect(config)
    parts = []
    for name, section in config:
        if section is not None:
            parts.append(_section(name, section, instead))
    return "\n".join(parts)


def _section(name: str, section: Section, instead: dict[str, Any]) -> str:
    fields, values = fields_of(type(section)), section.model_dump()
    lines, tables = [f"[{name}]\n"], []
    for key in dict.fromkeys([*fields, *values]):
        if values[key] is None:
            lines.append(_comment(name, key, fields[key].description or "", instead))
            continue
        text = tomli_w.dumps({name: {key: _without_none(values[key])}})
        if text.startswith(lines[0]):
            lines.append(text.removeprefix(lines[0]))
        else:  # a table, or a list of them, has a heading of its own, below which no key of the section can stand
            tables.append(text)
    return "".join(lines) + "".join(f"\n{table}" for table in tables)


def _comment(section: str, key: str, description: str, instead: dict[str, Any]) -> str:
    """The line of a key that is not set: `# ema_decay = 0.8, not set: 0.8 for LoRA, else 0 (none)`."""
    description = " ".join(description.split())
    meaning = re.search(r"[^(]\babsent: (.+?)(?=; |\. |\.$|$)", description)
    does = meaning[1] if meaning else description.removesuffix(".")
    value = instead.get(f"{section}.{key}")
    return f"# {key}{'' if value is None else f' = {show(value)}'}, not set: {does}\n"


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    return [_without_none(inner) for inner in value] if isinstance(value, list | tuple) else value


def _in_effect(config: "Config") -> dict[str, Any]:
    """What stands for keys that are not set, where the configuration alone decides it."""
    sampler, algorithm, selector = config.sampler, config.algorithm, config.selector
    found: dict[str, Any] = {
        "model.ema_decay": config.model.average_decay,
        "model.lora_alpha": config.model.lora_rank if config.model.train == "lora" else None,
        "train.microbatch": config.train.usual_microbatch(sampler.guidance_scale),
        "evaluation.num_steps": sampler.num_steps,
        "evaluation.guidance_scale": sampler.guidance_scale,
        "algorithm.clip_range_high": getattr(algorithm, "clip_range", None),
    }
    if sampler.guidance_scale != 1:
        found["sampler.train_guidance"] = getattr(algorithm, "train_guidance", None)
    if isinstance(algorithm, Spo):
        found["algorithm.branch_from"] = algorithm.first_step(sampler.num_steps)
    if isinstance(selector, LateStart):
        found["selector.start"], found["selector.end"] = selector.range_of(sampler.num_steps)
    return found

"""What a run is and how to have it again: its facts, the settings of its own, the command, and the adapter in use."""

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adascope_fast.config.defaults import Change, changes
from adascope_fast.config.tree import EMBEDDED_NAMES
from adascope_fast.reporting.files import mapping, number_of

Record = Mapping[str, Any]
GIVEN = {"pipeline": "model", "algorithm": "algorithm", "selector": "selector"}
"""Parts that may have been passed in Python, and the section of the configuration whose place they take."""
IMPORT = "from diffusers import DiffusionPipeline"
PACKAGES = {"adascope-fast": "adascope_fast", "python": "Python"}


def facts(run: Record, config: Record, parts: Record, reward: str) -> list[tuple[str, str]]:
    """(name, value) of what a reader looks for first; what is not recorded is left out."""
    memory, acceleration = number_of(run, "peak_memory_mb"), mapping(run.get("acceleration"))
    passed, named = given(parts), {section: mapping(config.get(section)).get("name") for section in GIVEN.values()}
    names = named | {section: passed[part] for part, section in GIVEN.items() if part in passed}
    sampler, train = mapping(config.get("sampler")), mapping(config.get("train"))
    images = f"{train.get('prompts_per_iteration')} prompts of {train.get('samples_per_prompt')} pictures"
    found = {
        "model": names["model"],
        "algorithm": names["algorithm"],
        "reward": reward,
        "steps trained by": names["selector"],
        "an iteration": f"{images}, {sampler.get('num_steps')} steps" if train and sampler else None,
        "seed": mapping(config.get("run")).get("seed"),
        "date": run.get("date"),
        "time in all": duration(run.get("seconds_total")),
        "device": run.get("device"),
        "peak memory": f"{memory:,.0f} MB" if memory == memory else None,
        "attention": acceleration.get("attention"),
        "versions": ", ".join(
            f"{PACKAGES.get(name, name)} {version}" for name, version in mapping(run.get("versions")).items()
        ),
        "commit": run.get("commit"),
    }
    return [(name, str(value)) for name, value in found.items() if value not in (None, "")]


def settings(config: Record) -> list[Change]:
    """The settings that are not the defaults, but for the folder."""
    return [change for change in changes(config) if change.key != "run.folder"]


def command(folder: Path, run: Record, parts: Record) -> dict[str, str]:
    """How the run was started, and what makes it again: a command, or Python where parts were passed there."""
    again = f"{folder}_again"
    passed = given(parts)
    if passed:
        arguments = ", ".join(f"{name}=..." for name in passed)
        config = f"Config.load({_text(folder / 'config.toml')}, [{_text(f'run.folder={again}')}])"
        repeat = f"from adascope_fast import Config, Trainer\n\nTrainer({config}, {arguments}).train()"
    else:
        repeat = shlex.join(["adascope-fast", "train", str(folder / "config.toml"), f"run.folder={again}"])
    return {"started": str(run.get("command") or ""), "repeat": repeat, "language": "Python" if passed else "a shell"}


def use(folder: Path, config: Record, parts: Record, prompt: str) -> str:
    """Lines of Python that draw with what was trained, "" where nothing was exported.

    Args:
        prompt: an example.
    """
    if not any((folder / "adapter").rglob("*.safetensors")):
        return ""
    model, sampler = mapping(config.get("model")), mapping(config.get("sampler"))
    name, adapter = str(model.get("name", "")), _text(folder / "adapter")
    if "pipeline" in given(parts):
        lines = ["pipeline = ...  # the one that was passed to Trainer, loaded again"]
        lines.append(f"pipeline.load_lora_weights({adapter})")
    elif model.get("train") == "full" or name.endswith(".safetensors"):
        merged = f"{folder}_merged"
        lines = [f"# first, in a shell: {shlex.join(['adascope-fast', 'merge', str(folder), merged])}", IMPORT, ""]
        lines.append(f"pipeline = DiffusionPipeline.from_pretrained({_text(merged)})")
    else:
        lines = [*_base(model), f"pipeline.load_lora_weights({adapter})"]
    return "\n".join([*lines, _picture(sampler, prompt)])


def use_published(repo_id: str, config: Record, prompt: str, denoiser: tuple[str, str] | None) -> str:
    """The same with what was published as `repo_id`.

    Args:
        denoiser: class and folder of a whole one; None: a LoRA adapter.
    """
    model, sampler = mapping(config.get("model")), mapping(config.get("sampler"))
    if denoiser is None:
        lines = [*_base(model), f"pipeline.load_lora_weights({_text(repo_id)})"]
    else:
        lines = _base(model, denoiser, repo_id)
    return "\n".join([*lines, _picture(sampler, prompt)])


def _base(model: Record, denoiser: tuple[str, str] | None = None, repo_id: str = "") -> list[str]:
    """Lines that load the pipeline that was trained, with another denoiser if one is named."""
    name = str(model.get("name", ""))
    is_embedded, dtype = name in EMBEDDED_NAMES, model.get("dtype", "float32")
    lines = ["from adascope_fast.backbones import folder_of"] if is_embedded else []
    chosen = [f"{key}={_text(model[key])}" for key in ("revision", "variant") if model.get(key)]
    kind = [f"dtype=torch.{dtype}"] if dtype != "float32" else []
    lines += ["import torch"] if kind else []
    lines += [IMPORT if denoiser is None else f"{IMPORT}, {denoiser[0]}", ""]
    if denoiser is not None:
        class_name, part = denoiser
        given_to = ", ".join([_text(repo_id), f"subfolder={_text(part)}", *kind])
        lines.append(f"{part} = {class_name}.from_pretrained({given_to})")
        chosen.append(f"{part}={part}")
    place = ", ".join([f"folder_of({_text(name)})" if is_embedded else _text(name), *chosen, *kind])
    return [*lines, f"pipeline = DiffusionPipeline.from_pretrained({place})"]


def _picture(sampler: Record, prompt: str) -> str:
    """The line that draws."""
    how = {"num_inference_steps": sampler.get("num_steps"), "guidance_scale": sampler.get("guidance_scale")}
    arguments = [_text(prompt), *(f"{key}={value}" for key, value in how.items() if isinstance(value, int | float))]
    return f"picture = pipeline({', '.join(arguments)}).images[0]"


def given(parts: Record) -> dict[str, str]:
    """What was passed in Python, by the argument: what it is called."""
    known = {name: mapping(part) for name, part in mapping(parts.get("parts")).items()}
    return {name: str(part.get("name")) for name, part in known.items() if part.get("is_given") is True}


def _text(value: Any) -> str:
    """A Python literal in double quotes."""
    return json.dumps(str(value), ensure_ascii=False)


def duration(seconds: Any) -> str:
    """Minutes and seconds, "" where they are not known."""
    if not isinstance(seconds, int | float):
        return ""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def example(prompts: Any) -> str:
    """A prompt to draw: the first that was shown."""
    return str(prompts[0]) if isinstance(prompts, Sequence) and not isinstance(prompts, str) and prompts else "a cat"

"""What a run was made of beyond its configuration: recorded at its start, compared when it goes on.

A reward, prompts, a pipeline, an algorithm or a selector that was passed in Python is in no file, and what a
configuration names (a module, a prompt file, a model's folder) may change on disk. `parts.json` says of each part what
it was called, a digest of it, and whether it was passed in Python.

A digest is SHA-256: of prompts their text; of a function its source and the texts and networks that it encloses; of an
object the source of its class, the fields that it was made with, and its texts and networks; of a network and of a
pipeline the names, types, shapes and 64 elements of each weight, and the scheduler's settings; of a reward on a server
what the server says. Source that this package ships is left out: run.json has its version.
"""

import hashlib
import inspect
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel
from torch import nn

from adascope_fast.config import ConfigError
from adascope_fast.rewards import Mixed, Remote
from adascope_fast.training.run_folder import write_whole

if TYPE_CHECKING:
    from adascope_fast.backbones import PipelineBackbone

FILE = "parts.json"
NUM_PROBED = 64
ARGUMENTS = ("reward", "train_prompts", "held_out_prompts", "pipeline", "algorithm", "selector")


@dataclass(frozen=True)
class Part:
    """One thing that a run was made of."""

    name: str
    """What it is called: module:object, a model, a number of prompts."""
    digest: str
    """SHA-256 of it, "" where its name says all."""
    is_given: bool
    """Whether it was passed in Python, in place of what the configuration names."""


def of_object(value: Any, *, is_given: bool) -> Part:
    """A reward, an algorithm or a selector; of one of this package's that the configuration names, its networks."""
    value = inspect.unwrap(value)
    if isinstance(value, Mixed):
        parts = {name: asdict(of_object(one, is_given=is_given)) for name, one in value.rewards.items()}
        return Part(name_of(value), _digest(json.dumps([parts, value.weights])), is_given)
    if isinstance(value, Remote):  # wherever its server is
        return Part(f"{value.served.name} of a server", value.digest, is_given)
    if is_given or not _is_ours(_type_of(value)):
        return Part(name_of(value), _digest(json.dumps(_described(value))), is_given)
    networks = {name: weights(one) for name, one in vars(value).items() if isinstance(one, nn.Module)}
    return Part(name_of(value), _digest(json.dumps(networks)) if networks else "", is_given)


def of_prompts(
    prompts: Sequence[str], *, is_given: bool, metadata: Mapping[str, Mapping[str, Any]] | None = None
) -> Part:
    """A list of prompts, with what the reward is told of them besides."""
    count = f"{len(prompts)} prompt{'' if len(prompts) == 1 else 's'}, {prompts[0]!r:.60} first"
    known = {prompt: dict(metadata[prompt]) for prompt in prompts if prompt in metadata} if metadata else {}
    told = [list(prompts), known] if known else list(prompts)
    return Part(count, _digest(json.dumps(told, sort_keys=True, default=str)), is_given)


def of_pipeline(components: Mapping[str, Any], name: str, dtype: torch.dtype, *, is_given: bool) -> Part:
    """A pipeline's networks and scheduler, before anything is trained.

    Args:
        dtype: that the run has its weights in; the digest is of weights in that type.
    """
    modules = {key: part for key, part in components.items() if isinstance(part, nn.Module)}
    found: dict[str, Any] = {key: weights(part, dtype) for key, part in modules.items()}
    scheduler = components.get("scheduler")
    if scheduler is not None:
        settings = {key: value for key, value in dict(scheduler.config).items() if not key.startswith("_")}
        found["scheduler"] = [type(scheduler).__name__, json.loads(json.dumps(settings, default=str))]
    return Part(name, _digest(json.dumps(found, sort_keys=True)), is_given)


def of_model(backbone: "PipelineBackbone", pipeline: Part) -> str:
    """Digest of a model before it is trained and of what will be: whoever draws its rollouts must have the same.

    Args:
        pipeline: `of_pipeline` of it.
    """
    options, (tensors, metadata) = backbone.options, backbone.adapter_file()
    trained = {name: list(value.shape) for name, value in tensors.items()}
    told = [options.embedded_guidance, options.max_sequence_length, list(backbone.latent_shape), trained, metadata]
    return _digest(json.dumps([pipeline.digest, told], sort_keys=True))


def weights(module: nn.Module, dtype: torch.dtype | None = None) -> str:
    """Digest of a network by its weights, in another type if one is named, adapters left out."""
    total = hashlib.sha256()
    for name, value in module.state_dict().items():
        if ".lora_" in name or not isinstance(value, torch.Tensor):
            continue
        flat = value.detach().reshape(-1)
        where = torch.arange(NUM_PROBED, device=flat.device) * max(0, len(flat) - 1) // (NUM_PROBED - 1)
        probed = flat[where] if len(flat) else flat
        if dtype is not None and probed.is_floating_point():
            probed = probed.to(dtype)
        name = name.replace(".base_layer.", ".")
        total.update(f"{name} {probed.dtype} {list(value.shape)}\n".encode())
        total.update(probed.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def write(folder: Path, parts: Mapping[str, Part], *, signature: str, changes: Sequence[str] = ()) -> None:
    """Write `parts.json` in one go; `signature` is that of `trust`."""
    values = {name: asdict(part) for name, part in parts.items()}
    text = json.dumps({"parts": values, "changes": list(changes), "signature": signature}, indent=1)
    write_whole(folder / FILE, text)


def read(folder: Path) -> tuple[dict[str, Part], list[str], str]:
    """(parts, changes, signature) of a run; ConfigError where the file is not as it was written."""
    path = folder / FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        parts = {name: Part(**part) for name, part in values["parts"].items()}
        changes, signature = [str(change) for change in values["changes"]], str(values["signature"])
        if not all(isinstance(part.name, str) and isinstance(part.digest, str) for part in parts.values()):
            raise TypeError("a part has a name and a digest")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        why = getattr(error, "strerror", None) or " ".join(str(error).split())[:100] or type(error).__name__
        raise ConfigError(
            f"{path} must say what the run was made of, and it cannot be read ({why}); restore it, or start a new run"
        ) from None
    return parts, changes, signature


def refuse_given(folder: Path, names: Iterable[str], *, instead: str) -> None:
    """ConfigError where one of these parts was passed in Python, so that the command line has it not.

    Args:
        instead: how to do it in Python, with `{config}` and `{arguments}` for what to fill in.
    """
    parts, _, _ = read(folder)
    given = {name: parts[name] for name in names if name in parts and parts[name].is_given}
    if given:
        arguments = ", ".join(f"{name}=..." for name in given)
        what = ", ".join(f"{name}={part.name}" for name, part in given.items())
        config = f"Config.load({str(folder / 'config.toml')!r})"
        raise ConfigError(
            f"the run in {str(folder)!r} was made in Python with {what}, which the command line has not; "
            f"do it there: {instead.format(config=config, arguments=arguments, folder=repr(str(folder)))}"
        )


def differences(before: Mapping[str, Part], now: Mapping[str, Part]) -> list[str]:
    """What of `now` is another than `before`, in words."""
    found = []
    for name, part in now.items():
        old = before.get(name)
        if old is None:
            continue
        is_same = old.digest == part.digest if old.digest and part.digest else old.name == part.name
        if old.is_given != part.is_given or (not is_same and old.name != part.name):
            found.append(f"{name} was {_spelled(old)} and is {_spelled(part)}")
        elif not is_same:
            found.append(f"{name} is called {part.name} as before, but is not what it was")
    return found


def refuse_changed(folder: Path, changed: Sequence[str]) -> None:
    """ConfigError if anything has changed."""
    if changed:
        raise ConfigError(
            f"a resumed run goes on with what {folder / FILE} says that it was made with, and {'; '.join(changed)}; "
            f"give the same, start a new run, or take the change with --accept-changes, in Python "
            f"resume(accept_changes=True)"
        )


def _spelled(part: Part) -> str:
    return f"{part.name} ({'passed in Python' if part.is_given else 'by the configuration'})"


def _described(value: Any) -> Any:
    """What tells a value from another of its kind, as JSON."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, nn.Module):
        return [name_of(value), weights(value)]
    if isinstance(value, list | tuple):
        return [_described(one) for one in value]
    if hasattr(value, "func") and hasattr(value, "keywords"):  # functools.partial
        return [_described(value.func), _described(list(value.args)), _described(list(value.keywords.items()))]
    if hasattr(value, "__func__"):  # a method
        return [_described(value.__func__), _described(value.__self__)]
    if callable(value) and hasattr(value, "__code__"):
        held = [_contents(cell) for cell in value.__closure__ or ()]
        return [name_of(value), _source(value), [_described(one) for one in held if isinstance(one, nn.Module | str)]]
    found = {name: _described(getattr(value, name)) for name in _made_with(value)}
    inside = getattr(value, "__dict__", {})
    found |= {name: _described(one) for name, one in inside.items() if isinstance(one, nn.Module | str)}
    source = _source(type(value))
    return [name_of(value), *([source] if source else []), found] if source or found else name_of(value)


def _made_with(value: Any) -> list[str]:
    """The fields that an object was made with, where its class declares them."""
    if is_dataclass(value):
        return [field.name for field in fields(value) if field.init]
    return list(type(value).model_fields) if isinstance(value, BaseModel) else []


def _source(code: Any) -> str:
    """Digest of the source of a function or class; "" of what this package ships, and of what has none."""
    if _is_ours(code):
        return ""
    compiled = getattr(code, "__code__", None)
    try:
        source = inspect.getsource(code)
    except (OSError, TypeError):  # typed in by hand, or no Python
        source = ""
    if compiled is not None and (not source or code.__name__ == "<lambda>"):  # a line may have several of these
        constants = [value for value in compiled.co_consts if isinstance(value, bool | int | float | str)]
        source += f"{compiled.co_code.hex()} {compiled.co_names} {constants}"
    return _digest(source) if source else ""


def _contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


def _is_ours(code: Any) -> bool:
    return str(getattr(code, "__module__", "")).split(".")[0] == "adascope_fast"


def _type_of(value: Any) -> Any:
    return value if hasattr(value, "__qualname__") else type(value)


def name_of(value: Any) -> str:
    """`module:object` of a function or of an object's class."""
    named = _type_of(value)
    return f"{getattr(named, '__module__', None) or ''}:{getattr(named, '__qualname__', repr(named))}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

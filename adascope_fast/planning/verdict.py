"""Whether a training fits into GPUs of 24, 40 and 80 GB, and the smallest change with which it does.

A change is planned as any configuration is, not guessed. Batch sizes come first, which change no result; then what
costs time; then what changes what is trained.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adascope_fast.config import Config, ConfigError
from adascope_fast.planning.plan import GIB, Plan, Planner, in_bytes
from adascope_fast.settings import show

SIZES = (24, 40, 80)
"""GB of GPUs that people have; a GPU's GB are GiB."""
SHARE, CONTEXT = 0.1, 1 * GIB
"""What is left free: a tenth, for the allocator's rounding and for what a plan is off, and a GPU's context."""
Changes = Mapping[str, Any]
"""Values by `section.key`."""
CHANGES: tuple[Changes, ...] = (
    {"model.offload_text_encoders": True},
    {"model.gradient_checkpointing": True},
    {"model.dtype": "bfloat16"},
    {"model.quantize": "nf4"},
    {"model.train": "lora"},
)
"""Besides batch sizes, each larger than all before it together."""


@dataclass(frozen=True)
class Fit:
    """A size of GPU, whether the training fits, and if not what makes it fit."""

    size: int
    is_fitting: bool
    changes: Changes | None
    """Keys and values; empty where it fits as it is, None where no change does."""
    num_bytes: float
    """What it takes with the changes and what is left free."""

    @property
    def line(self) -> str:
        """The changes, to be put behind a command."""
        return " ".join(f"{key}={show(value).strip(chr(34))}" for key, value in (self.changes or {}).items())


def needed_bytes(plan: Plan) -> float:
    """Memory that a GPU must have: the plan's peak and what is left free."""
    return plan.peak_bytes * (1 + SHARE) + CONTEXT


def verdict(config: Config, planner: Planner | None = None) -> list[Fit]:
    """For each size of GPU, whether `config` fits, or the smallest change with which it does."""
    planner = planner or Planner()
    as_it_is = needed_bytes(planner.plan(config))
    found = []
    for size in SIZES:
        fit = Fit(size, True, {}, as_it_is) if as_it_is <= size * GIB else _changed(config, size, planner)
        found.append(fit or Fit(size, False, None, as_it_is))
    return found


def text(fits: list[Fit]) -> str:
    """Lines for people, to follow a plan's."""
    free = f"with {SHARE:.0%} and {in_bytes(CONTEXT)} left free"
    fitting = [f"{fit.size} GB" for fit in fits if fit.is_fitting]
    lines = []
    if fitting:
        taken = next(fit.num_bytes for fit in fits if fit.is_fitting)
        lines.append(f"fits in             {', '.join(fitting)}: takes {in_bytes(taken)} {free}")
    for fit in fits:
        if fit.is_fitting:
            continue
        if fit.changes is None:
            lines.append(f"does not fit in     {fit.size} GB, whatever is changed; train a smaller model or resolution")
        else:
            lines.append(f"does not fit in     {fit.size} GB; it does, with {in_bytes(fit.num_bytes)}, after")
            lines.append(f"                    {fit.line}")
    return "\n".join(lines)


def _changed(config: Config, size: int, planner: Planner) -> Fit | None:
    for bits in range(2 ** len(CHANGES)):
        changes = {key: value for number, one in enumerate(CHANGES) if bits >> number & 1 for key, value in one.items()}
        changed = _with(config, changes)
        if changed is None or (bits and _is_same(config, changes)) or not _may_fit(changed, size, planner):
            continue
        if fit := _with_smaller_batches(changed, changes, size, planner):
            return fit
    return None


def _may_fit(config: Config, size: int, planner: Planner) -> bool:
    """Whether the weights alone leave room, which costs less to find out than a plan."""
    return planner.weight_bytes(config) * (1 + SHARE) + CONTEXT <= size * GIB


def _with_smaller_batches(config: Config, changes: Changes, size: int, planner: Planner) -> Fit | None:
    """With the largest of the halved batches that fit, the update's and the rollout's each by itself."""
    room = (size * GIB - CONTEXT) / (1 + SHARE)
    whole = planner.plan(config)
    if whole.encode_bytes > room:
        return None
    batches: dict[str, int] = {}
    if max(whole.rollout_bytes, whole.decode_bytes) > room:
        for batch in _halves(min(config.train.rollout_batch, whole.images)):
            smaller = planner.plan(_set(config, {"train.rollout_batch": batch}))
            if max(smaller.rollout_bytes, smaller.decode_bytes) <= room:
                batches["train.rollout_batch"] = batch
                break
        else:
            return None
    if whole.update_bytes[whole.microbatch] > room:
        sizes = [size for size in _halves(whole.microbatch) if _update_bytes(config, size, planner) <= room]
        if not sizes:
            return None
        batches["train.microbatch"] = sizes[0]
    fitting = planner.plan(_set(config, batches))
    if needed_bytes(fitting) > size * GIB:  # a smaller rollout batch may have changed the usual microbatch
        return None
    return Fit(size, False, {**batches, **changes}, needed_bytes(fitting))


def _update_bytes(config: Config, microbatch: int, planner: Planner) -> float:
    changed = planner.plan(_set(config, {"train.microbatch": microbatch}))
    return changed.update_bytes[microbatch]


def _halves(batch: int) -> list[int]:
    """Half of it, half of that, down to 1."""
    found = []
    while batch > 1:
        batch //= 2
        found.append(batch)
    return found


def _is_same(config: Config, changes: Changes) -> bool:
    """Whether one of the changes is none."""
    values = config.model_dump()
    return any(values[key.split(".")[0]][key.split(".")[1]] == value for key, value in changes.items())


def _with(config: Config, changes: Changes) -> Config | None:
    """None where the configuration does not allow it: weights that are all trained cannot be quantised."""
    try:
        return _set(config, changes)
    except ConfigError:
        return None


def _set(config: Config, changes: Changes) -> Config:
    values = config.model_dump(exclude_none=True)
    for key, value in changes.items():
        section, _, name = key.partition(".")
        values[section][name] = value
    return Config.of(values)

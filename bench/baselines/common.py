"""What all variants of the benchmark share: the setting, the clock, and the loop that obeys `end_to_end.py`.

A variant is a process of its own. It gets its `Setting` as JSON in its first argument, answers one line when it is
ready, and then one JSON line for each JSON line on its standard input:

    {"op": "run", "prompts": [...], "keep": [start, end] or null}      one iteration, timed
    {"op": "count", ...}                                              one iteration, its GPU launches and host syncs
    {"op": "flops"}                                                   FLOPs of one (picture, step), where it knows them
    {"op": "sweep", "prompts": [...], "keeps": [[start, end], ...]}   one rollout, then an update for each interval

Imports torch and the standard library alone, so that it also runs in TRL's environment.
"""

import importlib.util
import json
import os
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

REWARD_FILE = Path(__file__).parents[2] / "adascope_fast" / "rewards" / "jpeg.py"
PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "trl", "triton")


@dataclass(frozen=True)
class Setting:
    """What is the same for every variant, and `options`, in which they differ."""

    folder: str
    """A diffusers pipeline."""
    family: str
    """`sd`, `sdxl` or `sd3`."""
    num_steps: int = 50
    guidance_scale: float = 5.0
    noise: float = 1.0
    """DDIM's eta, or Flow-SDE's noise level."""
    batch: int = 8
    """Pictures of one rollout and rows of one training forward, before guidance doubles them."""
    lora_rank: int = 4
    """With alpha = rank, on to_q, to_k, to_v and to_out.0 (and SD3's added projections): what TRL builds in."""
    learning_rate: float = 3e-4
    clip_range: float = 1e-4
    max_grad_norm: float = 1.0
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 1
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)


class NotBuiltError(Exception):
    """The variant does not exist for this model, device or version; the message is the note in the table."""


@dataclass
class Clock:
    """Wall and CPU seconds by part of an iteration; CPU is user + system time of the process, all threads."""

    device: str
    wall: dict[str, float] = field(default_factory=dict)
    cpu: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Add the time of the block to `part`."""
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.wait()
        self.wall[part] = self.wall.get(part, 0.0) + time.perf_counter() - wall
        self.cpu[part] = self.cpu.get(part, 0.0) + time.process_time() - cpu

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.device == "cuda":
            torch.cuda.synchronize()


class Variant:
    """One way to make an iteration. Made from a `Setting`; subclasses raise `NotBuiltError` where they cannot be."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    def iterate(self, prompts: list[str], keep: tuple[int, int] | None, clock: Clock) -> dict[str, Any]:
        """Rollout, reward, update; (images, pairs, ratio_deviation) and parts "rollout" and "update" on the clock.

        Args:
            keep: the steps to train, [start, end); None means the variant's own choice.
        """
        raise NotImplementedError

    def flops(self) -> dict[str, float]:
        """FLOPs of one (picture, step), guidance included: `forward`, and `forward_backward`."""
        raise NotBuiltError("FLOPs are counted in the eager loop")

    def sweep(self, prompts: list[str], keeps: list[list[int]]) -> list[Clock]:
        """One rollout, then an update on each interval of steps: part "update" of a clock for each."""
        raise NotBuiltError("the sweep is ours alone")

    def tokens(self, prompt: str) -> list[int]:
        """What the text encoder is given for a prompt."""
        raise NotImplementedError


def serve(variant: type[Variant]) -> None:
    """Obey the benchmark until its end of the pipe closes."""
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not get between the answers

    def answer(values: dict[str, Any]) -> None:
        channel.write(json.dumps(values) + "\n")

    setting = Setting(**json.loads(sys.argv[1]))
    torch.set_num_threads(setting.threads)
    torch.manual_seed(setting.seed)
    warnings.simplefilter("ignore")
    try:
        it = variant(setting)
        answer({"versions": _versions(), "tokens": it.tokens("two small red circles on a grey background")})
    except NotBuiltError as reason:
        answer({"not_built": str(reason)})
        return
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer(_obey(it, request))
        except NotBuiltError as reason:
            answer({"not_built": str(reason)})


def _obey(it: Variant, request: dict[str, Any]) -> dict[str, Any]:
    if request["op"] == "flops":
        return it.flops()
    if request["op"] == "sweep":
        clocks = it.sweep(request["prompts"], request["keeps"])
        return {kind: [getattr(clock, kind[:-2])["update"] for clock in clocks] for kind in ("wall_s", "cpu_s")}
    prompts, keep = request["prompts"], request.get("keep")
    work = count if request["op"] == "count" else measure
    return work(it, prompts, None if keep is None else (keep[0], keep[1]))


def measure(it: Variant, prompts: list[str], keep: tuple[int, int] | None) -> dict[str, Any]:
    """One iteration: seconds in all and by part, peak memory, and what it did."""
    device = it.setting.device
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    clock = Clock(device)
    with clock("all"):
        facts = it.iterate(prompts, keep, clock)
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {**facts, "wall_s": clock.wall, "cpu_s": clock.cpu, "peak_mb": round(peak / 2**20)}


def count(it: Variant, prompts: list[str], keep: tuple[int, int] | None) -> dict[str, Any]:
    """GPU launches and host syncs of one iteration; a sync is what `torch.cuda.set_sync_debug_mode` warns of."""
    if it.setting.device != "cuda":
        raise NotBuiltError("launches and host syncs are counted on a GPU")
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        it.iterate(prompts, keep, Clock("no waiting"))
    torch.cuda.set_sync_debug_mode("default")
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        it.iterate(prompts, keep, Clock("no waiting"))
        torch.cuda.synchronize()
    launches = sum(event.count for event in seen.key_averages() if "Launch" in event.key and event.key.startswith("cu"))
    syncs = sum("synchroniz" in str(one.message) for one in caught)
    return {"launches": launches, "syncs": syncs}


def load_reward() -> Callable[[torch.Tensor, list[str]], torch.Tensor]:
    """The JPEG reward, from its file: TRL's environment does not have the package."""
    spec = importlib.util.spec_from_file_location("jpeg_reward", REWARD_FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.jpeg_compressibility


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found | {"torch": str(torch.__version__)}  # with its build

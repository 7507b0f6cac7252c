"""What several GPUs send each other in an iteration and how long they wait: counted on this machine, computed for more.

    python bench/scaling.py [--sizes 1 2 4] [--out bench/results/scaling.json] [--jitter 0.03] [--share 0.4] ...

Counted: two iterations of `scenes` and `scenes-flow` on 1, 2 and 4 processes of this machine, the model whole on each
and in parts, beside the bytes that the formulas below give for the same pairs. They must be equal.

Computed: the same formulas with the shapes of published models and 8 to 512 GPUs, each with 8 images an iteration.
Seconds are those of assumed links and an assumed share of an assumed GPU's matrix rate, all of which are printed: no
GPU was measured. What a computed row says is how large the parts are beside each other, not how fast a GPU is.
"""

import argparse
import datetime
import itertools
import json
import math
import os
import pickle
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from scipy import integrate, stats
from torch import distributed, nn

from adascope_fast import backbones
from adascope_fast.config import Config
from adascope_fast.distributed import Ranks, bounds_of
from adascope_fast.planning.plan import plan
from adascope_fast.rollout import PromptCache
from adascope_fast.training.trainer import Trainer

ROOT = Path(__file__).resolve().parents[1]
BUCKET = 2**26
COLUMNS = 10
"""Numbers that are told of each trained row."""
CASES = {"scenes": "quickstart.toml", "scenes-flow": "quickstart_flow.toml"}
SMALL = [
    "log.trackers=[]",
    "train.device=cpu",
    "train.prompts_per_iteration=4",
    "train.samples_per_prompt=4",
    "train.rollout_batch=4",
    "train.microbatch=16",
    "train.updates_per_iteration=2",
    "sampler.num_steps=8",
    "acceleration.fold_adapter=off",
]
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
Pair = tuple[int, int]


# What is sent


@dataclass(frozen=True)
class Shape:
    """An iteration of a policy gradient: `bounds` of the samples of each rank, `steps` of a rollout, and sizes."""

    bounds: list[int]
    steps: int
    state_bytes: int
    """Of one latent."""
    gradients: list[int]
    """Bytes of each trained tensor's gradient; none where the model is in parts."""
    num_parts: int = 0
    """Of a reward that has several."""
    senses: bool = True

    @property
    def size(self) -> int:
        return len(self.bounds) - 1

    @property
    def most(self) -> int:
        """Samples of the rank that has most."""
        return max(stop - start for start, stop in itertools.pairwise(self.bounds))


def sent(shape: Shape, updates: Sequence[Sequence[Pair]]) -> list[dict[str, int]]:
    """Bytes that each rank sends in an iteration, by message; pickled objects are not among them.

    Args:
        updates: the (sample, step) pairs of each update, in their order.
    """
    others = shape.size - 1
    shares = [dealt(pairs, shape.bounds) for pairs in updates]
    rows = [sum(len(share[rank]) for share in shares) for rank in range(shape.size)]
    every = {
        "finite images": shape.most * others,
        "numbers of samples": 4 * (3 * shape.steps + 1 + shape.num_parts) * shape.most * others,
        "chosen steps": shape.steps * shape.most * others * shape.senses,
        "gradients": len(updates) * sum(2 * bucket * others // shape.size for bucket in buckets(shape.gradients)),
        "statistics of rows": 4 * COLUMNS * max(rows) * others,
    }
    states = [0] * shape.size
    for share in shares:
        for rank, pairs in enumerate(share):
            wanted = {(sample, state) for sample, step in pairs for state in (step, step + 1)}
            for sample, _ in wanted:
                if (holder := owner(sample, shape.bounds)) != rank:
                    states[holder] += shape.state_bytes
    return [every | {"states of moved pairs": count} for count in states]


def owner(sample: int, bounds: Sequence[int]) -> int:
    """The rank that drew a sample."""
    return next(rank for rank, stop in enumerate(bounds[1:]) if sample < stop)


def dealt(pairs: Sequence[Pair], bounds: Sequence[int]) -> list[list[Pair]]:
    """The pairs that each rank trains: as many as the others, its own first, then what is left, in order."""
    size = len(bounds) - 1
    room = [len(pairs) * (rank + 1) // size - len(pairs) * rank // size for rank in range(size)]
    shares: list[list[Pair]] = [[] for _ in range(size)]
    left = []
    for pair in pairs:
        rank = owner(pair[0], bounds)
        (shares[rank] if len(shares[rank]) < room[rank] else left).append(pair)
    for rank, share in enumerate(shares):
        count = room[rank] - len(share)
        share += left[:count]
        left = left[count:]
    return shares


def buckets(sizes: Sequence[int]) -> list[int]:
    """Bytes of each message that gradients are added in."""
    found: list[int] = []
    for size in sizes:
        if not found or found[-1] >= BUCKET:
            found.append(0)
        found[-1] += size
    return found


def gathered(groups: Sequence[Sequence[tuple[torch.Size, int, bool]]], size: int, *, calls: int, updates: int) -> int:
    """Bytes that a rank sends where it holds a part of the model: a block's weights at each call, gradients once.

    Args:
        groups: of the tensors that are gathered together, (shape, bytes of an element, is trained).
        calls: how often a block's weights are gathered.
    """
    total = 0
    for group in groups:
        for shape, width, is_trained in group:
            part = width * math.ceil(shape[0] / size) * math.prod(shape[1:])
            total += (calls + updates * is_trained) * part * (size - 1)
    return total


# What is counted here


def count(out: Path, cases: Sequence[str]) -> None:
    """Two iterations of each case in this process, one of several; each rank writes what it sent and would have."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        distributed.init_process_group("gloo")
    torch.set_num_threads(1)
    for case in cases:
        rows = _iterations(case, out)
        (out / f"{case}.{Ranks().rank}.json").write_text(json.dumps(rows))
    if distributed.is_initialized():
        distributed.destroy_process_group()


def _iterations(case: str, out: Path) -> list[dict[str, Any]]:
    overrides = [*SMALL, f"run.folder={out / 'run'}"]
    trainer = Trainer(Config.load(ROOT / "configs" / CASES[case], overrides), quiet=True)
    trainer.prepare()
    engine, train, ranks = trainer.engine, trainer.config.train, trainer.ranks
    bounds = bounds_of(train.prompts_per_iteration * train.samples_per_prompt, train.rollout_batch, ranks.size)
    groups, cache, planned, found = _groups(engine.backbone.denoiser), PromptCache(engine.backbone), engine.planned, []
    updates: list[list[Pair]] = []

    def watched(rows: Any, generator: torch.Generator) -> Any:
        plans = planned(rows, generator)
        updates.extend([tuple(pair) for pair in rows.pairs[one.rows].tolist()] for one in plans)
        return plans

    with mock.patch.object(engine, "planned", watched), _collectives() as told, _objects(ranks) as objects:
        for iteration in range(2):
            for kept in (updates, told, objects):
                kept.clear()
            batch = trainer._batch(iteration)
            report = engine.step(cache(batch), batch, iteration=iteration, seed=iteration)
            is_in_parts = ranks.are_in_step
            gradients = [] if is_in_parts else [parameter.nbytes for parameter in engine._parameters]
            shape = Shape(
                bounds,
                trainer.schedule.num_steps,
                4 * math.prod(engine.backbone.latent_shape),
                gradients,
                len(report.values.get("reward_parts", {})),
                engine.selector.senses(iteration),
            )
            row = {
                "predicted": sent(shape, updates)[ranks.rank],
                "counted": report.values["ranks"][ranks.rank]["bytes_sent"],
                "objects": len(objects),
                "object_bytes": sum(objects),
            }
            if is_in_parts:
                forwards = -(-shape.most // train.rollout_batch) * shape.steps
                microbatches = [math.ceil(math.ceil(len(rows) / ranks.size) / engine.microbatch) for rows in updates]
                calls = forwards + 2 * sum(microbatches)
                row["in_parts"] = {
                    "predicted": gathered(groups, ranks.size, calls=calls, updates=len(updates)),
                    "counted": sum(told),
                }
            found.append(row)
    return found


def _groups(denoiser: nn.Module) -> list[list[tuple[torch.Size, int, bool]]]:
    """All tensors of a model that ranks may hold in parts; which are gathered together does not change the sum."""
    return [[(value.shape, value.element_size(), value.requires_grad) for value in denoiser.parameters()]]


@contextmanager
def _collectives() -> Any:
    """Within it, the bytes that FSDP2 sends in each of its collectives, as a ring would."""
    from torch.distributed.fsdp._fully_shard import _fsdp_collectives as fsdp

    found: list[int] = []
    gather, scatter = fsdp.DefaultAllGather.__call__, fsdp.DefaultReduceScatter.__call__

    def gathers(self: Any, output_tensor: torch.Tensor, input_tensor: torch.Tensor, *rest: Any, **more: Any) -> Any:
        found.append(input_tensor.nbytes * (distributed.get_world_size() - 1))
        return gather(self, output_tensor, input_tensor, *rest, **more)

    def scatters(self: Any, output_tensor: torch.Tensor, input_tensor: torch.Tensor, *rest: Any, **more: Any) -> Any:
        found.append(output_tensor.nbytes * (distributed.get_world_size() - 1))
        return scatter(self, output_tensor, input_tensor, *rest, **more)

    with (
        mock.patch.object(fsdp.DefaultAllGather, "__call__", gathers),
        mock.patch.object(fsdp.DefaultReduceScatter, "__call__", scatters),
    ):
        yield found


@contextmanager
def _objects(ranks: Ranks) -> Any:
    """Within it, the pickled bytes of each object that this rank tells the others."""
    found: list[int] = []
    inner = distributed.all_gather_object if distributed.is_available() else None

    def watched(parts: list[Any], value: Any, *rest: Any) -> None:
        found.append(len(pickle.dumps(value)))
        assert inner is not None
        inner(parts, value, *rest)

    with mock.patch.object(distributed, "all_gather_object", watched):
        yield found


def counted(size: int, cases: Sequence[str], **environment: str) -> list[dict[str, Any]]:
    """What the processes have counted: a row for each case, rank and iteration."""
    with tempfile.TemporaryDirectory() as work:
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(size)] if size > 1 else []
        command = [sys.executable, *launcher, str(Path(__file__).resolve()), "--count", work, *cases]
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment)
        found = []
        for case, rank in itertools.product(cases, range(size)):
            rows = json.loads((Path(work) / f"{case}.{rank}.json").read_text())
            about = {"case": case, "processes": size, "rank": rank, "model": "in parts" if environment else "whole"}
            found += [about | {"iteration": number} | row for number, row in enumerate(rows)]
    return found


def unequal(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows whose bytes are not those that were predicted."""
    return [
        row
        for row in rows
        if sum(row["predicted"].values()) != row["counted"]
        or ("in_parts" in row and row["in_parts"]["predicted"] != row["in_parts"]["counted"])
    ]


# What is computed


@dataclass(frozen=True)
class Assumed:
    """Of the machine that rows are computed for; none of it was measured."""

    node: int = 8
    """GPUs that NVLink joins."""
    nvlink_gb_s: float = 360.0
    """Each way, of a GPU: 80 % of an H100's 450."""
    nvlink_us: float = 3.0
    """From one GPU to the next."""
    infiniband_gb_s: float = 40.0
    """Of a GPU's own adapter: 80 % of 400 Gb/s."""
    infiniband_us: float = 6.0
    peak_tflops: float = 989.0
    """Of an H100 SXM, dense bfloat16, by its data sheet."""
    share: float = 0.4
    """Of it that the denoiser reaches."""
    jitter: float = 0.03
    """Standard deviation of a rank's time between two messages that all wait for, as a share of it."""
    spread: float = 0.3
    """Standard deviation of a prompt's trained steps, as a share of their mean."""
    object_us: float = 20.0
    """Of the host, to read one object of another rank."""
    updates: int = 2
    """Optimiser steps of an iteration."""

    def seconds(self, num_bytes: float, hops: float, size: int) -> float:
        """Of a collective in which each rank sends so many bytes, in so many turns one after another."""
        is_one_node = size <= self.node
        latency = self.nvlink_us if is_one_node else self.infiniband_us
        bandwidth = self.nvlink_gb_s if is_one_node else self.infiniband_gb_s
        return hops * latency * 1e-6 + num_bytes / (bandwidth * 1e9)


MODELS: dict[str, list[str]] = {
    "sd15": ["sampler.guidance_scale=5.0", "train.microbatch=8"],
    "sdxl": ["sampler.guidance_scale=5.0", "train.microbatch=8"],
    "sd35-medium": ["sampler.guidance_scale=4.5", "train.microbatch=4", "algorithm.name=grpo"],
    "flux-dev": ["sampler.guidance_scale=1.0", "train.microbatch=4", "algorithm.name=grpo"],
}
EACH = [
    "model.dtype=bfloat16",
    "model.lora_rank=32",
    "sampler.num_steps=10",
    "train.prompts_per_iteration=2",
    "train.samples_per_prompt=4",
    "train.rollout_batch=4",
]
SIZES = (8, 16, 32, 64, 128, 256, 512)


@dataclass(frozen=True)
class Load:
    """What a GPU does in an iteration, by the plan of a model."""

    images: int
    batch: int
    steps: int
    fraction: float
    rollout_flops: float
    """Of an image, with its decoding."""
    row_flops: float
    """Of a trained pair."""
    state_bytes: int
    gradients: list[int]
    weights: list[int]
    """Bytes of each part of the denoiser that is gathered at once."""
    microbatch: int


def load_of(name: str) -> Load:
    """From the model's JSON files."""
    config = Config.load(None, [*EACH, *MODELS[name], f"model.name={ROOT / 'configs' / 'published' / name}"])
    planned, train = plan(config), config.train
    backbone = backbones.outline(config.model.name, **config.model.options())
    names = set(getattr(backbone.denoiser, "_repeated_blocks", None) or backbone.denoiser._no_split_modules or ())
    blocks = [module for module in backbone.denoiser.modules() if type(module).__name__ in names]
    sizes = [sum(value.nbytes for value in block.parameters()) for block in blocks]
    rest = sum(value.nbytes for value in backbone.denoiser.parameters()) - sum(sizes)
    per_image = (planned.flops["rollout"] + planned.flops["decoding"]) / planned.images
    return Load(
        planned.images,
        train.rollout_batch,
        config.sampler.num_steps,
        planned.fraction,
        per_image,
        planned.training_flops,
        4 * math.prod(backbone.latent_shape),
        [parameter.numel() * 4 for parameter in backbone.trainable_parameters()],
        [*sizes, rest],
        planned.microbatch,
    )


def slowest(size: int) -> float:
    """Mean of the largest of so many standard normal draws."""
    value, _ = integrate.quad(
        lambda x: x * size * stats.norm.pdf(x) * stats.norm.cdf(x) ** (size - 1), -8, 12, limit=200, points=[0, 3]
    )
    return value


def held(load: Load, size: int, assumed: Assumed) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of each update [u, size] that lie on each rank, and as many as it trains; drawn once, from one seed."""
    draw = np.random.default_rng(size)
    images_of_a_prompt = 4
    mean = load.fraction * load.steps
    prompts = load.images * size // images_of_a_prompt
    lengths = np.clip(np.rint(draw.normal(mean, assumed.spread * mean, prompts)), 1, load.steps).astype(int)
    on_rank = (lengths * images_of_a_prompt).reshape(size, -1).sum(1)
    left, found = on_rank.copy(), []
    for remaining in range(assumed.updates, 0, -1):
        part = draw.multivariate_hypergeometric(left, left.sum() // remaining, method="marginals")
        left = left - part
        found.append(part)
    lie = np.array(found)
    total = lie.sum(1, keepdims=True)
    edges = total * np.arange(size + 1) // size
    return lie, np.diff(edges, axis=1)


def computed(name: str, load: Load, size: int, assumed: Assumed, *, in_parts: bool = False) -> dict[str, Any]:
    """An iteration of `size` GPUs: bytes that each sends, seconds, and the share of them in which a GPU waits."""
    rate, others = assumed.share * assumed.peak_tflops * 1e12, size - 1
    count, updates = load.images * size, assumed.updates
    bounds = bounds_of(count, load.batch, size)
    samples = np.diff(bounds)
    lie, trained = held(load, size, assumed)
    rollout, row = load.rollout_flops / rate, load.row_flops / rate
    late = assumed.jitter * slowest(size)
    work = {"rollout": samples.mean() * rollout, "update": trained.mean() * updates * row}
    longest = {"rollout": samples.max() * rollout, "update": trained.max(1).sum() * row}
    moved = np.maximum(0, lie - trained)
    shape = Shape(bounds, load.steps, load.state_bytes, [] if in_parts else load.gradients)
    messages = {name: float(value) for name, value in sent(shape, [])[0].items()}
    messages["gradients"] = updates * sum(2 * bucket * others / size for bucket in buckets(shape.gradients))
    messages["statistics of rows"] = 4.0 * COLUMNS * trained.sum(0).max() * others
    messages["states of moved pairs"] = 2.0 * load.state_bytes * moved.sum(0).max()
    turns = {
        "gradients": 2 * others * updates * len(buckets(shape.gradients)),
        "states of moved pairs": others * updates,
    }
    seconds = {name: assumed.seconds(value, turns.get(name, others), size) for name, value in messages.items()}
    objects = 9 * (2 * assumed.seconds(0, others, size) + size * assumed.object_us * 1e-6)
    seconds["objects"] = objects
    if in_parts:
        batches = int(-(-samples.max() // load.batch)) * load.steps
        micro = int(np.ceil(trained.max(1) / load.microbatch).sum())
        weights = sum(load.weights)
        a_call = sum(assumed.seconds(part * others / size, others, size) for part in load.weights)
        messages["weights"] = (batches + 2 * micro) * weights * others / size
        messages["gradients"] = updates * sum(load.gradients) * others / size
        # The next block's weights come while a block computes: what shows is what takes longer than that.
        forward = longest["rollout"] / batches
        update = longest["update"] / micro / 2
        seconds["weights"] = batches * max(0.0, a_call - forward) + 2 * micro * max(0.0, a_call - update)
        seconds["gradients"] = updates * assumed.seconds(
            sum(load.gradients) * others / size, others * len(load.weights), size
        )
    waits = {
        "rollout batches": longest["rollout"] - work["rollout"],
        "pairs": longest["update"] - work["update"],
        "stragglers": late * sum(longest.values()),
        "messages": sum(seconds.values()),
    }
    total = sum(work.values()) + sum(waits.values())
    undealt = lie.max(1).sum() / lie.mean(1).sum() - 1
    return {
        "model": name,
        "gpus": size,
        "sharing": "in parts" if in_parts else "whole",
        "bytes_sent": {name: round(value) for name, value in messages.items()},
        "message_seconds": {name: round(value, 6) for name, value in seconds.items()},
        "seconds": round(total, 3),
        "idle_share": {name: round(value / total, 5) for name, value in waits.items()},
        "idle_share_in_all": round(sum(waits.values()) / total, 4),
        "pairs_of_the_fullest_rank": round(float(undealt), 4),
    }


def dealt_batches(batches: int, size: int) -> float:
    """The share of the rollout in which a GPU waits, where so many batches are dealt to so many GPUs."""
    return 1 - batches / size / math.ceil(batches / size)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Lines for people, in Markdown."""
    lines = [
        "| model | GPUs | sent by a GPU | messages | stragglers | pairs | idle in all | idle, pairs not dealt |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        idle, update = row["idle_share"], row["pairs_of_the_fullest_rank"]
        mib = sum(row["bytes_sent"].values()) / 2**20
        lines.append(
            f"| {row['model']}, {row['sharing']} | {row['gpus']} | {mib:,.0f} MiB | {idle['messages']:.1%} | "
            f"{idle['stragglers']:.1%} | {idle['pairs']:.2%} | {row['idle_share_in_all']:.1%} | +{update:.0%} update |"
        )
    return "\n".join(lines)


def main() -> None:
    """Count, compute, and write both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="*", default=[1, 2, 4], help="processes to count on here")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "scaling.json")
    parser.add_argument("--count", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("cases", nargs="*", help=argparse.SUPPRESS)
    for field, value in asdict(Assumed()).items():
        parser.add_argument(f"--{field.replace('_', '-')}", type=type(value), default=value, help="assumed")
    chosen = parser.parse_args()
    if chosen.count is not None:
        count(chosen.count, chosen.cases)
        return
    assumed = Assumed(**{field: getattr(chosen, field) for field in asdict(Assumed())})
    rows = []
    for size in chosen.sizes:
        rows += counted(size, list(CASES))
        rows += counted(size, list(CASES), **FSDP) if size > 1 else []
    wrong = unequal(rows)
    print(f"counted: {len(rows)} iterations of a rank, {len(wrong)} not as predicted")
    loads = {name: load_of(name) for name in MODELS}
    found = [computed(name, load, size, assumed) for name, load in loads.items() for size in SIZES]
    found += [computed("flux-dev", loads["flux-dev"], size, assumed, in_parts=True) for size in SIZES]
    strong = {str(size): round(dealt_batches(384, size), 4) for size in SIZES if size <= 384}
    print(json.dumps(asdict(assumed)), table(found), sep="\n")
    result = {
        "command": "python bench/scaling.py",
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, no GPU",
        "versions": {name: version(name) for name in ("torch", "diffusers", "accelerate", "peft")},
        "setting": {"counted": SMALL, "computed": EACH, "models": MODELS},
        "counted": rows,
        "assumed": asdict(assumed),
        "computed": found,
        "idle_share_of_384_rollout_batches": strong,
    }
    chosen.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if wrong:
        sys.exit(f"{len(wrong)} of {len(rows)} rows sent other bytes than predicted; they are in {chosen.out}")


if __name__ == "__main__":
    main()

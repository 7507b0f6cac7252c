"""What an iteration costs beside the denoiser: kernel launches, torch operations and bytes, counted, not timed.

    python bench/kernels/traffic.py [--models scenes ...] [--dtypes bfloat16 ...] [--cases plain ...]
        [--steps 6 12] [--part after] [--out FILE]

Whole iterations of the embedded models run on the CPU with the kernels in Triton's interpreter, set up as a run sets
them up; `counting.py` says what is counted. Told are one step of a rollout, all sensing of an iteration, and one
microbatch of an update. Bytes are read and written, of one latent element (of one step, where it is sensing).

"before" and "after" of the committed file are of two commits; `--part` says which of them is written.
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).parents[2]
RESULTS = CHECKOUT / "bench" / "results" / "traffic.json"
MODELS = {"scenes": "UNet, channels-last", "scenes-flow": "transformer"}
DTYPES = ("float32", "bfloat16")
CASES = {
    "plain": [],
    "guidance": ["sampler.guidance_scale=5"],
    "KL": ["algorithm.kl_weight=0.1"],
    "second update": ["train.updates_per_iteration=2"],
}
NUM_ROWS, MICROBATCH = 8, 4
SMALL = [
    "train.prompts_per_iteration=2",
    f"train.samples_per_prompt={NUM_ROWS // 2}",
    f"train.rollout_batch={NUM_ROWS}",
    f"train.microbatch={MICROBATCH}",
    "algorithm.clip_range=5e-3",
    "selector.name=adascope",
]
INTERPRETED = {"TRITON_INTERPRET": "1", "ADASCOPE_FAST_KERNELS": "triton", "OMP_NUM_THREADS": "1"}
SHOWN = ("launches", "latent_operations", "small_operations", "kernel_bytes", "operation_bytes")
Row = dict[str, Any]


def iteration(model: str, dtype: str, case: str, num_steps: int) -> list[Row]:
    """One iteration: a row for each of its parts that are told."""
    from counting import Counting, Counts

    from adascope_fast.config import Config
    from adascope_fast.rollout import PromptCache
    from adascope_fast.training.trainer import Trainer

    settings = [f"model.name={model}", f"model.dtype={dtype}", f"sampler.num_steps={num_steps}", *SMALL, *CASES[case]]
    config = Config.load(CHECKOUT / "configs" / "tiny.toml", settings)
    trainer = Trainer(config, reward=_redness, quiet=True)
    trainer.prepare()
    engine, prompts = trainer.engine, trainer.prompts_of(0)
    encoded, size = PromptCache(trainer.backbone)(prompts), _size(trainer.backbone.latent_shape)
    counting, part = Counting(trainer.backbone.denoiser, size), engine._part
    cuts: dict[str, list[tuple[int, Counts]]] = {"rollout": [], "update": []}
    sensed: list[Counts] = []

    @contextmanager
    def cut_off(name: str) -> Iterator[None]:
        counting.cut()
        with part(name):
            yield
        if name == "sensing":
            sensed.append(counting.cut())

    engine._part = cut_off  # type: ignore[method-assign]
    engine._progress = lambda name, done, total: cuts[name].append((done, counting.cut()))
    with counting.everything():
        engine.step(encoded, prompts, iteration=0, seed=1)
    step, microbatch = num_steps // 2, _a_whole_one(len(cuts["update"]), config.train.num_updates)
    (before, _), (after, update) = cuts["update"][microbatch - 1 : microbatch + 1]
    told = {
        "rollout step": cuts["rollout"][step][1].told(NUM_ROWS * size),
        "sensing": sum(sensed, Counts()).told(NUM_ROWS * size * num_steps),
        "update microbatch": update.told((after - before) * size),
    }
    head = {"model": model, "dtype": dtype, "case": case, "num_steps": num_steps}
    return [head | {"part": name} | values for name, values in told.items()]


def _a_whole_one(num_microbatches: int, num_updates: int) -> int:
    """Number of the last update's second microbatch: with the first comes the plan, after the last the optimiser."""
    per_update = num_microbatches // num_updates
    assert per_update >= 3
    return (num_updates - 1) * per_update + 1


def _redness(images: Any, prompts: list[str]) -> Any:
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


def _size(shape: tuple[int, ...]) -> int:
    channels, height, width = shape
    return channels * height * width


def count(models: list[str], dtypes: list[str], cases: list[str], steps: list[int]) -> Iterator[Row]:
    """Rows of all iterations; more steps than the first are for the plain case, whose sensing they are of."""
    for model in models:
        for dtype in dtypes:
            for case in cases:
                yield from iteration(model, dtype, case, steps[0])
            for num_steps in steps[1:]:
                yield from iteration(model, dtype, cases[0], num_steps)


def facts() -> Row:
    """With what this was counted."""
    command = ["git", "log", "-1", "--format=%H", "--", "adascope_fast", "kernels"]
    commit = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    return {
        "command": f"python bench/kernels/traffic.py {' '.join(sys.argv[1:])}".strip(),
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip() or None,
        "versions": {"torch": version("torch"), "triton": version("triton"), "python": platform.python_version()},
        "rows_of_a_rollout_step": NUM_ROWS,
        "rows_of_a_microbatch": MICROBATCH,
    }


def table(rows: list[Row]) -> str:
    """Markdown: one line a row."""
    names = ["launches", "operations on latents", "small operations", "bytes, kernels", "bytes, operations"]
    lines = [f"| model | type | part | case | {' | '.join(names)} |", "|---" * (4 + len(names)) + "|"]
    for row in rows:
        head = [row["model"], row["dtype"], _part(row), row["case"]]
        lines.append(f"| {' | '.join(head)} | {' | '.join(f'{row[key]:g}' for key in SHOWN)} |")
    return "\n".join(lines)


def _part(row: Row) -> str:
    return f"{row['part']}, T = {row['num_steps']}" if row["part"] == "sensing" else row["part"]


def comparison(result: Row, dtype: str = "bfloat16") -> str:
    """Markdown of kernels/README.md: before and after, in one type; models that cost the same share a line."""
    names = ["launches", "operations on latents", "small operations", "bytes an element"]
    before, models = {_key(row): row for row in result["before"]["rows"]}, {}
    for row in result["after"]["rows"]:
        old = before[_key(row)]
        if row["dtype"] == dtype and _is_shown(row):
            pairs = [(old[key], row[key]) for key in SHOWN[:3]] + [(_all_bytes(old), _all_bytes(row))]
            cells = (_part(row), row["case"], *(f"{was:g} → {now:g}" for was, now in pairs))
            models.setdefault(cells, []).append(f"`{row['model']}`")
    lines = [f"| part | case | {' | '.join(names)} | model |", "|---" * (3 + len(names)) + "|"]
    lines += [f"| {' | '.join(cells)} | {', '.join(models[cells])} |" for cells in sorted(models)]
    return "\n".join(lines)


def _is_shown(row: Row) -> bool:
    """Where the case makes a difference."""
    told = {"rollout step": ("plain", "guidance"), "sensing": ("plain",), "update microbatch": tuple(CASES)}
    return row["case"] in told[row["part"]] and (row["num_steps"] == 6 or row["part"] == "sensing")


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("model", "dtype", "case", "num_steps", "part"))


def _all_bytes(row: Row) -> float:
    return round(row["kernel_bytes"] + row["operation_bytes"], 1)


def main() -> int:
    """Count, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--steps", nargs="+", type=int, default=[6, 12], help="steps of a rollout")
    parser.add_argument("--part", choices=["before", "after"], default="after")
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in INTERPRETED.items()):
        environment = os.environ | INTERPRETED | {"PYTHONPATH": str(CHECKOUT), "HF_HUB_OFFLINE": "1"}
        return subprocess.run([sys.executable, *sys.argv], env=environment, check=False).returncode
    rows = list(count(chosen.models, chosen.dtypes, chosen.cases, chosen.steps))
    print(table(rows))
    result = json.loads(chosen.out.read_text()) if chosen.out.exists() else {}
    result[chosen.part] = facts() | {"rows": rows}
    chosen.out.parent.mkdir(exist_ok=True)
    chosen.out.write_text(json.dumps(result).replace("}, {", "},\n{").replace('"rows": [', '"rows": [\n') + "\n")
    print(chosen.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())

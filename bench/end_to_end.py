"""Images per second of a whole RL iteration: TRL, an eager loop, its compiled form, Flow-GRPO-Fast's steps, and ours.

    python bench/end_to_end.py [--device cpu|cuda] [--models scenes sd15 sdxl sd35m] [--sweep] [--quick] [--out FILE]

Every variant does the same work on the same prompts, with the same steps, guidance, batch, type, LoRA and reward (JPEG
size). Each is a process of its own, and their iterations take turns, so that a busy moment meets all of them. Figures
are medians; ratios are of medians, in CPU time (user + system) and in wall time. Writes JSON and prints a table.

`sd15`, `sdxl` and `sd35m` have the published shapes and random weights: throughput does not depend on the weights.
TRL runs in an environment of its own (`make bench-cpu` makes it); without it that row says so.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

from baselines import report
from baselines.common import Setting

HERE = Path(__file__).parent
SCENES = HERE.parent / "adascope_fast" / "assets" / "scenes"
EAGER, OURS, TRL = (HERE / "baselines" / name for name in ("eager.py", "ours.py", "trl_ddpo.py"))
SWEEP = (0.1, 0.3, 0.6, 1.0)


@dataclass(frozen=True)
class Variant:
    """One row: a script and what it is told. `needs_gpu` rows are left out on the CPU."""

    name: str
    label: str
    script: Path
    options: dict[str, Any] = field(default_factory=dict)
    is_interval: bool = False
    needs_gpu: bool = False
    is_full_only: bool = False

    @property
    def is_one_pass(self) -> bool:
        """Trained within the rollout."""
        return self.options.get("config", {}).get("train", {}).get("update") == "one_pass"


def _ours(name: str, label: str, config: dict[str, Any] | None = None, **flags: bool) -> Variant:
    return Variant(name, label, OURS, {"config": config or {}}, **flags)


ONE_PASS = {"train": {"update": "one_pass"}}
TAIL = {"sampler": {"tail_share": 0.4}}


VARIANTS = [
    Variant("trl", "B0 TRL 0.23.1 DDPOTrainer", TRL),
    Variant("eager", "B1 eager loop", EAGER),
    Variant("compiled", "B2 = B1 + torch.compile", EAGER, {"compile": "default"}, needs_gpu=True),
    Variant(
        "compiled_graphs", "B2 = B1 + torch.compile, reduce-overhead", EAGER, {"compile": "reduce-overhead"},
        needs_gpu=True, is_full_only=True,
    ),
    Variant("fast_window", "B3 Flow-GRPO-Fast: window of 3 SDE steps", EAGER, {"window": 3}),
    _ours("ours_every_step", "ours, every step"),
    _ours("ours_interval", "ours, interval", is_interval=True),
    _ours("ours_one_pass", "ours, interval, one pass", ONE_PASS, is_interval=True),
    _ours("ours_tail", "ours, interval, 0.4 of the steps after it", TAIL, is_interval=True),
]  # fmt: skip


def ladder(batch: int, *, is_gpu: bool) -> list[Variant]:
    """Our features one at a time, each row with those above it."""
    features: list[tuple[str, dict[str, dict[str, Any]]]] = [
        ("five timesteps in a forward", {"train": {"microbatch": 5 * batch}}),
        ("adapter folded in the rollout", {"acceleration": {"fold_adapter": "on"}}),
        ("fused optimiser", {"acceleration": {"fused_optimizer": "on"}}),
        ("channels_last", {"acceleration": {"channels_last": "on"}}),
    ]
    if is_gpu:
        features += [
            ("torch.compile, regional", {"acceleration": {"compile": "regional"}}),
            ("CUDA graphs", {"acceleration": {"cuda_graphs": "on"}}),
        ]
    config: dict[str, dict[str, Any]] = {
        "train": {"microbatch": batch},
        "acceleration": {"compile": "off", "channels_last": "off", "fused_optimizer": "off", "fold_adapter": "off"},
    }
    rows = [_ours("ladder_0", "ours with none of these", config)]
    for label, changes in features:
        config = {name: config.get(name, {}) | changes.get(name, {}) for name in config | changes}
        rows.append(_ours(f"ladder_{len(rows)}", f"+ {label}", config))
    rows.append(_ours(f"ladder_{len(rows)}", "+ interval", config, is_interval=True))
    one_pass = config | {"train": config["train"] | ONE_PASS["train"]}
    rows.append(_ours(f"ladder_{len(rows)}", "+ interval + one pass", one_pass, is_interval=True))
    return [*rows, _ours(f"ladder_{len(rows)}", "+ interval + short tail", config | TAIL, is_interval=True)]


class Worker:
    """A variant's process: JSON lines in, JSON lines out. `note` says why it is not there."""

    def __init__(self, variant: Variant, setting: Setting, python: str, folder: Path) -> None:
        self.variant, self.note, self.ready = variant, "", {}
        self._errors = (folder / f"{variant.name}.err").open("w+")
        if not Path(python).exists():
            self.note = f"not measured: no {python}; make bench-cpu makes it"
            return
        threads = str(setting.threads)
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        setting = replace(setting, options=variant.options)
        self._process = subprocess.Popen(
            [python, str(variant.script), json.dumps(asdict(setting))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, cwd=folder, env=environment,
        )  # fmt: skip

    def wait_ready(self) -> None:
        """Read the first line, which loading takes."""
        if not self.note:
            self.ready = self._read()

    def ask(self, op: str, **values: Any) -> dict[str, Any]:
        """The answer to one request; empty, and `note` set, where there is none."""
        if self.note:
            return {}
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"op": op, **values}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the reason is in what it wrote last
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            answer = json.loads(line)
            self.note = answer.pop("not_built", "")
            return answer
        self._errors.seek(0)
        last = (self._errors.read().strip().splitlines() or ["no message"])[-1]
        self.note = f"failed: {last[:200]}"
        return {}

    def close(self) -> None:
        """End the process by closing its input."""
        if hasattr(self, "_process"):
            self._process.communicate()
        self._errors.close()


def main() -> None:
    """Measure every model and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--models", nargs="+", choices=("scenes", "sd15", "sdxl", "sd35m"), help="default: scenes, sd15 on CUDA"
    )
    parser.add_argument("--only", nargs="+", choices=[variant.name for variant in VARIANTS], help="rows to measure")
    parser.add_argument("--repeats", type=int, help="timed iterations of each variant; default 3, on CUDA 5")
    parser.add_argument("--num-steps", type=int, help="denoising steps; default 50, sd35m 10")
    parser.add_argument("--batch", type=int, help="pictures of an iteration; default 8, sdxl 2")
    parser.add_argument("--sweep", action="store_true", help="update time against the fraction of steps trained")
    parser.add_argument("--ladder", action="store_true", help="our features one at a time")
    parser.add_argument("--quick", action="store_true", help="two repeats, 20 steps: minutes on a GPU")
    parser.add_argument("--trl-python", default=str(HERE.parent / ".venv-trl" / "bin" / "python"))
    parser.add_argument("--out", type=Path, default=HERE / "results" / "end_to_end.json")
    chosen = parser.parse_args()
    started, load = time.time(), list(os.getloadavg())
    models = []
    for name in chosen.models or (["scenes"] if chosen.device == "cpu" else ["scenes", "sd15"]):
        with tempfile.TemporaryDirectory() as work:
            models.append(measure(name, chosen, Path(work)))
        report.write(chosen.out, models, device=_device(chosen.device), started=started, load=load)
        print(f"\n{name}, {models[-1]['setting']['num_steps']} steps, batch {models[-1]['setting']['batch']}\n")
        print(report.markdown(models[-1]["rows"]), flush=True)
        for goal in models[-1]["goals"]:
            print(json.dumps(goal))
        if models[-1]["sweep"]:
            print(json.dumps(models[-1]["sweep"]))
    print(chosen.out)


def measure(name: str, chosen: argparse.Namespace, work: Path) -> dict[str, Any]:
    """All rows of one model."""
    is_gpu = chosen.device == "cuda"
    setting = _setting(name, chosen, work)
    if name != "scenes":
        subprocess.run(
            [sys.executable, str(HERE / "baselines" / "models.py"), name, setting.folder, chosen.device], check=True
        )
    variants = [v for v in VARIANTS if (not chosen.only or v.name in chosen.only) and (is_gpu or not v.needs_gpu)]
    variants = [v for v in variants if not (chosen.quick and v.is_full_only)]
    if chosen.ladder:
        variants += ladder(setting.batch, is_gpu=is_gpu)
    repeats = chosen.repeats or (2 if chosen.quick else 5 if is_gpu else 3)
    prompts, keep = prompt_batches(setting.batch), interval(setting.num_steps)
    with workers(variants, setting, chosen.trl_python, work) as processes:
        taken: dict[str, list[dict[str, Any]]] = {variant.name: [] for variant in variants}
        # A GPU needs a warm-up, compiling above all; on the CPU the median of three sees to the first iteration.
        for number in range(-2 if is_gpu else 0, repeats):
            batch = next(prompts)
            for it in processes:
                answer = it.ask("run", prompts=batch, keep=keep if it.variant.is_interval else None)
                if answer and number >= 0:
                    taken[it.variant.name].append(answer)
        rows = [_row(it, taken[it.variant.name], setting) for it in processes]
        if is_gpu:
            _count(processes, rows, next(prompts), setting, keep)
        sweep = None
        if chosen.sweep:
            sweep = run_sweep(processes, setting, prompts, repeats)
    for base in ("trl", "eager"):
        report.ratios(rows, base)
    return {
        "model": name,
        "setting": {key: value for key, value in asdict(setting).items() if key != "folder"},
        "interval": keep,
        "repeats": repeats,
        "versions": {it.variant.name: it.ready.get("versions") for it in processes},
        "rows": rows,
        "sweep": sweep,
        "goals": [] if is_gpu else report.goals(rows, sweep),
    }


@contextmanager
def workers(variants: list[Variant], setting: Setting, trl_python: str, work: Path) -> Iterator[list[Worker]]:
    """The processes, loaded; an error if they do not cut a prompt into the same tokens."""
    with ExitStack() as stack:
        found = []
        for variant in variants:
            python = trl_python if variant.script == TRL else sys.executable
            found.append(Worker(variant, setting, python, work))
            stack.callback(found[-1].close)
        for worker in found:
            worker.wait_ready()
        tokens = {json.dumps(worker.ready["tokens"]) for worker in found if "tokens" in worker.ready}
        if len(tokens) > 1:
            raise RuntimeError(f"the variants must see the same tokens, but they see {sorted(tokens)}")
        yield found


def run_sweep(processes: list[Worker], setting: Setting, prompts: Iterator[list[str]], repeats: int) -> dict | None:
    """Update time of ours against the fraction of steps trained (those in the middle), and the line."""
    it = next((it for it in processes if it.variant.name == "ours_every_step" and not it.note), None)
    if it is None:
        return None
    num_steps, answers = setting.num_steps, []
    sizes = sorted({max(1, round(fraction * num_steps)) for fraction in SWEEP})
    keeps = [[(num_steps - size) // 2, (num_steps - size) // 2 + size] for size in sizes]
    for _ in range(repeats):
        answers.append(it.ask("sweep", prompts=next(prompts), keeps=keeps))
        if it.note:
            return {"note": it.note}
    fractions, kind = [size / num_steps for size in sizes], _clock(setting)
    medians = [median(values) for values in zip(*(answer[kind] for answer in answers), strict=True)]
    return {
        "fractions": fractions,
        "update_s": medians,
        "clock": kind,
        "repeats": answers,
        "fit": report.fit_through_origin(fractions, medians),
    }


def interval(num_steps: int) -> list[int]:
    """[5, 32) of 50 steps, or the same share of another number."""
    return [round(num_steps * 0.1), round(num_steps * 0.64)]


def prompt_batches(size: int) -> Iterator[list[str]]:
    """New prompts for every iteration, so that a cache of encoded prompts does not decide."""
    from adascope_fast import prompts

    texts = iter(prompts.load("scenes:train"))
    while True:
        batch = list(islice(texts, size))
        if len(batch) < size:
            texts = iter(prompts.load("scenes:train"))
            continue
        yield batch


def _setting(name: str, chosen: argparse.Namespace, work: Path) -> Setting:
    is_gpu = chosen.device == "cuda"
    is_flow = name == "sd35m"
    return Setting(
        folder=str(SCENES if name == "scenes" else work / name),
        family="sd3" if is_flow else "sdxl" if name == "sdxl" else "sd",
        num_steps=chosen.num_steps or (10 if is_flow else 20 if chosen.quick else 50),
        guidance_scale=4.5 if is_flow else 5.0,
        noise=0.7 if is_flow else 1.0,
        batch=chosen.batch or (2 if name == "sdxl" else 8),
        dtype="bfloat16" if is_gpu else "float32",
        device=chosen.device,
        threads=8 if is_gpu else 1,
    )


def _row(it: Worker, repeats: list[dict[str, Any]], setting: Setting) -> dict[str, Any]:
    row: dict[str, Any] = {"name": it.variant.name, "label": it.variant.label, "clock": _clock(setting)}
    if not repeats:
        return row | {"note": it.note}
    row |= report.summarise(repeats, clock=row["clock"], num_steps=setting.num_steps)
    if it.variant.is_one_pass:
        row["ms_per_image_step"] = None  # it trains within the rollout
    return row


def _count(
    processes: list[Worker], rows: list[dict[str, Any]], prompts: list[str], setting: Setting, keep: list[int]
) -> None:
    """Launches, host syncs and FLOP shares; outside the timed iterations."""
    eager = next((it for it in processes if it.variant.name == "eager"), None)
    flops = eager.ask("flops") if eager is not None else {}
    for it, row in zip(processes, rows, strict=True):
        if "wall_s" not in row:
            continue
        answer = it.ask("count", prompts=prompts, keep=keep if it.variant.is_interval else None)
        for key, value in answer.items():
            row[f"{key}_per_step"] = value / setting.num_steps
        if flops:
            report.flop_share(row, flops, num_steps=setting.num_steps, is_one_pass=it.variant.is_one_pass)


def _clock(setting: Setting) -> str:
    return "wall_s" if setting.device == "cuda" else "cpu_s"


def _device(device: str) -> str:
    if device == "cpu":
        return "no GPU used"
    import torch

    return torch.cuda.get_device_name()


if __name__ == "__main__":
    main()

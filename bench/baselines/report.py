"""From the repeats of the variants to medians, ratios, the fitted line, a table and a JSON file."""

import datetime
import json
import math
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

Record = dict[str, Any]


def summarise(repeats: list[Record], *, clock: str, num_steps: int) -> Record:
    """Medians of one variant's iterations. `clock` is "cpu_s" or "wall_s": what "rollout_s" and "update_s" are in."""
    first = repeats[0]

    def middle(kind: str, *parts: str) -> float:
        return median(sum(one[kind].get(part, 0.0) for part in parts) for one in repeats)

    update = middle(clock, "update")
    fraction = first["pairs"] / (first["images"] * num_steps)
    return {
        "images_per_s": first["images"] / middle("wall_s", "all"),
        "images_per_cpu_s": first["images"] / middle("cpu_s", "all"),
        "wall_s": middle("wall_s", "all"),
        "cpu_s": middle("cpu_s", "all"),
        "rollout_s": middle(clock, "encode", "rollout"),
        "update_s": update,
        "ms_per_image_step": 1000 * update / first["pairs"],
        "fraction_trained": fraction,
        "peak_mb": max(one["peak_mb"] for one in repeats),
        "ratio_deviation": max(one["ratio_deviation"] for one in repeats),
        "repeats": repeats,
    }


def ratios(rows: list[Record], base: str) -> None:
    """Add to each measured row how many times the throughput of `base` it has, in wall and in CPU time."""
    against = next((row for row in rows if row["name"] == base and "wall_s" in row), None)
    for row in rows:
        if against is not None and "wall_s" in row:
            row[f"times_{base}"] = {kind: against[kind] / row[kind] for kind in ("wall_s", "cpu_s")}


def flop_share(row: Record, flops: dict[str, float], *, num_steps: int, is_one_pass: bool) -> None:
    """Add model FLOP/s as a share of the measured matrix rate: of the update, and of rollout and update together.

    Model FLOPs are those of the denoiser for what the algorithm needs: a forward for each step sampled, and for
    each trained pair a forward and a backward, or the backward alone in one pass. Recomputation does not count.
    """
    first, pairs = row["repeats"][0], row["repeats"][0]["pairs"]
    sampled = first.get("forwards", first["images"] * num_steps)
    train = pairs * (flops["forward_backward"] - (flops["forward"] if is_one_pass else 0))
    both = sampled * flops["forward"] + train
    row["flop_share"] = both / (row["rollout_s"] + row["update_s"]) / flops["matrix_rate"]
    row["flop_share_update"] = None if is_one_pass else train / row["update_s"] / flops["matrix_rate"]


def fit_through_origin(fractions: list[float], seconds: list[float]) -> dict[str, float]:
    """Least squares of seconds = slope * fraction: slope, R (Pearson), and the worst |deviation| from the line.

    The deviation is relative to the line at that fraction.
    """
    if len(fractions) < 2 or min(fractions) <= 0:
        raise ValueError(f"a line needs two points or more with fractions above 0, got {fractions}")
    slope = sum(x * y for x, y in zip(fractions, seconds, strict=True)) / sum(x * x for x in fractions)
    mean_x, mean_y = sum(fractions) / len(fractions), sum(seconds) / len(seconds)
    covariance = sum((x - mean_x) * (y - mean_y) for x, y in zip(fractions, seconds, strict=True))
    spread = math.sqrt(sum((x - mean_x) ** 2 for x in fractions) * sum((y - mean_y) ** 2 for y in seconds))
    worst = max(abs(y / (slope * x) - 1) for x, y in zip(fractions, seconds, strict=True))
    return {"slope_s": slope, "r": covariance / spread if spread else float("nan"), "worst_deviation": worst}


def goals(rows: list[Record], sweep: Record | None) -> list[Record]:
    """The CPU goals: throughput against TRL in CPU time, and the line through the origin."""
    wanted = {"ours_every_step": 1.1, "ours_interval": 1.5, "ours_one_pass": 1.75}
    found = []
    for name, least in wanted.items():
        row = next((row for row in rows if row["name"] == name and "times_trl" in row), None)
        value = None if row is None else row["times_trl"]["cpu_s"]
        found.append({"goal": f"{name} / trl", "at_least": least, "value": value, "met": _met(value, least)})
    worst = None if sweep is None or "fit" not in sweep else sweep["fit"]["worst_deviation"]
    met = None if worst is None else worst <= 0.05
    found.append({"goal": "worst deviation of update time from the line", "at_most": 0.05, "value": worst, "met": met})
    return found


def _met(value: float | None, least: float) -> bool | None:
    return None if value is None else value >= least


COLUMNS: list[tuple[str, str, str]] = [
    ("images/s", "images_per_s", ".2f"),
    ("images / CPU s", "images_per_cpu_s", ".2f"),
    ("rollout s", "rollout_s", ".2f"),
    ("update s", "update_s", ".2f"),
    ("ms / (image, step)", "ms_per_image_step", ".2f"),
    ("steps trained", "fraction_trained", ".0%"),
    ("peak MB", "peak_mb", ".0f"),
    ("max abs(ratio - 1)", "ratio_deviation", ".1e"),
    ("launches / step", "launches_per_step", ".0f"),
    ("syncs / step", "syncs_per_step", ".2f"),
    ("FLOP share, update", "flop_share_update", ".0%"),
    ("FLOP share, all", "flop_share", ".0%"),
]


def markdown(rows: list[Record]) -> str:
    """The table of one model; what was not measured says so, or why."""
    heads = ["variant", *(head for head, _, _ in COLUMNS), "x B0", "x B1"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        if "wall_s" not in row:
            lines.append(f"| {row['label']} | {row['note']} |" + " |" * (len(heads) - 2))
            continue
        cells = [row["label"], *(_cell(row.get(key), form) for _, key, form in COLUMNS)]
        cells += [_cell(row.get(f"times_{base}", {}).get(row["clock"]), ".2f") for base in ("trl", "eager")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(value: float | None, form: str) -> str:
    return "not measured" if value is None else format(value, form)


def write(path: Path, models: list[Record], *, device: str, started: float, load: list[float]) -> None:
    """Write everything measured, with machine, versions, date, command and load."""
    result = facts("end_to_end.py", device=device) | {
        "load_average": {"before": load, "after": list(os.getloadavg())},
        "seconds": round(datetime.datetime.now().timestamp() - started, 1),
        "models": models,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def facts(script: str, *, device: str) -> Record:
    """The command, the date, the commit, the machine, and the versions here, torch's with its build."""
    import torch

    return {
        "command": " ".join(["python", f"bench/{script}", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "machine": f"{platform.machine()}, {_processor()}, {os.cpu_count()} cores, {device}",
        "versions": {"torch": str(torch.__version__)}
        | {name: version(name) for name in ("diffusers", "transformers", "peft")},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown processor"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown processor")


def _commit() -> str:
    here = Path(__file__).parent
    found = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"

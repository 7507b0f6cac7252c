"""What `run.py` prints and draws: the table, the goals, time against rows, and bandwidth against traffic."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from plan import COPY_CELL, NAMES, PROVIDERS, SPEED_CELL
from timed import MIX

Row = dict[str, Any]
COPY_GOAL, SPEED_GOAL = 0.9, 1.5
INK = "#808080"  # legible on white and on black: the pages decide what is behind
COLUMNS = {
    "device_us": "device us",
    "host_us": "host us",
    "launches": "launches",
    "gb_per_s": "GB/s",
    "copy_share": "share of copy",
    "peak_memory_mb": "peak MB",
    "error": "error",
}
ON_CPU = ("host_us", "launches", "error")
FORMATS = {"copy_share": ".0%", "error": ".1e", "launches": "d", "gb_per_s": ".0f"}


def table(result: Row) -> str:
    """Markdown: one line for each case, the providers side by side; then the goals, and what was not measured."""
    columns = [key for key in COLUMNS if result["gpu"] is not None or key in ON_CPU]
    heads = ["operation", "timed", "latents", "rows", "types", "layout", "provider"]
    lines = [f"| {' | '.join([*heads, *(COLUMNS[key] for key in columns)])} |"]
    lines.append("|---" * (len(heads) + len(columns)) + "|")
    for row in result["rows"]:
        if "note" not in row:
            keys = ("operation", "timed", "shape", "rows", "dtype", "layout", "provider")
            cells = [str(row[key]) for key in keys] + [_shown(key, row.get(key)) for key in columns]
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *(f"goal: {one['goal']}: {one['line']}" for one in goals(result["rows"]))]
    return "\n".join([*lines, *result["notes"], *_not_measured(result["rows"])])


def _shown(key: str, value: Any) -> str:
    return "-" if value is None else format(value, FORMATS.get(key, ".1f"))


def _not_measured(rows: list[Row]) -> list[str]:
    """One line for each shape, number of rows, types and layout, and reason: the operations, and which providers."""
    begun = {_cell(row)[1:] for row in rows if "note" not in row}
    found: dict[tuple, dict[str, list[str]]] = {}
    for row in rows:
        if "note" in row:
            left = found.setdefault((_cell(row)[1:], row["note"]), {})
            left.setdefault(row["operation"], []).append(row["provider"])
    lines = []
    for (cell, note), operations in found.items():
        named = "; ".join(f"{name} ({', '.join(providers)})" for name, providers in operations.items())
        lines.append(f"- not measured, {note}: {_where(*cell)}: {named if cell in begun else ', '.join(operations)}")
    return lines


def _where(shape: str, n: int, dtype: str, layout: str) -> str:
    return f"{n} rows of {shape}, {dtype}, {layout}"


def goals(rows: list[Row]) -> list[Row]:
    """Each goal: whether it is met, by the operation that does worst, and how many of the operations were measured."""
    measured = [row for row in rows if row.get("device_us") is not None]
    ours = {_cell(row): row for row in measured if row["provider"] == "kernels"}
    compiled = {_cell(row): row["device_us"] for row in measured if row["provider"] == "compile"}
    shares = {cell: row["copy_share"] for cell, row in ours.items() if cell[1:] == (*COPY_CELL, MIX, "contiguous")}
    ratios = {cell: compiled[cell] / row["device_us"] for cell, row in ours.items() if cell in compiled}
    at_speed = {cell: ratio for cell, ratio in ratios.items() if cell[1:] == (*SPEED_CELL, MIX, "contiguous")}
    asked = {_cell(row) for row in rows if row["provider"] == "compile"}
    all_asked = asked & {_cell(row) for row in rows if row["provider"].startswith("kernels")}
    of_copy, of_compile = (f"{n} rows of {shape}, {MIX}" for shape, n in (COPY_CELL, SPEED_CELL))
    times = "{:.2f} times"
    return [
        _goal(f"90 % of the copy bandwidth, {of_copy}", shares, COPY_GOAL, 100, "{:.0f} %", len(NAMES)),
        _goal(f"1.5 times as fast as torch.compile, {of_compile}", at_speed, SPEED_GOAL, 1, times, len(NAMES)),
        _goal("never slower than torch.compile", ratios, 1.0, 1, times, len(all_asked)),
    ]


def _cell(row: Row) -> tuple:
    return row["operation"], row["shape"], row["rows"], row["dtype"], row["layout"]


def _goal(goal: str, values: dict[tuple, float], least: float, unit: float, form: str, num_asked: int) -> Row:
    """Met only where every operation that the goal is about was measured; two decimals count."""
    if not values:
        return {"goal": goal, "met": None, "worst": None, "line": "not measured"}
    worst = min(values, key=lambda cell: values[cell])
    at = worst[0] if len({cell[1:] for cell in values}) == 1 else f"{worst[0]}, {_where(*worst[1:])}"
    is_met = round(values[worst], 2) >= least
    is_whole = len(values) >= num_asked
    verdict = "not met" if not is_met else "met" if is_whole else "met so far, not measured in full"
    line = f"{verdict}: {form.format(unit * values[worst])} at worst ({at}), {len(values)} of {num_asked} measured"
    return {"goal": goal, "met": is_met if is_whole or not is_met else None, "worst": values[worst], "line": line}


def draw(result: Row, path: Path) -> list[Path]:
    """Time against rows; and on a GPU, beside it, bandwidth against traffic. Where they were written."""
    drawn = result["asked"]["dtypes"][0], result["asked"]["layouts"][0]
    rows = [row for row in result["rows"] if "note" not in row and (row["dtype"], row["layout"]) == drawn]
    if not rows:
        return []
    times = path.with_suffix(".png")
    _draw_times(result, rows, times)
    if not any(row.get("gb_per_s") for row in rows):
        return [times]
    roofline = path.with_name(f"{path.stem}_roofline.png")
    _draw_roofline(result, rows, roofline)
    return [times, roofline]


def _draw_times(result: Row, rows: list[Row], path: Path) -> None:
    """One panel for each operation and shape."""
    key, label = ("device_us", "device, us, cold L2") if result["gpu"] else ("host_us", "host, us")
    rows = [row for row in rows if row.get(key) is not None]
    shapes = sorted({row["shape"] for row in rows}, key=lambda shape: [int(part) for part in shape.split("x")])
    operations = list(dict.fromkeys(row["operation"] for row in rows))

    def fill(panels: Any) -> None:
        for shape, line in zip(shapes, panels, strict=True):
            for operation, panel in zip(operations, line, strict=True):
                mine = [row for row in rows if (row["operation"], row["shape"]) == (operation, shape)]
                _lines(panel, mine, lambda row: row["rows"], key)
                counts = sorted({row["rows"] for row in mine})
                panel.set_title(f"{operation}\n{shape}", fontsize=8, color=INK)
                panel.set_xticks(counts, map(str, counts))
                panel.set_xticks([], minor=True)

    _page(result, path, (len(shapes), len(operations)), ("rows", label), fill)


def _draw_roofline(result: Row, rows: list[Row], path: Path) -> None:
    """One panel for each operation: what it reaches below the bandwidth of a copy, along lines of equal time."""
    rows = [row for row in rows if row.get("gb_per_s")]
    operations = list(dict.fromkeys(row["operation"] for row in rows))
    width = min(4, len(operations))
    height = -(-len(operations) // width)
    bytes_seen, copy = [row["bytes_moved"] for row in rows], result["copy_gb_per_s"]
    ends = [min(bytes_seen) / 2, max(bytes_seen) * 2]
    lowest = min(row["gb_per_s"] for row in rows) / 2

    def fill(panels: Any) -> None:
        for operation, panel in zip(operations, panels.flat, strict=False):
            for microseconds in (1, 10, 100, 1000, 10000):
                panel.plot(ends, [size / microseconds / 1e3 for size in ends], color=INK, linewidth=0.5, linestyle=":")
                at = max(lowest * 1.2 * microseconds * 1e3, ends[0] * 1.1)
                if at < ends[1] / 4:
                    panel.text(at, at / microseconds / 1e3, f"{microseconds} us", fontsize=6, color=INK)
            panel.plot(ends, [copy, copy], color=INK, label="bandwidth of a copy")
            panel.plot(ends, [COPY_GOAL * copy] * 2, color=INK, linestyle="--", label="90 % of it")
            _lines(
                panel,
                [row for row in rows if row["operation"] == operation],
                lambda row: row["bytes_moved"],
                "gb_per_s",
            )
            panel.set(xlim=ends, ylim=(lowest, copy * 2))
            panel.set_title(operation, fontsize=8, color=INK)
        for panel in panels.flat[len(operations) :]:
            panel.set_axis_off()

    labels = ("bytes that the kernels move in a call", "GB/s of them, cold L2")
    _page(result, path, (height, width), labels, fill)


def _lines(panel: Any, rows: list[Row], across: Callable[[Row], float], up: str) -> None:
    """A line for each provider, in the colour that it has in every panel."""
    for provider in dict.fromkeys(row["provider"] for row in rows):
        points = sorted((across(row), row[up]) for row in rows if row["provider"] == provider)
        colour = f"C{list(PROVIDERS).index(provider.partition(',')[0])}"
        panel.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1, label=provider, color=colour)
    panel.set(xscale="log", yscale="log")


def _page(result: Row, path: Path, size: tuple[int, int], labels: tuple[str, str], fill: Callable[[Any], None]) -> None:
    """One page of panels, one legend above them, nothing behind them."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    height, width = size
    figure, panels = plt.subplots(
        height, width, figsize=(max(2.6 * width, 6), 2.4 * height + 1.2), squeeze=False, layout="constrained"
    )
    fill(panels)
    for panel in panels.flat:
        panel.tick_params(labelsize=7, which="both", colors=INK)
        panel.patch.set_alpha(0)
        for spine in panel.spines.values():
            spine.set_color(INK)
    handles = {
        label: line for panel in panels.flat for line, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(), handles.keys(), loc="outside upper center", ncols=len(handles), fontsize=7,
        labelcolor=INK, frameon=False,
    )  # fmt: skip
    where = result["gpu"] or f"{result['machine']}, no GPU"
    kind = f"{result['asked']['dtypes'][0]}, {result['asked']['layouts'][0]}"
    figure.supxlabel(f"{labels[0]}\n{where}, torch {result['versions']['torch']}, {kind}", fontsize=8, color=INK)
    figure.supylabel(labels[1], fontsize=8, color=INK)
    figure.savefig(path, dpi=130, transparent=True)
    plt.close(figure)

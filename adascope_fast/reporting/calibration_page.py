"""A calibration as a page, as a figure for papers, and as JSON."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from adascope_fast.reporting import figures

Rows = list[tuple[float, float, float, float]]
COLOURS = {"a": "#2b68cf", "b": "#d9702a", "c": "#1f9272", "e": "#9298a1"}


def write_calibration(values: Mapping[str, Any], folder: Path) -> Path:
    """Write `calibration.json`, `calibration.png` and `calibration.html` into the folder; the page's path.

    Args:
        values: `Calibration.values()`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "calibration.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    panels, num_steps = _panels(values), values["num_steps"]
    shaded = values["configured"]["mean_start"], values["configured"]["mean_end"]
    _figure(panels, num_steps, shaded).savefig(folder / "calibration.png", dpi=150)
    here = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(here), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    length = num_steps + 1
    page = environment.get_template("calibration.html.j2").render(
        values=values,
        panels=[
            (title, keys, Markup(figures.steps_chart(curves, num_steps, title, shaded=shaded)))
            for title, keys, curves in panels
        ],
        histogram=Markup(
            figures.histogram(
                [
                    (css, _counts([interval[side] for interval in values["configured"]["intervals"]], length))
                    for css, side in (("c", 0), ("b", 1))
                ],
                "prompts",
            )
        ),
        decisions=[(name, _decision(values[name])) for name in ("configured", "proposed")],
    )
    path = folder / "calibration.html"
    path.write_text(page, encoding="utf-8")
    return path


def _panels(values: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]], list[tuple[str, Rows]]]]:
    """(title, (CSS class, meaning) of its curves, the curves): the paper's Figure 1, one panel for each quantity."""
    curves = values["curves"]
    theory, sampler = (
        [(step + 0.5, value, value, value) for step, value in enumerate(values[name])] for name in ("theory", "sampler")
    )
    return [
        ("reward", [("a", f"{values['reward']} of the decoded guess")], [("a", _rows(curves["reward"], 0.0))]),
        ("structure", [("a", values["structure"])], [("a", _rows(curves["structure"], 0.5))]),
        ("preference", [("a", "what the end is decided on")], [("a", _rows(curves["preference"], 0.0))]),
        (
            "uncertainty",
            [
                ("a", "1 - correlation of the latents around a step"),
                ("b", "this sampler, ideal denoiser, Gaussian data"),
                ("e", "Theorem 2, the same data"),
            ],
            [("e", theory), ("b", sampler), ("a", _rows(curves["uncertainty"], 0.5))],
        ),
    ]


def _rows(curve: Mapping[str, Sequence[float | None]], offset: float) -> Rows:
    """(step, mean, low, high); a step's value stands in its middle, a state's at the step that it enters."""
    return [
        (index + offset, mean, mean - std, mean + std)
        for index, (mean, std) in enumerate(zip(curve["mean"], curve["std"], strict=True))
        if mean is not None and std is not None
    ]


def _counts(steps: Sequence[int], length: int) -> list[int]:
    return [sum(step == place for step in steps) for place in range(length)]


def _decision(decision: Mapping[str, Any]) -> list[str]:
    reasons = sorted(decision["reasons"].items(), key=lambda item: -item[1])
    return [
        f"{decision['kappa']:.3g}",
        f"{decision['phi_end']:.3g}",
        f"{decision['mean_start']:.1f} ± {decision['std_start']:.1f}",
        f"{decision['mean_end']:.1f} ± {decision['std_end']:.1f}",
        f"{decision['fraction']:.0%}",
        ", ".join(f"{reason} {count}" for reason, count in reasons),
    ]


def _figure(panels: Any, num_steps: int, shaded: tuple[float, float]) -> Figure:
    figure = Figure(figsize=(9, 6), layout="constrained")
    for axes, (title, keys, curves) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        axes.axvspan(*shaded, color=COLOURS["c"], alpha=0.13, lw=0)
        names = dict(keys)
        for css, rows in curves:
            x, mean, low, high = zip(*rows, strict=True) if rows else ((), (), (), ())
            axes.plot(x, mean, color=COLOURS[css], label=names[css])
            axes.fill_between(x, low, high, color=COLOURS[css], alpha=0.16, lw=0)
        axes.set_xlim(0, num_steps)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("denoising step")
        axes.set_title(title)
        axes.legend(frameon=False, fontsize=8)
    return figure

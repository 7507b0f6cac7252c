"""A calibration as a page, as a figure for papers, and as JSON."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from adascope_fast.reporting import figures, reasons

COLOURS = {"a": "#4a86e8", "b": "#e07b35", "c": "#2aa583", "e": "#9298a1"}
INK = "#808080"  # legible on white and on black: the pages decide what is behind
SIZE = {"width": 320, "height": 166}
Panel = tuple[str, str, list[tuple[str, str, list[figures.Row]]]]


def write_calibration(values: Mapping[str, Any], folder: Path) -> Path:
    """Write `calibration.json`, `calibration.png` and `calibration.html` into the folder; the page's path.

    Args:
        values: `Calibration.values()`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "calibration.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    panels, num_steps = _panels(values), values["num_steps"]
    shaded = values["configured"]["mean_start"], values["configured"]["mean_end"]
    _figure(panels, num_steps, shaded).savefig(folder / "calibration.png", dpi=150, transparent=True)
    here = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(here), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    length = num_steps + 1
    page = environment.get_template("calibration.html.j2").render(
        values=values,
        panels=[
            (
                title,
                [key[:2] for key in curves],
                Markup(figures.steps_chart(curves, num_steps, quantity, shaded=shaded, **SIZE)),
            )
            for title, quantity, curves in panels
        ],
        histogram=Markup(
            figures.histogram(
                [
                    (css, name, _counts([interval[side] for interval in values["configured"]["intervals"]], length))
                    for css, name, side in (("c", "Start", 0), ("b", "end", 1))
                ],
                "decisions",
                **SIZE,
            )
        ),
        decisions=[(name, _decision(values[name])) for name in ("configured", "proposed")],
        reasons=_reasons(values),
        line=" ".join(f"selector.{key}={values['proposed'][key]:.3g}" for key in THRESHOLDS),
        toml="\n".join(["[selector]", *(f"{key} = {values['proposed'][key]:.3g}" for key in THRESHOLDS)]),
        halves=values["halves"],
    )
    path = folder / "calibration.html"
    path.write_text(page, encoding="utf-8")
    return path


THRESHOLDS = ("kappa", "phi_end")


def _panels(values: Mapping[str, Any]) -> list[Panel]:
    """(title, quantity, (CSS class, meaning, rows) of its curves): the paper's Figure 1, a panel for each quantity."""
    curves = values["curves"]
    theory, sampler = (
        [(step + 0.5, value, value, value) for step, value in enumerate(values[name])] for name in ("theory", "sampler")
    )
    judged = f"{values['reward']} of the decoded guess"
    return [
        ("reward", "reward", [("a", judged, _rows(curves["reward"], 0.0))]),
        (
            "structure, which decides the start",
            "change at the step",
            [("a", values["structure"], _rows(curves["structure"], 0.5))],
        ),
        (
            "preference, which decides the end",
            "preference",
            [("a", values["preference"], _rows(curves["preference"], 0.0))],
        ),
        (
            "uncertainty",
            "1 - correlation of latents",
            [
                ("e", "Theorem 2, Gaussian data", theory),
                ("b", "this sampler, ideal denoiser, the same data", sampler),
                ("a", "measured", _rows(curves["uncertainty"], 0.5)),
            ],
        ),
    ]


def _rows(curve: Mapping[str, Sequence[float | None]], offset: float) -> list[figures.Row]:
    """(step, mean, low, high); a step's value stands in its middle, a state's at the step that it enters."""
    return [
        (index + offset, mean, mean - std, mean + std)
        for index, (mean, std) in enumerate(zip(curve["mean"], curve["std"], strict=True))
        if mean is not None and std is not None
    ]


def _counts(steps: Sequence[int], length: int) -> list[int]:
    return [sum(step == place for step in steps) for place in range(length)]


def _decision(decision: Mapping[str, Any]) -> list[str]:
    return [
        f"{decision['kappa']:.3g}",
        f"{decision['phi_end']:.3g}",
        f"{decision['mean_start']:.1f} ± {decision['std_start']:.1f}",
        f"{decision['mean_end']:.1f} ± {decision['std_end']:.1f}",
        f"{decision['fraction']:.0%}",
    ]


def _reasons(values: Mapping[str, Any]) -> list[tuple[str, str, int, int]]:
    """(reason, its meaning, decisions as configured, decisions as proposed)."""
    one, other = (values[name]["reasons"] for name in ("configured", "proposed"))
    names = sorted(dict.fromkeys([*one, *other]), key=lambda name: -one.get(name, 0))
    return [(name, reasons.in_words(name), one.get(name, 0), other.get(name, 0)) for name in names]


def _figure(panels: Sequence[Panel], num_steps: int, shaded: tuple[float, float]) -> Figure:
    figure = Figure(figsize=(9, 6.4), layout="constrained")
    for axes, (title, quantity, curves) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        axes.axvspan(*shaded, color=COLOURS["c"], alpha=0.16, lw=0, label="trained, as configured")
        for css, name, rows in curves:
            x, mean, low, high = zip(*rows, strict=True) if rows else ((), (), (), ())
            axes.plot(x, mean, color=COLOURS[css], label=name)
            axes.fill_between(x, low, high, color=COLOURS[css], alpha=0.2, lw=0)
        axes.set_xlim(0, num_steps)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("denoising step", color=INK)
        axes.set_ylabel(quantity, color=INK)
        axes.set_title(title, color=INK, fontsize=10)
        axes.tick_params(colors=INK)
        for spine in axes.spines.values():
            spine.set_color(INK)
        axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    return figure

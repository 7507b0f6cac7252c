"""Fig. 1: structure, reward and uncertainty of a rollout's clean guesses, step by step, with Theorem 2's curve.

One iteration at 50 steps, sensed at every step of every image as the paper senses (CLIP and reward of the decoded
guesses), and once more by correlations alone; the update that follows plays no part. `adascope-fast calibrate` draws
the same of any model and reward.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import runs
from experiments.paper.declaring import BALANCED, DDPO, Arm, Experiment
from experiments.paper.figures import COLOURS, INK, inked

STEPS = 50
THRESHOLDS = ("selector.name=adascope", "selector.kappa=0.736", "selector.phi_end=0.468")
"""What `adascope-fast calibrate experiments/paper/scenes.toml --prompts 24 sampler.num_steps=50` proposes."""


def theorem_2(num_steps: int) -> list[float]:
    """1 - correlation of the latents around each step, by the schedule of the embedded model alone."""
    from adascope_fast import backbones, theory
    from adascope_fast.config import Config

    config = Config.load(None, ["model.name=scenes"])
    backbone = backbones.load(config.model.name, **config.model.options())
    schedule = backbone.schedule(num_steps, kind="auto", eta=None, noise_level=None, shift=None)
    return (1 - theory.schedule_correlation(schedule)).tolist()


def draw(folders: Mapping[str, Sequence[Path]], picture: Path) -> dict[str, Any]:
    """The curves of the first iteration, mean over seeds, each scaled to [0, 1] in the picture alone."""
    import matplotlib
    import numpy as np

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found: dict[str, Any] = {}
    for arm, mine in folders.items():
        selectors = [runs.stats_of(folder)[0]["selector"] for folder in mine]
        names = [name for name in selectors[0]["curves"] if selectors[0]["curves"][name]]
        curves = {
            name: np.nanmean(np.array([one["curves"][name] for one in selectors], dtype=np.float64), 0)
            for name in names
        }
        found[arm] = {name: [None if value != value else value for value in curve] for name, curve in curves.items()}
        found[arm]["interval"] = [float(np.mean([one[key] for one in selectors])) for key in ("mean_start", "mean_end")]
    steps = max(len(curve) for arm in found.values() for name, curve in arm.items() if name != "interval") - 1
    found["theorem_2"] = theorem_2(steps)
    figure, axes = pyplot.subplots(
        1, len(folders), figsize=(6 * len(folders), 4.2), squeeze=False, layout="constrained"
    )
    for axis, arm in zip(axes[0], folders, strict=True):
        shown = {**found[arm], "Theorem 2's uncertainty": found["theorem_2"]}
        axis.axvspan(*shown.pop("interval"), color=COLOURS[4], alpha=0.12, lw=0, label="mean interval")
        for (name, curve), colour in zip(shown.items(), COLOURS[2:], strict=False):
            values = np.array(curve, dtype=np.float64)
            low, high = np.nanmin(values), np.nanmax(values)
            axis.plot((values - low) / (high - low if high > low else 1), color=colour, label=name)
        axis.set(title=arm, xlabel="denoising step", ylabel="each curve from its least to its most")
        inked(axis)
        axis.legend(frameon=False, fontsize=8, labelcolor=INK)
    figure.savefig(picture, dpi=90, transparent=True)
    pyplot.close(figure)
    found["said"] = [
        "",
        "| sensing | mean interval of the steps |",
        "|---|---|",
        *(
            f"| `{arm}` | [{found[arm]['interval'][0]:.1f}, {found[arm]['interval'][1]:.1f}) of {steps} |"
            for arm in folders
        ),
    ]
    return found


COMMON = (
    *DDPO, *BALANCED, *THRESHOLDS, f"sampler.num_steps={STEPS}", "train.iterations=1", "train.checkpoint_every=1",
    "evaluation.num_prompts=2", "evaluation.every=0",
)  # fmt: skip
SEMANTIC = ("sensing.kind=semantic",)
EXPERIMENT = Experiment(
    "How do structure, reward and uncertainty change from step to step, and where is the interval?",
    "Fig. 1",
    {
        "semantic": Arm(
            ("sensing.kind=semantic", "sensing.every=1", "sensing.stride=1", "sensing.num_samples=0"), is_of_scenes=True
        ),
        "latent": Arm(("sensing.kind=latent",), is_of_scenes=True),
    },
    common=COMMON,
    drawing=draw,
    trains=False,
    notes=("Curves of the first iteration, before any training: `fig1_steps.png`.",),
)

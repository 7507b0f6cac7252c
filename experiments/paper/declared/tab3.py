"""Tab. 3, Fig. 8, 12: metrics, and how varied the images are, of AdaScope and six others, by `adascope-fast evaluate`.

Settings of the algorithms are those of experiments/algorithms/entries.py; runs of DDPO, DPOK and TDPO are Tab. 1's.
"""

from experiments.algorithms.entries import ALGORITHMS
from experiments.paper.arms import ADASCOPE
from experiments.paper.declaring import RATES, Arm, Experiment

ARMS = {}
for name in ("ddpo", "dpok", "tdpo", "spo", "diffusion_dpo", "diffusion_kto"):
    entry = ALGORITHMS[name]
    changes = (f"algorithm.name={name}", *entry.settings, *entry.original)
    if entry.preferences is not None:
        changes = (*changes, "evaluation.every=20")
    ARMS[name] = Arm(changes, preferences=entry.preferences, against=None if name == "ddpo" else "ddpo")
ARMS["ddpo_adascope"] = Arm(("algorithm.name=ddpo", *ALGORITHMS["ddpo"].settings, *ADASCOPE), against="ddpo")

EXPERIMENT = Experiment(
    "What do thirteen metrics say, and how varied are the images?",
    "Tab. 3, Fig. 8, 12",
    ARMS,
    rates=RATES,
    evaluated=tuple(ARMS),
    notes=(
        "Diffusion-DPO and Diffusion-KTO learn from 240 pairs of images that the reward has judged; sampling these "
        "is not in their seconds.",
        "The projection of the images is on the page `report.html` in the evaluation's folder.",
    ),
)

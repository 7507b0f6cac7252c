"""Tab. 1: time and pairs to a reward, the reward itself and diversity, of four algorithms with and without AdaScope.

Settings of the algorithms are those of experiments/algorithms/entries.py.
"""

from experiments.algorithms.entries import ALGORITHMS
from experiments.paper.arms import ADASCOPE
from experiments.paper.declaring import EVERY_STEP, RATES, Arm, Experiment

ARMS = {}
for name in ("ddpo", "dpok", "d3po", "tdpo"):
    changes = (f"algorithm.name={name}", *ALGORITHMS[name].settings)
    ARMS[name] = Arm((*changes, *EVERY_STEP))
    ARMS[f"{name}_adascope"] = Arm((*changes, *ADASCOPE), against=name)

EXPERIMENT = Experiment(
    "Does each algorithm get to the same reward sooner with AdaScope?", "Tab. 1, Fig. 4", ARMS, rates=RATES
)

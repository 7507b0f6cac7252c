"""Sup. 3.3, Fig. 11: algorithms for flow models, each from its own steps, and GRPO from AdaScope's interval.

Settings of the algorithms are those of experiments/algorithms/entries.py. The column of the best gain within the
seconds that all arms have is the comparison at equal seconds.
"""

from experiments.algorithms.entries import ALGORITHMS
from experiments.paper.arms import ADASCOPE
from experiments.paper.declaring import EVERY_STEP, RATES, Arm, Experiment

GRPO = ("algorithm.name=grpo", *ALGORITHMS["grpo"].settings)
ARMS = {"flow_grpo": Arm((*GRPO, *EVERY_STEP), config="scenes_flow.toml")}
for name in ("flow_grpo_fast", "awm", "diffusion_nft"):
    entry = ALGORITHMS[name]
    changes = (f"algorithm.name={name}", *entry.settings, *entry.original)
    ARMS[name] = Arm(changes, config="scenes_flow.toml", against="flow_grpo")
ARMS["adascope"] = Arm((*GRPO, *ADASCOPE), config="scenes_flow.toml", against="flow_grpo")

EXPERIMENT = Experiment(
    "Which algorithm learns most on the flow model in the same seconds?", "sup. 3.3, Fig. 11", ARMS, rates=RATES
)

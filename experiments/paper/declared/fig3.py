"""Fig. 3: the final reward credited to every step, to the last step alone, and to AdaScope's interval."""

from experiments.paper.arms import ADASCOPE
from experiments.paper.declaring import BALANCED, DDPO, EVERY_STEP, Arm, Experiment

EXPERIMENT = Experiment(
    "Does backfilling the reward beat a sparse one, and the interval both?",
    "Fig. 3",
    {
        "sparse": Arm((*EVERY_STEP, "algorithm.backfill=sparse")),
        "backfilled": Arm((*EVERY_STEP, "algorithm.backfill=full"), against="sparse"),
        "adascope": Arm(ADASCOPE, against="backfilled"),
    },
    common=(*DDPO, *BALANCED),
)

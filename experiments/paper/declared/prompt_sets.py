"""Other prompt sets: captions of one object with a place, and of two or three, each trained on and judged alone."""

from experiments.paper.arms import ADASCOPE
from experiments.paper.declaring import BALANCED, DDPO, EVERY_STEP, Arm, Experiment

SETS = {"placed": r" (in|at) the ", "several": "^(two|three) "}
ARMS = {}
for name, pattern in SETS.items():
    ARMS[f"{name}_every_step"] = Arm(EVERY_STEP, captions=pattern, is_of_scenes=True)
    ARMS[f"{name}_adascope"] = Arm(ADASCOPE, against=f"{name}_every_step", captions=pattern, is_of_scenes=True)

EXPERIMENT = Experiment("Does it hold on other prompts?", "sup., prompts", ARMS, common=(*DDPO, *BALANCED))

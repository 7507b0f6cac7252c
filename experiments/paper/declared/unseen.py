"""Combinations that were held out: trained on captions without a colour (or shape), judged on those that have it."""

from functools import partial

from experiments.paper.arms import ADASCOPE
from experiments.paper.declaring import BALANCED, DDPO, EVERY_STEP, Arm, Experiment

ARMS = {}
for name, pattern in {
    "colour": ("red|orange|yellow|green", "blue|purple"),
    "shape": ("circle|square", "triangle|cross"),
}.items():
    captions = partial(Arm, captions=pattern[0], judged_by=pattern[1], is_of_scenes=True)
    ARMS[f"{name}_every_step"] = captions(EVERY_STEP)
    ARMS[f"{name}_adascope"] = captions(ADASCOPE, against=f"{name}_every_step")

EXPERIMENT = Experiment(
    "Does what was learned hold for colours and shapes that were not trained on?",
    "Fig. 9, 10",
    ARMS,
    common=(*DDPO, *BALANCED),
    notes=("The base model was pretrained with all colours and shapes; none of the judged captions was ever drawn.",),
)

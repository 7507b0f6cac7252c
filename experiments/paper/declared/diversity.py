"""Tab. 3 and the diversity figures: the thirteen metrics, the projection of images and its silhouette, by evaluate."""

from experiments.paper.declaring import ADASCOPE, BALANCED, DDPO, EVERY_STEP, Arm, Experiment

EXPERIMENT = Experiment(
    "What do thirteen metrics say, and how varied are the images?",
    "Tab. 3, Fig. 8, 12",
    {"every_step": Arm(EVERY_STEP), "adascope": Arm(ADASCOPE, against="every_step")},
    common=(*DDPO, *BALANCED),
    evaluated=("every_step", "adascope"),
    notes=("The projection of the images is on the page `report.html` in the evaluation's folder.",),
)

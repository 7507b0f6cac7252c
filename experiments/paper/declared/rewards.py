"""Other rewards: JPEG (in)compressibility, and CLIP similarity by the embedded CLIP.

Where a reward saturates is its own, so each has the end that `adascope-fast calibrate experiments/paper/scenes.toml
--prompts 24 reward.name=...` proposes before anything is trained. The guesses of incompressibility do not rise: there
it is the paper's.
"""

from experiments.paper.arms import ADASCOPE
from experiments.paper.declaring import BALANCED, DDPO, EVERY_STEP, RATES, Arm, Experiment

REWARDS = {
    "compressible": (("reward.name=jpeg_compressibility",), 0.346),
    "incompressible": (("reward.name=jpeg_incompressibility",), 0.0416),
    "clip": (("reward.name=clip_similarity", "reward.clip=scenes-clip"), 0.0623),
}
ARMS = {}
for name, (changes, phi_end) in REWARDS.items():
    ARMS[f"{name}_every_step"] = Arm((*changes, *EVERY_STEP), is_of_scenes=True)
    calibrated = (*ADASCOPE, f"selector.phi_end={phi_end}")
    ARMS[f"{name}_adascope"] = Arm((*changes, *calibrated), against=f"{name}_every_step", is_of_scenes=True)

EXPERIMENT = Experiment(
    "Does it hold for other rewards?",
    "sup., rewards",
    ARMS,
    common=(*DDPO, *BALANCED),
    rates=RATES,
    gain=0.1,
    notes=("Rewards have scales of their own; compressibility can be hacked, so its gain is not a better image.",),
)

"""Other rewards: JPEG (in)compressibility, CLIP similarity by the embedded CLIP, and a mixture of two."""

from experiments.paper.declaring import ADASCOPE, BALANCED, DDPO, EVERY_STEP, Arm, Experiment

REWARDS = {
    "compressible": ("reward.name=jpeg_compressibility",),
    "incompressible": ("reward.name=jpeg_incompressibility",),
    "clip": ("reward.name=clip_similarity", "reward.clip=scenes-clip"),
}
ARMS = {}
for name, changes in REWARDS.items():
    ARMS[f"{name}_every_step"] = Arm((*changes, *EVERY_STEP))
    ARMS[f"{name}_adascope"] = Arm((*changes, *ADASCOPE), against=f"{name}_every_step")

EXPERIMENT = Experiment(
    "Does it hold for other rewards?",
    "sup., rewards",
    ARMS,
    common=(*DDPO, *BALANCED),
    gain=0.1,
    notes=("Rewards have scales of their own; compressibility can be hacked, so its gain is not a better image.",),
)

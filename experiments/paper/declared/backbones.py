"""Other backbones: the latent diffusion model with guidance, and the rectified-flow transformer."""

from experiments.paper.declaring import ADASCOPE, ADASCOPE_FLOW, BALANCED, EVERY_STEP, Arm, Experiment

GUIDED = ("sampler.guidance_scale=2", "algorithm.clip_range=5e-3", "algorithm.min_count=8", "train.learning_rate=3e-3")
FLOW = ("algorithm.clip_range=5e-3",)
EXPERIMENT = Experiment(
    "Does it hold on other backbones?",
    "sup., backbones",
    {
        "guided_every_step": Arm((*GUIDED, *EVERY_STEP)),
        "guided_adascope": Arm((*GUIDED, *ADASCOPE), against="guided_every_step"),
        "flow_every_step": Arm((*FLOW, *EVERY_STEP), config="scenes_flow.toml"),
        "flow_adascope": Arm((*FLOW, *ADASCOPE_FLOW), against="flow_every_step", config="scenes_flow.toml"),
    },
    common=BALANCED,
)

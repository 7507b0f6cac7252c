"""Other backbones: the latent diffusion model with guidance, and the rectified-flow transformer.

With guidance the reward of the guesses saturates earlier: its end is what `adascope-fast calibrate
experiments/paper/scenes.toml --prompts 24 sampler.guidance_scale=2` proposes.
"""

from functools import partial

from experiments.algorithms.entries import ALGORITHMS
from experiments.paper.arms import ADASCOPE
from experiments.paper.declaring import BALANCED, DDPO, EVERY_STEP, RATES, Arm, Experiment

GUIDED = (*DDPO, *BALANCED, "sampler.guidance_scale=2")
FLOW = ("algorithm.name=grpo", *ALGORITHMS["grpo"].settings)
_arm = partial(Arm, is_of_scenes=True)
EXPERIMENT = Experiment(
    "Does it hold on other backbones?",
    "sup., backbones",
    {
        "guided_every_step": _arm((*GUIDED, *EVERY_STEP)),
        "guided_adascope": _arm((*GUIDED, *ADASCOPE, "selector.phi_end=0.382"), against="guided_every_step"),
        "flow_every_step": _arm((*FLOW, *EVERY_STEP), config="scenes_flow.toml"),
        "flow_adascope": _arm((*FLOW, *ADASCOPE), against="flow_every_step", config="scenes_flow.toml"),
    },
    rates=RATES,
)

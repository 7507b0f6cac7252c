"""The arms of time_to_reward.py: what trains, what sets it apart, and the grid from which its settings are tuned.

All arms of a family have the same model, adapter (rank 4 on the attention projections, which is what TRL builds in),
captions, images of an iteration, steps, noise, guidance, loss and clip range. Every grid has four points, so no arm is
tuned more than another. AdaScope's end is what `adascope-fast calibrate` proposes at 10 steps: where the reward of
the guesses has all but a fifth of its gain. Its start is the peak of the structure's volatility
(kappa = 1), the first step here: on these models it is worth training, and a training without it is less steady.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
CHECKOUT = HERE.parents[1]
PEERS = HERE / "peers"
ASSETS = CHECKOUT / "adascope_fast" / "assets"

GRID = ((3e-3, 4), (5e-3, 4), (1e-2, 1), (1e-2, 4))
"""(learning rate, updates): around what a first tuning found; at 3e-2 what was tried lost its reward."""
ONE_UPDATE = ((3e-3, 1), (5e-3, 1), (1e-2, 1), (2e-2, 1))
"""For what allows one update an iteration."""
LEAST_GUIDANCE = 1.01
"""As near to none as TRL's trainer takes, which ends in an error at 1; every arm pays for the second forward.

The held-out reward is measured without any, where the images are the same to the eye."""


@dataclass(frozen=True)
class Arm:
    """One way to train."""

    name: str
    label: str
    script: str = "ours.py"
    changes: tuple[str, ...] = ()
    """`section.field=value` of our configuration."""
    grid: tuple[tuple[float, int], ...] = GRID
    """(learning rate, updates of an iteration) to choose from."""

    @property
    def is_trl(self) -> bool:
        """Whether it runs in TRL's environment."""
        return self.script == "trl_ddpo.py"


@dataclass(frozen=True)
class Goal:
    """`arm` reaches a gain in at most 1 / `times` of the seconds of `base`."""

    arm: str
    base: str
    times: float


@dataclass(frozen=True)
class Family:
    """A model, and the arms that are compared on it."""

    name: str
    model: str
    num_steps: int
    guidance_scale: float
    arms: tuple[Arm, ...]
    goals: tuple[Goal, ...]
    seconds: float
    """CPU seconds of training of a run, unless others are asked for."""
    rival: str
    """The arm that gains and times are compared with first."""

    @property
    def folder(self) -> Path:
        """The model's."""
        return ASSETS / self.model


DDPO = ("algorithm.name=ddpo", "algorithm.clip_range=5e-3", "algorithm.min_count=8")
GRPO = ("algorithm.name=grpo", "algorithm.clip_range=5e-3")
BALANCED = ("algorithm.step_weight=balanced",)
EVERY_STEP = ("selector.name=every_step", "selector.last_step=train")
BEFOREHAND = ("selector.mask_source=previous", "sensing.kind=latent", "sensing.every=4")
"""What a short tail and one pass need: intervals of earlier rollouts, every fourth iteration sensed whole."""
TAIL = ("sampler.tail_share=0.4",)
ONE_PASS = ("train.update=one_pass",)
BEST_WORST = ("train.best_worst_k=2",)
ADASCOPE = ("selector.name=adascope", "selector.kappa=1.0", "selector.phi_end=0.21")
PAPER = (*DDPO, *BALANCED, "selector.name=adascope", "selector.kappa=0.9", "selector.phi_end=0.034")
"""A control: the paper's mean interval, what `adascope-fast calibrate --end 0.636` proposes."""
SCENES = (*DDPO, *BALANCED, *ADASCOPE)
FLOW = (*GRPO, *BALANCED, *ADASCOPE)

FAMILIES = {
    family.name: family
    for family in (
        Family(
            "scenes", "scenes", num_steps=10, guidance_scale=LEAST_GUIDANCE, seconds=120, rival="trl",
            arms=(
                Arm("trl", "TRL 0.23.1 DDPOTrainer", "trl_ddpo.py"),
                Arm("eager", "eager loop, every step", "eager_ddpo.py"),
                Arm("every_step", "ours, every step", changes=(*DDPO, *EVERY_STEP)),
                Arm("every_step_balanced", "ours, every step, balanced", changes=(*DDPO, *BALANCED, *EVERY_STEP)),
                Arm("adascope_paper", "AdaScope, the paper's mean interval", changes=PAPER),
                Arm("adascope", "AdaScope", changes=SCENES),
                Arm(
                    "adascope_one_pass", "AdaScope, one pass, short tail",
                    changes=(*SCENES, *BEFOREHAND, *TAIL, *ONE_PASS), grid=ONE_UPDATE,
                ),
                Arm(
                    "adascope_best_worst", "AdaScope, short tail, best and worst images",
                    changes=(*SCENES, *BEFOREHAND, *TAIL, *BEST_WORST),
                ),
            ),
            goals=tuple(
                Goal(arm, base, times)
                for arm in ("adascope", "adascope_one_pass", "adascope_best_worst")
                for base, times in (("trl", 2.5), ("every_step_balanced", 1.5))
            ),
        ),
        Family(
            "flow", "scenes-flow", num_steps=10, guidance_scale=1.0, seconds=90, rival="flow_grpo",
            arms=(
                Arm("flow_grpo", "Flow-GRPO, every step", changes=(*GRPO, "selector.name=every_step")),
                Arm(
                    "every_step_balanced", "Flow-GRPO, every step, balanced",
                    changes=(*GRPO, *BALANCED, "selector.name=every_step"),
                ),
                Arm(
                    "flow_grpo_fast", "Flow-GRPO-Fast, window of 2 in steps 0 to 5",
                    changes=(
                        "algorithm.name=flow_grpo_fast", *BALANCED,
                        "selector.name=fast_window", "selector.start=0", "selector.end=5",
                    ),
                ),
                Arm("adascope", "AdaScope", changes=FLOW),
                Arm(
                    "adascope_one_pass", "AdaScope, one pass, short tail",
                    changes=(*FLOW, *BEFOREHAND, *TAIL, *ONE_PASS), grid=ONE_UPDATE,
                ),
                Arm(
                    "adascope_best_worst", "AdaScope, short tail, best and worst images",
                    changes=(*FLOW, *BEFOREHAND, *TAIL, *BEST_WORST),
                ),
            ),
            goals=tuple(
                Goal(arm, base, times)
                for arm in ("adascope", "adascope_one_pass", "adascope_best_worst")
                for base, times in (("flow_grpo", 2.5), ("flow_grpo_fast", 1.0), ("every_step_balanced", 1.5))
            ),
        ),
    )
}  # fmt: skip


def python_of(arm: Arm, trl_python: Path) -> str:
    """The interpreter of its environment."""
    return str(trl_python) if arm.is_trl else sys.executable

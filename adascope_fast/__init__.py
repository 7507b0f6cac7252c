"""Step-sparse reinforcement-learning fine-tuning of diffusion and flow-matching image models.

The public names are loaded when first used, so that the command line answers a typing error without importing torch.
"""

from typing import TYPE_CHECKING

from adascope_fast.lazy import lazy

if TYPE_CHECKING:
    from adascope_fast.adascope.interval_rule import Interval as Interval
    from adascope_fast.adascope.interval_rule import select_interval as select_interval
    from adascope_fast.adascope.selector import AdaScope as AdaScope
    from adascope_fast.adascope.sensing import Curves as Curves
    from adascope_fast.adascope.sensing import curves_of_guesses as curves_of_guesses
    from adascope_fast.algorithms.algorithm import Algorithm as Algorithm
    from adascope_fast.algorithms.policy_gradient import ddpo as ddpo
    from adascope_fast.algorithms.policy_gradient import grpo as grpo
    from adascope_fast.backbone import Backbone as Backbone
    from adascope_fast.compat.wrap import wrap as wrap
    from adascope_fast.config.tree import Config as Config
    from adascope_fast.engine.engine import Engine as Engine
    from adascope_fast.ops import explain as explain
    from adascope_fast.rewards import Reward as Reward
    from adascope_fast.rollout.trajectory import StepBatch as StepBatch
    from adascope_fast.rollout.trajectory import Trajectory as Trajectory
    from adascope_fast.schedules.samplers import Schedule as Schedule
    from adascope_fast.selectors.protocol import TimestepSelector as TimestepSelector
    from adascope_fast.theory import theoretical_correlation as theoretical_correlation
    from adascope_fast.training.monitoring.callbacks import Callback as Callback
    from adascope_fast.training.monitoring.callbacks import HeldOut as HeldOut
    from adascope_fast.training.trainer import Trainer as Trainer

__version__ = "0.1.0"

__getattr__ = lazy(
    __name__,
    {
        "AdaScope": "adascope",
        "Algorithm": "algorithms",
        "Backbone": "backbone",
        "Callback": "training",
        "Config": "config",
        "Curves": "adascope",
        "Engine": "engine",
        "HeldOut": "training",
        "Interval": "adascope",
        "Reward": "rewards",
        "Schedule": "schedules",
        "StepBatch": "rollout",
        "TimestepSelector": "selectors",
        "Trainer": "training",
        "Trajectory": "rollout",
        "curves_of_guesses": "adascope",
        "ddpo": "algorithms",
        "explain": "ops",
        "grpo": "algorithms",
        "select_interval": "adascope",
        "theoretical_correlation": "theory",
        "wrap": "compat.wrap",
    },
)

"""Step-sparse reinforcement-learning fine-tuning of diffusion and flow-matching image models.

The public names are loaded when first used, so that the command line answers a typing error without importing torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from adascope_fast.installation import refuse_broken_torchvision

if TYPE_CHECKING:
    from adascope_fast.adascope import AdaScope as AdaScope
    from adascope_fast.adascope import Interval as Interval
    from adascope_fast.adascope import select_interval as select_interval
    from adascope_fast.adascope import theoretical_correlation as theoretical_correlation
    from adascope_fast.algorithms import Algorithm as Algorithm
    from adascope_fast.algorithms import ddpo as ddpo
    from adascope_fast.algorithms import grpo as grpo
    from adascope_fast.backbones.protocol import Backbone as Backbone
    from adascope_fast.config import Config as Config
    from adascope_fast.engine import Engine as Engine
    from adascope_fast.ops import explain as explain
    from adascope_fast.rewards import Reward as Reward
    from adascope_fast.schedules import Schedule as Schedule
    from adascope_fast.sensing import Curves as Curves
    from adascope_fast.sensing import curves_of_guesses as curves_of_guesses
    from adascope_fast.timesteps import TimestepSelector as TimestepSelector
    from adascope_fast.train import Trainer as Trainer
    from adascope_fast.trajectory import StepBatch as StepBatch
    from adascope_fast.trajectory import Trajectory as Trajectory

__version__ = "0.1.0"

_HOME = {
    "AdaScope": "adascope",
    "Algorithm": "algorithms",
    "Backbone": "backbones.protocol",
    "Config": "config",
    "Curves": "sensing",
    "Engine": "engine",
    "Interval": "adascope",
    "Reward": "rewards",
    "Schedule": "schedules",
    "StepBatch": "trajectory",
    "TimestepSelector": "timesteps",
    "Trainer": "train",
    "Trajectory": "trajectory",
    "curves_of_guesses": "sensing",
    "ddpo": "algorithms",
    "explain": "ops",
    "grpo": "algorithms",
    "select_interval": "adascope",
    "theoretical_correlation": "adascope",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'adascope_fast' has no attribute {name!r}")
    try:
        return getattr(import_module(f"adascope_fast.{_HOME[name]}"), name)
    except (ImportError, RuntimeError):
        refuse_broken_torchvision()
        raise

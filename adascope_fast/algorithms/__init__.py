"""Reinforcement-learning algorithms: how samples are collected, how they become batches, and the loss of a batch."""

from typing import TYPE_CHECKING

from adascope_fast.lazy import lazy

if TYPE_CHECKING:
    from adascope_fast.algorithms.policy_gradient import Algorithm as Algorithm
    from adascope_fast.algorithms.policy_gradient import ddpo as ddpo
    from adascope_fast.algorithms.policy_gradient import grpo as grpo

__getattr__ = lazy(__name__, {"Algorithm": "policy_gradient", "ddpo": "policy_gradient", "grpo": "policy_gradient"})

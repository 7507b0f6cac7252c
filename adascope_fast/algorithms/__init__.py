"""Reinforcement-learning algorithms: how samples are collected, how they become batches, and the loss of a batch."""

from typing import TYPE_CHECKING

from adascope_fast.lazy import lazy

if TYPE_CHECKING:
    from adascope_fast.algorithms.algorithm import Algorithm as Algorithm
    from adascope_fast.algorithms.algorithm import Context as Context
    from adascope_fast.algorithms.algorithm import Loss as Loss
    from adascope_fast.algorithms.algorithm import Policy as Policy
    from adascope_fast.algorithms.algorithm import Rows as Rows
    from adascope_fast.algorithms.algorithm import Samples as Samples
    from adascope_fast.algorithms.critic import dpok as dpok
    from adascope_fast.algorithms.policy_gradient import PolicyGradient as PolicyGradient
    from adascope_fast.algorithms.policy_gradient import ddpo as ddpo
    from adascope_fast.algorithms.policy_gradient import grpo as grpo
    from adascope_fast.algorithms.policy_gradient import reinforce as reinforce
    from adascope_fast.algorithms.preference import d3po as d3po
    from adascope_fast.algorithms.preference import spo as spo
    from adascope_fast.algorithms.preference import diffusion_dpo as diffusion_dpo
    from adascope_fast.algorithms.preference import diffusion_kto as diffusion_kto
    from adascope_fast.algorithms.regression import awm as awm
    from adascope_fast.algorithms.regression import diffusion_nft as diffusion_nft

__getattr__ = lazy(
    __name__,
    {
        "Algorithm": "algorithm",
        "Context": "algorithm",
        "Loss": "algorithm",
        "Policy": "algorithm",
        "PolicyGradient": "policy_gradient",
        "Rows": "algorithm",
        "Samples": "algorithm",
        "awm": "regression",
        "d3po": "preference",
        "ddpo": "policy_gradient",
        "diffusion_nft": "regression",
        "diffusion_dpo": "preference",
        "diffusion_kto": "preference",
        "dpok": "critic",
        "grpo": "policy_gradient",
        "reinforce": "policy_gradient",
        "spo": "preference",
    },
)

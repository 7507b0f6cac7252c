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
    from adascope_fast.algorithms.critic import tdpo as tdpo
    from adascope_fast.algorithms.policy_gradient import PolicyGradient as PolicyGradient
    from adascope_fast.algorithms.policy_gradient import dance_grpo as dance_grpo
    from adascope_fast.algorithms.policy_gradient import ddpo as ddpo
    from adascope_fast.algorithms.policy_gradient import flow_grpo_fast as flow_grpo_fast
    from adascope_fast.algorithms.policy_gradient import grpo as grpo
    from adascope_fast.algorithms.policy_gradient import grpo_guard as grpo_guard
    from adascope_fast.algorithms.policy_gradient import mix_grpo as mix_grpo
    from adascope_fast.algorithms.policy_gradient import reinforce as reinforce
    from adascope_fast.algorithms.preference import d3po as d3po
    from adascope_fast.algorithms.preference import diffusion_dpo as diffusion_dpo
    from adascope_fast.algorithms.preference import diffusion_kto as diffusion_kto
    from adascope_fast.algorithms.preference import spo as spo
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
        "dance_grpo": "policy_gradient",
        "ddpo": "policy_gradient",
        "diffusion_nft": "regression",
        "diffusion_dpo": "preference",
        "diffusion_kto": "preference",
        "dpok": "critic",
        "flow_grpo_fast": "policy_gradient",
        "grpo": "policy_gradient",
        "grpo_guard": "policy_gradient",
        "mix_grpo": "policy_gradient",
        "reinforce": "policy_gradient",
        "spo": "preference",
        "tdpo": "critic",
    },
)

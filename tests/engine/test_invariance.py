"""The microbatch changes memory and speed, not what is learned: of the algorithms that are no plain policy gradient."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from adascope_fast.algorithms.critic import dpok
from adascope_fast.algorithms.preference import d3po, spo
from adascope_fast.algorithms.regression import awm, diffusion_nft

ALGORITHMS = {
    "dpok": lambda: dpok(value_learning_rate=1e-2, clip_range=0.01),
    "d3po": lambda: d3po(beta=2.0),
    "spo": lambda: spo(margin=0.0),
    "awm": lambda: awm(num_draws=3),
    "diffusion_nft": lambda: diffusion_nft(beta=0.5, kl_weight=0.1),
}


@pytest.mark.parametrize("minibatch", ["pairs", "samples"])
@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_microbatch_does_not_matter(
    make_toy: Callable,
    make_engine: Callable,
    make_other_reference: Callable,
    move: Callable,
    name: str,
    guidance_scale: float,
    minibatch: str,
):
    """Two iterations of two epochs of two updates each, with a reference policy of its own."""
    found = []
    for microbatch in (1, 3, 100):
        toy = make_toy(torch.float64)
        make_other_reference(make_toy, toy, 0.99)
        options: dict[str, Any] = {"inner_epochs": 2, "updates_per_iteration": 2, "minibatch": minibatch}
        options |= {"microbatch": microbatch, "guidance_scale": guidance_scale, "learning_rate": 0.02}
        found.append(move(make_engine(toy, ALGORITHMS[name](), **options), iterations=2))
    want, *others = found
    assert want.by.norm() > 1e-5
    for other in others:
        assert (other.by - want.by).norm() < 1e-6 * want.by.norm()
        for key in ("loss", "kl", "ratio_max_deviation", "grad_norm"):
            assert other.values[key] == pytest.approx(want.values[key], rel=1e-4, abs=1e-7), key
        assert other.values["pairs_trained"] == want.values["pairs_trained"] > 0


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_microbatch_is_that_many_denoiser_rows(make_toy: Callable, make_engine: Callable, move: Callable, name: str):
    """D3PO's rows are two of the denoiser's each."""
    toy, sizes = make_toy(), []
    predict = toy.predict

    def counting(sample: torch.Tensor, *rest: Any) -> torch.Tensor:
        if torch.is_grad_enabled():
            sizes.append(len(sample))
        return predict(sample, *rest)

    toy.predict = counting
    move(make_engine(toy, ALGORITHMS[name](), microbatch=4))
    assert max(sizes) == 4

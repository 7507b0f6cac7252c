"""Divergence of one step's policy from the reference policy.

Axes: `n` rows of `d` elements; `coef` [n, 3] is (a, b, std) of x_next ~ N(a * sample + b * output, std^2 I).
"""

from jaxtyping import Float
from torch import Tensor

from adascope_fast.reference.rows import arranged, row_mean


def gaussian_kl(
    output: Float[Tensor, "n *latent"],
    ref_output: Float[Tensor, "n *latent"],
    coef: Float[Tensor, "n 3"],
) -> Float[Tensor, " n"]:
    """Mean over d of KL(policy || reference) of one step, b^2 (output - ref_output)^2 / (2 std^2).

    The true divergence: flow_grpo's code leaves out a factor -dt.

    Args:
        output: the policy's output, after guidance; the gradient flows here.
        ref_output: the reference policy's output at the same x_t; no gradient flows to it.
        coef: as in `transition_log_prob`.
    """
    output, ref_output, coef = arranged(coef, output=output, ref_output=ref_output.detach())
    _, weight_output, std = coef.unbind(1)
    return 0.5 * (weight_output / std).square() * row_mean((output - ref_output).square())

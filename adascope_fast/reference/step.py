"""One rollout step of a sampler and its log-probability, the clean latents it guesses, and what both are like.

Axes: `n` rows of `d` elements; `coef` [n, 3] is (a, b, std) of x_next ~ N(a * sample + b * output, std^2 I).
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from adascope_fast.reference.correlation import correlation
from adascope_fast.reference.rows import arranged, per_row, picked
from adascope_fast.reference.transition import Kind, guide, transition_log_prob


class Step(NamedTuple):
    """Where a step took `n` samples, and what it can tell of them at no further pass over memory."""

    prev_sample: Float[Tensor, "n *latent"]
    """The next latents, in the dtype of `sample`."""
    log_prob: Float[Tensor, " n"]
    """Of prev_sample as stored."""
    x0: Float[Tensor, "n *latent"]
    """The guess of the final latents, in the dtype of `sample`."""
    x0_correlation: Float[Tensor, " n"] | None
    """Of x0 as stored with that of the step before."""
    sample_correlation: Float[Tensor, " n"]
    """Of `sample` with prev_sample as stored."""


@torch.no_grad()
def transition_step(
    sample: Float[Tensor, "n *latent"],
    output: Float[Tensor, "n *latent"],
    noise: Float[Tensor, "n *latent"],
    coef: Float[Tensor, "n 3"],
    *,
    output_uncond: Float[Tensor, "n *latent"] | None = None,
    guidance_scale: float = 1.0,
    kind: Kind = "gaussian",
) -> tuple[Float[Tensor, "n *latent"], Float[Tensor, " n"]]:
    """One rollout step: prev_sample, in the dtype of `sample`, and the log-probability of prev_sample as stored.

    Carries no gradient. A deterministic step (std = 0) is allowed; its "gaussian" log-probability is NaN.

    Args:
        sample: x_t.
        output: model output at x_t; the conditional one if `output_uncond` is given.
        noise: standard normal, shaped as `sample`.
        coef, kind: as in `transition_log_prob`.
        output_uncond: model output without the prompt; None means no guidance.
        guidance_scale: unused without `output_uncond`.
    """
    output = guide(output, output_uncond, guidance_scale)
    x, predicted, noise, weights = arranged(coef, sample=sample, output=output, noise=noise)
    weight_sample, weight_output, std = (per_row(column, x) for column in weights.unbind(1))
    prev_sample = (x * weight_sample).addcmul_(predicted, weight_output).addcmul_(noise, std).to(sample.dtype)
    return prev_sample, transition_log_prob(sample, output, prev_sample, coef, kind=kind)


@torch.no_grad()
def transition_step_with_x0(
    sample: Float[Tensor, "m *latent"],
    output: Float[Tensor, "n *latent"],
    noise: Float[Tensor, "m *latent"],
    coef: Float[Tensor, "n 3"],
    x0_coef: Float[Tensor, "n 2"],
    *,
    prev_x0: Float[Tensor, "m *latent"] | None = None,
    output_uncond: Float[Tensor, "n *latent"] | None = None,
    guidance_scale: float = 1.0,
    kind: Kind = "gaussian",
    rows: Int64[Tensor, " n"] | None = None,
    out: Step | None = None,
) -> Step:
    """`transition_step`'s two results, the guess x0 = c0 * sample + c1 * output, and two correlations.

    They are NaN where a row is constant or not finite, as `correlation`.

    Args:
        sample, output, noise, coef, output_uncond, guidance_scale, kind: as in `transition_step`.
        x0_coef: (c0, c1) of each row's step.
        prev_x0: the x0 of the step before, for `x0_correlation`, which is None without it.
        rows: of `out`, sample, noise and prev_x0, which are then tables of any length m; output and coefficients are
            [n]. None: all.
        out: tensors to write to, and what is returned; prev_sample may be `noise`. None: new ones.
    """
    if out is None and rows is not None:
        raise ValueError("rows are those of tables to write to, and out is None; pass out, or the rows themselves")
    if out is not None:
        _check_out(out, sample, has_prev_x0=prev_x0 is not None)
    sample, noise = picked(sample, rows), picked(noise, rows)
    guided = guide(output, output_uncond, guidance_scale)
    prev_sample, log_prob = transition_step(sample, guided, noise, coef, kind=kind)
    x, predicted = arranged(None, sample=sample, output=guided)
    if x0_coef.shape != (len(sample), 2):
        raise ValueError(f"x0_coef must be [{len(sample)}, 2], one (c0, c1) for each row, not {list(x0_coef.shape)}")
    of_sample, of_output = (per_row(column, x) for column in x0_coef.to(x.dtype).unbind(1))
    x0 = (x * of_sample).addcmul_(predicted, of_output).to(sample.dtype)
    likeness = None if prev_x0 is None else correlation(x0, picked(prev_x0, rows))
    step = Step(prev_sample, log_prob, x0, likeness, correlation(sample, prev_sample))
    if out is None:
        return step
    for table, values in zip(out, step, strict=True):
        if table is not None and values is not None:
            table.copy_(values) if rows is None else table.index_copy_(0, rows, values.to(table.dtype))
    return out


def _check_out(out: Step, sample: Tensor, *, has_prev_x0: bool) -> None:
    if has_prev_x0 and out.x0_correlation is None:
        raise ValueError("prev_x0 is given, and out has no x0_correlation to write to; give both or neither")
    for name, table in out._asdict().items():
        shape = sample.shape if name in ("prev_sample", "x0") else sample.shape[:1]
        if table is not None and (table.shape != shape or table.device != sample.device):
            raise ValueError(
                f"out's {name} must be {list(shape)} on {sample.device}, a row for each of sample, "
                f"not {list(table.shape)} on {table.device}"
            )

"""Ratios at the edges of float32 and of the clip range: worked by hand, and a grid to compare twins on.

`r` is exp(log_prob - old_log_prob), A the advantage; the clip range is [0.75, 1.5], from `BOUNDS`.
"""

from collections.abc import Callable
from itertools import product
from math import inf, nan
from typing import Any

import torch
from torch import Tensor

BOUNDS = {"clip_range": 0.25, "clip_range_high": 0.5}
HALF, TWICE = -0.6931472, 0.6931472  # log ratios

BY_HAND = {
    # log_prob, old, A: r, then (loss, slope) of PPO and of DPOK
    ("r inside", -2.0, -2.0, 3.0): (1.0, (-3.0, -3.0), (-3.0, -3.0)),
    ("r above, A > 0", TWICE, 0.0, 3.0): (2.0, (-4.5, 0.0), (-4.5, 0.0)),
    ("r above, A < 0", TWICE, 0.0, -3.0): (2.0, (6.0, 6.0), (4.5, 0.0)),
    ("r below, A > 0", HALF, 0.0, 3.0): (0.5, (-1.5, -1.5), (-2.25, 0.0)),
    ("r below, A < 0", HALF, 0.0, -3.0): (0.5, (2.25, 0.0), (2.25, 0.0)),
    ("r overflows, A > 0", 89.0, 0.0, 3.0): (inf, (-4.5, 0.0), (-4.5, 0.0)),
    ("r overflows, A < 0", 89.0, 0.0, -3.0): (inf, (inf, inf), (4.5, 0.0)),
    ("r overflows, A = 0", 89.0, 0.0, 0.0): (inf, (0.0, 0.0), (0.0, 0.0)),
    ("log_prob = inf, A > 0", inf, 0.0, 3.0): (inf, (-4.5, 0.0), (-4.5, 0.0)),
    ("log_prob = -inf, A > 0", -inf, 0.0, 3.0): (0.0, (0.0, 0.0), (-2.25, 0.0)),
    ("log_prob = -inf, A < 0", -inf, 0.0, -3.0): (0.0, (2.25, 0.0), (2.25, 0.0)),
    ("log_prob = -inf, A = 0", -inf, 0.0, 0.0): (0.0, (0.0, 0.0), (0.0, 0.0)),
    ("old = -inf, A > 0", 0.0, -inf, 3.0): (inf, (-4.5, 0.0), (-4.5, 0.0)),
    ("old = -inf, A < 0", 0.0, -inf, -3.0): (inf, (inf, inf), (4.5, 0.0)),
    ("old = -inf, A = 0", 0.0, -inf, 0.0): (inf, (0.0, 0.0), (0.0, 0.0)),
    ("old = inf, A > 0", 0.0, inf, 3.0): (0.0, (0.0, 0.0), (-2.25, 0.0)),
    ("old = inf, A < 0", 0.0, inf, -3.0): (0.0, (2.25, 0.0), (2.25, 0.0)),
    ("both = -inf", -inf, -inf, 3.0): (nan, (nan, nan), (nan, nan)),
    ("both = inf, A = 0", inf, inf, 0.0): (nan, (nan, nan), (nan, nan)),
    ("log_prob = nan", nan, 0.0, 3.0): (nan, (nan, nan), (nan, nan)),
    ("log_prob = nan, A = 0", nan, 0.0, 0.0): (nan, (nan, nan), (nan, nan)),
    ("old = nan", 0.0, nan, -3.0): (nan, (nan, nan), (nan, nan)),
    ("A = nan", 0.0, 0.0, nan): (1.0, (nan, nan), (nan, nan)),
    ("A = nan, r above", TWICE, 0.0, nan): (2.0, (nan, nan), (nan, nan)),
    ("A = nan, r infinite", 89.0, 0.0, nan): (inf, (nan, nan), (nan, nan)),
}

_LOG_PROBS = (-inf, -200.0, -89.0, -1.0, -0.3, 0.0, 1e-5, 0.3, 1.0, 89.0, 200.0, inf, nan)
_ADVANTAGES = (-inf, -2.0, -1e-30, -0.0, 0.0, 1e-30, 2.0, inf, nan)


def grid() -> tuple[Tensor, ...]:
    """(log_prob, old_log_prob, advantage) of every combination of edges."""
    return torch.tensor([*product(_LOG_PROBS, _LOG_PROBS, _ADVANTAGES)]).unbind(1)


def by_hand() -> tuple[tuple[Tensor, ...], dict[str, dict[str, Tensor]]]:
    """The rows of `BY_HAND`, and what each operation must give of them."""
    rows = torch.tensor([values for _, *values in BY_HAND]).unbind(1)
    names = {"clipped_policy_loss": 1, "dpok_policy_loss": 2}
    ratio = torch.tensor([found[0] for found in BY_HAND.values()])
    wanted = {}
    for name, place in names.items():
        loss, slope = torch.tensor([found[place] for found in BY_HAND.values()]).unbind(1)
        wanted[name] = {"ratio": ratio, "loss": loss, "slope": slope}
    return rows, wanted


def found(operation: Callable[..., Any], rows: tuple[Tensor, ...], **bounds: float) -> dict[str, Tensor]:
    """What an operation gives of rows: ratio, loss, and the slope that autograd finds."""
    log_prob, old_log_prob, advantage = rows
    log_prob = log_prob.clone().requires_grad_()
    loss, ratio = operation(log_prob, old_log_prob, advantage, **bounds)
    (slope,) = torch.autograd.grad(loss.sum(), log_prob)
    return {"ratio": ratio, "loss": loss.detach(), "slope": slope}


def assert_alike(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """Equal up to rounding, NaN for NaN; names the first that is not."""
    for name in want:
        torch.testing.assert_close(
            got[name], want[name], rtol=1e-6, atol=0, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}"
        )


def assert_bounds_belong_to_the_range(operation: Callable[..., Any]) -> None:
    """A ratio exactly on a bound has the slope -A r; one rounding outside it has none.

    The ratio is the operation's own, since exp(log(0.75)) may be a rounding away from 0.75.
    """
    for log_ratio, advantage in ((-0.3, -2.0), (0.3, 2.0)):
        rows = torch.tensor([log_ratio]), torch.zeros(1), torch.tensor([advantage])
        ratio = found(operation, rows, clip_range=1.0)["ratio"]
        inside = torch.nextafter(ratio, torch.ones(1))
        on_bound = found(operation, rows, clip_range=abs(ratio.item() - 1))
        beyond = found(operation, rows, clip_range=abs(inside.item() - 1))
        assert on_bound["slope"].item() == -advantage * ratio.item() == on_bound["loss"].item()
        assert beyond["slope"].item() == 0
        assert beyond["loss"].item() == -advantage * inside.item()

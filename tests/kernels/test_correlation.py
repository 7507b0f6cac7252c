"""The correlation kernels, interpreted, against the reference in float64 and the known answers."""

import json
import math
import os
from pathlib import Path

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("kernels run here under TRITON_INTERPRET=1 alone", allow_module_level=True)

from adascope_fast import reference
from adascope_fast.kernels import correlation

VECTORS = json.loads((Path(__file__).parents[1] / "data" / "vectors.json").read_text())["streaming"]
ATOL = {torch.float32: 1e-6, torch.bfloat16: 1e-6}  # both are read exactly and summed in float32


def _random(n, d, dtype=torch.float32, offset=0.0):
    generator = torch.Generator().manual_seed(n * 1000 + d)
    x, y = torch.randn(2, n, d, generator=generator).unbind(0)
    return (x + offset).to(dtype), (0.6 * x + 0.8 * y - 2 * offset).to(dtype)


@pytest.mark.parametrize("dtype", ATOL)
@pytest.mark.parametrize(("n", "d"), [(0, 4), (1, 2), (3, 1030), (70, 5), (1, 8200)])
def test_correlation_equals_the_reference(n, d, dtype):
    x, y = _random(n, d, dtype)
    got = correlation.correlation(x, y)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), reference.correlation(x.double(), y.double()), rtol=0, atol=ATOL[dtype])


@pytest.mark.parametrize("offset", [100.0, 1e4])
def test_an_offset_does_no_harm(offset):
    x, y = _random(2, 1500, offset=offset)
    want = reference.correlation(x.double(), y.double())
    torch.testing.assert_close(correlation.correlation(x, y).double(), want, rtol=0, atol=2e-6)


@pytest.mark.parametrize("num_channels", [1, 3, 8])
def test_channel_centering_equals_the_reference(num_channels):
    x, y = _random(2, 24 * 50)
    shift = torch.arange(24.0).repeat_interleave(50)
    x, y = (x + shift).view(2, 24, 5, 10), (y - shift).view(2, 24, 5, 10)
    got = correlation.correlation(x, y, center="channel", num_channels=num_channels)
    want = reference.correlation(x.double(), y.double(), center="channel", num_channels=num_channels)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-6)


def test_known_answers():
    case = VECTORS["small"]
    x, y = torch.tensor([case["x"]]).float(), torch.tensor([case["y"]]).float()
    state = correlation.correlation_update(torch.zeros(1, 6), x, y)
    assert state[0].tolist() == pytest.approx(
        [case[key] for key in ("n", "mean_x", "mean_y", "sxx", "syy", "sxy")], rel=1e-6
    )
    assert correlation.correlation(x, y).item() == pytest.approx(0.6, rel=1e-6)
    assert correlation.correlation(x + 1e4, y + 1e4).item() == pytest.approx(VECTORS["offset_1e4_corr"], rel=1e-6)
    case = VECTORS["merge"]
    x, y, state = torch.tensor([case["x"]]), torch.tensor([case["y"]]), torch.zeros(1, 6)
    for part in (slice(None, case["split"]), slice(case["split"], None)):
        state = correlation.correlation_update(state, x[:, part], y[:, part])
    want = [case[key] for key in ("mean_x", "mean_y", "sxx", "syy", "sxy")]
    assert state[0, 1:].tolist() == pytest.approx(want, rel=2e-5)


def test_streaming_equals_one_shot():
    x, y = _random(3, 2500, offset=30.0)
    state = torch.zeros(3, 6)
    for part in (slice(0, 1), slice(1, 1200), slice(1200, 2500)):
        state = correlation.correlation_update(state, x[:, part], y[:, part])
    assert state[:, 0].tolist() == [2500.0] * 3
    torch.testing.assert_close(
        reference.correlation_from_state(state), correlation.correlation(x, y), rtol=0, atol=1e-6
    )
    want = reference.correlation_update(torch.zeros(3, 6).double(), x.double(), y.double())
    torch.testing.assert_close(state.double(), want, rtol=2e-6, atol=1e-4)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, inside the interpreter
def test_degenerate_rows_are_nan_and_alone():
    x, y = _random(5, 1100)
    x[0], y[1] = 1e4, 0.0
    x[2, 7], y[3, 9] = math.inf, math.nan
    assert correlation.correlation(x, y).isnan().tolist() == [True, True, True, True, False]


def test_correlation_stays_within_one():
    x, _ = _random(4, 333)
    assert correlation.correlation(x, 7 * x - 3).tolist() == pytest.approx([1.0] * 4, abs=1e-6)
    assert correlation.correlation(x, 7 * x - 3).max() <= 1
    assert correlation.correlation(x, -x).min() >= -1


def test_a_row_does_not_depend_on_its_batch_nor_on_its_layout():
    x, y = _random(6, 4 * 20 * 20)
    together = correlation.correlation(x, y)
    assert torch.equal(correlation.correlation(x[4:5], y[4:5]), together[4:5])
    pairs = torch.stack([x, y], 1).view(6, 2, 4, 20, 20)
    moved = pairs[:, 1].to(memory_format=torch.channels_last)
    assert torch.equal(correlation.correlation(pairs[:, 0], moved), together)
    channels = {"center": "channel", "num_channels": 4}
    together = correlation.correlation(x, y, **channels)
    assert torch.equal(correlation.correlation(x[4:5], y[4:5], **channels), together[4:5])
    assert torch.equal(correlation.correlation(pairs[:, 0], moved, **channels), together)


@pytest.mark.parametrize("is_channels_last", [False, True])
@pytest.mark.parametrize(
    ("n", "k", "shape"), [(3, 5, (4, 6, 7)), (1, 1, (4, 20, 17)), (0, 2, (4, 3, 3)), (2, 7, (1, 1, 1))]
)
def test_many_with_one(n, k, shape, is_channels_last):
    generator = torch.Generator().manual_seed(n + k)
    y = torch.randn(n, *shape, generator=generator)
    x = 0.5 * y.unsqueeze(1) + torch.randn(n, k, *shape, generator=generator)
    if is_channels_last:
        x = x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    for rows in (x, torch.stack([x, x], 2)[:, :, 0]):
        got = correlation.correlations(rows, y)
        assert got.shape == (n, k)
        exact = reference.correlations(rows.double(), y.double())
        torch.testing.assert_close(got.double(), exact, rtol=0, atol=1e-6, equal_nan=True)
        each = [correlation.correlation(one, y) for one in rows.unbind(1)]
        torch.testing.assert_close(got, torch.stack(each, 1), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("place", [0, 500, 1023, 1024, 2999])
def test_an_outlier_is_no_pilot(place):
    """Around it, sums of squares would lose what all the others add."""
    generator = torch.Generator().manual_seed(place)
    x, noise = torch.randn(2, 1, 3000, generator=generator).unbind(0)
    y = 0.6 * x + 0.8 * noise
    x, y = x + 100, y - 3
    x[0, place] += 1e4
    exact = reference.correlation(x.double(), y.double())
    assert correlation.correlation(x, y).item() == pytest.approx(exact.item(), abs=2e-6)
    torch.testing.assert_close(
        correlation.correlation_update(torch.zeros(1, 6), x, y).double(),
        reference.correlation_update(torch.zeros(1, 6).double(), x.double(), y.double()), rtol=2e-6, atol=1e-3,
    )  # fmt: skip


def test_operators_pass_torch_opcheck():
    x, y = _random(2, 12)
    torch.library.opcheck(correlation.correlation_op, (x, y, 3))
    torch.library.opcheck(correlation.correlation_op, (torch.stack([x, y], 1), y, 1))
    torch.library.opcheck(correlation.update_op, (torch.zeros(2, 6), x, y))


def test_wrong_input_is_refused():
    x, y = _random(3, 8)
    with pytest.raises(ValueError, match='"sample" or "channel"'):
        correlation.correlation(x, y, center="row")
    with pytest.raises(ValueError, match="num_channels that divides 8"):
        correlation.correlation(x, y, center="channel", num_channels=3)
    with pytest.raises(ValueError, match=r"state must be \[3, 6\]"):
        correlation.correlation_update(torch.zeros(2, 6), x, y)
    with pytest.raises(ValueError, match=r"y \[3, 7\]"):
        correlation.correlation(x, y[:, :7])
    for many in (x, x.view(3, 2, 4), x[:2].unsqueeze(1), x.view(3, 1, 8)[:, :0]):
        with pytest.raises(ValueError, match=r"x must be \[n, k, ...\] and y \[n, ...\]"):
            correlation.correlations(many, y)
    with pytest.raises(ValueError, match="must have elements"):
        correlation.correlation(x[:, :0], y[:, :0])

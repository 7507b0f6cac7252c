"""What no operation can be given, through the door: refused alike by the reference and, interpreted, by the kernels."""

import inspect
import os
from collections.abc import Callable
from math import inf, nan
from typing import Any

import pytest
import torch
from operation_inputs import CONVERTED, N, arguments, tensors_of
from torch import Tensor

from adascope_fast import ops

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
INTERPRETED_BY_NUMPY = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
TABLES = ("sample", "prev_sample", "noise", "prev_x0")
NAMES = list(arguments())
WITH_LATENTS = [name for name in NAMES if not name.endswith("_policy_loss") or name.startswith("transition")]
WITH_ROWS = [name for name in NAMES if "rows" in inspect.signature(getattr(ops, name)).parameters]


@pytest.fixture(params=["reference", *(["triton"] if IS_INTERPRETED else [])], autouse=True)
def twin(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Who serves the operations."""
    monkeypatch.setenv("ADASCOPE_FAST_KERNELS", request.param)
    return request.param


def test_every_operation_is_here():
    assert set(NAMES) == set(ops._doors)


@pytest.mark.parametrize("name", WITH_LATENTS)
def test_rows_without_elements_are_refused(name: str):
    with pytest.raises(ValueError, match=r"latents must have elements, got rows of shape \[2, 0\]"):
        getattr(ops, name)(**arguments(row=(2, 0))[name])


@pytest.mark.parametrize("name", NAMES)
def test_tensors_on_another_device_are_refused_by_name(name: str):
    given = arguments()[name]
    for key, value in given.items():
        if isinstance(value, Tensor):
            with pytest.raises(
                ValueError, match=rf"the tensors of {name} must .* one device, got .*{key} on meta.*move"
            ):
                getattr(ops, name)(**given | {key: value.to("meta")})


def test_positional_tensors_are_named_too():
    given = arguments()["gaussian_kl"]
    with pytest.raises(ValueError, match="got output on cpu, ref_output on meta, coef on cpu; move them"):
        ops.gaussian_kl(given["output"], given["ref_output"].to("meta"), given["coef"])


@pytest.mark.parametrize("name", NAMES)
def test_float64_latents_are_left_to_the_reference_and_other_float64_is_converted(name: str, twin: str):
    operation, given = getattr(ops, name), arguments()[name]
    want = tensors_of(operation(**given))
    for key, value in given.items():
        if not isinstance(value, Tensor):
            continue
        double = given | {key: value.double()}
        if key in CONVERTED:
            for got, one in zip(tensors_of(operation(**double)), want, strict=True):
                assert got.dtype == one.dtype
                torch.testing.assert_close(got, one, rtol=1e-5, atol=1e-6)
        elif twin == "triton":
            with pytest.raises(
                RuntimeError, match=rf"no kernel can serve {name}: .* latents are float64; set ADASCOPE"
            ):
                operation(**double)
        else:
            operation(**double)


@pytest.mark.parametrize("name", WITH_ROWS)
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.tensor([0, 1, 2], dtype=torch.int32), r"rows must be int64 and \[n\], got torch.int32 and \[3\]"),
        (torch.tensor([[0, 1, 2]]), r"rows must be int64 and \[n\], got torch.int64 and \[1, 3\]"),
        (torch.tensor([0, 1]), "must"),
    ],
    ids=["int32", "two axes", "too few"],
)
def test_rows_that_are_none_are_refused(name: str, rows: Tensor, message: str):
    with pytest.raises(ValueError, match=message):
        _with_rows(name, rows)


@pytest.mark.parametrize("name", WITH_ROWS)
@pytest.mark.parametrize("last", [-1, N])
def test_the_reference_refuses_rows_that_are_not_there(name: str, last: int, twin: str):
    if twin == "triton":
        pytest.skip("the kernels do not look: on a GPU that would wait for it")
    found = rf"got {min(last, 0)} to {max(last, 1)}"
    with pytest.raises(ValueError, match=rf"rows must be numbers from 0 to 2 of a table's rows, {found}"):
        _with_rows(name, torch.tensor([0, 1, last]))


@pytest.mark.parametrize("name", WITH_ROWS)
def test_only_tables_may_have_another_length(name: str):
    given, rows = arguments()[name], torch.tensor([1, 2])
    ours = [key for key, value in given.items() if isinstance(value, Tensor) and key not in TABLES]
    _with_rows(name, rows, cut=ours)
    for wrong in ([], *([*ours, key] for key in TABLES if key in given)):
        with pytest.raises(ValueError, match="must"):
            _with_rows(name, rows, cut=wrong)


def _with_rows(name: str, rows: Tensor, cut: list[str] | None = None) -> Any:
    """The operation on some rows, where what is named in `cut` has only its first two."""
    given = arguments()[name]
    for key in cut or []:
        given[key] = given[key][:2]
    if name == "transition_step_with_x0":
        latents, numbers = torch.zeros(4, N, 2, 4), torch.zeros(4, N)
        given["out"] = ops.Step(latents[0], numbers[0], latents[1], numbers[1], numbers[2])
    return getattr(ops, name)(**given, rows=rows)


@INTERPRETED_BY_NUMPY
@pytest.mark.parametrize("clip", ["ppo", "dpok"])
@pytest.mark.parametrize(
    ("old", "advantage", "loss", "ratio", "is_flat"),
    [
        (-inf, 3.0, -3.6, inf, True),
        (-200.0, 3.0, -3.6, inf, True),
        (-200.0, 0.0, 0.0, inf, True),
        (inf, 0.0, 0.0, 0.0, True),
        (inf, -3.0, 2.7, 0.0, True),
        (nan, 3.0, nan, nan, False),
        (0.0, nan, nan, None, False),
    ],
)
def test_a_hostile_row_has_the_gradient_of_its_edge_and_leaves_the_others_alone(
    clip: str, old: float, advantage: float, loss: float, ratio: float | None, is_flat: bool
):
    given = arguments()["transition_policy_grad"] | {"clip": clip, "clip_range": 0.1, "clip_range_high": 0.2}
    del given["kl_weight"]
    del given["ref_output"]
    calm = _loss_and_gradients(given)
    given["old_log_prob"], given["advantage"] = given["old_log_prob"].clone(), given["advantage"].clone()
    given["old_log_prob"][1], given["advantage"][1] = old, advantage
    for number, (stats, *values) in enumerate(_loss_and_gradients(given)):
        for value, want in zip(values, calm[number][1:], strict=True):
            assert torch.equal(value[[0, 2]], want[[0, 2]])
        found, *gradients = (value[1] for value in values)
        assert found.item() == pytest.approx(loss, nan_ok=True)
        if ratio is not None:
            assert stats["ratio"][1].item() == pytest.approx(ratio, nan_ok=True)
        for gradient in gradients:
            assert (gradient == 0).all() if is_flat else gradient.isnan().all()
        assert stats["output_gradient"][1].item() == pytest.approx(0.0 if is_flat else nan, nan_ok=True)


def _loss_and_gradients(given: dict[str, Any]) -> list[tuple[dict[str, Tensor], Tensor, Tensor, Tensor]]:
    """(statistics, loss, gradients of both outputs), from each of the two operations that have them."""
    loss, stats, *gradients = ops.transition_policy_grad(**given)
    leaves = {key: given[key].clone().requires_grad_() for key in ("output", "output_uncond")}
    rest = {key: value for key, value in given.items() if key != "scale"}
    again, told = ops.transition_policy_loss(**rest | leaves)
    found = torch.autograd.grad((given["scale"] * again).sum(), list(leaves.values()))
    return [(stats, loss, *gradients), (told, again.detach(), *found)]  # type: ignore[list-item]


@pytest.mark.parametrize("name", ["transition_policy_loss", "transition_policy_grad"])
def test_clip_ranges_that_are_none_are_refused(name: str):
    operation: Callable[..., Any] = getattr(ops, name)
    for value in (0.0, -0.1, nan, inf):
        for key in ("clip_range", "clip_range_high"):
            with pytest.raises(ValueError, match=rf"{key} must be above 0 and at most 1e12, got {value}; pass"):
                operation(**arguments()[name] | {key: value})

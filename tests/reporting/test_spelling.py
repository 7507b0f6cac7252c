"""Numbers have the digits that their interval bears out, and zero has no sign."""

import math

import pytest

from adascope_fast.reporting.spelling import decimals, fixed, points, three


@pytest.mark.parametrize(
    ("reach", "bounds", "want"),
    [
        (0.0315, (), 3),
        (0.1, (), 2),
        (0.099, (), 3),
        (3.2, (), 1),
        (12.0, (), 0),
        (1500.0, (), 0),
        (2e-5, (), 6),
        (0.02, (0.0004, 0.04), 4),
        (0.02, (0.0, 0.04), 3),
        (0.02, (1e-12, 0.04), 7),
        (0.0, (), 3),
        (math.nan, (), 3),
    ],
)
def test_half_an_interval_is_shown_with_two_digits_and_no_bound_as_zero(
    reach: float, bounds: tuple[float, ...], want: int
):
    assert decimals(reach, *bounds) == want


def test_zero_has_no_sign():
    assert [fixed(value, 3, signed=True) for value in (-0.0002, 0.0002, 0.0, -0.0)] == ["0.000"] * 4
    assert fixed(-0.0002, 0) == "0"
    assert [points(value) for value in (0.04, -0.04, 2.5, -2.5, math.nan)] == ["0.0", "0.0", "+2.5", "-2.5", "-"]


def test_a_sign_is_shown_where_it_is_asked_for():
    assert (fixed(0.5, 2, signed=True), fixed(0.5, 2), fixed(-0.5, 2)) == ("+0.50", "0.50", "-0.50")


def test_three_digits_count():
    assert [three(value) for value in (0.25, 0.012345, 12.3456, 123.456, 0.0)] == [
        "0.250",
        "0.0123",
        "12.3",
        "123",
        "0",
    ]
    assert three(math.nan) == "-"

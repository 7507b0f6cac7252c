"""Numbers for people: as many digits as an interval bears out, and no zero with a sign."""

import math

MOST_DECIMALS = 12


def decimals(reach: float, *bounds: float) -> int:
    """Places that show half an interval's width with two digits, four more at most where a bound would look like 0."""
    if not math.isfinite(reach) or reach <= 0:
        return 3
    fewest = min(max(0, 1 - math.floor(math.log10(reach))), MOST_DECIMALS)
    enough = (places for places in range(fewest, fewest + 4) if not any(_vanishes(bound, places) for bound in bounds))
    return next(enough, fewest + 4)


def _vanishes(value: float, places: int) -> bool:
    return bool(value) and not float(f"{value:.{places}f}")


def fixed(value: float, places: int, *, signed: bool = False) -> str:
    """`value` with so many decimal places; "0.00", never "-0.00" or "+0.00"."""
    text = f"{value:.{places}f}"
    if not float(text):
        return f"{0:.{places}f}"
    return f"+{text}" if signed and value > 0 else text


def three(value: float) -> str:
    """Three digits that count, "-" for what is not known."""
    return "-" if not math.isfinite(value) else f"{value:#.3g}".removesuffix(".") if value else "0"


def points(value: float) -> str:
    """A change in percentage points or per cent, one decimal place, with its sign."""
    return "-" if not math.isfinite(value) else fixed(value, 1, signed=True)

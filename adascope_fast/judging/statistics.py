"""How often an arm is preferred, and how far raters agree, beyond chance.

A win counts 1, a tie one half. Votes on images of one prompt resemble each other, so a win rate is the mean over
prompts of each prompt's mean, and its interval is Wilson's with as many observations as there are prompts: it stays
within [0, 1] and has a width where every vote was the same.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence

NORMAL_95 = 1.959964


def wilson(rate: float, num: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a share `rate` of `num` observations (Wilson 1927)."""
    z = NORMAL_95
    centre = (rate + z * z / (2 * num)) / (1 + z * z / num)
    reach = z / (1 + z * z / num) * math.sqrt(rate * (1 - rate) / num + z * z / (4 * num * num))
    return max(0.0, centre - reach), min(1.0, centre + reach)


def win_rate(scores: Mapping[str, Sequence[float]]) -> tuple[float, float, float]:
    """(rate, low, high) of the scores (1, 0.5 or 0) of each prompt, of which there is at least one."""
    means = [sum(values) / len(values) for values in scores.values()]
    rate = math.fsum(means) / len(means)
    return rate, *wilson(rate, len(means))


def cohen_kappa(one: Sequence[str], other: Sequence[str]) -> float:
    """Agreement of two raters on the same things beyond chance, at most 1 (Cohen 1960).

    NaN where there is nothing, or both gave one and the same answer throughout, so that chance alone agrees wholly.
    """
    num = len(one)
    if not num:
        return math.nan
    agreed = sum(a == b for a, b in zip(one, other, strict=True)) / num
    ones, others = Counter(one), Counter(other)
    chance = sum(ones[answer] * others[answer] for answer in ones) / num**2
    return (agreed - chance) / (1 - chance) if chance < 1 else math.nan


def krippendorff_alpha(units: Sequence[Sequence[str]]) -> float:
    """Agreement of any number of raters, at most 1, each of whom may have left something out; nominal answers.

    Args:
        units: the answers on each thing (Krippendorff 2011, section D); of one alone there is nothing to compare.

    NaN where nothing has two answers, or all answers are one.
    """
    pairable = [Counter(unit) for unit in units if len(unit) > 1]
    totals: Counter[str] = sum(pairable, Counter())
    num = totals.total()
    if num < 2:
        return math.nan
    observed = sum(count * (unit.total() - count) / (unit.total() - 1) for unit in pairable for count in unit.values())
    expected = sum(count * (num - count) for count in totals.values()) / (num - 1)
    return 1 - observed / expected if expected else math.nan

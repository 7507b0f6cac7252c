"""Every reason that AdaScope can give has its meaning in words."""

import inspect
import re
from pathlib import Path

from adascope_fast.adascope import interval_rule, selector
from adascope_fast.reporting.reasons import INSTEAD, MEMORY, REASONS, in_words

WRITTEN = re.compile(r'"((?:fallback|clamped):\w+|ok|fixed|schedule|previous)"')


def given() -> set[str]:
    """The reasons in the source of the rule and of the selector, but for the choices of `mask_source`."""
    source = inspect.getsource(interval_rule) + inspect.getsource(selector)
    return set(WRITTEN.findall(source))


def test_every_reason_of_the_rule_is_explained_and_no_other():
    assert given() == REASONS.keys()


def test_what_was_taken_instead_is_told():
    assert in_words("ok") == REASONS["ok"]
    assert in_words("fallback:no_start") == f"{REASONS['fallback:no_start']} {INSTEAD}"
    assert in_words("fallback:no_start:memory") == f"{REASONS['fallback:no_start']} {MEMORY}"
    assert in_words("fallback:short") == REASONS["fallback:short"]


def test_a_reason_of_ones_own_selector_has_no_meaning_here():
    assert in_words("because") == ""


def test_the_documentation_has_every_reason():
    page = (Path(__file__).parents[2] / "docs" / "reports.md").read_text(encoding="utf-8")
    assert REASONS.keys() <= set(re.findall(r"`([\w:]+)`", page))

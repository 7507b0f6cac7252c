"""Words of others on a card."""

import pytest

from adascope_fast.training.hub.markdown import MOST_SHOWN, escaped, table


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("a red circle, 0.005 of it", "a red circle, 0.005 of it"),
        ("<img src=x onerror=alert(1)>", "&lt;img src=x onerror=alert(1)&gt;"),
        ("[me](javascript:x) ![p](q)", r"\[me\](javascript:x) !\[p\](q)"),
        ("`a` *b* _c_ ~d~ $e$", r"\`a\` \*b\* \_c\_ \~d\~ \$e\$"),
        ("a | b\n| c", r"a \| b \| c"),
        ("https://example.com www.example.com @me", r"https\://example.com www\.example.com \@me"),
        ("# a # b", r"\# a # b"),
        ("- a", r"\- a"),
        ("12. a", r"12\. a"),
        ("1) a", r"1\) a"),
        ("a \\ &lt; b", r"a \\ &amp;lt; b"),
    ],
)
def test_no_text_is_markup(text: str, want: str):
    assert escaped(text) == want


def test_a_long_text_is_cut():
    assert escaped("a" * (MOST_SHOWN + 1)) == "a" * (MOST_SHOWN - 3) + "..."


def test_a_table_has_a_line_below_its_heading():
    assert table(["a", "b"], [("1", "2")]) == ["| a | b |", "| --- | --- |", "| 1 | 2 |"]

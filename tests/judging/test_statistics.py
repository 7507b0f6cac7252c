"""Win rates and agreement, by hand and by scikit-learn; what results say of votes."""

import json
import math
import random
from pathlib import Path

import pytest
from arms_to_judge import PROMPTS, arms, comparison_of
from sklearn.metrics import cohen_kappa_score

from adascope_fast.judging import Comparison, results_of, table, write_results
from adascope_fast.judging.pairs import Pair, Side
from adascope_fast.judging.results import votes_in
from adascope_fast.judging.statistics import cohen_kappa, krippendorff_alpha, wilson, win_rate


def test_wilson_is_the_textbook_interval():
    # Newcombe 1998, table I: 81 of 263 and 15 of 148.
    assert wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(15 / 148, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0, 0.1611), abs=5e-5)  # 0 of 20, the same table
    low, high = wilson(1.0, 1)
    assert (low, high) == pytest.approx((1 / (1 + 1.959964**2), 1))


def test_a_prompt_counts_once_however_many_votes_it_has():
    assert win_rate({"a": [1, 1, 1, 0.5], "b": [0]}) == pytest.approx((0.4375, *wilson(0.4375, 2)))


def test_kappa_by_hand_and_by_scikit_learn():
    # Cohen 1960's form: 20 and 15 on the diagonal, 5 and 10 off it: (0.7 - 0.5) / (1 - 0.5).
    one, other = ["y"] * 25 + ["n"] * 25, ["y"] * 20 + ["n"] * 5 + ["y"] * 10 + ["n"] * 15
    assert cohen_kappa(one, other) == pytest.approx(0.4)
    rng = random.Random(0)
    for num in (1, 3, 40):
        one, other = (rng.choices("lre", [3, 2, 1], k=num) for _ in range(2))
        if len({*one, *other}) > 1:
            assert cohen_kappa(one, other) == pytest.approx(cohen_kappa_score(one, other))
    assert math.isnan(cohen_kappa(["l"] * 3, ["l"] * 3))
    assert math.isnan(cohen_kappa([], []))


def test_alpha_of_krippendorffs_own_example():
    """Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", section C: 0.743 for nominal answers."""
    raters = ["123321412...", "1233224125.3", ".3332342251.", "12332441251."]
    units = [[answer for answer in unit if answer != "."] for unit in zip(*raters, strict=True)]
    assert krippendorff_alpha(units) == pytest.approx(0.743, abs=5e-4)
    assert krippendorff_alpha([["a", "a"], ["b", "b"]]) == 1
    assert math.isnan(krippendorff_alpha([["a", "a"], ["a"]]))
    assert math.isnan(krippendorff_alpha([["a"], ["b"]]))


def _side(arm: str) -> Side:
    return Side(arm, "", "")


THREE = Comparison(
    ("a", "b", "c"),
    (
        Pair("p", _side("a"), _side("b")),
        Pair("p", _side("b"), _side("a")),
        Pair("q", _side("c"), _side("a")),
        Pair("q", _side("b"), _side("c")),
    ),
    0,
)


def _vote(rater: str, pair: int, choice: str, question: str = "fine_detail", **more: object) -> dict:
    return {"rater": rater, "pair": pair, "question": question, "choice": choice} | more


VOTES = [
    _vote("x", 0, "left", seconds=3.0),  # a beats b
    _vote("x", 1, "right", seconds=1.0),  # a beats b
    _vote("x", 2, "equal", seconds=2.0),
    _vote("x", 3, "left"),  # b beats c
    _vote("y", 0, "left"),
    _vote("y", 1, "left"),  # b beats a
    _vote("y", 2, "skip"),
    _vote("model:m", 0, "left", orders=["first", "second"]),
    _vote("model:m", 1, "equal", orders=["first", "first"]),
    _vote("model:m", 2, "equal", orders=["equal", "equal"]),
    _vote("model:m", 3, "failed"),
    _vote("x", 99, "left"),
    _vote("x", 0, "left", question="unheard_of"),
]


def test_win_rates_of_arms_and_of_each_two():
    told = results_of(THREE, VOTES)["win_rates"]["people"]["fine_detail"]
    # a: three of four on p, a tie on q.
    assert told["arms"]["a"] == pytest.approx(
        {"rate": 0.625, "low": wilson(0.625, 2)[0], "high": wilson(0.625, 2)[1], "num_prompts": 2}
        | {"wins": 3, "ties": 1, "losses": 1}
    )
    assert told["arms"]["b"]["rate"] == pytest.approx((0.25 + 1) / 2)
    assert told["arms"]["c"]["rate"] == pytest.approx(0.25)
    assert told["ties"] == pytest.approx(1 / 6)
    assert {tuple(pair["arms"]): pair["rate"] for pair in told["pairs"]} == {
        ("a", "b"): 0.75,
        ("a", "c"): 0.5,
        ("b", "c"): 1.0,
    }


def test_raters_agreement_and_a_models_position():
    found = results_of(THREE, VOTES)
    assert found["raters"]["x"] == {"answers": 4, "skipped": 0, "failed": 0, "median_seconds": 2.0}
    assert found["raters"]["y"] == {"answers": 2, "skipped": 1, "failed": 0, "median_seconds": None}
    assert found["raters"]["model:m"]["failed"] == 1
    pairs = {tuple(pair["raters"]): pair for pair in found["agreement"]["pairs"]}
    assert set(pairs) == {("x", "y"), ("x", "model:m"), ("y", "model:m"), ("most people", "model:m")}
    # x: left, right; y: left, left: half agreed, half by chance.
    assert pairs["x", "y"] == {"raters": ["x", "y"], "num": 2, "same": 0.5, "kappa": 0.0}
    # The majority of left and right is equal, as the model has it; then equal and equal: all three agree.
    assert pairs["most people", "model:m"]["same"] == 1.0
    assert found["agreement"]["alpha"] == pytest.approx(1 - (2 * 1 / 1) / ((3 * 1 + 1 * 3) / 3))
    assert found["position"]["model:m"] == {"consistent": pytest.approx(2 / 3), "first": pytest.approx(3 / 4)}
    assert "model:m" in found["win_rates"]


def test_all_questions_are_one_row_more():
    votes = [_vote("x", 0, "left"), _vote("x", 0, "right", question="aesthetic_appeal")]
    told = results_of(THREE, votes)["win_rates"]["people"]
    assert list(told) == ["aesthetic_appeal", "fine_detail", "all questions"]
    assert told["all questions"]["arms"]["a"]["rate"] == 0.5
    assert "c" not in told["fine_detail"]["arms"]


def test_no_votes_are_no_results():
    found = results_of(THREE, [])
    assert found["win_rates"] == {}
    assert "no votes yet" in table(found)


def test_results_are_written_as_a_page_that_needs_nothing_and_runs_nothing(tmp_path: Path):
    hostile = "<script>alert(1)</script>"
    found = comparison_of(arms(tmp_path, ["plain", "other & <b>"], prompts=[*PROMPTS, hostile]))
    found.keep_in(tmp_path / "out")
    votes = votes_in(tmp_path / "out")
    for vote in [_vote(hostile, 0, "left"), _vote("y", 0, "left"), _vote("model:<i>", 0, "left", orders=["first"] * 2)]:
        votes.add(vote)
    told = write_results(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == told
    page = (tmp_path / "out" / "results.html").read_text()
    assert "<script" not in page
    assert "<b>" not in page
    assert "<i>" not in page
    assert "other &amp; &lt;b&gt;" in page
    assert "://" not in page
    assert "Wilson" in page
    lines = table(told)
    assert "other & <b>" in lines
    assert "model:<i>: both orders agree on 0%" in lines

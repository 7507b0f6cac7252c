"""What the votes on pairs say: win rates of each arm, agreement of the raters, as JSON, as a page and as a table.

People are taken together; each model is taken by itself, and never mixed with them.
"""

import itertools
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

import adascope_fast.reporting
from adascope_fast.judging.pairs import Comparison, Pair
from adascope_fast.judging.questions import QUESTIONS
from adascope_fast.judging.statistics import cohen_kappa, krippendorff_alpha, win_rate
from adascope_fast.judging.votes import OF_MODEL, Votes

CHOICES = ("left", "right", "equal")
SKIPPED, FAILED = "skip", "failed"
PEOPLE, ALL = "people", "all questions"
KEY, FIELDS = ("rater", "pair", "question"), ("choice",)
METHOD = (
    "Win rate: a win counts 1, a tie one half; the mean over prompts of each prompt's mean. Interval: Wilson's at "
    "95 %, with as many observations as prompts. Kappa is Cohen's, alpha Krippendorff's for nominal answers; both are "
    "0 at the agreement of chance and 1 where all agree."
)

Vote = Mapping[str, Any]


def votes_in(out: Path) -> Votes:
    """The votes on pairs in a folder."""
    return Votes(out, key=KEY, fields=FIELDS)


def results_of(comparison: Comparison, votes: Iterable[Vote]) -> dict[str, Any]:
    """Everything that is reported, in plain values; what cannot be told is None.

    Args:
        votes: those that count; one on a pair or question that is not there is left out.
    """
    keys = {question.key for question in QUESTIONS}
    known = [
        vote
        for vote in votes
        if isinstance(vote["pair"], int) and 0 <= vote["pair"] < len(comparison.pairs) and vote["question"] in keys
    ]
    answers = [vote for vote in known if vote["choice"] in CHOICES]
    raters = list(dict.fromkeys(vote["rater"] for vote in known))
    models = [rater for rater in raters if rater.startswith(OF_MODEL)]
    groups = {PEOPLE: [rater for rater in raters if rater not in models]} | {model: [model] for model in models}
    return {
        "method": METHOD,
        "arms": list(comparison.arms),
        "num_pairs": len(comparison.pairs),
        "num_prompts": len({pair.prompt for pair in comparison.pairs}),
        "raters": {rater: _counts(known, rater) for rater in raters},
        "win_rates": {
            name: _by_question(comparison, [vote for vote in answers if vote["rater"] in members])
            for name, members in groups.items()
            if any(vote["rater"] in members for vote in answers)
        },
        "agreement": _agreement(answers, groups[PEOPLE], models),
        "position": {model: _position([vote for vote in answers if vote["rater"] == model]) for model in models},
    }


def write_results(out: Path) -> dict[str, Any]:
    """Write `results.json` and `results.html` of a folder of judgments, and return what they say."""
    found = results_of(Comparison.kept_in(out), votes_in(out))
    (out / "results.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    loader = FileSystemLoader([Path(__file__).parent, *adascope_fast.reporting.__path__])
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": _percent, "decimals": _decimals}
    page = environment.get_template("results.html").render(found=found, titles=_TITLES)
    (out / "results.html").write_text(page, encoding="utf-8")
    return found


def table(found: Mapping[str, Any]) -> str:
    """The same for a terminal."""
    lines = []
    for name, questions in found["win_rates"].items():
        width = max(len(_TITLES[key]) for key in questions)
        lines += ["", f"win rate by {name}, 95 % interval"]
        lines += [" " * width + "".join(f"  {arm:>20.20}" for arm in found["arms"])]
        for key, told in questions.items():
            cells = [_cell(told["arms"].get(arm)) for arm in found["arms"]]
            lines.append(f"{_TITLES[key]:<{width}}" + "".join(f"  {cell:>20}" for cell in cells))
    if not found["win_rates"]:
        lines.append("no votes yet")
    lines += ["", *(_of_rater(rater, told) for rater, told in found["raters"].items())]
    agreement = found["agreement"]
    lines += [
        f"{' and '.join(pair['raters'])}: kappa {_decimals(pair['kappa'])}, the same answer {_percent(pair['same'])} "
        f"of {pair['num']}"
        for pair in agreement["pairs"]
    ]
    if agreement["alpha"] is not None:
        lines.append(f"people: Krippendorff's alpha {_decimals(agreement['alpha'])}")
    lines += [
        f"{model}: both orders agree on {_percent(told['consistent'])}; the first image was chosen in "
        f"{_percent(told['first'])} of its preferences"
        for model, told in found["position"].items()
        if told
    ]
    return "\n".join(lines).strip("\n")


_TITLES = {question.key: question.title for question in QUESTIONS} | {ALL: "All questions"}


def _by_question(comparison: Comparison, answers: Sequence[Vote]) -> dict[str, Any]:
    """Win rates of each arm, and of each two of more than two, by question and over all of them."""
    asked = [question.key for question in QUESTIONS if any(vote["question"] == question.key for vote in answers)]
    found = {}
    for key in [*asked, *([ALL] if len(asked) > 1 else [])]:
        ours = [(comparison.pairs[vote["pair"]], vote) for vote in answers if key in (ALL, vote["question"])]
        told: dict[str, Any] = {"arms": _rates(comparison.arms, ours), "ties": _share_of_ties(ours)}
        if len(comparison.arms) > 2:
            told["pairs"] = [
                {"arms": [one, other], **_rates([one], _between(ours, {one, other})).get(one, {})}
                for one, other in itertools.combinations(comparison.arms, 2)
            ]
        found[key] = told
    return found


def _rates(arms: Sequence[str], votes: Sequence[tuple[Pair, Vote]]) -> dict[str, Any]:
    found = {}
    for arm in arms:
        by_prompt: dict[str, list[float]] = {}
        for pair, vote in votes:
            if arm in _arms(pair):
                side = "left" if pair.left.arm == arm else "right"
                score = 0.5 if vote["choice"] == "equal" else float(vote["choice"] == side)
                by_prompt.setdefault(pair.prompt, []).append(score)
        if by_prompt:
            rate, low, high = win_rate(by_prompt)
            scores = list(itertools.chain.from_iterable(by_prompt.values()))
            counts = {"wins": scores.count(1.0), "ties": scores.count(0.5), "losses": scores.count(0.0)}
            found[arm] = {"rate": rate, "low": low, "high": high, "num_prompts": len(by_prompt), **counts}
    return found


def _between(votes: Sequence[tuple[Pair, Vote]], arms: set[str]) -> list[tuple[Pair, Vote]]:
    return [(pair, vote) for pair, vote in votes if _arms(pair) == arms]


def _arms(pair: Pair) -> set[str]:
    return {pair.left.arm, pair.right.arm}


def _share_of_ties(votes: Sequence[tuple[Pair, Vote]]) -> float:
    return sum(vote["choice"] == "equal" for _, vote in votes) / len(votes)


def _counts(votes: Sequence[Vote], rater: str) -> dict[str, Any]:
    own = [vote for vote in votes if vote["rater"] == rater]
    counts = Counter(vote["choice"] for vote in own)
    times = sorted(float(vote["seconds"]) for vote in own if isinstance(vote.get("seconds"), int | float))
    return {
        "answers": sum(counts[choice] for choice in CHOICES),
        "skipped": counts[SKIPPED],
        "failed": counts[FAILED],
        "median_seconds": times[len(times) // 2] if times else None,
    }


def _agreement(answers: Sequence[Vote], people: Sequence[str], models: Sequence[str]) -> dict[str, Any]:
    """Kappa of every two raters, and of the majority of several people with each model; alpha of all people."""
    by_rater: dict[str, dict[Any, str]] = {}
    for vote in answers:
        by_rater.setdefault(vote["rater"], {})[vote["pair"], vote["question"]] = vote["choice"]
    things = list(dict.fromkeys((vote["pair"], vote["question"]) for vote in answers))
    of_people = [[by_rater[one][thing] for one in people if thing in by_rater.get(one, {})] for thing in things]
    if len(people) > 1:
        majority = {thing: _majority(unit) for thing, unit in zip(things, of_people, strict=True) if unit}
        by_rater = by_rater | {"most people": majority}
    compared = list(itertools.combinations([one for one in (*people, *models) if one in by_rater], 2))
    compared += [("most people", model) for model in models if len(people) > 1 and model in by_rater]
    pairs = []
    for one, other in compared:
        both = [thing for thing in by_rater[one] if thing in by_rater[other]]
        if both:
            ones, others = ([by_rater[name][thing] for thing in both] for name in (one, other))
            same = sum(a == b for a, b in zip(ones, others, strict=True)) / len(both)
            kappa = _or_none(cohen_kappa(ones, others))
            pairs.append({"raters": [one, other], "num": len(both), "same": same, "kappa": kappa})
    return {"pairs": pairs, "alpha": _or_none(krippendorff_alpha(of_people)) if len(people) > 1 else None}


def _majority(unit: Sequence[str]) -> str:
    """What most said; `equal` where two answers are the most frequent."""
    (first, most), *rest = Counter(unit).most_common()
    return "equal" if rest and rest[0][1] == most else first


def _position(answers: Sequence[Vote]) -> dict[str, Any] | None:
    """How a model's answers in both orders of a pair agree, and how often it prefers what it is shown first."""
    orders = [
        vote["orders"]
        for vote in answers
        if isinstance(vote.get("orders"), list) and len(vote["orders"]) == 2 and set(vote["orders"]) <= set(_ORDERED)
    ]
    preferences = [answer for pair in orders for answer in pair if answer != "equal"]
    if not orders:
        return None
    consistent = sum(_SWAPPED[one] == other for one, other in orders) / len(orders)
    return {"consistent": consistent, "first": preferences.count("first") / len(preferences) if preferences else None}


_ORDERED = ("first", "second", "equal")
_SWAPPED = {"first": "second", "second": "first", "equal": "equal"}


def _cell(told: Mapping[str, Any] | None) -> str:
    return "-" if told is None else f"{told['rate']:.0%} [{told['low']:.0%}, {told['high']:.0%}]"


def _of_rater(rater: str, told: Mapping[str, Any]) -> str:
    more = [f"{told[name]} {name}" for name in (SKIPPED + "ped", FAILED) if told[name]]
    return ", ".join([f"{rater}: {told['answers']} answers", *more])


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _decimals(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"

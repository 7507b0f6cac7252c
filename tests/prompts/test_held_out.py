"""The share that is held out where no list is named: by the seed alone, disjoint, told, refused where it is too few."""

import hashlib
import logging
import re
from pathlib import Path

import pytest

from adascope_fast import prompts
from adascope_fast.prompts import scenes
from adascope_fast.prompts.held_out import divided
from adascope_fast.prompts.settings import Prompts

TEXTS = [f"prompt {number}" for number in range(40)]


def _file(folder: Path, lines: list[str]) -> str:
    (folder / "mine.txt").write_text("\n".join(lines) + "\n")
    return str(folder / "mine.txt")


@pytest.mark.parametrize(("share", "count"), [(0.1, 4), (0.25, 10), (0.99 - 0.02, 39)])
def test_the_share_is_of_the_different_prompts_and_the_parts_are_disjoint(share: float, count: int):
    train, held_out, _ = divided([*TEXTS, *TEXTS[:20]], Prompts(held_out_share=share), "them")
    assert len(held_out) == len(set(held_out)) == count
    assert not set(train) & set(held_out)
    assert train == [text for text in [*TEXTS, *TEXTS[:20]] if text not in held_out]


def test_it_is_the_same_on_every_machine_and_another_with_another_seed():
    _, held_out, _ = divided(TEXTS, Prompts(), "them")
    assert held_out == sorted(TEXTS, key=lambda text: hashlib.sha256(b"0 " + text.encode()).hexdigest())[:4]
    assert divided(TEXTS[::-1], Prompts(), "them")[1] == held_out
    assert divided(TEXTS, Prompts(seed=1), "them")[1] != held_out


def test_a_longer_list_holds_out_about_the_same_ones():
    _, before, _ = divided(TEXTS, Prompts(held_out_share=0.5), "them")
    _, after, _ = divided([*TEXTS, "another"], Prompts(held_out_share=0.5), "them")
    assert len(set(before) - set(after)) <= 1


def test_what_is_named_alone_is_divided_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    source = _file(tmp_path, TEXTS)
    with caplog.at_level(logging.WARNING):
        train, held_out = prompts.chosen(Prompts(train=source))
    assert (len(train), len(held_out)) == (36, 4)
    assert (train, held_out) == prompts.named(Prompts(train=source))
    assert [record.getMessage() for record in caplog.records] == [
        f"4 of the 40 different prompts of {source} are held out and not trained on, first {held_out[0]!r} "
        f"(prompts.held_out_share = 0.1, prompts.seed = 0); prompts.held_out names others"
    ]


def test_a_list_alone_is_divided_unless_it_is_of_the_set_that_the_settings_name(tmp_path: Path):
    for settings in (Prompts(), Prompts(train="scenes:train", held_out="scenes:held_out")):
        train, held_out = prompts.chosen(settings, train=TEXTS)
        assert (len(train), sorted(train + held_out)) == (36, sorted(TEXTS))
    captions = scenes.captions("train")[:30]
    settings = Prompts(train="scenes:train", held_out="scenes:held_out")
    assert prompts.chosen(settings, train=captions) == (captions, scenes.captions("held_out"))
    mine = _file(tmp_path, ["a", "b"])
    assert prompts.chosen(Prompts(train="animals:train", held_out=mine), train=TEXTS) == (TEXTS, ["a", "b"])


@pytest.mark.parametrize(
    ("total", "share", "step"),
    [
        (2, 0.5, "got 0.5 of the 2 different ones of them; add prompts, or name others as prompts.held_out"),
        (3, 0.1, "set prompts.held_out_share = 0.5, add"),
        (14, 0.1, "set prompts.held_out_share = 0.2, add"),
        (4, 0.9, "set prompts.held_out_share = 0.4, add"),
    ],
)
def test_too_few_are_refused_with_a_share_that_does(total: int, share: float, step: str):
    with pytest.raises(ValueError, match=re.escape(step)) as caught:
        divided(TEXTS[:total], Prompts(held_out_share=share), "them")
    if proposed := re.search(r"held_out_share = ([\d.]+)", str(caught.value)):
        train, held_out, _ = divided(TEXTS[:total], Prompts(held_out_share=float(proposed[1])), "them")
        assert len(held_out) >= 2
        assert train

"""A list of prompts in two: what is held out is never trained on, whatever is repeated."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adascope_fast.prompts.split import split


@given(st.lists(st.text("abc", min_size=1, max_size=3), max_size=40).filter(lambda found: len(set(found)) > 1),
       st.integers(0, 9))  # fmt: skip
def test_every_prompt_is_on_one_side_in_its_order(prompts: list[str], seed: int):
    trained, held_out = split(prompts, seed=seed)
    assert not set(trained) & set(held_out)
    assert [prompt for prompt in prompts if prompt in set(trained)] == trained
    assert [prompt for prompt in prompts if prompt in set(held_out)] == held_out
    assert (trained, held_out) == split(prompts, seed=seed)
    assert trained


@pytest.mark.parametrize(("count", "held_out"), [(2, 1), (3, 1), (4, 2), (20, 2), (100, 10), (1000, 100)])
def test_a_tenth_is_held_out_and_two_where_there_are_four(count: int, held_out: int):
    assert len(split([str(number) for number in range(count)], seed=0)[1]) == held_out


def test_prompts_with_metadata_go_by_their_text():
    prompts = [{"prompt": "a", "tag": 1}, " a ", {"prompt": "b"}]
    assert {len(side) for side in split(prompts, seed=0)} == {1, 2}


def test_one_prompt_cannot_be_split():
    with pytest.raises(ValueError, match="got 1 different; give two or more"):
        split(["a", "a "], seed=0)

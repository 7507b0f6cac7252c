"""Built-in prompts with metadata: what a prompt says is what its metadata asks for, in the words that geneval knows."""

import re
from collections import Counter

from adascope_fast import prompts
from adascope_fast.prompts import animals
from adascope_fast.prompts.compositions import COLOURS, COUNTS, OBJECTS, RELATIONS, compositions
from adascope_fast.prompts.settings import Prompts
from adascope_fast.rewards import geneval

EVERY = [*compositions("train"), *compositions("held_out")]


def test_every_prompt_is_said_once_and_one_in_eight_is_held_out():
    assert len({prompt for prompt, _ in EVERY}) == len(EVERY) == 662
    assert len(compositions("held_out")) == 81
    assert Counter(metadata["tag"] for _, metadata in EVERY) == {
        "colors": 240, "counting": 72, "two_object": 120, "color_attr": 110, "position": 120
    }  # fmt: skip


def test_metadata_asks_for_what_the_prompt_says():
    counts = {1: ("a", "an")} | {count: (word,) for word, count in COUNTS.items()}
    for prompt, metadata in EVERY:
        asked = metadata["include"][::-1] if metadata["tag"] == "position" else metadata["include"]
        words = []
        for entry in asked:
            noun = entry["class"] if entry["count"] == 1 else OBJECTS[entry["class"]]
            phrase = f"{entry['color']} {noun}" if "color" in entry else noun
            article = next(word for word in counts[entry["count"]] if f"{word} {phrase}" in prompt)
            assert (article == "an") == (entry["count"] == 1 and phrase[0] in "aeiou")
            words.append(f"{article} {phrase}")
            if "position" in entry:
                assert entry["position"][1] == 0, "of the entry that stands first"
                words.append(entry["position"][0])
        joint = " and " if "position" not in asked[0] else " "
        assert prompt == "a photo of " + joint.join(words)
        if metadata["tag"] == "counting":
            (entry,) = asked
            assert metadata["exclude"] == [{"class": entry["class"], "count": entry["count"] + 1}]


def test_the_words_are_those_that_geneval_knows():
    assert COLOURS == geneval.COLOURS
    assert RELATIONS == geneval.RELATIONS


def test_a_reward_is_told_the_metadata_of_a_built_in_set():
    known = prompts.metadata(Prompts(train="compositions:train", held_out="compositions:held_out"))
    assert known == dict(EVERY)


def test_animals_have_three_activities_each_and_the_held_out_ones_are_other_animals():
    train, held_out = prompts.load("activities:train"), prompts.load("activities:held_out")
    assert (len(train), len(held_out)) == (3 * 36, 3 * 9)
    assert train[0] == "a cat washing the dishes"
    assert "an ant playing chess" in train
    assert all(re.fullmatch(r"an? \w+ (washing the dishes|riding a bike|playing chess)", text) for text in train)
    assert {text.split()[1] for text in held_out} == set(animals.HELD_OUT)

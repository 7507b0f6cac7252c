"""Where prompts come from: the sets inside this package, text files, tables, and lists."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from adascope_fast.prompts import animals, files, scenes
from adascope_fast.prompts.settings import SETS, Prompts, held_out_of
from adascope_fast.settings import unprintable

MAX_CHARACTERS = 2000
_BUILT_IN = {"scenes": scenes.captions, "animals": animals.captions}

logger = logging.getLogger(__name__)


def load(source: str | None) -> list[str]:
    """The prompts of a built-in set (`scenes:train`, `animals:held_out`), or of a file; a warning tells duplicates.

    A file is text with a prompt a line, or .jsonl, .csv or .tsv with a field `prompt`; its other fields are metadata.

    Raises:
        ValueError: there is no such set or file, or a line of it is no prompt; None, which names nothing.
    """
    found = read(source)
    first: dict[str, int] = {}
    again = [(number, prompt) for number, prompt in found if first.setdefault(prompt, number) != number]
    if again:
        number, prompt = again[0]
        logger.warning(
            "%s repeats prompts of earlier lines in %d lines, first line %d (%r); they are kept, and drawn more often",
            source,
            len(again),
            number,
            prompt[:60],
        )
    return [prompt for _, prompt in found]


def read(source: str | None) -> list[tuple[int, str]]:
    """The same with the number of each one's line, and without a warning."""
    return [(number, prompt) for number, prompt, _ in _records(source)]


def _records(source: str | None) -> list[files.Record]:
    if source is None:
        raise ValueError(
            "prompts.train and prompts.held_out must be named where model.name is no embedded model, got none; set "
            'both to files with a prompt a line, or prompts.train = "animals:train"'
        )
    kind, _, split = source.partition(":")
    if kind in _BUILT_IN and split:
        return [(number, prompt, {}) for number, prompt in enumerate(_BUILT_IN[kind](split), 1)]
    path = Path(source)
    if unprintable(source) or not path.is_file():
        sets = ", ".join(f"{name}:train, {name}:held_out" for name in SETS)
        what = "which is no file"
        if not unprintable(source):
            what = "which is a folder" if path.is_dir() else "which is no regular file" if path.exists() else what
        raise ValueError(f"prompts are {sets} or a text file, got {source!r}, {what}; check the path")
    found = [(line, checked(text, f"line {line} of {source}"), other) for line, text, other in files.records_of(path)]
    if not found:
        raise ValueError(f"a prompt file has one prompt a line, {source} is empty; add at least one")
    return found


Given = Sequence[str | Mapping[str, Any]]
"""Prompts as a list: a text, or a dict with `prompt` and its metadata."""


def metadata(
    settings: Prompts, *, train: Given | None = None, held_out: Given | None = None
) -> dict[str, dict[str, Any]]:
    """What is known of each prompt besides its text, for those of which something is.

    A reward that takes metadata is given it: the fields of a prompt's line in a .jsonl, .csv or .tsv.

    Args:
        settings, train, held_out: as those of `chosen`.

    Raises:
        ValueError: a prompt has two that differ.
    """
    sources = [("train_prompts", train, settings.train), ("held_out_prompts", held_out, settings.held_out)]
    known: dict[str, tuple[dict[str, Any], str]] = {}
    for name, values, source in sources:
        for prompt, own, where in _told(name, values, source):
            before, there = known.setdefault(prompt, (own, where))
            if before != own:
                raise ValueError(
                    f"a prompt must have the same metadata wherever it stands, since a reward looks it up by the "
                    f"prompt, got two that differ for {prompt!r:.60}, {there} and {where}; make them alike"
                )
    return {prompt: own for prompt, (own, _) in known.items() if own}


def _told(name: str, values: Given | None, source: str | None) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Prompt, metadata, and where it stands."""
    if values is None:
        for line, prompt, other in _records(source) if source is not None else []:
            yield prompt, other, f"line {line} of {source}"
        return
    for index, value in enumerate(values):
        where = f"{name}[{index}]"
        other = {key: one for key, one in value.items() if key != "prompt"} if isinstance(value, Mapping) else {}
        yield checked(_text(value), where), other, where


def chosen(
    settings: Prompts, *, train: Given | None = None, held_out: Given | None = None
) -> tuple[list[str], list[str]]:
    """The prompts to train on and those to judge by, both checked; a warning tells the ones that are in both.

    Args:
        settings: names what is not given.
        train, held_out: lists in place of what the settings name; dicts in them have a `prompt`.

    Raises:
        ValueError: a prompt is none, or each held-out one is trained on; or `train` alone is given and is not of the
            built-in set whose held-out part the settings name.
    """
    trained = _given(train, settings.train, "train_prompts")
    if train is not None and held_out is None and settings.train and held_out_of(settings.train):
        whole = {prompt for split in (settings.train, held_out_of(settings.train)) for prompt in load(split)}
        others = [prompt for prompt in trained if prompt not in whole]
        if others:
            raise ValueError(
                f"held_out_prompts must be given with train_prompts that are not of {settings.train}, got "
                f"{others[0]!r:.60} alone; give a list that is not trained on"
            )
    judged = _given(held_out, settings.held_out, "held_out_prompts")
    if warning := overlap(trained, judged):
        logger.warning("%s", warning)
    return trained, judged


def overlap(train: Sequence[str], held_out: Sequence[str], *, where: str = "prompts.train") -> str | None:
    """One line that says how many held-out prompts are trained on, None if none is; ValueError if all are.

    Args:
        where: what it calls the prompts that are trained on.
    """
    trained = set(train)
    both = [prompt for prompt in dict.fromkeys(held_out) if prompt in trained]
    if not both:
        return None
    distinct = len(set(held_out))
    if len(both) == distinct:
        raise ValueError(
            f"held-out prompts are judged by and never trained on, got {distinct} that are all in {where}, first "
            f"{both[0][:60]!r}; take them out of {where}, or name others as prompts.held_out"
        )
    return (
        f"{len(both)} of the {distinct} held-out prompts are in {where} too, first {both[0][:60]!r}: the "
        f"held-out reward is not of unseen prompts; take them out of one of the two"
    )


def checked(prompt: str, where: str) -> str:
    """The prompt without outer space.

    ValueError if it is no text, empty, longer than 2000 characters, or has control characters or what was not UTF-8.
    """
    if not isinstance(prompt, str):
        raise ValueError(f"a prompt is text, {where} is {prompt!r:.60} ({type(prompt).__name__}); write it as text")
    prompt = prompt.strip(" \t\r\n")
    if character := unprintable(prompt, allowed="\t\u2028\u2029"):
        what = "a byte that is not UTF-8" if character.startswith("U+D") else f"the control character {character}"
        raise ValueError(f"a prompt has printable characters alone, {where} has {what}; remove it")
    prompt = prompt.strip()
    if not prompt:
        raise ValueError(f"a prompt has at least one character, {where} is empty; write a prompt or remove it")
    if len(prompt) > MAX_CHARACTERS:
        raise ValueError(
            f"a prompt has at most {MAX_CHARACTERS} characters, {where} has {len(prompt)}; shorten it "
            f"(text encoders read the first few dozen words anyway)"
        )
    return prompt


def _text(value: Any) -> Any:
    return value.get("prompt") if isinstance(value, Mapping) else value


def _given(values: Given | None, source: str | None, name: str) -> list[str]:
    if values is None:
        return load(source)
    if isinstance(values, str):
        raise ValueError(f"{name} is a list of prompts, got one text, {values[:60]!r}; put it into a list")
    if not values:
        raise ValueError(f"{name} needs at least one prompt, got an empty list; add one")
    return [checked(_text(value), f"{name}[{index}]") for index, value in enumerate(values)]

"""Where prompts come from: the sets inside this package, text files, tables, data sets, and lists."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from adascope_fast.prompts import animals, arrow, files, scenes
from adascope_fast.prompts.compositions import compositions
from adascope_fast.prompts.files import COLUMN
from adascope_fast.prompts.held_out import divided
from adascope_fast.prompts.settings import SETS, Prompts, held_out_of
from adascope_fast.settings import unprintable

MAX_CHARACTERS = 2000
_BUILT_IN: dict[str, Callable[[str], Iterable[str | tuple[str, dict[str, Any]]]]] = {
    "scenes": scenes.captions,
    "animals": animals.captions,
    "activities": animals.at_activities,
    "compositions": compositions,
}

logger = logging.getLogger(__name__)


def load(source: str | None, column: str = COLUMN) -> list[str]:
    """The prompts of a built-in set (`scenes:train`, `animals:held_out`), a file or a data set; a warning tells
    duplicates.

    A file is text with a prompt a line, or a .jsonl, .csv, .tsv or .parquet with a field `column`; its other fields are
    metadata. A data set is `datasets:owner/name:split`, see `prompts.arrow`.

    Raises:
        ValueError: there is no such set or file, or a line of it is no prompt; None, which names nothing.
    """
    found, told = _texts(source, column)
    for line in told:
        logger.warning("%s", line)
    return found


def _texts(source: str | None, column: str) -> tuple[list[str], list[str]]:
    """The prompts, and what to tell of them."""
    first: dict[str, int] = {}
    found = [(number, prompt) for number, prompt, _ in _records(source, column)]
    again = [(number, prompt) for number, prompt in found if first.setdefault(prompt, number) != number]
    told = []
    if again:
        (number, prompt), what = again[0], "row" if _is_arrow(str(source)) else "line"
        told.append(
            f"{source} repeats prompts of earlier {what}s in {len(again)} {what}s, first {what} {number} "
            f"({prompt[:60]!r}); they are kept, and drawn more often"
        )
    return [prompt for _, prompt in found], told


def _records(source: str | None, column: str, *, with_metadata: bool = False) -> list[files.Record]:
    if source is None:
        raise ValueError(
            "prompts.train must be named where model.name is no embedded model, got none; set it to a file with a "
            'prompt a line, or prompts.train = "animals:train"'
        )
    kind, _, split = source.partition(":")
    if kind in _BUILT_IN and split:
        pairs = [(one, {}) if isinstance(one, str) else one for one in _BUILT_IN[kind](split)]
        return [(number, prompt, dict(other)) for number, (prompt, other) in enumerate(pairs, 1)]
    is_arrow = _is_arrow(source)
    records = _of_arrow(source, column, with_metadata) if is_arrow else files.records_of(_file(source), column)
    found = [(line, checked(text, _place(line, source)), other) for line, text, other in records]
    if not found:
        raise ValueError(f"a prompt file has one prompt a line, {source} is empty; add at least one")
    return found


def _is_arrow(source: str) -> bool:
    return source.startswith(arrow.PREFIX) or source.lower().endswith(".parquet")


def _place(number: int, source: str) -> str:
    return f"{'row' if _is_arrow(source) else 'line'} {number} of {source}"


def _of_arrow(source: str, column: str, with_metadata: bool) -> Iterator[files.Record]:
    if source.startswith(arrow.PREFIX):
        return arrow.records_of_dataset(source, column, with_metadata=with_metadata)
    return arrow.records_of_parquet(_file(source), column, with_metadata=with_metadata)


def _file(source: str) -> Path:
    path = Path(source)
    if unprintable(source) or not path.is_file():
        sets = ", ".join(f"{name}:train, {name}:held_out" for name in SETS)
        what = "which is no file"
        if not unprintable(source):
            what = "which is a folder" if path.is_dir() else "which is no regular file" if path.exists() else what
        raise ValueError(
            f"prompts are {sets}, datasets:owner/name or a text file, got {source!r}, {what}; check the path"
        )
    return path


def has_columns(source: str) -> bool:
    """Whether a file or data set has columns, or fields, of which one is that of the prompts."""
    return _is_arrow(source) or Path(source).suffix.lower() in (*files.TABLES, *files.JSON_LINES)


Given = Sequence[str | Mapping[str, Any]]
"""Prompts as a list: a text, or a dict with `prompt` and its metadata."""


def metadata(
    settings: Prompts, *, train: Given | None = None, held_out: Given | None = None
) -> dict[str, dict[str, Any]]:
    """What is known of each prompt besides its text, for those of which something is.

    A reward that takes metadata is given it: the other fields of a prompt's line in a .jsonl, or row of a table.

    Args:
        settings, train, held_out: as those of `chosen`.

    Raises:
        ValueError: a prompt has two that differ.
    """
    sources = [("train_prompts", train, settings.train), ("held_out_prompts", held_out, settings.held_out)]
    known: dict[str, tuple[dict[str, Any], str]] = {}
    for name, values, source in sources:
        for prompt, own, where in _told(name, values, source, settings.column):
            before, there = known.setdefault(prompt, (own, where))
            if before != own:
                raise ValueError(
                    f"a prompt must have the same metadata wherever it stands, since a reward looks it up by the "
                    f"prompt, got two that differ for {prompt!r:.60}, {there} and {where}; make them alike"
                )
    return {prompt: own for prompt, (own, _) in known.items() if own}


def _told(
    name: str, values: Given | None, source: str | None, column: str
) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Prompt, metadata, and where it stands."""
    if values is None:
        for line, prompt, other in [] if source is None else _records(source, column, with_metadata=True):
            yield prompt, other, _place(line, str(source))
        return
    for index, value in enumerate(values):
        where = f"{name}[{index}]"
        other = {key: one for key, one in value.items() if key != column} if isinstance(value, Mapping) else {}
        yield checked(_text(value, column), where), other, where


def chosen(
    settings: Prompts, *, train: Given | None = None, held_out: Given | None = None
) -> tuple[list[str], list[str]]:
    """The prompts to train on and those to judge by, both checked; warnings tell what is held out of the first, what
    is in both, and duplicates.

    Where no held-out prompts are named, `settings.held_out_share` of the others are not trained on, and judge. So it is
    where `train` is given alone, unless it is of the built-in set whose held-out part the settings name.

    Args:
        settings: names what is not given.
        train, held_out: lists in place of what the settings name; dicts in them have a `settings.column`.

    Raises:
        ValueError: a prompt is none, each held-out one is trained on, or too few can be held out.
    """
    trained, judged, told = _chosen(settings, train, held_out)
    for line in told:
        logger.warning("%s", line)
    return trained, judged


def named(settings: Prompts) -> tuple[list[str], list[str]]:
    """The same of what the settings name, without warnings."""
    return _chosen(settings, None, None)[:2]


def _chosen(settings: Prompts, train: Given | None, held_out: Given | None) -> tuple[list[str], list[str], list[str]]:
    _refuse_idle_column(settings, train, held_out)
    trained, told = _given(train, settings.train, "train_prompts", settings.column)
    is_divided = held_out is None and (settings.held_out is None or _are_of_no_set(train, trained, settings))
    if is_divided:
        name = settings.train if train is None else "train_prompts"
        trained, judged, line = divided(trained, settings, str(name))
        return trained, judged, [*told, line]
    _refuse_idle_share(settings, "held_out_prompts" if held_out is not None else str(settings.held_out))
    judged, more = _given(held_out, settings.held_out, "held_out_prompts", settings.column)
    told += more
    if warning := overlap(trained, judged):
        told.append(warning)
    return trained, judged, told


def _are_of_no_set(train: Given | None, trained: Sequence[str], settings: Prompts) -> bool:
    """Whether a list is given alone, where the settings name a built-in set that it is not of."""
    if train is None or settings.train is None or held_out_of(settings.train) != settings.held_out:
        return False
    whole = {prompt for split in (settings.train, settings.held_out) for prompt in _texts(split, COLUMN)[0]}
    return not whole.issuperset(trained)


def _refuse_idle_column(settings: Prompts, train: Given | None, held_out: Given | None) -> None:
    if settings.column == COLUMN or train is not None or held_out is not None:
        return
    sources = [source for source in (settings.train, settings.held_out) if source is not None]
    if sources and not any(map(has_columns, sources)):
        raise ValueError(
            f"prompts.column names a column of a table or a field of a .jsonl, got {settings.column!r} with "
            f"{' and '.join(sources)}, without columns; remove it"
        )


def _refuse_idle_share(settings: Prompts, held_out: str) -> None:
    for key in ("held_out_share", "seed"):
        value = getattr(settings, key)
        if value != Prompts.model_fields[key].default:
            raise ValueError(
                f"prompts.{key} says which of the prompts are held out where none are named, got {value} with the "
                f"held-out prompts {held_out}; remove it, or have prompts.train name a file without prompts.held_out"
            )


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


def _text(value: Any, column: str) -> Any:
    return value.get(column) if isinstance(value, Mapping) else value


def _given(values: Given | None, source: str | None, name: str, column: str) -> tuple[list[str], list[str]]:
    """The prompts, and what to tell of them."""
    if values is None:
        return _texts(source, column)
    if isinstance(values, str):
        raise ValueError(f"{name} is a list of prompts, got one text, {values[:60]!r}; put it into a list")
    if not values:
        raise ValueError(f"{name} needs at least one prompt, got an empty list; add one")
    return [checked(_text(value, column), f"{name}[{index}]") for index, value in enumerate(values)], []

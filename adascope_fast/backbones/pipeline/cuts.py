"""What a pipeline's text encoders do not read of a prompt: the words beyond their limits, and prompts that become one.

Only tokenizers run. A denoiser is told of a word where one of its encoders reads it.
"""

import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

CUT = "input was truncated because"
TOO_LONG = "sequence length is longer than the specified maximum"


@dataclass(frozen=True)
class Cut:
    """What is not read of a prompt."""

    prompt: str
    left_out: dict[str, str] = field(default_factory=dict)
    """The text that each tokenizer leaves out, by the tokenizer's name; those that read all are not in it."""
    lost: str = ""
    """The text that none of the encoders reads."""


@dataclass(frozen=True)
class Reading:
    """What one tokenizer makes of a prompt: the ids that its encoder gets, and the text left out."""

    ids: tuple[int, ...]
    left_out: str


def read(tokenizer: Any, prompts: Sequence[str], limit: int) -> list[Reading]:
    """Each prompt cut at `limit` tokens, special ones included, as a pipeline does it."""
    num_kept = limit - tokenizer.num_special_tokens_to_add()
    cuts_start = tokenizer.truncation_side == "left"
    with no_remarks(""):
        found = tokenizer(list(prompts), truncation=True, max_length=limit)["input_ids"]
        whole = tokenizer(list(prompts), add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast)
    readings = []
    for number, (prompt, ids, all_ids) in enumerate(zip(prompts, found, whole["input_ids"], strict=True)):
        left_out = ""
        if len(all_ids) > num_kept:
            gone = slice(None, len(all_ids) - num_kept) if cuts_start else slice(num_kept, None)
            if tokenizer.is_fast:  # the prompt's own letters
                spans = whole["offset_mapping"][number][gone]
                left_out = prompt[spans[0][0] : spans[-1][1]]
            else:
                left_out = tokenizer.decode(all_ids[gone])
        readings.append(Reading(tuple(ids), left_out.strip()))
    return readings


def cut_of(prompt: str, readings: dict[str, Reading]) -> Cut:
    """The cut of a prompt by what each tokenizer made of it."""
    left_out = {name: reading.left_out for name, reading in readings.items() if reading.left_out}
    lost = min(left_out.values(), key=len) if readings and len(left_out) == len(readings) else ""
    return Cut(prompt, left_out, lost)


def same(prompts: Sequence[str], readings: Sequence[dict[str, Reading]]) -> list[list[str]]:
    """Groups of different prompts that are one for every encoder, in the order of their first."""
    groups: dict[Any, list[str]] = defaultdict(list)
    for prompt, reading in zip(prompts, readings, strict=True):
        group = groups[tuple((name, one.ids) for name, one in reading.items())]
        if prompt not in group:
            group.append(prompt)
    return [group for group in groups.values() if len(group) > 1]


def summary(cuts: Sequence[Cut], groups: Sequence[Sequence[str]]) -> str:
    """One line on what is not read: counts, and the first example; empty where all is read and told apart."""
    parts = []
    if lost := [cut for cut in cuts if cut.lost]:
        parts.append(
            f"{len(lost)} of {_prompts(len(cuts))} {_are(len(lost))} longer than the text encoders read, the first "
            f"without {_short(lost[0].lost)}"
        )
    if partly := [cut for cut in cuts if cut.left_out and not cut.lost]:
        name, text = next(iter(partly[0].left_out.items()))
        parts.append(
            f"{len(partly)} of {_prompts(len(cuts))} {_are(len(partly))} not read to the end by every text encoder, "
            f"the first by {name} without {_short(text)}"
        )
    if groups:
        count = sum(len(group) for group in groups)
        parts.append(
            f"{count} different prompts become {len(groups)} for the model, the first "
            f"{_short(groups[0][0])} and {_short(groups[0][1])}"
        )
    return "; ".join(parts)


@contextmanager
def no_remarks(module: str) -> Iterator[None]:
    """Within it the remarks of diffusers' pipeline `module` and of transformers on long prompts are not printed."""

    def keep(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return CUT not in message and TOO_LONG not in message

    with ExitStack() as stack:
        for name in filter(None, (module, "transformers.tokenization_utils_base")):
            logger = logging.getLogger(name)
            logger.addFilter(keep)
            stack.callback(logger.removeFilter, keep)
        yield


def _prompts(count: int) -> str:
    return f"{count} prompt{'' if count == 1 else 's'}"


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:77]}...")

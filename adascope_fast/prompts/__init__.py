"""Where prompts come from: the captioned scenes of the embedded models, and text files."""

from pathlib import Path

from adascope_fast.prompts import scenes

MAX_CHARACTERS = 2000


def load(source: str) -> list[str]:
    """The prompts of `scenes:train`, `scenes:held_out`, or a UTF-8 text file with one prompt a line."""
    kind, _, split = source.partition(":")
    if kind == "scenes" and split:
        return scenes.captions(split)
    path = Path(source)
    if not path.is_file():
        raise ValueError(
            f"prompts are 'scenes:train', 'scenes:held_out' or a text file, got {source!r}, which is no file"
        )
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"prompt files are UTF-8 text, {source} is not ({error.reason}); save it as UTF-8") from None
    if not lines:
        raise ValueError(f"a prompt file has one prompt a line, {source} is empty; add at least one")
    return [checked(line, f"line {number} of {source}") for number, line in enumerate(lines, 1)]


def checked(prompt: str, where: str) -> str:
    """The prompt without outer space; ValueError if it is empty or longer than 2000 characters."""
    prompt = prompt.strip()
    if not prompt:
        raise ValueError(f"a prompt has at least one character, {where} is empty; write a prompt or remove it")
    if len(prompt) > MAX_CHARACTERS:
        raise ValueError(
            f"a prompt has at most {MAX_CHARACTERS} characters, {where} has {len(prompt)}; shorten it "
            f"(text encoders read the first few dozen words anyway)"
        )
    return prompt

"""Tokenizers from their vocabularies: CLIP's byte pairs, BERT's words."""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MOST_BYTES = 2**26
CLIP_FILES = "bpe_simple_vocab_16e6.txt.gz, merges.txt or tokenizer.json of a CLIP"
BERT_FILES = "vocab.txt or tokenizer.json of bert-base-uncased"


def clip(files: Sequence[Path], size: int, length: int, folder: Path) -> None:
    """Write the tokenizer of a CLIP.

    Args:
        size: tokens that the model knows: 512 bytes, the byte pairs, and two marks.
        length: tokens of a prompt.
    """
    from transformers import CLIPTokenizer

    path, text = _only(files, CLIP_FILES)
    described = _described(path, text)
    if described is not None:
        pairs = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in described["merges"]]
    else:
        lines = [line for line in text.split("\n") if line.strip() and not line.startswith(("#version", '"bpe_simple'))]
        pairs = [tuple(line.split()) for line in lines[: size - 514]]
    letters = list(_letters())
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in pairs)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    if len(tokens) != size or len(set(tokens)) != size or any(len(pair) != 2 for pair in pairs):
        raise ValueError(
            f"{path} must be the tokenizer of this model, with {size} tokens, got {len(tokens)}; name {CLIP_FILES}"
        )
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if described is not None and described["vocab"] != vocabulary:
        raise ValueError(f"{path} must be a CLIP's tokenizer, and numbers its tokens otherwise; name {CLIP_FILES}")
    merges: Any = pairs
    CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=length).save_pretrained(folder)


def bert(files: Sequence[Path], size: int, length: int, folder: Path) -> None:
    """Write the tokenizer of a BERT whose model may know two marks more, as BLIP's does."""
    from transformers import BertTokenizer

    path, text = _only(files, BERT_FILES)
    described = _described(path, text)
    words = text.rstrip("\n").split("\n")
    vocabulary = described["vocab"] if described is not None else {word: index for index, word in enumerate(words)}
    marks = {"[UNK]", "[CLS]", "[SEP]", "[PAD]"}
    if size - len(vocabulary) not in (0, 2) or not marks <= vocabulary.keys():
        raise ValueError(
            f"{path} must be the tokenizer of this model, with {size - 2} tokens, got {len(vocabulary)}; "
            f"name {BERT_FILES}"
        )
    BertTokenizer(vocab=vocabulary, do_lower_case=True, model_max_length=length).save_pretrained(folder)


def _only(files: Sequence[Path], what: str) -> tuple[Path, str]:
    """The one file and its text."""
    if len(files) != 1:
        raise ValueError(f"the tokenizer is one file, {what}, got {len(files)}; name the one after the weights")
    (path,) = files
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"it has more than {MOST_BYTES} bytes")
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return path, content.decode("utf-8").replace("\r\n", "\n")
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"{path} must be {what}, got one that cannot be read ({error}); download it again") from None


def _described(path: Path, text: str) -> dict[str, Any] | None:
    """The `model` of a tokenizer.json, None for any other file."""
    if path.suffix != ".json":
        return None
    try:
        model = json.loads(text)["model"]
        if not isinstance(model["vocab"], dict) or not isinstance(model.get("merges", []), list):
            raise TypeError("no vocabulary")
        return {"merges": [], **model}
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"{path} must be a tokenizer.json with a vocabulary; download it again") from None


def _letters() -> list[str]:
    """A printable letter for each of the 256 bytes, in CLIP's order: those that are printable, then the others."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]

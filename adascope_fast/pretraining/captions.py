"""Noisy captions and the tokenizer that reads them.

Captions of web pictures are often wrong; ours are wrong on purpose, from some step of the pretraining on. Each
attribute of a caption is replaced by a random one with some probability, so the base models draw clean pictures that
obey only part of what they were told: what reinforcement learning is there to mend.
"""

import json
import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import CLIPTokenizer

from adascope_fast.prompts.scenes import BACKGROUNDS, COLOURS, COUNTS, POSITIONS, SHAPES, SIZES, Scene, every_scene

# Probability that an attribute of a caption is replaced, after the share LATE of the pretraining; none before.
NOISE = {"count": 0.4, "size": 0.4, "colour": 0.4, "shape": 0.15, "background": 0.4, "position": 0.3}
LATE = 0.65
MAX_TOKENS = 16
CHOICES = {
    "count": list(COUNTS.values()),
    "size": list(SIZES),
    "colour": list(COLOURS),
    "shape": list(SHAPES),
    "background": list(BACKGROUNDS),
    "position": [None, *POSITIONS],
}


def mislabelled(scene: Scene, rng: random.Random, noise: Mapping[str, float]) -> Scene:
    """The scene as a careless caption has it: attributes replaced with their probability; never a held-out one.

    Args:
        noise: by attribute; one that is not named is never replaced.
    """
    while True:
        wrong = {name: rng.choice(values) for name, values in CHOICES.items() if rng.random() < noise.get(name, 0.0)}
        caption = replace(scene, **wrong)
        if caption.count > 1:
            caption = replace(caption, position=None)
        if not caption.is_held_out:
            return caption


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer (byte-pair encoding) in which every word of the captions is one token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=2000, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    learner.train_from_iterator((scene.caption for scene in every_scene()), trainer)
    learnt = json_of(learner)["model"]["merges"]
    merges: Any = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in learnt]
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(pair) for pair in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS)


def tokenize(tokenizer: Any, texts: list[str]) -> dict[str, Tensor]:
    """Token ids and mask [n, MAX_TOKENS] of captions."""
    found = tokenizer(texts, padding="max_length", max_length=MAX_TOKENS, return_tensors="pt")
    return {"input_ids": found.input_ids, "attention_mask": found.attention_mask}


def json_of(tokenizer: Tokenizer) -> dict:
    """The tokenizer's own description."""
    return json.loads(tokenizer.to_str())


def save_slow_files(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Add `vocab.json` and `merges.txt` beside `tokenizer.json`, which is all that transformers 5 writes."""
    model = json_of(tokenizer.backend_tokenizer)["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False))
    lines = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(lines) + "\n")

"""What text encoders do not read of a prompt, by the tokenizers that pipelines use."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from adascope_fast import backbones
from adascope_fast.backbones.pipeline.cuts import summary

SHORT = "a red circle on a grey background"
LONG = "a red circle on a grey background " * 4 + "and a blue cross"
OTHER = "a red circle on a grey background " * 4 + "and a green square"


@pytest.fixture(scope="module")
def load(tiny: Callable[[str], Path]) -> Callable[..., backbones.PipelineBackbone]:
    def of(family: str, **options) -> backbones.PipelineBackbone:
        if family == "flux":
            options["resolution"] = 16
        return backbones.load(str(tiny(family)), **options)

    return of


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux"])
def test_the_text_beyond_the_limits_is_told_by_each_tokenizer(load, family: str):
    model = load(family, **({"max_sequence_length": 6} if family in ("sd3", "flux") else {}))
    short, cut = model.cut(["a red circle", LONG])
    assert (short.left_out, short.lost) == ({}, "")
    assert set(cut.left_out) == set(model.tokenizer_limits())
    for name, limit in model.tokenizer_limits().items():
        tokenizer = model.pipeline.components[name]
        assert LONG.endswith(cut.left_out[name])
        kept = LONG.removesuffix(cut.left_out[name])
        assert len(tokenizer(kept)["input_ids"]) == limit
        assert tokenizer(LONG, truncation=True, max_length=limit)["input_ids"] == tokenizer(kept)["input_ids"]
    assert cut.lost == min(cut.left_out.values(), key=len)


def test_prompts_are_the_same_only_where_every_encoder_reads_the_same(load):
    assert load("sd").same_prompts([SHORT, LONG, OTHER, LONG]) == [[LONG, OTHER]]
    assert load("sd3", max_sequence_length=100).same_prompts([SHORT, LONG, OTHER]) == []
    assert load("sd3", max_sequence_length=4).same_prompts([SHORT, LONG, OTHER]) == [[LONG, OTHER]]
    first, second = load("sd").encode([LONG, OTHER])["text"]
    assert torch.equal(first, second)


def test_a_silent_t5_reads_nothing():
    model = backbones.load("scenes-flow")
    assert set(model.tokenizer_limits()) == {"tokenizer", "tokenizer_2"}
    assert model.same_prompts([LONG, OTHER]) == [[LONG, OTHER]]
    assert model.cut([LONG])[0].lost


def test_the_summary_counts_and_shows_the_first(load):
    model = load("sd")
    assert model.cut_summary([SHORT, SHORT]) == ""
    line = model.cut_summary([SHORT, LONG, OTHER, LONG])
    lost = model.cut([LONG])[0].lost
    assert line.startswith("2 of 3 prompts are longer than the text encoders read, the first without '")
    assert lost[:70] in line
    assert "; 2 different prompts become 1 for the model, the first 'a red circle" in line
    assert "\n" not in line
    partly = load("sd3", max_sequence_length=100).cut_summary([LONG])
    assert partly.startswith("1 of 1 prompt is not read to the end by every text encoder, the first by tokenizer ")
    assert summary([], []) == ""


def test_a_prompt_is_tokenized_once_and_diffusers_says_nothing(load, caplog, capsys, monkeypatch):
    model = load("sdxl")
    for name in ("diffusers", "transformers"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
    model.cut([LONG])
    monkeypatch.setattr("adascope_fast.backbones.pipeline.cuts.read", None)
    assert model.cut([LONG, LONG])[1].lost
    model.encode([LONG])
    assert "truncated" not in caplog.text + capsys.readouterr().err
    model.pipeline.encode_prompt([LONG], do_classifier_free_guidance=False)
    assert "truncated" in caplog.text, "diffusers itself still says so"


def test_an_outline_has_no_tokenizers():
    with pytest.raises(ValueError, match="got an outline; load the whole model"):
        backbones.outline("scenes").cut(["a"])

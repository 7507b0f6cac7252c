"""Published weights, converted, compute what the published architecture does; what is something else is refused."""

import gzip
import json
import os
import pickle
import stat
from pathlib import Path
from typing import Any

import published_models as published
import pytest
import torch
from command_line import call, refused
from safetensors.torch import load_file, save_file
from torch import Tensor

from adascope_fast.rewards.hps import Hps
from adascope_fast.rewards.image_reward import ImageReward
from adascope_fast.weights import KINDS, convert

PROMPTS = ["cat", "dog", "cat"]


def _images(side: int) -> Tensor:
    """Of three colours, with noise."""
    generator = torch.Generator().manual_seed(1)
    return torch.rand(3, 3, 1, 1, generator=generator).sqrt() * torch.rand(3, 3, side, side, generator=generator)


@pytest.fixture(scope="module")
def clip() -> Any:
    return published.seeded(published.OpenClip)


@pytest.fixture
def hps_files(clip: Any, tmp_path: Path) -> list[Path]:
    """Weights in a dict beside a counter, and the merges, zipped as they are published."""
    torch.save({"epoch": 3, "state_dict": clip.state_dict()}, tmp_path / "HPS_v2_compressed.pt")
    text = published.write_merges(tmp_path / "merges.txt").read_bytes()
    (tmp_path / "bpe_simple_vocab_16e6.txt.gz").write_bytes(gzip.compress(text))
    return [tmp_path / "HPS_v2_compressed.pt", tmp_path / "bpe_simple_vocab_16e6.txt.gz"]


def _cosine(clip: Any, images: Tensor) -> Tensor:
    tokens = torch.tensor([published.tokens_of(prompt) + [0] * 6 for prompt in PROMPTS])
    return clip.cosine(images, tokens)


def test_hpsv2_is_what_open_clip_computes(clip: Any, hps_files: list[Path], tmp_path: Path):
    images = _images(16)
    want = _cosine(clip, images)
    assert want.std() > 0.05, "the test sees differences"
    folder = convert("hpsv2", hps_files, tmp_path / "weights" / "hpsv2")
    reward = Hps.load(str(folder), version="2.0")
    torch.testing.assert_close(reward(images, PROMPTS), want, rtol=0, atol=1e-5)
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}
    described = json.loads((folder / "config.json").read_text())
    assert described["text_config"]["hidden_act"] == described["vision_config"]["hidden_act"] == "gelu"
    mask = os.umask(0)
    os.umask(mask)
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask for path in folder.iterdir())


@pytest.mark.parametrize("form", ["merges.txt", "tokenizer.json", "safetensors", "old zip", "parallel", "half"])
def test_other_forms_of_the_same_files_are_read_alike(clip: Any, hps_files: list[Path], tmp_path: Path, form: str):
    state, tokenizer = dict(clip.state_dict()), hps_files[1]
    weights = tmp_path / "other.pt"
    if form == "merges.txt":
        tokenizer = tmp_path / "merges.txt"
    if form == "tokenizer.json":
        tokenizer = convert("hpsv2", hps_files, tmp_path / "first") / "tokenizer.json"
    if form == "parallel":
        state = {f"module.{name}": value for name, value in state.items()}
    if form == "half":
        state = {name: value.half() for name, value in state.items()}
    if form == "safetensors":
        weights = tmp_path / "other.safetensors"
        save_file({name: value.contiguous() for name, value in state.items()}, weights)
    else:
        torch.save({"state_dict": state}, weights, _use_new_zipfile_serialization=form != "old zip")
    folder = convert("hpsv2.1", [tokenizer, weights], tmp_path / "out")
    images = _images(16)
    tolerance = 2e-3 if form == "half" else 1e-5
    got = Hps.load(str(folder), version="2.1")(images, PROMPTS)
    torch.testing.assert_close(got, _cosine(clip, images), rtol=0, atol=tolerance)


def test_the_version_of_the_weights_is_kept(hps_files: list[Path], tmp_path: Path):
    folder = convert("hpsv2.1", hps_files, tmp_path / "out")
    with pytest.raises(ValueError, match=r'got "2\.0" with weights of HPSv2\.1; set it to "2\.1"'):
        Hps.load(str(folder), version="2.0")


@pytest.fixture(scope="module")
def blip() -> Any:
    return published.seeded(published.ImageReward)


@pytest.fixture
def image_reward_files(blip: Any, tmp_path: Path) -> list[Path]:
    torch.save(blip.state_dict(), tmp_path / "ImageReward.pt")
    (tmp_path / "vocab.txt").write_text("\n".join(published.WORDS) + "\n")
    return [tmp_path / "ImageReward.pt", tmp_path / "vocab.txt"]


def test_image_reward_is_what_its_authors_model_computes(blip: Any, image_reward_files: list[Path], tmp_path: Path):
    images = _images(32)
    words = [["a", "red", "cat"], ["dog", "##s"], ["a", "cat", "on", "the", "moon"]]
    want = blip.score(images, words)
    assert want.std() > 0.01, "the test sees differences"
    folder = convert("image_reward", image_reward_files, tmp_path / "out")
    got = ImageReward.load(str(folder))(images, ["A red  cat", "dogs", "a cat on the moon"])
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    bare = ImageReward.load(str(folder))(images.flip(0), ["a red cat", "dogs", "a cat on the moon"])
    assert (bare - want).abs().max() > 1e-3, "the picture matters"


def test_the_aesthetic_layers_keep_their_names(tmp_path: Path):
    head = published.seeded(published.Head, 24)
    torch.save(head.state_dict(), tmp_path / "sac+logos+ava1-l14-linearMSE.pth")
    folder = convert("aesthetic", [tmp_path / "sac+logos+ava1-l14-linearMSE.pth"], tmp_path / "out")
    found = load_file(folder / "model.safetensors")
    assert found.keys() == head.state_dict().keys()
    assert all(torch.equal(found[name], value) for name, value in head.state_dict().items())


class _Harm:
    def __reduce__(self) -> Any:
        return os.system, ("true",)


def _damaged(what: str, state: dict[str, Tensor], path: Path) -> None:
    """The weights, spoilt in one way."""
    name = "transformer.resblocks.1.mlp.c_fc.weight"
    if what == "a weight less":
        del state[name]
    if what == "a weight more":
        state["score_predictor.weight"] = torch.zeros(2)
    if what == "another shape":
        state[name] = state[name][:-1].clone()
    if what == "not finite":
        state[name] = state[name] * torch.nan
    if what == "code":
        path.write_bytes(pickle.dumps({"state_dict": _Harm()}))
        return
    torch.save([1, 2] if what == "no weights" else state, path)
    if what == "cut":
        path.write_bytes(path.read_bytes()[:5000])
    if what == "text":
        path.write_text("version https://git-lfs.github.com/spec/v1\n")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("a weight less", r"lacks text_model\.encoder\.layers\.1\.mlp\.fc1\.weight; name the publisher's"),
        ("a weight more", r"has besides score_predictor\.weight; name the publisher's"),
        ("another shape", r"has in another shape text_model\.encoder\.layers\.1\.mlp\.fc1\.weight;"),
        ("not finite", r"weights must be finite, and text_model\.encoder\.layers\.1\.mlp\.fc1\.weight is not"),
        ("code", "must be a file of weights alone, got a pickle that would run code; download"),
        ("no weights", "must hold weights by name, got list without"),
        ("cut", r"must be a file of weights.* got one that cannot be read \("),
        ("text", r"must be a file of weights.* got "),
    ],
)
def test_what_is_no_such_file_is_refused_in_one_line(
    clip: Any, hps_files: list[Path], tmp_path: Path, what: str, message: str
):
    _damaged(what, dict(clip.state_dict()), hps_files[0])
    with pytest.raises(ValueError, match=message) as caught:
        convert("hpsv2", hps_files, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*")), "nothing half made is left"


@pytest.mark.parametrize("kind", ["aesthetic", "image_reward", "hpsv2"])
def test_weights_of_another_kind_are_refused(
    clip: Any, blip: Any, hps_files: list[Path], image_reward_files: list[Path], tmp_path: Path, kind: str
):
    files = {"aesthetic": hps_files[:1], "image_reward": hps_files, "hpsv2": image_reward_files}[kind]
    with pytest.raises(ValueError, match=r"must have the weights of .*lacks"):
        convert(kind, files, tmp_path / "out")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("#version: 0.2\nc a\n", "must be the tokenizer of this model, with 519 tokens, got 515; name bpe_simple"),
        ("#version: 0.2\nc a x\nd o\ne f\ng h\ni j\n", "must be the tokenizer of this model"),
        ('{"model": {"vocab": {"a": 0}, "merges": []}}', "must be the tokenizer of this model"),
        ('{"model": 3}', "must be a tokenizer.json with a vocabulary"),
    ],
)
def test_a_tokenizer_of_another_model_is_refused(hps_files: list[Path], tmp_path: Path, content: str, message: str):
    path = tmp_path / ("other.json" if content.startswith("{") else "other.txt")
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        convert("hpsv2", [hps_files[0], path], tmp_path / "out")


def test_the_command_converts_and_never_replaces_unasked(tmp_path: Path):
    torch.save(published.seeded(published.Head, 24).state_dict(), tmp_path / "head.pth")
    arguments = ("import-weights", "aesthetic", tmp_path / "head.pth", "--out", tmp_path / "out")
    made = call(*arguments)
    assert (made.code, made.out, made.err) == (0, f"{tmp_path / 'out'}\n", "")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert "never replaces what is there" in refused(*arguments)
    assert call(*arguments, "--overwrite").code == 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    said = refused(*arguments[:3], "--out", tmp_path / "mine", "--overwrite")
    assert "has no model.safetensors; choose another --out" in said
    assert (tmp_path / "mine" / "thesis.txt").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nope", "a.pt"], "import-weights knows hpsv2, hpsv2.1, image_reward, aesthetic"),
        (["hpsv2"], "takes HPSv2: HPS_v2_compressed.pt, and a CLIP tokenizer"),
        (["hpsv2", "no-such.pt"], "got 'no-such.pt', which is no file; download it from huggingface.co/xswu/HPSv2"),
    ],
)
def test_a_wrong_command_is_one_line(arguments: list[str], message: str):
    assert message in refused("import-weights", *arguments)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.txt"], "one file of weights .*, got 0 in a.txt"),
        (["a.pt", "b.pt"], "one file of weights .*, got 2 in a.pt, b.pt"),
    ],
)
def test_files_that_cannot_be_meant_are_refused(tmp_path: Path, names: list[str], message: str):
    for name in names:
        (tmp_path / name).write_text("x")
    with pytest.raises(ValueError, match=message):
        convert("hpsv2", [tmp_path / name for name in names], tmp_path / "out")


def test_each_kind_says_what_it_is_and_where_it_is_published():
    for name, (maker, what, published_at) in KINDS.items():
        assert maker.startswith("adascope_fast.weights."), name
        assert what
        assert "." in published_at

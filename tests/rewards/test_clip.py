"""The embedded CLIP and any other: accuracy on held-out captions, the reward, its pictures' preparation, refusals."""

import json
import math
import random
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel
from typer.testing import CliRunner

from adascope_fast import rewards
from adascope_fast.cli import app
from adascope_fast.config import ConfigError
from adascope_fast.pretraining import captions, clip, loop
from adascope_fast.pretraining.drawing import draw
from adascope_fast.prompts.scenes import every_scene
from adascope_fast.rewards import settings
from adascope_fast.rewards.clip import SCENES_CLIP, ClipSimilarity, prepared

CAPTIONS = [scene.caption for scene in clip.HELD_OUT]


@pytest.fixture(scope="module")
def judge() -> ClipSimilarity:
    return ClipSimilarity.load()


@pytest.fixture(scope="module")
def drawings() -> Tensor:
    """One picture of every held-out caption, by a seed of which the training has seen nothing."""
    return draw(clip.HELD_OUT, 77)


def _accuracy(judge: ClipSimilarity, images: Tensor) -> float:
    likeness = judge.embed_images(images) @ judge.embed_prompts(CAPTIONS, torch.device("cpu")).T
    return (likeness.argmax(1) == torch.arange(len(CAPTIONS))).double().mean().item()


def test_it_knows_held_out_pictures_by_their_captions(judge: ClipSimilarity, drawings: Tensor):
    """By chance one in 172 is right. The published accuracy is in bench/results/scenes_clip.json."""
    assert len(CAPTIONS) == 172
    assert _accuracy(judge, drawings) >= 0.72
    assert _accuracy(judge, clip.given_back(clip.embedded_vae(), drawings, 0.15, 1)) >= 0.70


def test_similarity_separates_right_from_shuffled_captions(judge: ClipSimilarity, drawings: Tensor):
    right, wrong = judge(drawings, CAPTIONS), judge(drawings, [*CAPTIONS[1:], CAPTIONS[0]])
    assert right.dtype == torch.float32
    assert right.abs().max() <= 1 + 1e-5
    assert (right > wrong).double().mean() > 0.97
    assert right.mean() - wrong.mean() > 0.4


def test_a_picture_is_judged_alike_alone_and_in_company_and_a_prompt_too(judge: ClipSimilarity, drawings: Tensor):
    together = judge(drawings[:7], CAPTIONS[:7])
    fresh = ClipSimilarity.load()
    for row in (6, 0, 3):
        torch.testing.assert_close(fresh(drawings[row : row + 1], [CAPTIONS[row]])[0], together[row], rtol=0, atol=1e-5)
    assert torch.equal(
        fresh.embed_prompts(CAPTIONS[:7], drawings.device), judge.embed_prompts(CAPTIONS[:7], drawings.device)
    )


def test_the_similarity_is_that_of_transformers_own_forward(judge: ClipSimilarity, drawings: Tensor):
    model = CLIPModel.from_pretrained(SCENES_CLIP).eval()
    tokens = captions.build_tokenizer()(CAPTIONS[:5], padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(pixel_values=drawings[:5] * 2 - 1, **tokens).logits_per_image / model.logit_scale.exp()
    torch.testing.assert_close(judge(drawings[:5], CAPTIONS[:5]), logits.diagonal(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(90, 60), (61, 93), (32, 32)], ids=str)
def test_pictures_are_prepared_as_by_transformers_own_processor(size: tuple[int, int]):
    """Bicubic on bytes against floats: they differ by rounding, and a little more where it overshoots."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    image = coarse.resize(size, Image.Resampling.BICUBIC)
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    want = torch.as_tensor(np.asarray(processor(image, return_tensors="np")["pixel_values"]))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
    got = prepared(pixels, 32, processor.image_mean, processor.image_std)
    assert got.shape == want.shape == (1, 3, 32, 32)
    assert (got - want).abs().mean() < 0.02
    assert prepared(torch.rand(2, 3, 32, 32), 32, (0.5,) * 3, (0.5,) * 3).abs().max() <= 1


def test_the_folder_is_small_and_plain():
    files = [path for path in SCENES_CLIP.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".txt", ".safetensors"}
    assert sum(path.stat().st_size for path in files) <= 3e6
    assert all(value.isfinite().all() for value in load_file(SCENES_CLIP / "model.safetensors").values())


def test_it_is_a_reward_by_name_and_so_is_any_other_folder(tmp_path: Path, drawings: Tensor):
    reward = rewards.load(settings.ClipSimilarity())
    assert rewards.score(reward, drawings[:3], CAPTIONS[:3]).min() > 0.2
    torch.manual_seed(0)
    tokenizer = captions.build_tokenizer()
    config = clip.build(tokenizer).config
    other = CLIPModel(CLIPConfig.from_dict(config.to_dict()))
    other.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    captions.save_slow_files(tokenizer, tmp_path / "other")
    named = rewards.load(settings.ClipSimilarity(clip=str(tmp_path / "other")))
    assert not torch.equal(named(drawings[:3], CAPTIONS[:3]), reward(drawings[:3], CAPTIONS[:3]))
    long = "a red circle " * 40
    assert named(drawings[:1], [long]).isfinite().all(), "a prompt that is too long is cut"


@pytest.mark.parametrize("name", ["no/such-clip-anywhere", "no-such-folder"])
def test_a_clip_that_is_not_there_is_refused_in_one_line(name: str):
    with pytest.raises(ValueError, match=rf"a CLIP is 'scenes-clip', the folder .*got '{name}'") as caught:
        ClipSimilarity.load(name)
    assert "\n" not in str(caught.value)


def test_pickled_weights_are_refused(tmp_path: Path):
    for path in SCENES_CLIP.iterdir():
        if path.suffix != ".safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    torch.save(load_file(SCENES_CLIP / "model.safetensors"), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="in safetensors"):
        ClipSimilarity.load(str(tmp_path))


def test_pretraining_leaves_a_folder_that_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(clip, "BATCH", 4)
    recipe = loop.Recipe(num_steps=3, learning_rate=1e-3, save_every=1)
    model = clip.pretrain(tmp_path / "clip", tmp_path / "work", recipe=recipe, num_images=64)
    judge = ClipSimilarity.load(str(tmp_path / "clip"))
    for name, value in model.state_dict().items():
        assert torch.equal(judge.model.state_dict()[name], value), name
    described = json.loads((tmp_path / "clip" / "preprocessor_config.json").read_text())
    assert described["image_mean"] == list(clip.MEAN)
    assert judge(torch.rand(2, 3, 64, 64), CAPTIONS[:2]).isfinite().all()
    clip.pretrain(tmp_path / "again", tmp_path / "work", recipe=recipe, num_images=64)  # nothing is left to do
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(
        torch.equal(value, again[name]) for name, value in load_file(tmp_path / "clip" / "model.safetensors").items()
    )


def test_the_command_makes_it_and_replaces_nothing_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    recipe = loop.Recipe(num_steps=1, learning_rate=1e-3)
    monkeypatch.setattr(clip, "pretrain", partial(clip.pretrain, recipe=recipe, num_images=64))
    arguments = ["pretrain", "scenes-clip", "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    made = CliRunner().invoke(app, arguments)
    assert (made.exit_code, made.stdout.strip().splitlines()[-1]) == (0, str(tmp_path / "out"))
    assert ClipSimilarity.load(str(tmp_path / "out"))(torch.rand(1, 3, 64, 64), CAPTIONS[:1]).isfinite().all()
    again = CliRunner().invoke(app, arguments)
    assert isinstance(again.exception, ConfigError)
    assert "is not replaced" in str(again.exception)


def test_a_mirrored_picture_has_the_mirrored_caption():
    left = [scene for scene in clip.TRAINING_SCENES if scene.position == "left"][:40]
    images = draw(left, 3)
    turned, said = clip._mirrored(images, left, random.Random(0))
    changed = [row for row in range(40) if said[row] != left[row]]
    assert 8 < len(changed) < 32
    for row in range(40):
        same = torch.equal(turned[row], images[row])
        assert same == (row not in changed)
        assert said[row].position == ("right" if row in changed else "left")
        assert said[row] in clip._ROW
    judge = rewards.load(settings.SceneAttributes())
    assert judge(turned, [scene.caption for scene in said]).mean() > 0.97


def test_neighbours_differ_in_one_attribute_and_are_never_held_out():
    held_out = set(clip.HELD_OUT)
    for scene in clip.TRAINING_SCENES[::37]:
        for other in clip._neighbours(scene, random.Random(1)):
            assert other not in held_out
            changed = [name for name in captions.CHOICES if getattr(scene, name) != getattr(other, name)]
            assert len(set(changed) - {"position"} if "count" in changed else changed) <= 1
    assert set(clip.TRAINING_SCENES) | held_out == set(every_scene())


def test_blur_keeps_the_mean_and_takes_the_detail():
    images = torch.zeros(4, 3, 20, 20)
    images[:, :, 10, 10] = 1.0
    worn = clip._worn(images, torch.Generator().manual_seed(0))
    assert worn.shape == images.shape
    assert abs(worn.mean() - images.mean()) < 5e-3
    assert worn[:, :, 10, 10].mean() < 0.8


def test_muon_is_orthogonal_and_resumes(tmp_path: Path):
    """One step of Muon moves a matrix along an (almost) orthogonal one; a stopped stage continues bit for bit."""
    recipe = loop.Recipe(num_steps=4, learning_rate=0.1, warmup=1, ema=0.0, save_every=2, weight_decay=0.0)

    def run(folder: str, stop_at: int | None = None) -> nn.Linear:
        torch.manual_seed(0)
        layer = nn.Linear(4, 4)

        def loss_at(step: int) -> Tensor:
            if step == stop_at:
                raise KeyboardInterrupt
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
            return (layer(x) - x).square().mean()

        loop.train(layer, loss_at, recipe, tmp_path / folder, "muon", matrices=[layer.weight], muon=0.5)
        return layer

    alone = run("alone")
    with pytest.raises(KeyboardInterrupt):
        run("stopped", 3)
    again = run("stopped")
    assert torch.equal(alone.weight, again.weight)
    assert torch.equal(alone.bias, again.bias)
    torch.manual_seed(0)
    layer = nn.Linear(4, 4)
    before = layer.weight.detach().clone()
    one = loop.Recipe(num_steps=1, learning_rate=0.1, warmup=0, ema=0.0, weight_decay=0.0)
    loop.train(
        layer,
        lambda _: layer(torch.eye(4)).square().sum(),
        one,
        tmp_path / "one",
        "",
        matrices=[layer.weight],
        muon=3.0,
    )
    singular = torch.linalg.svdvals(before - layer.weight.detach()) / (3.0 * 0.1 * 0.2 * math.sqrt(4))
    assert 0.6 < singular.min() <= singular.max() < 1.3, "Newton-Schulz leaves them near 1"


BROKEN = [b"", b"{", b"[]", b"\xff\xfe", b'{"image_mean": "x"}', b'{"image_std": [1]}', b'{"text_config": 3}']


@pytest.mark.parametrize("content", BROKEN)
@pytest.mark.parametrize(
    "name", ["config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]
)
def test_a_broken_file_of_a_clip_is_told_by_its_clip(tmp_path: Path, name: str, content: bytes):
    folder = tmp_path / "clip"
    shutil.copytree(SCENES_CLIP, folder)
    (folder / name).write_bytes(content)
    harmless = {"tokenizer_config.json": BROKEN[4:], "preprocessor_config.json": BROKEN[6:]}
    if content in harmless.get(name, []):
        ClipSimilarity.load(str(folder))
        return
    with pytest.raises(ValueError, match="CLIP") as caught:
        ClipSimilarity.load(str(folder))
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)

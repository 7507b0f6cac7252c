"""How the embedded models are made: drawings, captions wrong at the stated rate, a loop that resumes, plain folders."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline
from scipy import ndimage
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from adascope_fast import backbones
from adascope_fast.pretraining import autoencoder, captions, denoisers, loop, text
from adascope_fast.pretraining.drawing import LARGE_RADIUS, SMALL_RADIUS, draw
from adascope_fast.prompts.scenes import BACKGROUNDS, COLOURS, Scene, every_scene

SCENES = random.Random(4).sample(every_scene(), 120)


def _regions(picture: Tensor) -> list[np.ndarray]:
    """Masks of the connected regions that differ from the top left pixel."""
    is_object = (picture - picture[:, :1, :1]).abs().amax(0).numpy() > 0.15
    found: Any = ndimage.label(is_object, np.ones((3, 3)))
    label, count = found
    return [label == number for number in range(1, count + 1)]


def test_drawings_show_the_count_the_colours_and_the_sizes_of_their_scene():
    pictures = draw(SCENES, seed=0)
    assert pictures.shape == (120, 3, 64, 64)
    assert pictures.min() >= 0
    assert pictures.max() <= 1
    for scene, picture in zip(SCENES, pictures, strict=True):
        corner = picture[:, 0, 0] * 255
        assert (corner - torch.tensor(BACKGROUNDS[scene.background])).abs().max() < 6.01
        regions = _regions(picture)
        assert len(regions) == scene.count, scene.caption
        low, high = SMALL_RADIUS if scene.size == "small" else LARGE_RADIUS[scene.count]
        for region in regions:
            inside = ndimage.binary_erosion(region, np.ones((3, 3)))
            colour = picture[:, torch.from_numpy(inside)].median(1).values * 255
            assert (colour - torch.tensor(COLOURS[scene.colour])).abs().max() < 8.01, scene.caption
            radius = math.sqrt(region.sum() / math.pi)  # of a disc of the region's area; edges add up to a pixel
            assert low - 0.5 < radius < high + 1.2, scene.caption


@pytest.mark.parametrize(
    ("place", "axis", "sign"), [("left", 1, -1), ("right", 1, 1), ("top", 0, -1), ("bottom", 0, 1)]
)
def test_drawings_stand_where_their_scene_says(place: str, axis: int, sign: int):
    scene = Scene(1, "large", "blue", "triangle", "white", place)
    for picture in draw([scene] * 10, seed=2):
        (region,) = _regions(picture)
        middle = np.array(ndimage.center_of_mass(region)) - 31.5
        assert sign * middle[axis] > 8
        assert abs(middle[1 - axis]) < 7


def test_a_drawing_depends_on_its_seed_alone():
    assert torch.equal(draw(SCENES[:5], 3), draw(SCENES[:5], 3))
    assert not torch.equal(draw(SCENES[:5], 3), draw(SCENES[:5], 4))


def test_mislabelled_captions_are_wrong_at_the_stated_rates_and_never_held_out():
    rng = random.Random(0)
    scenes = [scene for scene in autoencoder.TRAINING_SCENES if scene.count == 1]
    changed = dict.fromkeys(captions.CHOICES, 0)
    rates = {"count": 0.45, "size": 0.3, "colour": 0.45, "shape": 0.1, "position": 0.45}
    num_draws = 12_000
    for scene in rng.choices(scenes, k=num_draws):
        caption = captions.mislabelled(scene, rng, rates)
        assert not caption.is_held_out
        assert caption in _ALL, "the grammar can say it"
        for name in changed:
            changed[name] += getattr(caption, name) != getattr(scene, name)
    assert changed["background"] == 0, "what has no rate is never replaced"
    for name, values in captions.CHOICES.items():
        if name == "position":  # also dropped where the count became more than one
            continue
        # Replaced by one of k values, 1 in k of which is the old one. Standard error below 0.005,
        # and rejecting held-out captions moves a rate by about a hundredth.
        expected = rates.get(name, 0.0) * (1 - 1 / len(values))
        assert changed[name] / num_draws == pytest.approx(expected, abs=0.025), name


def test_captions_are_right_until_late_and_careless_from_then_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(denoisers, "NUM_LATENTS", 64)
    monkeypatch.setattr(denoisers, "BATCH", 2)
    asked = []
    mislabelled = captions.mislabelled
    monkeypatch.setattr(captions, "mislabelled", lambda *given: asked.append(dict(given[2])) or mislabelled(*given))
    autoencoder.build(quant_conv=True).save_pretrained(tmp_path / "work" / "autoencoder" / "final")
    monkeypatch.setattr(text, "RECIPE", loop.Recipe(num_steps=1, learning_rate=1e-3))
    recipe = loop.Recipe(num_steps=10, learning_rate=1e-3)
    denoisers.pretrain("scenes", tmp_path / "scenes", tmp_path / "work", recipe=recipe)
    late = math.floor(10 * captions.LATE) + 1
    assert asked == [{}] * 2 * late + [captions.NOISE] * 2 * (10 - late)


def test_text_encoders_learn_to_tell_every_attribute_of_captions_they_never_saw(tmp_path: Path):
    torch.manual_seed(0)
    tokenizer = captions.build_tokenizer()
    encoder = CLIPTextModel(denoisers._text_config(32, tokenizer))

    def tokens(scenes: list[Scene]) -> Tensor:
        said = [scene.caption for scene in scenes]
        return tokenizer(said, padding="max_length", max_length=captions.MAX_TOKENS, return_tensors="pt").input_ids

    def read(ids: Tensor) -> list[Tensor]:
        return [encoder(ids)[0][:, -1]]

    scenes = autoencoder.TRAINING_SCENES
    recipe = loop.Recipe(num_steps=250, learning_rate=4e-3)
    heads: Any = text.pretrain([encoder], read, tokens(scenes), scenes, tmp_path, recipe=recipe)[0]
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    unseen = [scene for scene in every_scene() if scene.is_held_out]
    with torch.no_grad():
        (features,) = read(tokens(unseen))
        for head, (name, values) in zip(heads, captions.CHOICES.items(), strict=True):
            right = [values.index(getattr(scene, name)) for scene in unseen]
            assert (head(features).argmax(1) == torch.tensor(right)).float().mean() > 0.95, name


def test_errors_weigh_more_where_an_object_can_be_seen():
    error = torch.full((2, 1, 1, 2), 3.0)
    objects = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2).expand(2, 1, 1, 2)
    weighted = denoisers.object_weighted(error, objects, torch.tensor([0.0, 0.5]))
    assert weighted.flatten().tolist() == [9.0, 9.0, 9.0 * (1 + 0.5 * denoisers.OBJECT_WEIGHT), 9.0]


_ALL = set(every_scene())


def test_training_scenes_leave_out_the_held_out_ones_and_balance_the_counts():
    scenes = autoencoder.scenes_for(seed=3, num_scenes=3000)
    assert not any(scene.is_held_out for scene in scenes)
    for count in (1, 2, 3):
        assert sum(scene.count == count for scene in scenes) == pytest.approx(1000, abs=120)
    assert scenes == autoencoder.scenes_for(seed=3, num_scenes=3000)


def test_every_word_of_a_caption_is_one_token_and_no_caption_is_cut(tmp_path: Path):
    tokenizer = captions.build_tokenizer()
    every = [scene.caption for scene in every_scene()]
    for caption, ids in zip(every, tokenizer(every).input_ids, strict=True):
        assert len(ids) == len(caption.split()) + 2 <= captions.MAX_TOKENS, "one token a word, a start and an end"
    tokenizer.save_pretrained(tmp_path)
    captions.save_slow_files(tokenizer, tmp_path)
    assert {"tokenizer.json", "vocab.json", "merges.txt"} <= {path.name for path in tmp_path.iterdir()}
    (tmp_path / "tokenizer.json").unlink()  # transformers 4 reads the two others
    slow = CLIPTokenizer.from_pretrained(tmp_path)
    assert slow(every[::50]).input_ids == tokenizer(every[::50]).input_ids
    vocabulary = json.loads((tmp_path / "vocab.json").read_text())
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))


def _linear(seed: int) -> nn.Linear:
    layer = nn.Linear(3, 2)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
    return layer


def _loss_of(model: nn.Linear, stop_at: int | None = None) -> Callable[[int], Tensor]:
    def loss_at(step: int) -> Tensor:
        if step == stop_at:
            raise KeyboardInterrupt
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        return (model(x) - x[:, :2]).square().mean()

    return loss_at


@pytest.mark.parametrize("stop_at", [0, 3, 6, 7, 10])
def test_a_stopped_stage_resumes_bit_for_bit(tmp_path: Path, stop_at: int):
    recipe = loop.Recipe(num_steps=11, learning_rate=0.1, warmup=3, ema=0.9, save_every=3)
    alone = _linear(0)
    loop.train(alone, _loss_of(alone), recipe, tmp_path / "alone", "alone")
    stopped = _linear(0)
    with pytest.raises(KeyboardInterrupt):
        loop.train(stopped, _loss_of(stopped, stop_at), recipe, tmp_path / "stopped", "stopped")
    again = _linear(0 if stop_at < 3 else 1)  # once something is saved, the weights it starts from do not matter
    loop.train(again, _loss_of(again), recipe, tmp_path / "stopped", "again")
    assert torch.equal(again.weight, alone.weight)
    assert torch.equal(again.bias, alone.bias)
    assert not torch.equal(again.weight, _linear(0).weight)


def test_the_learning_rate_warms_up_and_falls_to_two_percent():
    recipe = loop.Recipe(num_steps=100, learning_rate=1.0, warmup=10)
    rates = [recipe.rate(step) for step in range(101)]
    assert rates[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert rates[55] == pytest.approx(0.51)  # half way down: the middle of 1 and 0.02
    assert rates[100] == pytest.approx(0.02)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_standardising_an_autoencoder_moves_its_latents_and_not_its_pictures(monkeypatch: pytest.MonkeyPatch):
    scenes = autoencoder.scenes_for(0, 24)
    monkeypatch.setattr(autoencoder, "scenes_for", lambda seed, num_scenes: scenes)
    torch.manual_seed(0)
    trained: Any = autoencoder.build().eval()
    model: Any = autoencoder._standardised(trained).eval()
    pictures = draw(scenes, 10**6) * 2 - 1
    with torch.no_grad():
        raw, latents = trained.encode(pictures).latent_dist.mean, model.encode(pictures).latent_dist.mean
        decoded, decoded_before = model.decode(latents).sample, trained.decode(raw).sample
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(8), rtol=0, atol=1e-4)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(8), rtol=0, atol=1e-3)
    torch.testing.assert_close(decoded, decoded_before, rtol=0, atol=1e-4)
    assert model.encode(pictures).latent_dist.std.max() < 1e-4, "sampling from the posterior is as good as its mean"


@pytest.mark.parametrize(
    ("name", "plain_class"), [("scenes", StableDiffusionPipeline), ("scenes-flow", StableDiffusion3Pipeline)]
)
def test_pretraining_leaves_a_folder_that_plain_diffusers_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, plain_class: type
):
    monkeypatch.setattr(denoisers, "NUM_LATENTS", 64)
    monkeypatch.setattr(denoisers, "BATCH", 4)
    untrained = autoencoder.build(quant_conv=True)
    untrained.register_to_config(scaling_factor=1.0, shift_factor=0.0)
    untrained.save_pretrained(tmp_path / "work" / "autoencoder" / "final")
    recipe = loop.Recipe(num_steps=2, learning_rate=1e-3)
    monkeypatch.setattr(text, "RECIPE", recipe)
    denoisers.pretrain(name, tmp_path / name, tmp_path / "work", recipe=recipe)

    pipeline = plain_class.from_pretrained(tmp_path / name)
    pipeline.set_progress_bar_config(disable=True)
    prompt = SCENES[0].caption
    picture = pipeline(prompt, num_inference_steps=1, output_type="np").images
    assert picture.shape == (1, 64, 64, 3)
    assert np.isfinite(picture).all()
    _check_is_plain(tmp_path / name)
    assert backbones.load(str(tmp_path / name), lora_rank=1).latent_shape == (8, 8, 8)


def _check_is_plain(folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".txt", ".safetensors"}
    assert sum(path.stat().st_size for path in files) < 15e6


@pytest.mark.parametrize("name", backbones.EMBEDDED)
def test_the_shipped_models_are_small_and_hold_nothing_that_could_run(name: str):
    _check_is_plain(backbones.folder_of(name))

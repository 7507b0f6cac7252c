"""Rewards that are models: each equals its published formula on a small model of its real class, and refuses others."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from small_judges import MEAN, PROJECTED, PROMPTS, SIDE, STD, images, save_clip
from torch import Tensor, nn
from transformers import AutoTokenizer, BertTokenizer, BlipConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from adascope_fast import rewards
from adascope_fast.config import Config
from adascope_fast.rewards import settings
from adascope_fast.rewards.image_reward import ImageRewardModel

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "large", "red", "circle", "two", "small", "blue", "on"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


def _head(width: int, folder: Path) -> nn.Sequential:
    """The published stack, with its dropouts, saved with its names."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        head = nn.Sequential(
            nn.Linear(width, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2), nn.Linear(128, 64),
            nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1),
        )  # fmt: skip
    folder.mkdir(exist_ok=True)
    save_file({f"layers.{name}": value for name, value in head.state_dict().items()}, folder / "model.safetensors")
    return head.eval()


@pytest.fixture(scope="module")
def aesthetic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("aesthetic")
    _head(PROJECTED, folder)
    return folder


@pytest.fixture(scope="module")
def image_reward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """BLIP's two encoders with random weights, the stack, and BERT's tokenizer."""
    folder = tmp_path_factory.mktemp("image_reward")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": len(WORDS), "max_position_embeddings": 40, "encoder_hidden_size": 32}
    vision = {**sizes, "image_size": SIDE, "patch_size": 16, "initializer_range": 0.1}
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = ImageRewardModel(BlipConfig(text_config=text, vision_config=vision)).requires_grad_(False)
        for value in model.parameters():
            value += torch.randn_like(value) * 0.1
    model.save_pretrained(folder)
    BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)}, model_max_length=35).save_pretrained(folder)
    CLIPImageProcessor(image_mean=MEAN, image_std=STD).save_pretrained(folder)
    return folder


@pytest.fixture
def section(clip: Path, aesthetic: Path, image_reward: Path) -> Callable[..., Any]:
    """The section of a reward by its name, with other keys besides its folders."""

    def made(name: str, **keys: Any) -> Any:
        folders: dict[str, dict[str, Any]] = {
            "clip_similarity": {"clip": str(clip)},
            "pick_score": {"model": str(clip)},
            "hpsv2": {"model": str(clip)},
            "aesthetic": {"model": str(aesthetic), "clip": str(clip)},
            "image_reward": {"model": str(image_reward)},
        }
        return Config.of({"reward": {"name": name, **folders[name], **keys}}).reward

    return made


NAMES = ["clip_similarity", "pick_score", "hpsv2", "aesthetic", "image_reward"]


def _processed(pixels: Tensor, folder: Path) -> Tensor:
    """By transformers' own processor, from Pillow's images."""
    shown = [Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()) for image in pixels]
    processor = CLIPImageProcessor.from_pretrained(folder)
    return torch.as_tensor(np.asarray(processor(shown, return_tensors="np")["pixel_values"]))


@torch.no_grad()
def _logits(clip: Path, pixels: Tensor) -> tuple[Tensor, float]:
    """transformers' own logits of each image with its prompt, all prompts padded to one length; exp(logit_scale)."""
    model, tokenizer = CLIPModel.from_pretrained(clip).eval(), CLIPTokenizer.from_pretrained(clip)
    tokens = tokenizer(PROMPTS, padding=True, return_tensors="pt")
    found = model(pixel_values=_processed(pixels, clip), **tokens)
    return found.logits_per_image.diagonal(), model.logit_scale.exp().item()


def test_pick_score_is_the_logit_of_transformers(section: Any, clip: Path):
    """And the cosine, where it is to be left as it is: exp(4.2) = 66.686 less."""
    want, scale = _logits(clip, images())
    assert scale == pytest.approx(math.exp(4.2))
    assert want.std() > 1
    got = rewards.load(section("pick_score"))(images(), PROMPTS)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    unit = rewards.load(section("pick_score", scale="unit"))(images(), PROMPTS)
    torch.testing.assert_close(unit, want / math.exp(4.2), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["hpsv2", "clip_similarity"])
def test_hps_and_clip_similarity_are_bare_cosines(section: Any, clip: Path, name: str):
    want, scale = _logits(clip, images())
    got = rewards.load(section(name))(images(), PROMPTS)
    torch.testing.assert_close(got, want / scale, rtol=0, atol=1e-5)


@torch.no_grad()
def test_aesthetic_is_the_stack_on_the_normalised_image_embedding(section: Any, clip: Path, tmp_path: Path):
    model = CLIPModel.from_pretrained(clip).eval()
    pooled = model.vision_model(pixel_values=_processed(images(), clip)).pooler_output
    embedding = model.visual_projection(pooled)
    head = _head(PROJECTED, tmp_path / "head")
    want = head(embedding / embedding.norm(dim=1, keepdim=True))[:, 0]
    got = rewards.load(section("aesthetic"))(images(), PROMPTS)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert torch.equal(got, rewards.load(section("aesthetic"))(images(), ["another"] * 3)), "no prompt matters"


@torch.no_grad()
def test_image_reward_is_the_stack_on_the_first_token_that_has_seen_the_image(section: Any, image_reward: Path):
    """Centred by 0.16717363 and divided by 1.03333950; tokens by hand, padded to 35."""
    weights = load_file(image_reward / "model.safetensors")
    config = BlipConfig.from_pretrained(image_reward)

    def part(start: str) -> dict[str, Tensor]:
        return {name.removeprefix(start): value for name, value in weights.items() if name.startswith(start)}

    sizes: Any = config
    vision, text = BlipVisionModel(sizes.vision_config).eval(), BlipTextModel(sizes.text_config, False).eval()
    vision.load_state_dict(part("vision_model."))
    text.load_state_dict(part("text_encoder."))
    pixels = (images() - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    seen = vision(pixel_values=pixels).last_hidden_state
    rows = [[2, 5, 7, 8, 3], [2, 9, 10, 11, 1, 3], [2, 3]]
    ids = torch.tensor([row + [0] * (35 - len(row)) for row in rows])
    everywhere = torch.ones(seen.shape[:2], dtype=torch.long)
    options: Any = {"encoder_hidden_states": seen, "encoder_attention_mask": everywhere}
    state = text(input_ids=ids, attention_mask=(ids != 0).long(), **options).last_hidden_state[:, 0]
    for place in (0, 2, 4, 6, 7):
        state = state @ weights[f"layers.{place}.weight"].T + weights[f"layers.{place}.bias"]
    want = (state[:, 0] - 0.16717363) / 1.0333395
    prompts = ["a red CIRCLE", "two small blue crosses", ""]
    reward = rewards.load(section("image_reward"))
    torch.testing.assert_close(reward(images(), prompts), want, rtol=0, atol=1e-5)
    long = "a red circle " * 20
    assert reward(images(1), [long]).isfinite().all(), "a prompt that is too long is cut"


@pytest.mark.parametrize("name", NAMES)
def test_a_score_depends_on_nothing_but_its_image_and_prompt(section: Any, name: str):
    together = rewards.load(section(name))(images(), PROMPTS)
    assert (together.dtype, together.shape, together.requires_grad) == (torch.float32, (3,), False)
    assert together.unique().numel() == 3
    in_twos, backwards = rewards.load(section(name, batch=2)), rewards.load(section(name))
    torch.testing.assert_close(in_twos(images(), PROMPTS), together, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(backwards(images().flip(0), PROMPTS[::-1]).flip(0), together, rtol=1e-5, atol=1e-5)
    alone = rewards.load(section(name))(images()[2:], PROMPTS[2:])
    torch.testing.assert_close(alone, together[2:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_near_and_returns_float32(section: Any, name: str, dtype: str):
    want = rewards.load(section(name))(images(), PROMPTS)
    reward: Any = rewards.load(section(name, dtype=dtype, device="cpu"))
    got = reward(images(), PROMPTS)
    assert got.dtype == torch.float32
    assert reward.model.dtype == getattr(torch, dtype)
    close = {"pick_score": 3.0, "image_reward": 0.1, "aesthetic": 0.03}.get(name, 0.03)
    torch.testing.assert_close(got, want, rtol=0.05, atol=close)


@pytest.mark.parametrize("name", NAMES)
def test_oblong_images_are_cut_to_their_middle(section: Any, name: str):
    reward = rewards.load(section(name))
    beside = images().flip(0)[..., :20]
    want = reward(images(), PROMPTS)
    for axis in (2, 3):
        long = torch.cat([beside.transpose(axis, 3), images(), beside.transpose(axis, 3)], axis)
        torch.testing.assert_close(reward(long, PROMPTS), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_gpu_that_is_not_there_is_refused(section: Any, name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(
        ValueError, match=r'reward\.device = "cuda:1" needs that CUDA GPU, and torch sees 1; use "auto"'
    ):
        rewards.load(section(name, device="cuda:1"))


def _one_line(section: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        rewards.load(section)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        (
            "pick_score",
            {"model": "no-such"},
            r"^reward\.model of pick_score is the folder .*got 'no-such': .*download it",
        ),
        ("hpsv2", {"model": "no-such"}, r"^reward\.model of hpsv2 is .*got 'no-such': .*import-weights hpsv2 "),
        ("aesthetic", {"model": "no-such"}, r"^reward\.model of aesthetic is .*'no-such': .*import-weights aesthetic "),
        ("aesthetic", {"clip": "no-such"}, r"^a CLIP is .*got 'no-such': .*download it first"),
        ("image_reward", {"model": "no-such"}, r"^reward\.model of image_reward is .*import-weights image_reward "),
    ],
)
def test_missing_weights_are_one_line_that_says_where_they_come_from(
    section: Any, name: str, keys: dict[str, Any], message: str
):
    _one_line(section(name, **keys), message)


def test_weights_of_another_kind_are_refused(section: Any, clip: Path, aesthetic: Path, image_reward: Path):
    wrong = r"got '.*': it must have the weights layers\.0\.weight to layers\.7\.bias alone, and has logit_scale"
    _one_line(section("aesthetic", model=str(clip)), wrong)
    _one_line(section("pick_score", model=str(aesthetic)), r"pick_score is .*got '.*it has no config\.json")
    _one_line(section("pick_score", model=str(image_reward)), "pick_score is .*must have all its weights")
    _one_line(section("image_reward", model=str(clip)), "image_reward is .*must have all its weights")
    _one_line(section("image_reward", model=str(aesthetic)), r"image_reward is .*it has no config\.json")


def test_a_stack_that_does_not_fit_its_clip_is_refused(section: Any, tmp_path: Path):
    _head(PROJECTED + 1, tmp_path / "head")
    message = "must fit its CLIP, got layers for 25 numbers and a CLIP of 24; set reward.clip to the CLIP"
    _one_line(section("aesthetic", model=str(tmp_path / "head")), message)


@pytest.mark.parametrize("content", [b"", b"{", b"\x08\0\0\0\0\0\0\0{}      "])
@pytest.mark.parametrize("name", ["pick_score", "aesthetic", "image_reward"])
def test_damaged_weights_are_told_by_their_folder(section: Any, tmp_path: Path, name: str, content: bytes):
    folder = tmp_path / "damaged"
    shutil.copytree(section(name).model, folder)
    (folder / "model.safetensors").write_bytes(content)
    _one_line(section(name, model=str(folder)), f"reward.model of {name} .*damaged")


@pytest.mark.parametrize("name", ["pick_score", "image_reward"])
def test_a_weight_that_is_missing_is_named(section: Any, tmp_path: Path, name: str):
    folder = tmp_path / "other"
    shutil.copytree(section(name).model, folder)
    weights = load_file(folder / "model.safetensors")
    gone = next(key for key in weights if key.endswith("layer_norm1.weight"))
    del weights[gone]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    _one_line(section(name, model=str(folder)), f"{gone} is missing or of another shape")


def test_pickles_are_not_read(section: Any, clip: Path, tmp_path: Path):
    folder = tmp_path / "pickled"
    shutil.copytree(clip, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    _one_line(section("pick_score", model=str(folder)), "pick_score is .*safetensors")


def test_hpsv2_looks_for_the_weights_of_its_version(monkeypatch: pytest.MonkeyPatch, clip: Path, tmp_path: Path):
    (tmp_path / "weights").mkdir()
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(clip, tmp_path / "weights" / "hpsv2.1")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hps_version": "2.1"}))
    reward: Any = rewards.load(Config.load(None, ["reward.name=hpsv2", "reward.version=2.1"]).reward)
    assert reward.name == "hpsv2 (weights/hpsv2.1)"
    with pytest.raises(ValueError, match=r'got "weights/hpsv2"'):
        rewards.load(settings.Hpsv2())
    with pytest.raises(ValueError, match=r"with weights of HPSv2\.1; set it to"):
        rewards.load(settings.Hpsv2(model=str(folder)))


def test_the_tokenizer_of_image_reward_is_berts(image_reward: Path):
    tokens = AutoTokenizer.from_pretrained(image_reward)("A red circle", padding="max_length", max_length=7)
    assert tokens["input_ids"] == [2, 5, 7, 8, 3, 0, 0]


def test_model_rewards_may_be_parts_with_keys_of_their_own(section: Any, clip: Path, aesthetic: Path):
    parts = {
        "pick_score": {"weight": 0.5, "model": str(clip), "scale": "unit", "batch": 1},
        "aesthetic": {"weight": -1.0, "model": str(aesthetic), "clip": str(clip)},
        "jpeg_compressibility": 2.0,
    }
    mixed = rewards.load(Config.of({"reward": {"name": "mixed", "parts": parts}}).reward)
    alone = [section("pick_score", scale="unit"), section("aesthetic"), settings.JpegCompressibility()]
    scores = [rewards.load(one)(images(), PROMPTS) for one in alone]
    want = 0.5 * scores[0] - scores[1] + 2 * scores[2]
    torch.testing.assert_close(rewards.score(mixed, images(), PROMPTS), want)


@pytest.mark.parametrize(
    ("override", "kind"),
    [
        ([], "hpsv2"),
        (["reward.version=2.1"], "hpsv2.1"),
        (["reward.name=aesthetic"], "aesthetic"),
        (["reward.name=image_reward"], "image_reward"),
    ],
)
def test_a_folder_that_was_not_made_is_told_and_no_hub_is_asked(
    override: list[str], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    section = Config.load(None, ["reward.name=hpsv2", *override]).reward
    with pytest.raises(ValueError, match=f"import-weights {kind} FILE... --out weights/{kind}"):
        rewards.load(section)

"""GenEval's attributes: its rules on boxes by hand, and the whole on small detectors of real classes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from command_line import TINY, refused
from small_judges import MEAN, SIDE, STD, images, save_clip
from torch import Tensor
from transformers import (
    CLIPModel,
    CLIPTokenizer,
    OwlViTConfig,
    OwlViTForObjectDetection,
    OwlViTProcessor,
    YolosConfig,
    YolosForObjectDetection,
)
from transformers.models.owlvit.image_processing_pil_owlvit import OwlViTImageProcessorPil
from transformers.models.yolos.image_processing_pil_yolos import YolosImageProcessorPil

from adascope_fast import rewards
from adascope_fast.config import Config
from adascope_fast.pretraining import captions
from adascope_fast.rewards.geneval import COLOURS, Box, Found, by_class, met, overlap, relations

LABELS = {0: "cup", 1: "sofa", 2: "person"}


@pytest.mark.parametrize(
    ("one", "other", "want"),
    [
        ((0, 0, 10, 10), (50, 0, 60, 10), {"left of"}),
        ((50, 0, 60, 10), (0, 0, 10, 10), {"right of"}),
        ((0, 0, 10, 10), (0, 50, 10, 60), {"above"}),
        ((0, 50, 10, 60), (0, 0, 10, 10), {"below"}),
        ((0, 0, 10, 10), (40, 40, 50, 50), {"left of", "above"}),  # (40 - 2) / 56.6 = 0.67 each way
        ((0, 0, 10, 10), (50, 20, 60, 30), {"left of"}),  # 48 / 53.9 = 0.89 and 18 / 53.9 = 0.33
        ((0, 0, 100, 10), (19, 0, 119, 10), set()),  # 19 is within a tenth of 200
        ((0, 0, 100, 10), (50, 0, 150, 10), {"left of"}),  # (50 - 20) / 50 = 0.6
        ((0, 0, 100, 10), (38, 0, 138, 10), set()),  # (38 - 20) / 38 = 0.47
        ((5, 5, 9, 9), (5, 5, 9, 9), set()),
    ],
)
def test_a_position_is_that_of_centres_less_a_margin(one: Box, other: Box, want: set[str]):
    assert relations(one, other) == want


def test_objects_are_kept_by_confidence_sixteen_of_a_class():
    found: list[tuple[str, float, Box]] = [
        ("mouse", 0.31 + number / 100, (number, 0, number + 1, 1)) for number in range(20)
    ]
    found += [("cup", 0.3, (0, 0, 1, 1)), ("cup", 0.95, (0, 0, 4, 4)), ("cup", 0.5, (0, 0, 4, 2))]
    kept = by_class(found, 0.3)
    assert [one.score for one in kept["cup"]] == [0.95, 0.5]
    assert len(kept["computer mouse"]) == 16
    assert kept["computer mouse"][0].box == (19, 0, 20, 1)
    assert overlap((0, 0, 4, 4), (0, 0, 4, 2)) == 0.5
    assert overlap((0, 0, 1, 1), (5, 5, 6, 6)) == overlap((1, 1, 1, 1), (1, 1, 1, 1)) == 0
    assert [one.score for one in by_class(found, 0.3, 0.5)["cup"]] == [0.95]
    assert [one.score for one in by_class(found, 0.3, 0.51)["cup"]] == [0.95, 0.5]


APPLES = [Found((0, 0, 10, 10), 0.9), Found((20, 0, 30, 10), 0.8)]
OBJECTS = {"apple": APPLES, "cup": [Found((60, 0, 70, 10), 0.7)]}
RED = {APPLES[0].box: "red", APPLES[1].box: "green", OBJECTS["cup"][0].box: "red"}


@pytest.mark.parametrize(
    ("include", "want"),
    [
        ([{"class": "apple", "count": 2}], {"count": [True]}),
        ([{"class": "apple", "count": 1}], {"count": [True]}),  # two are there, as GenEval counts without exclude
        ([{"class": "apple", "count": 3}], {"count": [False]}),
        ([{"class": "apple", "count": 1, "color": "red"}], {"count": [True], "colour": [True]}),  # the surest alone
        ([{"class": "apple", "count": 2, "color": "red"}], {"count": [True], "colour": [False]}),
        ([{"class": "pear", "count": 1, "color": "red"}], {"count": [False], "colour": [False]}),
        (
            [{"class": "apple", "count": 2}, {"class": "cup", "position": ["right of", 0]}],
            {"count": [True, True], "position": [True]},
        ),
        (
            [{"class": "cup"}, {"class": "apple", "count": 2, "position": ["right of", 0]}],
            {"count": [True, True], "position": [False]},
        ),
        (
            [{"class": "pear"}, {"class": "cup", "position": ["right of", 0]}],
            {"count": [False, True], "position": [False]},
        ),
    ],
)
def test_attributes_by_hand(include: list[dict[str, Any]], want: dict[str, list[bool]]):
    got: dict[str, list[bool]] = {}
    for kind, is_met in met({"include": include}, OBJECTS, lambda box, name: RED[box]):
        got.setdefault(kind, []).append(is_met)
    assert got == want


def test_what_must_not_be_there_counts_too():
    def absent(count: int) -> list[tuple[str, bool]]:
        asked = {"include": [], "exclude": [{"class": "apple", "count": count}]}
        return met(asked, OBJECTS, lambda box, name: "red")

    assert [absent(count) for count in (1, 2, 3)] == [[("absence", False)], [("absence", False)], [("absence", True)]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A detector with labels of its own, one that looks for words, and a CLIP; all weights are random."""
    found = {name: tmp_path_factory.mktemp(name) for name in ("yolos", "owlvit", "clip")}
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    tokenizer = captions.build_tokenizer()
    words, square = len(tokenizer), {"height": SIDE, "width": SIDE}
    text = {**sizes, "vocab_size": words, "bos_token_id": words - 2, "eos_token_id": words - 1, "pad_token_id": 0}
    labels: Any = {"id2label": LABELS, "label2id": {name: number for number, name in LABELS.items()}}
    with torch.random.fork_rng():
        torch.manual_seed(4)
        yolos = YolosForObjectDetection(
            YolosConfig(**sizes, image_size=[SIDE, SIDE], patch_size=8, num_detection_tokens=12, **labels)
        )
        owlvit = OwlViTForObjectDetection(
            OwlViTConfig(
                text_config={**text, "max_position_embeddings": 16},
                vision_config={**sizes, "image_size": SIDE, "patch_size": 8},
                projection_dim=32,
            )
        )
        for model in (yolos, owlvit):
            for value in model.requires_grad_(False).parameters():
                value += torch.randn_like(value) * 0.2
    yolos.save_pretrained(found["yolos"])
    YolosImageProcessorPil(size=square).save_pretrained(found["yolos"])
    owlvit.save_pretrained(found["owlvit"])
    prepared = OwlViTImageProcessorPil(size=square, crop_size=square, do_center_crop=False)
    OwlViTProcessor(image_processor=prepared, tokenizer=tokenizer).save_pretrained(found["owlvit"])
    captions.save_slow_files(tokenizer, found["owlvit"])
    save_clip(found["clip"])
    return found


@pytest.fixture
def section(folders: dict[str, Path]) -> Callable[..., Any]:
    def made(detector: str = "yolos", **keys: Any) -> Any:
        own = {"name": "geneval", "model": str(folders[detector]), "clip": str(folders["clip"]), **keys}
        return Config.of({"reward": own}).reward

    return made


@torch.no_grad()
def _found(folder: Path, pixels: Tensor, threshold: float) -> list[list[tuple[str, float, list[float]]]]:
    """Label, confidence and box of each image's objects, from YOLOS' own outputs: ImageNet's mean and std in, a softmax
    over labels and none, centres and sizes as shares of the image out."""
    model = YolosForObjectDetection.from_pretrained(folder).eval()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    outputs = model(pixel_values=(pixels - mean[:, None, None]) / std[:, None, None])
    scores, labels = outputs.logits.softmax(-1)[..., :-1].max(-1)
    x, y, w, h = (outputs.pred_boxes * SIDE).unbind(-1)
    boxes = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], -1)
    return [
        [(LABELS[int(label)], score.item(), box.tolist()) for label, score, box in zip(*image, strict=True)
         if score > threshold]
        for image in zip(labels, scores, boxes, strict=True)
    ]  # fmt: skip


@torch.no_grad()
def _colour(folder: Path, image: Tensor, box: list[float], name: str) -> str:
    """By CLIP, the mean of three templates' unit vectors for each of ten colours."""
    model, tokenizer = CLIPModel.from_pretrained(folder).eval(), CLIPTokenizer.from_pretrained(folder)
    left, top, right, bottom = (min(max(round(side), 0), SIDE) for side in box)
    crop = image[None, :, top:bottom, left:right]
    short = min(crop.shape[-2:])
    sizes = [side * SIDE // short for side in crop.shape[-2:]]
    crop = F.interpolate(crop, sizes, mode="bicubic", antialias=True).clamp(0, 1)
    y, x = ((side - SIDE) // 2 for side in sizes)
    crop = crop[..., y : y + SIDE, x : x + SIDE]
    pixels = (crop - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    seen = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)[0]
    likeness = []
    for colour in COLOURS:
        texts = [
            f"a photo of a {colour} {name}",
            f"a photo of a {colour}-colored {name}",
            f"a photo of a {colour} object",
        ]
        tokens = tokenizer(texts, padding=True, truncation=True, max_length=16, return_tensors="pt")
        read = model.text_projection(model.text_model(**tokens).pooler_output)
        likeness.append((F.normalize(read, dim=1).mean(0) / F.normalize(read, dim=1).mean(0).norm()) @ seen)
    return COLOURS[int(torch.stack(likeness).argmax())]


def test_the_score_is_the_share_of_what_a_real_detector_finds(section: Any, folders: dict[str, Path]):
    """Every number of each class is asked for, so that some are met and some are not, and each colour."""
    shown, threshold = images(3), 0.35
    found = _found(folders["yolos"], shown, threshold)
    assert len({label for image in found for label, *_ in image}) >= 2
    reward: Any = rewards.load(section(threshold=threshold, counting_threshold=threshold))
    strict: Any = rewards.load(section(threshold=threshold, strict=True))
    checked = {True: 0, False: 0}
    for number, image in enumerate(found):
        for name, label in (("cup", "cup"), ("couch", "sofa"), ("person", "person")):
            mine = sorted((one for one in image if one[0] == label), key=lambda one: -one[1])
            if not mine:
                continue
            colour = _colour(folders["clip"], shown[number], mine[0][2], name)
            for asked, count in ((colour, 1), (COLOURS[COLOURS.index(colour) - 1], len(mine) + 1)):
                metadata: Any = {
                    "include": [{"class": name, "count": count}, {"class": name, "count": 1, "color": asked}],
                    "exclude": [{"class": name, "count": len(mine) + 1}],
                }
                wanted = [count <= len(mine), True, asked == colour, True]
                one = shown[number : number + 1]
                got = reward(one, ["a"], [metadata])
                assert got.item() == pytest.approx(sum(wanted) / 4)
                assert strict(one, ["a"], [metadata]).item() == float(all(wanted))
                checked[all(wanted)] += 1
    assert min(checked.values()) >= 2


def test_an_image_is_judged_alike_alone_and_in_company(section: Any):
    metadata = {"a": {"include": [{"class": "cup", "count": 2}, {"class": "person", "color": "red"}]},
                "b": {"tag": "counting", "include": [{"class": "couch", "count": 1}]}}  # fmt: skip
    for detector in ("yolos", "owlvit"):
        reward: Any = rewards.load(section(detector, threshold=0.3, counting_threshold=0.4, batch=2))
        rewards.hand_metadata(reward, metadata)
        together = rewards.score(reward, images(3), ["a", "b", "a"])
        for number, prompt in enumerate("aba"):
            alone = rewards.score(reward, images(3)[number : number + 1], [prompt])
            assert torch.equal(alone, together[number : number + 1])
        assert set(rewards.breakdown(reward, images(3), ["a", "b", "a"])) == {"count", "colour"}


def test_a_detector_of_words_knows_any_class(section: Any):
    reward: Any = rewards.load(section("owlvit", threshold=0.0, counting_threshold=1.0))
    asked = [{"include": [{"class": "unicorn", "count": 1}]}, {"tag": "counting", "include": [{"class": "unicorn"}]}]
    assert reward(images(2), ["a", "b"], asked).tolist() == [1.0, 0.0]
    half: Any = rewards.load(section("owlvit", threshold=0.0, dtype="bfloat16"))
    assert half(images(1), ["a"], asked[:1]).tolist() == [1.0]


@pytest.mark.parametrize(
    ("metadata", "why"),
    [
        ({}, "got none for 'p' in prompts.train"),
        ({"include": "cup"}, "got none for 'p'"),
        ({"include": ["cup"]}, "got the entry 'cup' without a class"),
        ({"include": [{"class": "cup", "count": 0}]}, "got the count 0, which is none of 1 to 16,"),
        ({"include": [{"class": "cup", "count": True}]}, "got the count True,"),
        ({"include": [{"class": "unicorn"}]}, "got the class 'unicorn', which the detector does not know,"),
        ({"include": [{"class": "cup", "color": "gold"}]}, "got the color 'gold', which is none of red, orange"),
        (
            {"include": [{"class": "cup", "position": ["near", 0]}]},
            r"got the position \['near', 0\], which is no relation",
        ),
        ({"include": [{"class": "cup", "position": ["above", 0]}]}, r"got the position \['above', 0\]"),
        ({"exclude": [{"class": "cup", "count": 17}]}, "got the count 17"),
    ],
)
def test_metadata_that_cannot_be_told_is_refused(section: Any, metadata: dict[str, Any], why: str):
    reward: Any = rewards.load(section())
    rewards.hand_metadata(reward, {"p": metadata})
    with pytest.raises(ValueError, match=f"^reward geneval needs GenEval's metadata of each prompt .*{why}"):
        rewards.check_prompts(reward, ["p"], "prompts.train")
    with pytest.raises(ValueError, match=r"reward geneval needs GenEval's metadata"):
        rewards.score(reward, images(1), ["p"])


def test_what_is_no_detector_is_refused(section: Any, folders: dict[str, Path], tmp_path: Path):
    def refusal(**keys: Any) -> str:
        with pytest.raises(ValueError, match=r"^reward\.model of geneval is the folder") as caught:
            rewards.load(section(**keys))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "CLIPConfig is that of no detector" in refusal(model=str(folders["clip"]))
    assert "download it first" in refusal(model="no-such")
    bare = shutil.copytree(folders["yolos"], tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    assert str(bare) in refusal(model=str(bare))


def test_a_training_without_metadata_is_refused_before_it_starts(section: Any, tmp_path: Path):
    own = section()
    keys = [f"reward.model={own.model}", f"reward.clip={own.clip}", f"run.folder={tmp_path / 'run'}"]
    assert "needs GenEval's metadata of each prompt" in refused("train", TINY, "reward.name=geneval", *keys)
    lines = [{"prompt": name, "include": [{"class": "cup", "colour": "red"}]} for name in ("a cup", "two cups")]
    for name, line in zip(("train", "held_out"), lines, strict=True):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(line | {"include": [{"class": "spoon"}]}) + "\n")
    named = [f"prompts.{name}={tmp_path / name}.jsonl" for name in ("train", "held_out")]
    said = refused("train", TINY, "reward.name=geneval", *keys, *named)
    assert "the class 'spoon', which the detector does not know, for 'a cup' in prompts.train" in said

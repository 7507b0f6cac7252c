"""Objects, counts, colours and positions that a prompt's metadata asks for, found by a detector (GenEval, 2310.11513).

Metadata is GenEval's own, a field of the prompt file beside `prompt`:
{"tag": "two_object", "include": [{"class": "apple", "count": 2, "color": "red"}, {"class": "cup", "count": 1,
"position": ["left of", 0]}], "exclude": [{"class": "apple", "count": 3}]}; a position is relative to an earlier entry.

An object counts above a confidence of 0.3, or 0.9 for the tag "counting"; the `count` most confident ones are looked
at. A colour is the likeliest of ten by a CLIP on the object's box. A is left of B where the distance of their centres,
less a tenth of both boxes' sizes, points left by more than half of the whole distance; above, below and right alike.

Differs from GenEval: the detector is one of transformers, with labels of its own or with words (OWL-ViT, OWLv2), in
place of mmdetection's Mask2Former, so there are no masks, and numbers are not comparable with published ones. The
score is the share of what is asked for that is there, unless it is to be all or nothing, as GenEval's.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from adascope_fast.loading import align, load_whole, quiet
from adascope_fast.rewards.clip import Clip, device_of, refuse_absent, refuse_bare, told
from adascope_fast.rewards.reward import eight_bits

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
TEMPLATES = ("a photo of a {} {}", "a photo of a {}-colored {}", "a photo of a {} object")
Relation = Literal["left of", "right of", "above", "below"]
RELATIONS = get_args(Relation)
MARGIN = 0.1
MOST_OBJECTS = 16
MOST_KNOWN = 1000
WORDS = ("owlvit", "owlv2")
"""Detectors of transformers that look for words."""
SAME = {
    "aeroplane": "airplane",
    "diningtable": "dining table",
    "keyboard": "computer keyboard",
    "motorbike": "motorcycle",
    "mouse": "computer mouse",
    "pottedplant": "potted plant",
    "remote": "tv remote",
    "sofa": "couch",
    "tvmonitor": "tv",
}
"""Labels of detectors, and what GenEval calls them."""
RULE = "reward.model of geneval is the folder of a transformers object detector in safetensors, or a repository of one"
EXAMPLE = '"include": [{"class": "apple", "count": 2}]'

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels."""


@dataclass(frozen=True)
class Found:
    """An object of an image."""

    box: Box
    score: float


class GenEval:
    """Reward in [0, 1]: the share of the attributes asked for that the picture has.

    Args:
        detector: a transformers model of object detection, with labels of its own or with words.
        processor: its processor.
        clip: tells colours.
        takes_words: whether the detector looks for words.
        is_strict: 1 where all attributes are there, else 0.
        threshold, counting_threshold: the least confidence of an object, and that for the tag "counting".
        max_overlap: of two boxes of a class that overlap by more (intersection over union) the less confident one is
            left out; 1 keeps all.
    """

    name = "geneval"

    def __init__(
        self,
        detector: Any,
        processor: Any,
        clip: Clip,
        *,
        takes_words: bool = False,
        is_strict: bool = False,
        threshold: float = 0.3,
        counting_threshold: float = 0.9,
        max_overlap: float = 1.0,
        device: str = "auto",
        batch: int | None = None,
    ) -> None:
        self.detector, self.processor = detector.requires_grad_(False).eval(), processor
        align(self.detector)
        self.clip, self.clip_model, self.takes_words, self.is_strict = clip, clip.model, takes_words, is_strict
        self.threshold, self.counting_threshold, self.max_overlap = threshold, counting_threshold, max_overlap
        self.device, self.batch = device, batch
        self._metadata: Mapping[str, Mapping[str, Any]] = {}
        self._colours: dict[str, Tensor] = {}

    @classmethod
    def load(
        cls,
        model: str,
        *,
        clip: str,
        dtype: str = "float32",
        device: str = "auto",
        batch: int | None = None,
        **options: Any,
    ) -> "GenEval":
        """The detector and the CLIP by their folders or repositories; ValueError where one is missing or none."""
        from transformers import AutoConfig, AutoImageProcessor, AutoProcessor
        from transformers.models.auto.modeling_auto import (
            MODEL_FOR_OBJECT_DETECTION_MAPPING,
            MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING,
        )

        refuse_absent(device)
        with told(RULE, model, "download it first, or name a folder"):
            refuse_bare(model)
            config = type(AutoConfig.from_pretrained(model, trust_remote_code=False))
            takes_words = config.model_type in WORDS
            known = MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING if takes_words else MODEL_FOR_OBJECT_DETECTION_MAPPING
            if config not in known:
                raise ValueError(f"{config.__name__} is that of no detector with labels of its own, nor of OWL-ViT")
            kind = known[config]
            detector = load_whole(kind, model, "it", trust_remote_code=False, dtype=getattr(torch, dtype))
            reader = AutoProcessor if takes_words else AutoImageProcessor
            with quiet():
                processor = reader.from_pretrained(model, trust_remote_code=False)
        found = Clip.load(clip, dtype=dtype, device=device, batch=batch)
        return cls(detector, processor, found, takes_words=takes_words, device=device, batch=batch, **options)

    def take_metadata(self, metadata: Mapping[str, Mapping[str, Any]]) -> None:
        """What is known of each prompt."""
        self._metadata = metadata

    @torch.no_grad()
    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> Tensor:
        """Scores [b] float32 of pictures [b, 3, h, w] in [0, 1].

        Args:
            metadata: of each prompt; None: as `take_metadata` has it.
        """
        shares = []
        for told_of in self.attributes(images, prompts, metadata):
            met = [is_met for _, is_met in told_of]
            shares.append(float(all(met)) if self.is_strict else sum(met) / len(met))
        return torch.tensor(shares, dtype=torch.float32, device=images.device)

    def breakdown(self, images: Tensor, prompts: Sequence[str]) -> dict[str, float]:
        """Share of the counts, colours, positions and absences asked for that are there."""
        told_of = [pair for image in self.attributes(images, prompts) for pair in image]
        found: dict[str, list[bool]] = {}
        for kind, is_met in told_of:
            found.setdefault(kind, []).append(is_met)
        return {kind: sum(met) / len(met) for kind, met in found.items()}

    def check_prompts(self, prompts: Sequence[str], where: str) -> None:
        """ValueError where a prompt has no metadata, or asks for what cannot be told."""
        for prompt in dict.fromkeys(prompts):
            self._asked(prompt, self._metadata.get(prompt, {}), where)

    @torch.no_grad()
    def attributes(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> list[list[tuple[str, bool]]]:
        """For each image what was asked for: its kind (count, colour, position or absence), and whether it is met."""
        if metadata is None:
            metadata = [self._metadata.get(prompt, {}) for prompt in prompts]
        for prompt, asked in zip(prompts, metadata, strict=True):
            self._asked(prompt, asked, "the prompts")
        told_of = []
        for first in range(0, len(images), self.batch or max(1, len(images))):
            part = slice(first, first + (self.batch or len(images)))
            for image, objects, asked in zip(
                images[part], self._detect(images[part], metadata[part]), metadata[part], strict=True
            ):
                told_of.append(met(asked, objects, lambda box, name, image=image: self._colour(image, box, name)))
        return told_of

    def _detect(self, images: Tensor, metadata: Sequence[Mapping[str, Any]]) -> list[dict[str, list[Found]]]:
        """The objects of each image by class, the most confident first."""
        device, size = device_of(self.device, images), list(images.shape[-2:])
        self.detector.to(device)
        pixels = np.ascontiguousarray(eight_bits(images).transpose(0, 3, 1, 2))
        sizes = torch.tensor([size] * len(images))
        least = min(self.threshold, self.counting_threshold)
        if self.takes_words:
            # Each image is looked through for its own words: a word's score may depend on the others.
            found = [self._by_words(one, classes(asked), sizes[:1], least, device) for one, asked in
                     zip(pixels, metadata, strict=True)]  # fmt: skip
        else:
            inputs = self.processor(images=list(pixels), input_data_format="channels_first", return_tensors="pt")
            outputs = self.detector(**self._inputs(inputs, device))
            told_of = self.processor.post_process_object_detection(outputs, threshold=least, target_sizes=sizes)
            names = self.detector.config.id2label
            found = [[(names[int(label)], score, box) for label, score, box in _rows(one, "labels")] for one in told_of]
        return [
            by_class(one, self.counting_threshold if asked.get("tag") == "counting" else self.threshold,
                     self.max_overlap)
            for one, asked in zip(found, metadata, strict=True)
        ]  # fmt: skip

    def _by_words(
        self, pixels: Any, words: Sequence[str], sizes: Tensor, least: float, device: torch.device
    ) -> list[tuple[str, float, Box]]:
        queries = [[f"a photo of a {word}" for word in words]]
        length = self.detector.config.text_config.max_position_embeddings
        texts: Any = {"text": queries, "padding": "max_length", "truncation": True, "max_length": length}
        inputs = self.processor(**texts, images=[pixels], input_data_format="channels_first", return_tensors="pt")
        outputs = self.detector(**self._inputs(inputs, device))
        (told_of,) = self.processor.post_process_grounded_object_detection(
            outputs, threshold=least, target_sizes=sizes, text_labels=[list(words)]
        )
        return [(str(word), score, box) for word, score, box in _rows(told_of, "text_labels")]

    def _inputs(self, inputs: Any, device: torch.device) -> dict[str, Tensor]:
        dtype = self.detector.dtype
        return {
            name: value.to(device, dtype) if value.is_floating_point() else value.to(device)
            for name, value in inputs.items()
        }

    def _colour(self, image: Tensor, box: Box, name: str) -> str:
        """The likeliest colour of an object."""
        if name not in self._colours:
            if len(self._colours) >= MOST_KNOWN:
                self._colours.clear()
            texts = [template.format(colour, name) for colour in COLOURS for template in TEMPLATES]
            read = self.clip.embed_prompts(texts, image.device)
            self._colours[name] = F.normalize(read.view(len(COLOURS), len(TEMPLATES), -1).mean(1), dim=-1)
        height, width = image.shape[-2:]
        left, top, right, bottom = (round(side) for side in box)
        left, top = min(max(left, 0), width - 1), min(max(top, 0), height - 1)
        right, bottom = min(max(right, left + 1), width), min(max(bottom, top + 1), height)
        seen = self.clip.embed_images(image[None, :, top:bottom, left:right])
        return COLOURS[int((self._colours[name].to(image.device) @ seen[0]).argmax())]

    def _asked(self, prompt: str, metadata: Mapping[str, Any], where: str) -> None:
        if why := self._unclear(metadata):
            raise ValueError(
                f"reward geneval needs GenEval's metadata of each prompt ({EXAMPLE}), got {why} for {prompt!r:.60} in "
                f"{where}; write it beside prompt in a .jsonl, or choose another reward"
            )

    def _unclear(self, metadata: Mapping[str, Any]) -> str:
        """What is wrong with metadata, "" where nothing is."""
        include, exclude = metadata.get("include", []), metadata.get("exclude", [])
        if not isinstance(include, list) or not isinstance(exclude, list) or not [*include, *exclude]:
            return "none"
        known = {SAME.get(label, label) for label in (self.detector.config.id2label or {}).values()}
        for place, entry in enumerate([*include, *exclude]):
            if not isinstance(entry, Mapping) or not isinstance(entry.get("class"), str):
                return f"the entry {entry!r:.60} without a class"
            count, colour, position = entry.get("count", 1), entry.get("color"), entry.get("position")
            if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= MOST_OBJECTS:
                return f"the count {count!r:.20}, which is none of 1 to {MOST_OBJECTS},"
            if not self.takes_words and _called(entry) not in known:
                return f"the class {entry['class']!r:.40}, which the detector does not know,"
            if colour is not None and colour not in COLOURS:
                return f"the color {colour!r:.20}, which is none of {', '.join(COLOURS)},"
            if position is not None and not _is_position(position, min(place, len(include))):
                return (
                    f"the position {position!r:.40}, which is no relation ({', '.join(RELATIONS)}) to an earlier entry,"
                )
        return ""


def met(asked: Mapping[str, Any], objects: Mapping[str, Sequence[Found]], colour_of: Any) -> list[tuple[str, bool]]:
    """Each attribute that is asked for, in words, and whether the image has it.

    Args:
        asked: metadata.
        objects: by class, the most confident first.
        colour_of: the colour of (box, class).
    """
    told_of: list[tuple[str, bool]] = []
    groups: list[Sequence[Found]] = []
    for entry in asked.get("include", []):
        name, count = _called(entry), entry.get("count", 1)
        found = objects.get(name, [])[:count]
        is_there = len(found) == count
        groups.append(found if is_there else [])
        told_of.append(("count", is_there))
        if "color" in entry and entry["color"] is not None:
            told_of.append(
                ("colour", is_there and all(colour_of(one.box, entry["class"]) == entry["color"] for one in found))
            )
        if "position" in entry and entry["position"] is not None:
            relation, target = entry["position"]
            pairs = [(one.box, other.box) for one in groups[-1] for other in groups[target]]
            told_of.append(("position", bool(pairs) and all(relation in relations(*pair) for pair in pairs)))
    for entry in asked.get("exclude", []):
        name = _called(entry)
        told_of.append(("absence", len(objects.get(name, [])) < entry.get("count", 1)))
    return told_of


def relations(one: Box, other: Box) -> set[str]:
    """Where a box is as seen from another; empty where they are at the same place but for the margin."""
    offset = [(one[axis] + one[axis + 2] - other[axis] - other[axis + 2]) / 2 for axis in (0, 1)]
    sizes = [abs(one[axis + 2] - one[axis]) + abs(other[axis + 2] - other[axis]) for axis in (0, 1)]
    beyond = [
        math.copysign(max(abs(value) - MARGIN * size, 0.0), value) for value, size in zip(offset, sizes, strict=True)
    ]
    if max(map(abs, beyond)) < 1e-3:
        return set()
    dx, dy = (value / math.hypot(*offset) for value in beyond)
    told_of = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {name for name, is_so in told_of.items() if is_so}


def by_class(
    found: Sequence[tuple[str, float, Box]], threshold: float, max_overlap: float = 1.0
) -> dict[str, list[Found]]:
    """The objects above a confidence by class, at most 16 of each, the most confident first."""
    objects: dict[str, list[Found]] = {}
    for label, score, box in sorted(found, key=lambda one: -one[1]):
        kept = objects.setdefault(SAME.get(label, label), [])
        is_new = max_overlap >= 1 or all(overlap(box, other.box) < max_overlap for other in kept)
        if score > threshold and len(kept) < MOST_OBJECTS and is_new:
            kept.append(Found(box, score))
    return {name: kept for name, kept in objects.items() if kept}


def overlap(one: Box, other: Box) -> float:
    """Intersection over union of two boxes."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(width, 0.0) * max(height, 0.0)
    whole = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)) - shared
    return shared / whole if whole else 0.0


def classes(asked: Mapping[str, Any]) -> list[str]:
    """The classes that metadata names, each once."""
    entries = [*asked.get("include", []), *asked.get("exclude", [])]
    return list(dict.fromkeys(_called(entry) for entry in entries))


def _called(entry: Mapping[str, Any]) -> str:
    """The class of an entry, as GenEval calls it."""
    name = str(entry["class"])
    return SAME.get(name, name)


def _rows(told_of: Mapping[str, Any], labels: str) -> list[tuple[Any, float, Box]]:
    boxes, scores = told_of["boxes"].float().tolist(), told_of["scores"].float().tolist()
    return [(label, score, tuple(box)) for label, score, box in zip(told_of[labels], scores, boxes, strict=True)]


def _is_position(position: Any, place: int) -> bool:
    """Whether it is [relation, index of an earlier entry]."""
    if not isinstance(position, list | tuple) or len(position) != 2:
        return False
    relation, target = position
    return relation in RELATIONS and isinstance(target, int) and 0 <= target < place

"""How many of a scene caption's attributes the picture satisfies, decided by classical image analysis.

A verifiable reward in the spirit of GenEval (2310.11513), without a detector: the background is the colour of the
frame's border, objects are connected regions that differ from it, and each object has an area, a place, a colour
and the shape whose template overlaps it best. `b` pictures, `k` objects at most, `s` shapes. Whole batches at once.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from adascope_fast.prompts.scenes import BACKGROUNDS, COLOURS, POSITIONS, SHAPES, SIZES, parse, refuse_others

ATTRIBUTES = ("count", "size", "colour", "shape", "background", "position")
SIZE = 64  # pictures are analysed at this resolution
MAX_OBJECTS = 5
FOREGROUND_DISTANCE = 0.16  # RGB distance from the background that makes a pixel part of an object
MIN_AREA = 30.0  # pixels; smaller regions are specks, not objects
SMALL_RADIUS = 7.8  # of a disc of equal area, in pixels
CENTRE_REACH = 6.0  # pixels from the middle that still count as "in the centre"
MIN_OVERLAP = 0.72  # intersection over union with the best template
PALETTE_DISTANCE = 0.30  # RGB distance beyond which a colour is none of the named ones
TEMPLATE = 24  # templates and cut-out objects have this many pixels a side


class SceneAttributes:
    """Reward in [0, 1]: the mean over the attributes that the caption names. Higher is better.

    An attribute counts only if every object in the picture has it. Prompts must be scene captions (ValueError).
    """

    name = "scene_attributes"

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores [b] float32 of pictures [b, 3, h, w] in [0, 1]."""
        satisfied, named = self.attributes(images, prompts)
        return (satisfied & named).sum(1) / named.sum(1).float()

    def check_prompts(self, prompts: Sequence[str], where: str) -> None:
        """ValueError where one of them is no scene caption."""
        refuse_others(prompts, where)

    def breakdown(self, images: Tensor, prompts: Sequence[str]) -> dict[str, float]:
        """Share of the pictures that satisfy each attribute, of those whose caption names it."""
        satisfied, named = self.attributes(images, prompts)
        shares = (satisfied & named).sum(0) / named.sum(0)
        return {name: share for name, share in zip(ATTRIBUTES, shares.tolist(), strict=True) if share == share}

    def attributes(self, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(satisfied, named), both bool [b, 6] in the order of `ATTRIBUTES`; only single objects name a position."""
        scenes = [parse(prompt) for prompt in prompts]
        device = images.device
        want = torch.tensor(
            [
                (
                    scene.count,
                    SIZES.index(scene.size),
                    list(COLOURS).index(scene.colour),
                    list(SHAPES).index(scene.shape),
                    list(BACKGROUNDS).index(scene.background),
                    list(POSITIONS).index(scene.position) if scene.position else -1,
                )
                for scene in scenes
            ],
            device=device,
        ).reshape(-1, 6)
        seen, present = describe(images)
        agrees = seen == want[:, None]  # [b, k, 6]
        alike = (agrees | ~present[..., None]).all(1) & present.any(1, keepdim=True)  # [b, 6]
        count = present.sum(1) == want[:, 0]
        background = seen[:, 0, 4] == want[:, 4]
        satisfied = torch.stack([count, alike[:, 1], alike[:, 2], alike[:, 3], background, alike[:, 5]], 1)
        named = torch.ones_like(satisfied)
        named[:, 5] = want[:, 5] >= 0
        return satisfied, named


def describe(images: Tensor) -> tuple[Tensor, Tensor]:
    """What the pictures [b, 3, h, w] show: (seen [b, k, 6] indices into the palettes, -1 for none; present [b, k])."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"pictures have shape [b, 3, h, w], got {list(images.shape)}")
    images = images.float()
    if images.shape[-2:] != (SIZE, SIZE):
        images = F.interpolate(images, (SIZE, SIZE), mode="area")
    border = torch.cat([images[:, :, 0], images[:, :, -1], images[:, :, :, 0], images[:, :, :, -1]], -1)
    background = border.median(-1).values  # [b, 3]
    mask = (images - background[:, :, None, None]).square().sum(1).sqrt() > FOREGROUND_DISTANCE
    objects, present = _objects(mask)  # [b, k, h, w], [b, k]
    area = objects.sum((2, 3))
    pixel = torch.arange(SIZE, device=images.device) + 0.5
    safe = area.clamp(min=1)
    x = (objects.sum(2) * pixel).sum(-1) / safe
    y = (objects.sum(3) * pixel).sum(-1) / safe
    # Antialiased edges mix in the background: the colour is the mean over the inside.
    inside = -F.max_pool2d(-objects, 3, 1, 1)
    inside = torch.where(inside.sum((2, 3), keepdim=True) > 0, inside, objects)
    colour = torch.einsum("bchw,bkhw->bkc", images, inside) / inside.sum((2, 3)).clamp(min=1)[..., None]
    seen = torch.stack(
        [
            torch.zeros_like(area, dtype=torch.long),
            (area > torch.pi * SMALL_RADIUS**2).long(),
            _nearest(colour, COLOURS),
            _shape(objects),
            _nearest(background, BACKGROUNDS)[:, None].expand(area.shape),
            _position(x, y),
        ],
        -1,
    )
    return seen, present


def _objects(mask: Tensor) -> tuple[Tensor, Tensor]:
    """The largest connected regions [b, k, h, w] as 0/1 floats, and which of them are real objects [b, k]."""
    b, h, w = mask.shape
    in_plane = np.zeros((3, 3, 3), dtype=int)
    in_plane[1] = 1  # regions touch along edges and corners, never across pictures
    found: Any = ndimage.label(mask.cpu().numpy(), in_plane)
    label = torch.from_numpy(found[0].astype(np.int64)).view(b, h * w)
    # Labels grow from picture to picture; count them from 1 in each.
    first = torch.where(label > 0, label, label.numel()).amin(1, keepdim=True)
    label = torch.where(label > 0, label - first + 1, 0).to(mask.device)
    area = torch.zeros(b, h * w + 1, device=mask.device).scatter_add_(1, label, (label > 0).float())
    area, index = area.topk(MAX_OBJECTS, dim=1)  # [b, k]
    present = area >= MIN_AREA
    objects = (label[:, None] == index[:, :, None]) & (index > 0)[:, :, None] & present[:, :, None]
    return objects.float().view(b, MAX_OBJECTS, h, w), present


def _nearest(colour: Tensor, palette: dict[str, tuple[int, int, int]]) -> Tensor:
    """Index of the nearest named colour of [..., 3] values, -1 where none is near."""
    values = torch.tensor(list(palette.values()), device=colour.device) / 255
    distance, index = torch.cdist(colour.reshape(1, -1, 3), values[None])[0].min(-1)
    return torch.where(distance < PALETTE_DISTANCE, index, -1).view(colour.shape[:-1])


def _position(x: Tensor, y: Tensor) -> Tensor:
    dx, dy = x - SIZE / 2, y - SIZE / 2
    names = list(POSITIONS)
    index = {name: torch.full_like(dx, names.index(name), dtype=torch.long) for name in names}
    sideways = torch.where(dx < 0, index["left"], index["right"])
    upright = torch.where(dy < 0, index["top"], index["bottom"])
    away = torch.where(dx.abs() > dy.abs(), sideways, upright)
    return torch.where(torch.maximum(dx.abs(), dy.abs()) < CENTRE_REACH, index["centre"], away)


def _shape(objects: Tensor) -> Tensor:
    """Index of the template that overlaps each object's bounding box best, -1 below `MIN_OVERLAP`."""
    b, k, h, w = objects.shape
    rows, columns = objects.amax(3), objects.amax(2)  # [b, k, h], [b, k, w]
    top, left = rows.argmax(-1), columns.argmax(-1)
    bottom, right = h - rows.flip(-1).argmax(-1), w - columns.flip(-1).argmax(-1)
    unit = (torch.arange(TEMPLATE, device=objects.device) + 0.5) / TEMPLATE
    y = top[..., None] + unit * (bottom - top)[..., None]  # [b, k, template] in pixels
    x = left[..., None] + unit * (right - left)[..., None]
    grid = torch.stack(torch.broadcast_tensors((x / w * 2 - 1)[:, :, None, :], (y / h * 2 - 1)[:, :, :, None]), -1)
    cut = F.grid_sample(objects.view(b * k, 1, h, w), grid.view(b * k, TEMPLATE, TEMPLATE, 2), align_corners=False)
    cut = (cut > 0.5).view(b, k, 1, -1)
    templates = _templates(objects.device)  # [s, template * template]
    overlap = (cut & templates).sum(-1) / (cut | templates).sum(-1).clamp(min=1)
    best, index = overlap.max(-1)
    stretched = (bottom - top).float() / (right - left).clamp(min=1)
    fits = (best >= MIN_OVERLAP) & (stretched > 0.6) & (stretched < 1.6)
    return torch.where(fits, index, -1)


def _templates(device: torch.device) -> Tensor:
    unit = (torch.arange(TEMPLATE, device=device) + 0.5) / TEMPLATE * 2 - 1
    y, x = torch.meshgrid(unit, unit, indexing="ij")
    shapes = {
        "circle": x.square() + y.square() <= 1,
        "square": torch.ones_like(x, dtype=torch.bool),
        "triangle": x.abs() <= (y + 1) / 2,
        "cross": (x.abs() <= 1 / 3) | (y.abs() <= 1 / 3),
    }
    return torch.stack([shapes[name] for name in SHAPES]).flatten(1)

"""Pictures of scenes, drawn by distance functions and antialiased over one pixel.

`b` scenes, `k` objects at most (3), 64 x 64 pixels. Every shape has the area of a disc of its radius,
so "small" and "large" mean the same for a cross and a circle. Positions come from `place`, colours get a small jitter.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from adascope_fast.prompts.scenes import BACKGROUNDS, COLOURS, SHAPES, Scene

IMAGE_SIZE = 64
SMALL_RADIUS = (5.2, 6.8)
LARGE_RADIUS = {1: (10.5, 13.0), 2: (9.5, 11.5), 3: (8.8, 9.8)}
# Half width and half height of each shape of unit-disc area (pi).
HALF_SQUARE = np.pi**0.5 / 2
CIRCUMRADIUS_TRIANGLE = (4 * np.pi / (3 * 3**0.5)) ** 0.5
ARM_CROSS = (np.pi * 9 / 20) ** 0.5  # arms a third as wide as long
HALF_EXTENT = {
    "circle": (1.0, 1.0),
    "square": (HALF_SQUARE, HALF_SQUARE),
    "triangle": (CIRCUMRADIUS_TRIANGLE * 3**0.5 / 2, CIRCUMRADIUS_TRIANGLE * 0.75),
    "cross": (ARM_CROSS, ARM_CROSS),
}
_NUM_CANDIDATES = 400


def draw(scenes: Sequence[Scene], seed: int) -> Tensor:
    """Pictures [b, 3, 64, 64] in [0, 1] that satisfy every attribute of their scene; the seed fixes the rest."""
    rng = np.random.default_rng(seed)
    centre = np.full((len(scenes), 3, 2), np.nan)
    radius = np.zeros((len(scenes), 3))
    for b, scene in enumerate(scenes):
        low, high = SMALL_RADIUS if scene.size == "small" else LARGE_RADIUS[scene.count]
        radius[b, : scene.count] = rng.uniform(low, high, scene.count)
        centre[b, : scene.count] = _place(scene, radius[b, : scene.count], rng)
    names = list(SHAPES)
    shape = torch.tensor([names.index(scene.shape) for scene in scenes])
    colour = _palette([COLOURS[scene.colour] for scene in scenes], 8, rng)
    background = _palette([BACKGROUNDS[scene.background] for scene in scenes], 6, rng)
    distance = _distance(torch.from_numpy(centre).float(), torch.from_numpy(radius).float())  # [shape, b, k, h, w]
    distance = distance[shape, torch.arange(len(scenes))]
    coverage = (0.5 - distance).clamp(0, 1).nan_to_num(0.0).amax(1, keepdim=True)  # [b, 1, h, w]
    return background + coverage * (colour - background)


def where_objects(pictures: Tensor) -> Tensor:
    """Pixels [b, 1, h, w], bool, of a drawing that differ from its corner, which is background."""
    return (pictures - pictures[:, :, :1, :1]).abs().sum(1, keepdim=True) > 0.1


def _palette(colours: list[tuple[int, int, int]], jitter: float, rng: np.random.Generator) -> Tensor:
    values = np.array(colours, dtype=np.float64).reshape(-1, 3) + rng.uniform(-jitter, jitter, (len(colours), 3))
    return torch.from_numpy(values.clip(0, 255) / 255).float()[:, :, None, None]


def _place(scene: Scene, radius: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Centres [k, 2] (x, y) in pixels: inside the frame, boxes at least two pixels apart."""
    half = radius[:, None] * np.array(HALF_EXTENT[scene.shape])  # [k, 2]
    if scene.position is not None:
        return _place_at(scene.position, half, rng)
    low, high = half + 1, IMAGE_SIZE - half - 1
    candidates = rng.uniform(low, high, (_NUM_CANDIDATES, *half.shape))  # [m, k, 2]
    gap = np.abs(candidates[:, :, None] - candidates[:, None]) - (half[:, None] + half[None]) - 2
    apart = (gap.max(-1) >= 0) | np.eye(len(radius), dtype=bool)
    good = apart.all((1, 2)).nonzero()[0]
    if len(good):
        return candidates[good[0]]
    corners = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, 1.0]])[: len(radius)]
    return low + corners * (high - low)


def _place_at(position: str, half: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    middle = IMAGE_SIZE / 2
    furthest = middle - half[0] - 1  # [2]
    along, across = rng.uniform(0, 1), rng.uniform(-4, 4)
    if position == "centre":
        return middle + rng.uniform(-2.5, 2.5, (1, 2))
    axis = 0 if position in ("left", "right") else 1
    sign = -1 if position in ("left", "top") else 1
    offset = np.zeros(2)
    offset[axis] = sign * (furthest[axis] - along * max(furthest[axis] - 13, 0))
    offset[1 - axis] = across
    return (middle + offset)[None]


def _distance(centre: Tensor, radius: Tensor) -> Tensor:
    """Signed distances in pixels, negative inside: [shape, b, k, h, w], NaN where there is no object."""
    grid = torch.arange(IMAGE_SIZE) + 0.5
    dx = grid[None, None, None, :] - centre[:, :, 0, None, None]
    dy = grid[None, None, :, None] - centre[:, :, 1, None, None]
    r = radius[:, :, None, None]
    dx, dy = torch.broadcast_tensors(dx, dy)
    circle = (dx.square() + dy.square()).sqrt() - r
    square = torch.maximum(dx.abs(), dy.abs()) - HALF_SQUARE * r
    # The box of the triangle is centred, so its circumcentre lies a quarter of the height below the middle.
    below = dy - CIRCUMRADIUS_TRIANGLE * r * 0.25
    inner = CIRCUMRADIUS_TRIANGLE * r / 2
    triangle = torch.maximum(below - inner, dx.abs() * (3**0.5 / 2) - below * 0.5 - inner)
    arm, width = ARM_CROSS * r, ARM_CROSS * r / 3
    cross = torch.minimum(
        torch.maximum(dx.abs() - arm, dy.abs() - width), torch.maximum(dx.abs() - width, dy.abs() - arm)
    )
    return torch.stack([circle, square, triangle, cross])

"""Pictures on disk: grids whose pictures stand apart and can be cut out again, and captioned sheets for people.

Axes: `n` pictures, `h` and `w` pixels; values in [0, 1]. CPU tensors and numpy arrays are both taken.
"""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

FONT_SIZE = 13
GAP = 6
"""Pixels between two pictures of a grid: white, and a grey frame of one pixel around each picture."""
MOST_SHOWN = 256
"""Pixels of a picture's longer side on a page, twice what it is shown at for screens that have them."""


def save_grid(images: Any, columns: int, path: Path) -> None:
    """Write the pictures as `grid` lays them out, as one PNG, whose folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(grid(images, columns)).save(path)


def grid(images: Any, columns: int) -> np.ndarray:
    """The pictures [n, 3, h, w] as one of 8 bits, row by row, with `GAP` between them; places left over are white.

    Args:
        images: values outside [0, 1] are clipped.
        columns: pictures in a row.
    """
    pixels = _to_pixels(images)
    num, height, width, _ = pixels.shape
    rows = -(-num // columns)
    laid = np.full((rows * (height + GAP) + GAP, columns * (width + GAP) + GAP, 3), 255, np.uint8)
    for index, image in enumerate(pixels):
        top, left = index // columns * (height + GAP) + GAP, index % columns * (width + GAP) + GAP
        laid[top - 1 : top + height + 1, left - 1 : left + width + 1] = 150
        laid[top : top + height, left : left + width] = image
    return laid


def contact_sheet(images: Any, captions: Sequence[str], columns: int, path: Path, *, scale: int = 2) -> None:
    """Write the pictures, enlarged by `scale`, as one PNG on white, each with its caption wrapped below."""
    pixels = _to_pixels(images)
    num, height, width, _ = pixels.shape
    if len(captions) != num:
        raise ValueError(f"a contact sheet needs one caption a picture, got {len(captions)} for {num}; pass as many")
    height, width, gap = height * scale, width * scale, 8
    font = ImageFont.load_default(FONT_SIZE)
    lines = [_wrap(caption, width, font) for caption in captions]
    line_height = FONT_SIZE + 3
    cell = height + line_height * max(map(len, lines), default=0) + gap
    rows = -(-num // columns)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (cell + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for index, image in enumerate(pixels):
        left, top = gap + index % columns * (width + gap), gap + index // columns * (cell + gap)
        enlarged = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
        sheet.paste(enlarged, (left, top))
        for number, line in enumerate(lines[index]):
            draw.text((left, top + height + 3 + number * line_height), line, fill=(40, 40, 40), font=font)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def cut(path: Path, rows: int, columns: int, *, gap: int) -> list[list[str]]:
    """The pictures of a grid PNG, row by row, each as a `data:` address; large ones are made smaller.

    ValueError where so many do not fit.

    Args:
        gap: pixels around each picture; 0 for a grid without gaps, as earlier versions wrote.
    """
    with Image.open(path) as grid:
        width, height = ((side - gap) // number - gap for side, number in ((grid.width, columns), (grid.height, rows)))
        if min(width, height) < 1:
            raise ValueError(
                f"a grid of {rows} by {columns} pictures is larger than {grid.width} x {grid.height} pixels"
            )
        corners = [
            [(gap + column * (width + gap), gap + row * (height + gap)) for column in range(columns)]
            for row in range(rows)
        ]
        return [
            [_shown(grid.crop((left, top, left + width, top + height))) for left, top in row_corners]
            for row_corners in corners
        ]


def strip(images: Sequence[np.ndarray], *, side: int) -> str:
    """Images [h, w, 3] of 8 bits beside each other, `side` pixels high at most, as a `data:` address."""
    parts = [Image.fromarray(image) for image in images]
    height = min(side, *(part.height for part in parts)) if len(parts) > 1 else min(side, parts[0].height)
    parts = [part.resize((max(1, part.width * height // part.height), height)) for part in parts]
    joined = Image.new("RGB", (sum(part.width for part in parts), height))
    left = 0
    for part in parts:
        joined.paste(part, (left, 0))
        left += part.width
    return _data_url(joined)


def _shown(image: Image.Image) -> str:
    """A small picture as it is; a large one smaller, and as JPEG, so that a page of many can be sent."""
    if max(image.size) <= MOST_SHOWN:
        return _data_url(image)
    image.thumbnail((MOST_SHOWN, MOST_SHOWN), Image.Resampling.LANCZOS)
    return _data_url(image, "JPEG", quality=90)


def _data_url(image: Image.Image, kind: str = "PNG", **how: Any) -> str:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format=kind, optimize=True, **how)
    return f"data:image/{kind.lower()};base64," + base64.b64encode(buffer.getvalue()).decode()


def _to_pixels(images: Any) -> np.ndarray:
    values = np.asarray(images, dtype=np.float32)
    if values.ndim != 4 or values.shape[1] != 3 or not len(values):
        raise ValueError(
            f"pictures are [n, 3, h, w] with n >= 1, got {list(values.shape)}; stack them along the first axis"
        )
    return np.rint(np.clip(np.nan_to_num(values), 0, 1) * 255).astype(np.uint8).transpose(0, 2, 3, 1)


def _wrap(text: str, width: int, font: Any) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines

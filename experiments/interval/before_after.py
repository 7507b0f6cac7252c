"""A run's held-out pictures before and after training, side by side on the same seeds, as one PNG for people.

python experiments/interval/before_after.py runs/quickstart [--prompts N] [--out FILE.png]
"""

import argparse
import json
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).parent
SCALE, MARGIN, GUTTER, FONT_SIZE = 2, 10, 24, 18
HEADER, CAPTION = 34, 26  # pixels above the first row and below each


def main() -> None:
    """Write the PNG and say where."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--prompts", type=int, default=6, help="rows, from the first held-out caption on")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "before_after.png")
    chosen = parser.parse_args()
    if not (chosen.run / "samples" / "after.png").is_file():
        parser.error(f"a finished run has samples/after.png, {str(chosen.run)!r} has not; check the path")
    before_after(chosen.run, num_prompts=chosen.prompts).save(chosen.out)
    print(chosen.out)


def before_after(run: Path, *, num_prompts: int) -> Image.Image:
    """The first rows of `samples/before.png` and `samples/after.png`, enlarged, each with its caption below."""
    grid = json.loads((run / "samples" / "grid.json").read_text(encoding="utf-8"))
    num_iterations = len((run / "stats.jsonl").read_text(encoding="utf-8").splitlines())
    prompts, tile = grid["prompts"][:num_prompts], grid["tile"]
    gap = grid.get("gap", 0)  # earlier runs have none
    width, height = grid["columns"] * (tile + gap) - gap, tile
    size = (2 * (MARGIN + width * SCALE) + GUTTER, HEADER + len(prompts) * (height * SCALE + CAPTION))
    sheet, font = Image.new("RGB", size, "white"), ImageFont.load_default(FONT_SIZE)
    draw = ImageDraw.Draw(sheet)
    halves = (("before", "base"), ("after", f"after {num_iterations} iterations, same seeds"))
    for half, (name, title) in enumerate(halves):
        left = MARGIN + half * (width * SCALE + GUTTER)
        draw.text((left, 8), title, fill="black", font=font)
        with Image.open(run / "samples" / f"{name}.png") as images:
            for row in range(len(prompts)):
                upper = gap + row * (height + gap)
                strip = images.crop((gap, upper, gap + width, upper + height))
                top = HEADER + row * (height * SCALE + CAPTION)
                sheet.paste(strip.resize((width * SCALE, height * SCALE), Image.Resampling.BICUBIC), (left, top))
    for row, prompt in enumerate(prompts):
        top = HEADER + (row + 1) * (height * SCALE + CAPTION) - CAPTION
        draw.text((MARGIN, top + 2), prompt, fill="black", font=font)
    return sheet


if __name__ == "__main__":
    main()

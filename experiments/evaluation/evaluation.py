"""Three runs of the quickstart beside their base model: the interval, every step, and a reward that can be hacked.

    .venv/bin/python experiments/evaluation/evaluation.py --work runs/evaluation

Trains what is not there yet (about five CPU minutes a run), evaluates, and writes `results/` and the page's picture,
docs/images/evaluate.png, which needs a Chromium (tests/browser.py).
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results"
RUNS = {
    "adascope": [],
    "every_step": ["selector.name=every_step"],
    "compressible": ["reward.name=jpeg_compressibility"],
}
SHARED = ["evaluation.every=5", "evaluation.clip=scenes-clip"]


def main() -> None:
    """Train, evaluate, and keep what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/evaluation"), help="folder of the runs and the images")
    work = parser.parse_args().work
    for name, changes in RUNS.items():
        if not (work / name / "report.html").is_file():
            command("train", CHECKOUT / "configs" / "quickstart.toml", f"run.folder={work / name}", *SHARED, *changes)
    out = work / "compared"
    command("evaluate", *(f"{name}={work / name}" for name in RUNS), "--out", out)
    for name in ("evaluation.json", "table.csv"):
        shutil.copy(out / name, RESULTS / name)
    picture(out / "report.html", CHECKOUT / "docs" / "images" / "evaluate.png")


def command(*arguments: str | Path) -> None:
    """A command of the program, which must succeed."""
    subprocess.run([sys.executable, "-m", "adascope_fast.cli", *map(str, arguments)], check=True)


def picture(page: Path, image: Path) -> None:
    """Pictures of the page: its table and images, and beside it what is said of hacking and variety."""
    sys.path.insert(0, str(CHECKOUT / "tests"))
    from browser import opened

    with opened(viewport={"width": 1100, "height": 800}) as browser:
        browser.goto(page.resolve().as_uri())
        for number, section in enumerate(browser.locator("section").all()[:4]):
            section.screenshot(path=image.with_stem(f"{image.stem}_{number}"))
    parts = [image.with_stem(f"{image.stem}_{number}") for number in range(4)]
    stacked([parts[1], parts[3]], image.with_stem(f"{image.stem}_hacked"))
    stacked([parts[0], parts[2]], image)
    for part in parts:
        part.unlink()


def stacked(parts: list[Path], image: Path) -> None:
    """The pictures below each other, the lower end of tall ones cut off."""
    from PIL import Image

    opened = [Image.open(part).convert("RGB") for part in parts]
    opened = [part.crop((0, 0, part.width, min(part.height, 1250))) for part in opened]
    whole = Image.new("RGB", (max(part.width for part in opened), sum(part.height + 16 for part in opened)), "#f7f7f5")
    top = 0
    for part in opened:
        whole.paste(part, (0, top))
        top += part.height + 16
    whole.save(image, optimize=True)


if __name__ == "__main__":
    main()

"""Screenshots of a report, a calibration and an evaluation for the documentation, wide and narrow, light and dark.

`python tests/reporting/screenshots.py RUN CALIBRATION EVALUATION [--out FOLDER]`; the first two pages are written again
first.
"""

import argparse
import io
import json
import sys
from pathlib import Path
from typing import Any

from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from browser import opened

from adascope_fast.reporting import write_calibration, write_report

OUT = Path(__file__).parents[2] / "docs" / "images"
SIZES = {"wide": (1200, 1500), "narrow": (500, 1500)}


def main() -> None:
    """Write the images and say which."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("calibration", type=Path, help="folder of a calibration")
    parser.add_argument("evaluation", type=Path, help="folder of an evaluation")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the images")
    chosen = parser.parse_args()
    values = json.loads((chosen.calibration / "calibration.json").read_text(encoding="utf-8"))
    report, calibration = write_report(chosen.run), write_calibration(values, chosen.calibration)
    chosen.out.mkdir(parents=True, exist_ok=True)
    for name, (width, height) in SIZES.items():
        for scheme, place in (("light", "top"), ("dark", "pictures")):
            shots = [("report", report, place), ("calibration", calibration, "top")]
            shots.append(("evaluation", chosen.evaluation / "report.html", place))
            with opened(viewport={"width": width, "height": height}, color_scheme=scheme) as page:
                for kind, path, where in shots:
                    _save(page, path, where, chosen.out / f"{kind}_{name}_{scheme}.webp")
    with opened(viewport=dict(zip(("width", "height"), SIZES["wide"], strict=True))) as page:
        _save(page, report, "charts", chosen.out / "report_charts.webp")


def _save(page: Any, shown: Path, where: str, path: Path) -> None:
    """A window of a page from an anchor on, without loss where that is smaller, as it is for text."""
    page.goto(f"{shown.absolute().as_uri()}#{where}")
    found = []
    with Image.open(io.BytesIO(page.screenshot())) as image:
        for how in ({"lossless": True}, {"quality": 90}):
            image.convert("RGB").save(buffer := io.BytesIO(), "WEBP", method=6, **how)
            found.append(buffer.getvalue())
    path.write_bytes(min(found, key=len))
    print(f"{path}: {path.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main()

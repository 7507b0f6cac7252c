"""The report and the calibration in a browser: they fit narrow and wide windows, and nothing is only to be seen."""

import json
from pathlib import Path
from typing import Any

import pytest
from browser import opened
from run_folders import COLUMNS, PROMPTS, make_run, page_of

from adascope_fast.reporting import write_calibration

NUM_STEPS = 20


def _curve(num: int) -> dict[str, list[float]]:
    return {"mean": [0.9 - 0.04 * i for i in range(num)], "std": [0.02] * num}


def _decision(kappa: float) -> dict[str, Any]:
    told = {"kappa": kappa, "phi_end": 0.1, "mean_start": 2.5, "mean_end": 12.5, "std_start": 1.0, "std_end": 0.5}
    return told | {"fraction": 0.5, "reasons": {"fallback:no_start:memory": 2}, "intervals": [[2, 12], [3, 13]]}


CALIBRATION = {
    "num_steps": NUM_STEPS, "num_prompts": 2, "samples_per_prompt": 4, "reward": "r", "model": "m", "seed": 7,
    "structure": "1 - correlation of guesses", "preference": "correlation with the final latent",
    "curves": {"structure": _curve(20), "preference": _curve(21), "reward": _curve(21), "uncertainty": _curve(20)},
    "theory": [0.2] * 20, "sampler": [0.1] * 20, "configured": _decision(0.25), "proposed": _decision(0.9),
    "target": (0.106, 0.636), "aim": "where they were asked to", "seconds": 1.0,
    "halves": {"num": 8, "kappa": (0.7, 1.0), "phi_end": (0.04, 0.05), "miss_start": 0.5, "miss_end": 0.2},
}  # fmt: skip


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A report with long names and values, and a calibration."""
    folder = tmp_path_factory.mktemp("pages")
    run = make_run(folder / "run")
    (run / "adapter").mkdir()
    (run / "adapter" / "a.safetensors").touch()
    config = (run / "config.toml").read_text()
    (run / "config.toml").write_text(config.replace("[model]\n", f'[model]\nlora_targets = ["{"a_long_name." * 9}"]\n'))
    record = json.loads((run / "run.json").read_text()) | {"command": "adascope-fast train " + "a" * 150}
    (run / "run.json").write_text(json.dumps(record))
    page_of(run)
    return {"report": run / "report.html", "calibration": write_calibration(CALIBRATION, folder / "calibration")}


@pytest.mark.parametrize("name", ["report", "calibration"])
def test_a_page_fits_its_window_in_both_themes(pages: dict[str, Path], name: str):
    grounds = set()
    for scheme in ("light", "dark"):
        with opened(viewport={"width": 1200, "height": 800}, color_scheme=scheme) as page:
            for width in (1200, 500, 360):
                page.set_viewport_size({"width": width, "height": 800})
                page.goto(pages[name].as_uri())
                assert page.evaluate("document.documentElement.scrollWidth") <= width
            grounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert len(grounds) == 2


@pytest.mark.parametrize("width", [1200, 500])
def test_pictures_stand_apart_at_a_size_to_be_seen(pages: dict[str, Path], width: int):
    with opened(viewport={"width": width, "height": 800}) as page:
        page.goto(pages["report"].as_uri())
        boxes = page.evaluate("[...document.images].map(image => image.getBoundingClientRect().toJSON())")
        assert len(boxes) == 2 * COLUMNS * len(PROMPTS)
        assert all(96 <= box["width"] <= 128 and box["height"] == pytest.approx(box["width"], abs=1) for box in boxes)
        one, other = boxes[:2]
        assert other["left"] - one["right"] >= 6
        assert all(page.evaluate("[...document.images].map(image => image.naturalWidth > 0 && image.alt.length > 20)"))


def test_a_click_selects_what_is_to_be_copied(pages: dict[str, Path]):
    for name, want in (("report", "adascope-fast train "), ("calibration", "[selector]\nkappa = 0.9\nphi_end = 0.1")):
        with opened(viewport={"width": 1200, "height": 800}) as page:
            page.goto(pages[name].as_uri())
            page.locator("pre.copy").first.click()
            assert page.evaluate("getSelection().toString()").startswith(want)


@pytest.mark.parametrize("name", ["report", "calibration"])
def test_every_chart_has_a_name_for_who_does_not_see_it(pages: dict[str, Path], name: str):
    with opened(viewport={"width": 1200, "height": 800}) as page:
        page.goto(pages[name].as_uri())
        charts = page.get_by_role("img").and_(page.locator("svg"))
        assert charts.count() == page.locator("svg").count() > 4
        labels = charts.evaluate_all("charts => charts.map(chart => chart.getAttribute('aria-label'))")
        assert all(any(letter.isdigit() for letter in label) for label in labels)

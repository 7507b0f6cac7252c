"""The report page: made from the run folder alone, safe to open, complete, and honest about what is missing."""

import base64
import io
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from run_folders import COLUMNS, HOSTILE, NUM_STEPS, PROMPTS, images_of, make_run, page_of, record_of, words_of

from adascope_fast.reporting import figures, write_report
from adascope_fast.reporting.by_step import MEANINGS, starts_and_ends

TITLE_OF_HISTOGRAM = "starts and ends, of all prompts and iterations"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


def test_texts_of_the_run_are_escaped(run: Path):
    page = page_of(run)
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt; &amp; &#34;quotes&#34;") >= 3  # caption and two alt texts
    assert HOSTILE in words_of(page)


def test_each_part_of_a_reward_has_a_curve_and_its_name_is_escaped(run: Path):
    assert "Its parts in training" not in words_of(page_of(run))
    lines = [json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines()]
    for number, line in enumerate(lines):
        line["reward_parts"] = {HOSTILE: 0.5 + 0.01 * number, "pick_score": 20.0 + number, "never": None}
    lines[3]["reward_parts"] = "nothing"
    (run / "stats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = page_of(run)
    assert "Its parts in training, each without its weight:" in words_of(page)
    assert "<script" not in page
    assert page.count('aria-label="pick_score by iteration"') == 1
    label = "&lt;script&gt;alert(1)&lt;/script&gt; &amp; &quot;quotes&quot; by iteration"
    assert page.count(f'aria-label="{label}"') == 1
    assert HOSTILE in words_of(page)
    assert "never by iteration" not in page


def test_page_makes_no_request(run: Path):
    page = page_of(run)
    assert not re.search(r"(https?:)?//\w", re.sub(r"data:image/png;base64,[\w+/=]+", "", page))
    assert set(re.findall(r'(?:src|href)="([a-z:/]+);', page)) == {"data:image/png"}
    assert "default-src 'none'" in page
    assert not re.search(r"url\(|@import|<link|<iframe", page)


def test_headline_numbers(run: Path):
    words = words_of(page_of(run))
    for expected in (
        "before 0.512 95 %: 0.481 to 0.544",
        "after 0.699 95 %: 0.669 to 0.728",
        "difference +0.186 95 %: +0.151 to +0.222",
        "The reward rose by more than the 95 % interval.",
        "192 pictures",
        "colour 61.0% 83.0% +22.0",
        "shape 55.0% - -",
        "finished, 30 of 30 iterations",
        "peak memory 1,834 MB",
        "time in all 2 min 51 s",
        "torch 2.13.0",
        "commit 0123abc",
        "knee 60 66.7%",
        "fallback:no_gain 30 33.3%",
    ):
        assert expected in words, expected


@pytest.mark.parametrize(
    ("low", "high", "want"),
    [
        (-0.02, 0.06, "includes 0: no clear change"),
        (-0.2, -0.1, "fell by more than the 95 % interval"),
        (None, None, "No interval of the difference was recorded"),
    ],
)
def test_verdict_follows_the_interval(run: Path, low: float | None, high: float | None, want: str):
    evaluation = json.loads((run / "evaluation.json").read_text())
    evaluation["difference"] = {"mean": 0.02, "low": low, "high": high}
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    words = words_of(page_of(run))
    assert want in words
    assert "rose by more" not in words


def test_variety_is_shown_beside_the_reward(run: Path):
    words = words_of(page_of(run))
    assert "diversity 0.250 0.200 -20%" in words
    assert "contrast 0.260 0.130 -50%" in words


@pytest.mark.parametrize(
    ("means", "want"),
    [
        ([0.5, 0.6, 0.7], "The held-out reward was highest at the end."),
        ([0.5, 0.75, 0.62], "highest (0.750) after 10 of 20 iterations and fell by 0.130."),
    ],
)
def test_a_reward_that_swung_back_is_told(run: Path, means: list[float], want: str):
    assert "was highest" not in words_of(page_of(run)), "with two evaluations there is nothing to tell"
    evaluation = json.loads((run / "evaluation.json").read_text())
    evaluation["history"] = [
        {"iteration": 10 * k, "mean": mean, "low": mean, "high": mean, "diversity": 0.3 - 0.05 * k, "contrast": 0.2}
        for k, mean in enumerate(means)
    ]
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    page = page_of(run)
    assert want in words_of(page)
    for name in ("diversity", "contrast"):
        assert page.count(f'aria-label="{name} by iteration"') == 1


def test_a_single_picture_a_prompt_has_no_diversity(run: Path):
    evaluation = json.loads((run / "evaluation.json").read_text())
    for when in ("before", "after"):
        evaluation[when]["diversity"] = None
        evaluation[when]["contrast"] = 0.26 if when == "before" else 0.2599
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    words = words_of(page_of(run))
    assert "diversity 0" not in words
    assert "contrast 0.260 0.260 +0%" in words


def test_the_page_says_that_the_complement_was_trained(run: Path):
    assert "as a control" not in words_of(page_of(run))
    record = record_of(0)
    record["selector"]["is_complement"] = True
    (run / "stats.jsonl").write_text(json.dumps(record))
    assert "as a control, the steps outside it were trained" in words_of(page_of(run))


def test_steps_are_shown_early_and_late(run: Path):
    page = page_of(run)
    section = page.split("<h2>By denoising step</h2>")[1].split("</section>")[0]
    titles = re.findall(r"<h3>(.*?)</h3>", section)
    assert titles == [*(meaning for name, meaning in MEANINGS.items() if name != "structure"), TITLE_OF_HISTOGRAM]
    charts = section.split("<h3>")[1:-1]
    assert all(len(re.findall(r'class="line [ea]"', chart)) == 2 for chart in charts), "two curves in each"
    early, late = re.findall(r'class="line [ea]" d="M([^"]*)"', charts[titles.index("pictures trained")])
    assert len(early.split("L")) == len(late.split("L")) == NUM_STEPS
    # Iterations 0..9 trained 4.5 pictures a step on average, 20..29 trained 24.5.
    heights = [float(curve.split("L")[3].split()[1]) for curve in (early, late)]
    zero = float(early.split("L")[0].split()[1])
    assert (zero - heights[1]) / (zero - heights[0]) == pytest.approx(24.5 / 4.5, rel=0.05)


def test_starts_and_ends_are_counted():
    stats = [{"selector": {"intervals": [[2, 5], [3, 5]]}}, {"selector": {"intervals": [[2, 4]]}}, {"selector": {}}]
    chart = starts_and_ends(stats, 6)
    assert re.findall(r'class="fill (\w)".*?<title>(.*?)</title>', chart) == [
        ("c", "step 2: 2"),
        ("c", "step 3: 1"),
        ("b", "step 4: 1"),
        ("b", "step 5: 2"),
    ]
    heights = {title: float(height) for height, title in re.findall(r'height="([\d.]+)"><title>(.*?)</title>', chart)}
    assert heights["step 5: 2"] == pytest.approx(2 * heights["step 4: 1"], abs=0.2)
    assert starts_and_ends([{"selector": {}}], 6) == ""


def test_a_run_without_records_by_step_has_no_such_section(run: Path):
    record = record_of(0) | {"steps": {}}
    record["selector"]["curves"] = {}
    (run / "stats.jsonl").write_text(json.dumps(record))
    assert "By denoising step" not in page_of(run)


def test_a_moving_window_is_drawn(run: Path):
    lines = [json.dumps(record_of(i) | {"selector": {"start": i, "end": i + 4, "fraction": 0.2}}) for i in range(5)]
    (run / "stats.jsonl").write_text("\n".join(lines))
    section = page_of(run).split("<h2>Trained steps</h2>")[1].split("</section>")[0]
    assert "records no interval" not in section
    (start,) = re.findall(r'class="line c" d="M([^"]*)"', section)
    heights = [float(point.split()[1]) for point in start.split("L")]
    assert heights == sorted(heights, reverse=True), "it rises towards the picture"
    assert len(set(heights)) == 5


def test_time_is_summed_and_shared(run: Path):
    words = words_of(page_of(run))
    assert "rollout 45.0 s 37.5% 1.50 s" in words  # 30 iterations of 4 s, 1.5 of them rollout
    assert "update 60.0 s 50.0% 2.00 s" in words


def test_pictures_pair_up_by_prompt(run: Path):
    page = page_of(run)
    sources = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    strips = [np.asarray(Image.open(io.BytesIO(base64.b64decode(source)))) for source in sources]
    assert len(strips) == 2 * len(PROMPTS)
    for index, strip in enumerate(strips):
        row, after = divmod(index, 2)
        images = images_of(after)[row * COLUMNS : (row + 1) * COLUMNS]
        want = np.rint(np.concatenate(list(images), axis=2).transpose(1, 2, 0) * 255)
        np.testing.assert_array_equal(strip, want)


def test_run_stopped_in_the_middle(run: Path):
    record = json.loads((run / "run.json").read_text()) | {"status": "interrupted"}
    (run / "run.json").write_text(json.dumps(record))
    evaluation = json.loads((run / "evaluation.json").read_text())
    (run / "evaluation.json").write_text(json.dumps({key: evaluation[key] for key in ("reward", "before")}))
    lines = (run / "stats.jsonl").read_text().splitlines(keepends=True)
    (run / "stats.jsonl").write_text("".join(lines[:11]) + lines[11][:40])
    (run / "samples" / "after.png").write_bytes((run / "samples" / "after.png").read_bytes()[:60])
    words = words_of(page_of(run))
    assert "interrupted after 11 of 30 iterations" in words
    assert "The run had not finished: there is no evaluation after training." in words
    assert "not drawn: the run had not finished" in words
    assert "before 0.512" in words


def test_folder_with_nothing_in_it(tmp_path: Path):
    words = words_of(page_of(tmp_path))
    for sentence in (
        "No evaluation was recorded",
        "No pictures were recorded",
        "No iteration was recorded",
        "No times were recorded",
        "Nothing about the run was recorded",
        "config.toml is missing",
    ):
        assert sentence in words


def test_not_a_folder(tmp_path: Path):
    with pytest.raises(ValueError, match=r"a report needs the folder of a run, got .*nothing, which is not a folder"):
        write_report(tmp_path / "nothing")


def test_selector_without_intervals(run: Path):
    record = record_of(0) | {"selector": {}}
    (run / "stats.jsonl").write_text(json.dumps(record) + "\n")
    words = words_of(page_of(run))
    assert "records no interval" in words
    assert "records no reasons" in words


def test_values_that_are_not_finite_are_left_out(run: Path):
    records = [record_of(i) for i in range(4)]
    records[1]["reward_mean"] = math.nan
    records[2]["grad_norm"] = math.inf
    records[2]["nonfinite"] = 3
    (run / "stats.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    page = page_of(run)
    for chart in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL):
        assert not re.search(r"\b(nan|inf)\b", chart)
    assert "Not finite, and left out: 3 log-probabilities or ratios." in words_of(page)


def test_iteration_run_twice_counts_once(run: Path):
    with (run / "stats.jsonl").open("a") as file:
        file.write(json.dumps(record_of(29) | {"reward_mean": 0.123456}) + "\n")
    words = words_of(page_of(run))
    assert "30 of 30 iterations" in words
    assert "29 0.1235" in words


def test_charts_are_well_formed_and_stay_inside(run: Path):
    charts = re.findall(r"<svg.*?</svg>", page_of(run), flags=re.DOTALL)
    assert len(charts) == 18
    for chart in charts:
        root = ElementTree.fromstring(chart)
        _, _, width, height = map(float, root.attrib["viewBox"].split())
        for path in root.iter("path"):
            for x, y in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", path.attrib["d"]):
                assert 0 <= float(x) <= width
                assert 0 <= float(y) <= height


def test_axes_place_the_corners():
    axes = figures.Axes(
        (0, 10), (0, 1), "x", "y", width=100 + figures.LEFT + figures.RIGHT, height=50 + figures.TOP + figures.BOTTOM
    )
    assert axes.place(0, 1) == (figures.LEFT, figures.TOP)
    assert axes.place(10, 0) == (figures.LEFT + 100, figures.TOP + 50)
    assert axes.place(2.5, 0.5) == (figures.LEFT + 25, figures.TOP + 25)


@pytest.mark.parametrize(
    ("low", "high", "want"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (-3, 4, [-2, 0, 2, 4]),
        (0.51, 0.69, [0.55, 0.6, 0.65]),
        (0, 37, [0, 10, 20, 30]),
    ],
)
def test_ticks_are_round(low: float, high: float, want: list[float]):
    assert figures.ticks(low, high) == pytest.approx(want)

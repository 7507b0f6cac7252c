"""The report page: made from the run folder alone, safe to open, complete, and honest about what is missing."""

import base64
import io
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from run_folders import (
    COLUMNS,
    HOSTILE,
    NUM_STEPS,
    PROMPTS,
    TILE,
    images_of,
    make_run,
    page_of,
    record_of,
    words_of,
)

from adascope_fast.reporting import figures, write_report
from adascope_fast.reporting.by_step import JUDGED, LIKENESS, MEANINGS, charts, starts_and_ends

TITLE_OF_HISTOGRAM = "starts and ends"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


def test_texts_of_the_run_are_escaped(run: Path):
    page = page_of(run)
    assert "<script" not in page
    assert (
        page.count("&lt;script&gt;alert(1)&lt;/script&gt; &amp; &#34;quotes&#34;") >= 9
    )  # caption, and the alt texts of two times four pictures
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
    assert page.count('aria-label="pick_score by iteration. 20 at 0, ') == 1
    label = "&lt;script&gt;alert(1)&lt;/script&gt; &amp; &quot;quotes&quot; by iteration."
    assert page.count(f'aria-label="{label}') == 1
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
        "before 0.512 95 % interval: 0.481 to 0.544",
        "after 0.699 95 % interval: 0.669 to 0.728",
        "difference +0.186 95 % interval: +0.151 to +0.222",
        "The 95 % interval of the difference, +0.151 to +0.222, lies above 0: the reward rose.",
        "192 pictures of 48 prompts",
        "colour 61.0 % 83.0 % +22.0 points",
        "shape 55.0 % - -",
        "finished, 30 of 30 iterations",
        "the preference was nearly gained at the end. 60 66.7%",
        "fallback:no_gain The preference gained nothing after the start, so only the end fell back. 30 33.3%",
    ):
        assert expected in words, expected


@pytest.mark.parametrize(
    ("low", "high", "want"),
    [
        (-0.02, 0.06, "of the difference, -0.020 to +0.060, includes 0: no change is shown"),
        (-0.2, -0.1, "of the difference, -0.200 to -0.100, lies below 0: the reward fell"),
        (0.0, 0.06, "of the difference, 0.000 to +0.060, includes 0: no change is shown"),
        (1e-5, 0.06, "of the difference, +0.00001 to +0.06000, lies above 0: the reward rose"),
        (-3e-5, -2e-5, "of the difference, -0.0000300 to -0.0000200, lies below 0: the reward fell"),
        (None, None, "No interval of the difference was recorded"),
    ],
)
def test_verdict_follows_the_interval(run: Path, low: float | None, high: float | None, want: str):
    evaluation = json.loads((run / "evaluation.json").read_text())
    evaluation["difference"] = {"mean": 0.02, "low": low, "high": high}
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    words = words_of(page_of(run))
    assert want in words
    assert all(float(number) for number in re.findall(r"[+-]\d+\.\d+", words)), "no zero has a sign"


def test_variety_is_shown_beside_the_reward(run: Path):
    words = words_of(page_of(run))
    assert "diversity 0.250 0.200 -20.0 %" in words
    assert "contrast 0.260 0.130 -50.0 %" in words


@pytest.mark.parametrize(
    ("means", "want"),
    [
        ([0.5, 0.6, 0.7], "The held-out reward was highest at the end."),
        ([0.5, 0.75, 0.62], "highest (0.750) after 10 of 20 iterations and fell by 0.130."),
        ([0.5, 0.75, 0.7499], "highest (0.750) after 10 of 20 iterations and ended as high."),
    ],
)
def test_a_reward_that_swung_back_is_told(run: Path, means: list[float], want: str):
    assert "was highest" not in words_of(page_of(run)), "with two evaluations there is nothing to tell"
    evaluation = json.loads((run / "evaluation.json").read_text())
    evaluation["history"] = [
        {
            "iteration": 10 * k,
            "mean": mean,
            "low": mean - 0.03,
            "high": mean + 0.03,
            "diversity": 0.3 - 0.05 * k,
            "contrast": 0.2,
        }
        for k, mean in enumerate(means)
    ]
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    page = page_of(run)
    assert want in words_of(page)
    for name in ("diversity", "contrast"):
        assert page.count(f'aria-label="{name}, 0 to ') == 1


def test_a_single_picture_a_prompt_has_no_diversity(run: Path):
    evaluation = json.loads((run / "evaluation.json").read_text())
    for when in ("before", "after"):
        evaluation[when]["diversity"] = None
        evaluation[when]["contrast"] = 0.26 if when == "before" else 0.2599
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    words = words_of(page_of(run))
    assert "diversity 0" not in words
    assert "contrast 0.260 0.260 0.0 %" in words


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
    titles_of = {name: meaning[0] for name, meaning in MEANINGS.items() if name != "structure"}
    assert titles == [*(titles_of | {"preference": LIKENESS[0]}).values(), TITLE_OF_HISTOGRAM]
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
        ("c", "Start at step 2: 2"),
        ("c", "Start at step 3: 1"),
        ("b", "end at step 4: 1"),
        ("b", "end at step 5: 2"),
    ]
    heights = {title: float(height) for height, title in re.findall(r'height="([\d.]+)"><title>(.*?)</title>', chart)}
    assert heights["end at step 5: 2"] == pytest.approx(2 * heights["end at step 4: 1"], abs=0.2)
    assert "Start: 2 at 2, 1 at 3; end: 1 at 4, 2 at 5." in chart
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
    shown = [np.asarray(Image.open(io.BytesIO(base64.b64decode(source)))) for source in sources]
    assert len(shown) == 2 * len(PROMPTS) * COLUMNS
    sides = [np.rint(images_of(after).transpose(0, 2, 3, 1) * 255) for after in (0, 1)]
    rows = [side[row * COLUMNS : (row + 1) * COLUMNS] for row in range(len(PROMPTS)) for side in sides]
    np.testing.assert_array_equal(shown, np.concatenate(rows))


def test_each_picture_has_its_score_below_it_and_in_its_alternative(run: Path):
    page = page_of(run)
    section = page.split("<h2>Pictures</h2>")[1].split("</section>")[0]
    assert re.findall(r'<span aria-hidden="true">(.*?)</span>', section)[:8] == [
        "0.10",
        "0.25",
        "not finite",
        "0.90",
        *[""] * 4,
    ]
    first, third, after = (re.findall(r'alt="(.*?)"', section)[place] for place in (0, 2, 4))
    assert first.startswith("before, picture 1 of 4, scene_attributes 0.10: &lt;script&gt;")
    assert third.startswith("before, picture 3 of 4, scene_attributes not finite: ")
    assert after.startswith("after, picture 1 of 4: "), "no scores were recorded"


def test_a_grid_of_an_earlier_version_has_no_gaps(run: Path):
    for name, seed in (("before", 0), ("after", 1)):
        rows = images_of(seed).reshape(len(PROMPTS), COLUMNS, 3, TILE, TILE).transpose(0, 3, 1, 4, 2)
        joined = np.rint(rows.reshape(len(PROMPTS) * TILE, COLUMNS * TILE, 3) * 255).astype(np.uint8)
        Image.fromarray(joined).save(run / "samples" / f"{name}.png")
    with_gaps = re.findall(r'src="data:image/png;base64,([^"]+)"', page_of(make_run(run.parent / "other")))
    (run / "samples" / "grid.json").write_text(json.dumps({"prompts": PROMPTS, "columns": COLUMNS, "tile": TILE}))
    assert re.findall(r'src="data:image/png;base64,([^"]+)"', page_of(run)) == with_gaps


def test_what_one_update_holds_at_zero_is_a_sentence_and_not_five_charts(run: Path):
    config = (run / "config.toml").read_text()
    (run / "config.toml").write_text(config.replace("updates_per_iteration = 2", "updates_per_iteration = 1"))
    zero = {"approx_kl": 0.0, "clipfrac": 0.0, "ratio_max_deviation": 0.0, "learning_rate": 0.01}
    lines = []
    for iteration in range(4):
        record = record_of(iteration) | zero | {"loss": 3e-9 * iteration}
        steps = {name: [None, *[0.0] * (NUM_STEPS - 2), None] for name in ("ratio_deviation", "clipfrac")}
        lines.append(json.dumps(record | {"steps": record_of(iteration)["steps"] | steps}) + "\n")
    (run / "stats.jsonl").write_text("".join(lines))
    page = page_of(run)
    words = words_of(page)
    why = (
        "as it must be with one update an iteration: the weights have not moved since the rollout, so every ratio is 1"
    )
    assert f"Clipped pairs and mean |ratio - 1|: 0 at every step, {why}." in words
    kinds = "Approximate KL from the rollout's policy, clipped pairs, largest |ratio - 1| and loss but for rounding"
    assert f"{kinds}: 0 in every iteration, {why}; the loss is then" in words
    assert "The same in every iteration: learning rate 0.01." in words
    for absent in ("approx. KL", "clipped, %", "|ratio - 1| of", "learning rate of", "loss, mean"):
        assert f'aria-label="{absent}' not in page


def test_a_quantity_that_stays_as_it_is_has_no_chart_and_no_wrong_reason(run: Path):
    """With two updates an iteration nothing holds these at 0."""
    records = [record_of(iteration) | {"clipfrac": 0.0, "learning_rate": 0.01} for iteration in range(3)]
    (run / "stats.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    words = words_of(page_of(run))
    assert "The same in every iteration: clipped pairs 0, learning rate 0.01." in words
    assert "as it must be" not in words


@pytest.mark.parametrize(
    ("sensing", "want"),
    [("latent", LIKENESS), ("reward_only", JUDGED), ("semantic", JUDGED), (None, MEANINGS["preference"])],
)
def test_preference_is_called_what_was_sensed(sensing: str | None, want: tuple[str, str, int]):
    drawn, _ = charts([record_of(0), record_of(1)], NUM_STEPS, sensing)
    (title,) = [title for title, _ in drawn if title.startswith("preference")]
    assert title == want[0]
    assert f'aria-label="{want[1]} by denoising step.' in dict(drawn)[title]


def test_a_selector_of_ones_own_may_sense_anything(run: Path):
    assert LIKENESS[0] in words_of(page_of(run))
    part = {"name": "mine:Mine", "digest": "", "is_given": True}
    (run / "parts.json").write_text(json.dumps({"parts": {"selector": part}}))
    words = words_of(page_of(run))
    assert LIKENESS[0] not in words
    assert MEANINGS["preference"][0] in words


def test_parts_that_are_no_shares_are_not_told_in_per_cent(run: Path):
    evaluation = json.loads((run / "evaluation.json").read_text()) | {"reward": "mixed"}
    evaluation["before"]["attributes"], evaluation["after"]["attributes"] = {"pick_score": 21.5}, {"pick_score": 22.0}
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    assert "pick_score 21.5 22.0 +0.500" in words_of(page_of(run))


def test_every_axis_has_a_label_and_every_chart_its_values(run: Path):
    charts = re.findall(r"<svg.*?</svg>", page_of(run), flags=re.DOTALL)
    for chart in charts:
        label = ElementTree.fromstring(chart).attrib["aria-label"]
        assert re.search(r"\d", label.partition(" by ")[2] or label), label
        if 'class="bar"' in chart:
            continue
        (quantity,) = re.findall(r'<text class="quantity"[^>]*>(.+?)</text>', chart)
        assert label.startswith(unescape(quantity).partition(", \N{MULTIPLICATION SIGN}")[0])
        assert re.search(r">(iteration|denoising step)</text>", chart)


def test_ticks_too_small_to_write_share_a_power_of_ten():
    chart = figures.line_chart([(0.0, 6.1e-5), (1.0, 7.2e-5)], "gradient norm")
    assert "gradient norm, \N{MULTIPLICATION SIGN}10\N{SUPERSCRIPT MINUS}\N{SUPERSCRIPT FIVE}</text>" in chart
    assert ">6.5</text>" in chart
    assert 'aria-label="gradient norm by iteration. 6.1e-05 at 0, 7.2e-05 at 1."' in chart


def test_a_long_curve_is_told_at_evenly_spaced_points():
    told = figures.in_words([(float(x), float(x)) for x in range(1000)])
    assert told.startswith("0 at 0, 84 at 84, 168 at 168, ")
    assert told.endswith(", 999 at 999")
    assert len(told.split(", ")) <= figures.MOST_TOLD


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

import math
from pathlib import Path

import pytest
import torch
from image_folders import folder

from adascope_fast.comparison.guards import Contrast, DistanceToBase, PixelDiversity, parting, verdict
from adascope_fast.comparison.measuring import Estimate
from adascope_fast.comparison.reading import batches, pixels_of


def test_contrast_is_the_standard_deviation_of_an_images_values():
    metric = Contrast()
    images = torch.zeros(2, 3, 2, 2)
    images[1, :, 0] = 1
    metric.update(images, ["a", "b"])
    assert metric.compute() == pytest.approx(0.25)


def test_diversity_is_over_pairs_of_a_prompt_then_prompts():
    metric = PixelDiversity()
    greys = torch.tensor([0.0, 0.6, 1.0, 0.3, 0.3]).view(-1, 1, 1, 1).expand(-1, 3, 4, 4)
    metric.update(greys[:2], ["a", "a"])
    metric.update(greys[2:], ["a", "b", "b"])
    assert metric.compute() == pytest.approx(((0.6 + 1.0 + 0.4) / 3 + 0) / 2, rel=1e-6)
    alone = PixelDiversity()
    alone.update(greys[:2], ["a", "b"])
    with pytest.raises(ValueError, match="one image a prompt"):
        alone.compute()


def difference(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x - y).abs().mean((1, 2, 3))


def test_the_distance_is_to_the_bases_image_on_the_same_prompt_and_seed(tmp_path: Path):
    base = folder(tmp_path / "base", {"a": [0, 51], "b": [102]})
    arm = folder(tmp_path / "arm", {"b": [153], "a": [51, 51], "other": [255]})
    found = DistanceToBase(difference)
    for batch in batches(arm, 2):
        found.update("arm", pixels_of(batch), batch, base)
    # Seeds follow the prompts' order, so "b" is 0 in one and 10 in the other: only equal seeds are compared.
    assert math.isnan(found.of("arm"))
    same = folder(tmp_path / "same", {"a": [51, 51], "b": [153]})
    for batch in batches(same, 2):
        found.update("same", pixels_of(batch), batch, base)
    assert found.of("same") == pytest.approx((0.2 + 0.0 + 0.2) / 3, rel=1e-6)


def estimates(**changes: float) -> dict[str, dict[str, Estimate]]:
    """A base and an arm by each measure: value 1 and spread 0.1, and the arm's change in spreads."""
    base = Estimate(1.0, 0.9, 1.1, spread=0.1)
    found = {
        key: {"base": base, "arm": Estimate(1.0 + 0.1 * changes.get(key, 0.0), 0, 0)}
        for key in ("lpips", "clip_score", "contrast", "pixel_diversity")
    }
    gain = changes.get("rise", 0.2)
    found["reward"] = {"base": base, "arm": Estimate(1 + gain, 0, 0, gain=(gain, gain - 0.1, gain + 0.1))}
    return found


def judged(**changes: float):
    return verdict("arm", "base", estimates(**changes), "reward", None, [], {})


def test_a_reward_that_rises_alone_is_no_sign():
    found = judged(lpips=-0.9, clip_score=0.5, contrast=0.9)
    assert not found.is_suspect
    assert found.words.startswith("The reward rose (+0.200 [+0.100, +0.300])")
    assert "no sign" in found.words
    assert [round(sign.spreads, 6) for sign in found.signs] == [-0.9, 0.0, 0.5, 0.9]


@pytest.mark.parametrize("change", [{"lpips": -1.1}, {"clip_score": -1.1}, {"contrast": 1.1}, {"contrast": -1.1}])
def test_a_measure_beyond_the_bases_spread_is_a_sign(change: dict[str, float]):
    found = judged(**change)
    assert found.is_suspect
    assert "may be hacked" in found.words
    assert sum(sign.is_one for sign in found.signs) == 1


def test_pixels_decide_only_where_lpips_is_not_known():
    assert not judged(pixel_diversity=-3).is_suspect
    known = estimates(pixel_diversity=-3)
    del known["lpips"]
    assert verdict("arm", "base", known, "reward", None, [], {}).is_suspect


def test_more_variety_and_a_better_clip_score_are_none():
    assert not judged(lpips=3, clip_score=3, pixel_diversity=3).is_suspect


def test_where_the_reward_did_not_rise_nothing_was_gained_by_it():
    found = judged(rise=0.05, lpips=-2)
    assert not found.is_suspect
    assert "did not rise" in found.words
    assert "LPIPS diversity moved" in found.words


def test_an_unknown_reward_is_told():
    found = verdict("arm", "base", estimates(clip_score=-2), None, None, [], {})
    assert found.words == "Its reward is not known; CLIP score moved beyond the base model's own spread."
    assert found.is_suspect
    nothing = verdict("arm", "base", {}, None, None, [], {})
    assert nothing.words == "No measure could be compared with the base model."


def test_the_unit_of_the_distance_to_the_base_is_the_bases_own_distance_between_seeds(tmp_path: Path):
    base, arm = folder(tmp_path / "base", {"a": [0, 0]}), folder(tmp_path / "arm", {"a": [102, 102]})
    away = DistanceToBase(difference)
    for batch in batches(arm, 2):
        away.update("arm", pixels_of(batch), batch, base)
    known = estimates()
    known["lpips"] = {name: Estimate(0.2, 0, 0, spread=1.0) for name in ("base", "arm")}
    (sign,) = [one for one in verdict("arm", "base", known, "reward", away, [], {}).signs if "base's" in one.measure]
    assert (sign.trained, sign.spreads, sign.is_one) == (pytest.approx(0.4), pytest.approx(2.0), True)


def point(iteration: int, mean: float, diversity: float, contrast: float = 0.3) -> dict[str, float]:
    return {"iteration": iteration, "mean": mean, "diversity": diversity, "contrast": contrast, "clip_score": 0.2}


SPREAD = {"diversity": 0.1, "contrast": 0.1, "clip_score": 0.1}


def test_reward_and_variety_part_where_they_stay_apart():
    course = [point(0, 0.5, 0.5), point(5, 0.6, 0.35), point(10, 0.6, 0.45), point(15, 0.7, 0.39), point(20, 0.8, 0.1)]
    assert parting(course, SPREAD) == (
        "From iteration 15 on the held-out reward is higher and diversity beyond the base's spread."
    )


def test_a_reward_that_falls_back_has_not_parted():
    course = [point(0, 0.5, 0.5), point(5, 0.6, 0.1), point(10, 0.4, 0.1)]
    assert parting(course, SPREAD) == "Up to iteration 10 the held-out reward and these did not part."


def test_a_course_that_was_not_recorded_is_told():
    assert "set evaluation.every" in parting([point(0, 0.5, 0.5), point(20, 0.9, 0.1)], SPREAD)
    assert "did not record the base model's spread" in parting([point(n, 0.5, 0.5) for n in range(3)], {})

"""A calibration: its curves against the rollout itself, its thresholds against their aim, its page and its refusals."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from run_folders import words_of

from adascope_fast.adascope.selector import AdaScope
from adascope_fast.adascope.sensing import Curves, latent_curves
from adascope_fast.config import Config, ConfigError
from adascope_fast.planning import calibration
from adascope_fast.planning.calibration import PAPER, Calibration, Seen, calibrate
from adascope_fast.reporting import write_calibration
from adascope_fast.rollout import EncodedPrompts, OwnNoise, rollout
from adascope_fast.schedules import samplers as schedules
from adascope_fast.theory import ideal_chain, schedule_correlation
from adascope_fast.training.trainer import Trainer

TINY = Path(__file__).parents[2] / "configs" / "tiny.toml"
CAPTIONS = ["a large red circle on a grey background", "two small blue crosses on a black background"]


def redness(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


def _made(config: Config) -> Trainer:
    return Trainer(config, reward=redness, train_prompts=CAPTIONS, held_out_prompts=["a cat"], quiet=True)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Calibration]:
    folder = tmp_path_factory.mktemp("calibration") / "run"
    overrides = [f"run.folder={folder}", "sampler.num_steps=6", "train.samples_per_prompt=3", "train.update=one_pass"]
    config = Config.load(TINY, [*overrides, "selector.mask_source=previous"])
    result = calibrate(config, num_prompts=2, trainer=_made)
    assert not folder.exists(), "a calibration is no run"
    return config, result


def test_curves_are_those_of_the_rollout(found: tuple[Config, Calibration]):
    config, result = found
    trainer = _made(config.model_copy(update={"train": config.train.model_copy(update={"prompts_per_iteration": 2})}))
    trainer.prepare()
    prompts = trainer.prompts_of(0)
    trajectory = rollout(
        trainer.backbone,
        trainer.schedule,
        EncodedPrompts.of(trainer.backbone, prompts),
        prompts,
        guidance_scale=config.sampler.guidance_scale,
        noise=OwnNoise(config.run.seed),
        batch=100,
    )
    with torch.no_grad():
        images = trainer.backbone.decode(trajectory.latents[:, -1])
        first = trainer.backbone.decode(trajectory.x0[:, 0])
    reward = result.curves["reward"]
    assert [len(curve["mean"]) for curve in result.curves.values()] == [6, 7, 7, 6]
    by_prompt = redness(images, prompts).view(2, 3).mean(1)
    assert reward["mean"][-1] == pytest.approx(by_prompt.mean().item(), abs=1e-5)
    assert reward["std"][-1] == pytest.approx(by_prompt.std(correction=0).item(), abs=1e-5)
    assert reward["mean"][0] == pytest.approx(redness(first, prompts).mean().item(), abs=1e-5)
    volatility, preference = latent_curves(trajectory)
    assert result.curves["structure"]["mean"] == pytest.approx(volatility.mean(0).tolist(), abs=1e-5)
    assert result.curves["preference"]["mean"] == pytest.approx(preference.mean(0).tolist(), abs=1e-5)
    states = trajectory.latents.flatten(2).double().numpy()  # [6, 7, d]
    # Pooled over the pictures of a prompt, as the mean of their means: each latent has nearly mean 0 and variance 1.
    pearson = np.stack([np.corrcoef(rows).diagonal(1) for rows in states]).mean(0)
    uncertainty: Any = result.curves["uncertainty"]["mean"]
    np.testing.assert_allclose(uncertainty, 1 - pearson, atol=0.02)
    assert result.theory == (1 - schedule_correlation(trainer.schedule)).tolist()
    assert result.sampler == (1 - ideal_chain(trainer.schedule, 1.0).correlation).tolist() != result.theory
    keep = AdaScope()(trajectory, 0)
    assert result.configured.fraction == pytest.approx(keep.double().mean().item())
    assert sum(result.configured.reasons.values()) == 2 == len(result.configured.intervals)


def test_a_sensor_of_the_reward_decides_on_the_reward(found: tuple[Config, Calibration], tmp_path: Path):
    overrides = ["sampler.num_steps=6", "sensing.kind=reward_only", "sensing.stride=1", "sensing.num_samples=0"]
    overrides += ["sensing.decoder=linear", f"run.folder={tmp_path / 'out'}"]
    result = calibrate(Config.load(TINY, overrides), num_prompts=2, trainer=_made)
    assert not (tmp_path / "out").exists()
    preference, reward = (np.array(result.curves[name]["mean"], float) for name in ("preference", "reward"))
    latent = np.array(found[1].curves["preference"]["mean"], float)
    assert result.structure == "1 - correlation of guesses"
    assert result.preference == f"{result.reward} of the decoded guess"
    assert not np.allclose(preference[:-1], latent[:-1], atol=0.01), "not the latents'"
    np.testing.assert_allclose(preference, reward, atol=0.1)  # a linear decoder, against the model's own


def _settling(num_prompts: int, t: int) -> Any:
    """Volatility that falls by a factor a step from prompt to prompt a little differently, and a rising preference."""
    i = np.arange(t + 1)
    decay = 0.45 + 0.02 * np.arange(num_prompts)[:, None]
    volatility = 0.001 + 0.2 * np.exp(-decay * i[:-1])
    preference = 1 - 0.6 * np.exp(-0.3 * decay * i)
    return Curves(torch.from_numpy(preference), volatility=torch.from_numpy(volatility))


def _seen(curves: Any, t: int) -> Seen:
    schedule = schedules.dance_sde(torch.linspace(1, 0, t + 1), eta=0.3)
    prompts = list("abcdefgh")[: len(curves.preference)]
    return Seen(curves, prompts, t, schedule.log_snr, schedule.trainable)


def test_the_aim_of_an_end_is_where_the_reward_saturates():
    # Rises from 0.4 to 0.8 in four steps, then stays: a fifth of what came since the start is left after 3.2 of 10.
    reward = [0.4, 0.5, 0.6, 0.7, 0.8, *[0.8] * 6]
    assert calibration._saturated(reward, 0.0, 0.2) == pytest.approx(0.32)
    assert calibration._saturated(reward, 0.2, 0.5) == pytest.approx(0.3)
    assert calibration._saturated(reward, 0.3, 0.9) == pytest.approx(0.4)  # one step is trained
    dip = [0.0, 0.9, 0.5, 1.0, 1.0]
    assert calibration._saturated(dip, 0.0, 0.2) == pytest.approx((2 + 0.3 / 0.5) / 4)  # it has to stay so
    with pytest.raises(ConfigError, match=r"it went from 1 at step 0.0 to 0.5 at the last"):
        calibration._saturated([1.0, 0.5], 0.0, 0.2)
    with pytest.raises(ConfigError, match="to nan at the last"):
        calibration._saturated([1.0, None], 0.0, 0.2)


def test_an_end_is_asked_for_saturated_or_the_papers_and_said_to_be():
    rising, falling = [0.4, 0.5, 0.6, 0.7, 0.8, *[0.8] * 6], [0.8, 0.5, 0.4]
    assert calibration._end(rising, 0.0, None, None) == (
        pytest.approx(0.32), "where 20% of the gain in the reward of the guesses is still to come"
    )  # fmt: skip
    assert calibration._end(rising, 0.2, None, 0.5)[0] == pytest.approx(0.3)
    assert calibration._end(rising, 0.2, 0.9, None) == (0.9, "where they were asked to")
    end, aim = calibration._end(falling, 0.0, None, None)
    assert end == PAPER[1]
    assert aim.startswith("where the paper's do; the reward of the guesses saturates nowhere, it went from 0.8 at step")
    assert calibration._end(falling, 0.7, None, None)[0] >= 0.7
    with pytest.raises(ConfigError, match="saturates nowhere"):
        calibration._end(falling, 0.0, None, 0.2)


@pytest.mark.parametrize("target", [PAPER, (0.2, 0.5), (0.08, 0.8)])
def test_the_proposed_thresholds_meet_their_aim_without_falling_back(target: tuple[float, float]):
    t, curves = 50, _settling(6, 50)
    seen = _seen(curves, t)
    proposed = calibration._proposed(AdaScope(), seen, target)
    assert abs(proposed.mean_start - target[0] * t) < 1
    assert abs(proposed.mean_end - target[1] * t) < 1
    assert not [reason for reason in proposed.reasons if reason.startswith("fallback")]
    again = AdaScope(kappa=proposed.kappa, phi_end=proposed.phi_end)
    again.decide(curves, seen.prompts, log_snr=seen.log_snr)
    assert again.telemetry()["intervals"] == proposed.intervals


def test_a_fallback_near_the_aim_is_not_proposed():
    """The paper's interval is the fallback's: thresholds that never hold would meet the aim exactly."""
    seen = _seen(_settling(6, 20), 20)
    adascope = AdaScope(fallback=PAPER)
    assert calibration._decide(adascope, seen, 1e-9, 0.1).mean_start == 2
    proposed = calibration._proposed(adascope, seen, PAPER)
    assert calibration._fallbacks(proposed) == 0


def test_thresholds_of_prompts_alike_are_sure_and_of_others_are_not(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(calibration, "NUM_SPLITS", 2)
    t = 12
    one = _settling(1, t)
    alike = Curves(one.preference.expand(4, -1), volatility=one.volatility.expand(4, -1))
    sure = calibration._halves(AdaScope(), _seen(alike, t), PAPER, 0)
    assert sure is not None
    assert (sure.num, sure.kappa[0], sure.phi_end[0]) == (4, sure.kappa[1], sure.phi_end[1])
    proposed = calibration._proposed(AdaScope(), _seen(alike, t), PAPER)
    assert (sure.kappa[0], sure.phi_end[0]) == (proposed.kappa, proposed.phi_end)
    misses = abs(proposed.mean_start - PAPER[0] * t), abs(proposed.mean_end - PAPER[1] * t)
    assert (sure.miss_start, sure.miss_end) == pytest.approx(misses)
    several = calibration._halves(AdaScope(), _seen(_settling(4, t), t), (0.2, 0.5), 0)
    assert several is not None
    assert several.phi_end[0] < several.phi_end[1]
    assert several == calibration._halves(AdaScope(), _seen(_settling(4, t), t), (0.2, 0.5), 0), "by its seed"


def test_thresholds_of_a_half_are_tried_on_the_other_half():
    adascope, seen = AdaScope(), _seen(_settling(8, 20), 20).of("ah")
    found = calibration._halves(adascope, seen, (0.2, 0.5), 0)
    parts = [seen.of(prompt) for prompt in "ah"]
    proposed = [calibration._proposed(adascope, part, (0.2, 0.5)) for part in parts]
    tried = [
        calibration._decide(adascope, part, one.kappa, one.phi_end)
        for part, one in zip(parts[::-1], proposed, strict=True)
    ]
    assert found is not None
    assert found.miss_end == pytest.approx(np.mean([abs(one.mean_end - 10) for one in tried]))
    assert found.miss_end != pytest.approx(np.mean([abs(one.mean_end - 10) for one in proposed]))


def test_one_prompt_says_nothing_of_how_sure_thresholds_are(tmp_path: Path):
    assert calibration._halves(AdaScope(), _seen(_settling(1, 20), 20), PAPER, 0) is None
    result = calibrate(Config.load(TINY, ["sampler.num_steps=6"]), num_prompts=1, trainer=_made)
    assert "how sure" not in result.text()
    assert "With one prompt nothing can be said" in words_of(write_calibration(result.values(), tmp_path).read_text())


def test_the_part_of_some_prompts_has_their_curves():
    seen = _seen(_settling(4, 20), 20)
    part = seen.of(["b", "d"])
    assert part.prompts == ["b", "d"]
    assert part.curves.preference.equal(seen.curves.preference[[1, 3]])
    assert part.curves.structure is None


def test_the_page_and_its_figures(found: tuple[Config, Calibration], tmp_path: Path):
    _, result = found
    hostile = replace(result, reward="<script>alert(1)</script>")
    path = write_calibration(hostile.values(), tmp_path / "new" / "folder")
    page = path.read_text(encoding="utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert page.count("<svg") == 5, "four panels and the histogram"
    assert page.count('class="shade"') == 4
    assert f"{result.configured.mean_start:.1f} ± {result.configured.std_start:.1f}" in page
    words, halves = words_of(page), result.halves
    assert halves is not None
    kappa, phi_end = (f"{value:.3g}" for value in (result.proposed.kappa, result.proposed.phi_end))
    assert f"selector.kappa={kappa} selector.phi_end={phi_end}</pre>" in page
    assert f"[selector]\nkappa = {kappa}\nphi_end = {phi_end}</pre>" in page
    assert Config.load(None, [f"selector.kappa={kappa}", f"selector.phi_end={phi_end}"])
    assert "2 prompts, 3 pictures each, 6 steps, run.seed 0; nothing was trained" in words
    assert f"kappa came out from {halves.kappa[0]:.3g} to {halves.kappa[1]:.3g} and phi_end from" in words
    assert f"missed the aim by {halves.miss_start:.1f} steps at its start and {halves.miss_end:.1f} at its end" in words
    assert "correlation with the final latent" in words
    assert json.loads((path.parent / "calibration.json").read_text())["theory"] == result.theory
    with Image.open(path.parent / "calibration.png") as image:
        assert image.size[0] > 1000
        assert image.convert("RGBA").getpixel((1, 1)) == (255, 255, 255, 0), "nothing is behind it"
    assert f"selector.kappa={result.proposed.kappa:.3g}" in result.text()


@pytest.mark.parametrize(
    "overrides",
    [
        ["selector.name=every_step"],
        ["selector.name=window", "train.update=one_pass"],
        ["selector.name=static_range", "selector.start=1", "selector.end=3", "sampler.tail_share=0.5"],
        ["selector.name=my_module:MySelector", "selector.size=3"],
        ["selector.name=complement"],
    ],
    ids=["every_step", "window", "static_range", "own", "complement"],
)
def test_a_configuration_with_another_selector_is_looked_at_with_adascope(
    found: tuple[Config, Calibration], tmp_path: Path, overrides: list[str]
):
    shared = [f"run.folder={tmp_path / 'run'}", "sampler.num_steps=6", "train.samples_per_prompt=3"]
    result = calibrate(Config.load(TINY, [*shared, *overrides]), num_prompts=2, trainer=_made)
    assert replace(result, seconds=0.0) == replace(found[1], seconds=0.0)


def test_the_complement_is_looked_at_with_its_own_adascope(tmp_path: Path):
    shared = [f"run.folder={tmp_path / 'run'}", "sampler.num_steps=6", "selector.kappa=0.9", "selector.pooling=batch"]
    one, other = (
        calibrate(Config.load(TINY, [*shared, f"selector.name={name}"]), num_prompts=2, trainer=_made)
        for name in ("complement", "adascope")
    )
    assert replace(one, seconds=0.0) == replace(other, seconds=0.0)
    assert one.configured.kappa == 0.9
    assert len(one.configured.intervals) == 1, "the pool is the batch"


def test_a_sampler_without_noise_is_looked_at_at_every_step(tmp_path: Path):
    """AWM trains a deterministic sampler's steps too."""
    overrides = ["model.name=scenes-flow", "algorithm.name=awm", "sampler.kind=flow_ode", "sampler.num_steps=6"]
    result = calibrate(Config.load(TINY, [*overrides, f"run.folder={tmp_path}"]), num_prompts=2, trainer=_made)
    lengths = [end - start for start, end in result.configured.intervals]
    assert result.configured.fraction == pytest.approx(np.mean(lengths) / 6)


def test_the_causal_rule_is_calibrated_too(tmp_path: Path):
    overrides = ["sampler.num_steps=6", "selector.rule=knee_causal", "sensing.kind=reward_only", "sensing.stride=1"]
    overrides += ["sensing.num_samples=0", "selector.kappa=0.5", f"run.folder={tmp_path}"]
    result = calibrate(Config.load(TINY, overrides), num_prompts=1, trainer=_made)
    assert result.configured.kappa == 0.5
    assert "fallback:first" not in result.configured.reasons, "the scale of the curves is known"


@pytest.mark.parametrize("rule", ["literal", "fraction", "schedule", "fixed"])
@pytest.mark.parametrize("name", ["adascope", "complement"])
def test_a_rule_without_thresholds_is_refused(name: str, rule: str):
    config = Config.load(TINY, [f"selector.name={name}", f"selector.rule={rule}"])
    with pytest.raises(ConfigError, match=f'got "{rule}"; set selector.rule = "knee"'):
        calibrate(config, num_prompts=1, trainer=_made)


def test_what_cannot_be_calibrated_is_refused():
    with pytest.raises(ConfigError, match="looks at different prompts, got 3 of 2"):
        calibrate(Config.load(TINY), num_prompts=3, trainer=_made)
    with pytest.raises(ConfigError, match="of 3 steps is trained whole, there is nothing to calibrate"):
        calibrate(Config.load(TINY, ["sampler.num_steps=3"]), num_prompts=1, trainer=_made)

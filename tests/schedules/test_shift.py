"""`sampler.shift`: a flow's noise levels as DanceGRPO and MixGRPO have them, wherever the model samples."""

from pathlib import Path

import pytest
import torch
from command_line import TINY, call, refused

from adascope_fast.config import Config
from adascope_fast.schedules import Schedule, flow_sde, shifted_sigmas
from adascope_fast.training.trainer import Trainer

FLOW = ["model.name=scenes-flow", "algorithm.name=grpo", "sampler.num_steps=4", "selector.name=every_step"]
SMALLEST = [*FLOW, "reward.name=jpeg_compressibility", "train.prompts_per_iteration=1", "evaluation.num_prompts=1"]


def test_sigmas_are_even_ones_shifted_once():
    # s t / (1 + (s - 1) t) at t = 1, 3/4, 1/2, 1/4, 0 with s = 3: 9/10, 3/4, 1/2
    assert shifted_sigmas(4, 3.0).tolist() == pytest.approx([1, 0.9, 0.75, 0.5, 0], abs=1e-15)
    assert shifted_sigmas(5, 1.0).tolist() == pytest.approx([1, 0.8, 0.6, 0.4, 0.2, 0], abs=1e-15)


def test_the_schedulers_own_levels_are_not_looked_at():
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)
    got, own = (Schedule.from_diffusers(scheduler, 10, shift=shift) for shift in (3.0, None))
    want = flow_sde(shifted_sigmas(10, 3.0), noise_level=0.7)
    assert torch.equal(got.coef, want.coef)
    assert torch.equal(got.timesteps, want.timesteps)
    assert not torch.equal(got.coef, own.coef)


def test_training_evaluation_and_drawing_have_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[list[float]] = []
    from adascope_fast.rollout import sampling
    from adascope_fast.training import draw, evaluation

    def watched(*args, **kwargs):
        seen.append(args[1].timesteps.tolist())
        return sampling.rollout(*args, **kwargs)

    for module in (draw, evaluation):
        monkeypatch.setattr(module, "rollout", watched)
    monkeypatch.setattr("adascope_fast.engine.collection.rollout", watched)
    monkeypatch.setattr("adascope_fast.planning.calibration.rollout", watched)
    monkeypatch.setattr("adascope_fast.preferences.making.rollout", watched)
    run, shift = tmp_path / "run", "sampler.shift=3.0"
    assert call("train", TINY, *SMALLEST, shift, f"run.folder={run}", "train.iterations=1").code == 0
    assert call("sample", run, "--prompt", "a small red circle", "--num", "1").code == 0
    outcome = call("calibrate", TINY, *SMALLEST, shift, "--prompts", "2", "--out", tmp_path / "calibration")
    assert outcome.code == 0, outcome
    judged = "reward.name=jpeg_compressibility"
    outcome = call("make-preferences", TINY, *SMALLEST, shift, judged, "--pairs", "1", "--out", tmp_path / "set")
    assert outcome.code == 0, outcome
    assert len(seen) >= 7, "evaluation, iteration, evaluation, two drawings, calibration, preferences"
    for timesteps in seen:
        assert timesteps == pytest.approx([1000, 900, 750, 500])
    trainer = Trainer(Config.load(run / "config.toml"), quiet=True)
    trainer.prepare()
    assert trainer.schedule.timesteps.tolist() == pytest.approx([1000, 900, 750, 500])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sampler.shift=3.0"], "sampler.shift is of flow samplers, got 3 for the sampler ddim of a DDIMScheduler"),
        (["sampler.shift=3.0", "sampler.kind=ddpm"], 'got 3.0 with sampler.kind = "ddpm"; remove it'),
        ([*FLOW, "sampler.shift=0"], "sampler.shift must be above 0, got 0"),
        ([*FLOW, "sampler.shift=-1.0"], "sampler.shift must be above 0, got -1"),
        ([*FLOW, "sampler.shift=1000"], "sampler.shift must be at most 100, got 1000"),
    ],
)
def test_it_is_refused_where_it_means_nothing(tmp_path: Path, overrides: list[str], message: str):
    assert message in refused("train", TINY, f"run.folder={tmp_path / 'run'}", *overrides)

"""The warning that rounding alone is beyond the clip range: in a run, once, and whom it does not concern."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_runs import CAPTIONS, SMALLEST, TINY, lines_of, redness

from adascope_fast.algorithms.algorithm import Algorithm, Context, Samples
from adascope_fast.algorithms.policy_gradient import Pairs, PolicyGradient, reinforce
from adascope_fast.config import Config
from adascope_fast.engine.drift import drift_hint
from adascope_fast.engine.settings import Updates
from adascope_fast.training.trainer import Trainer

DRIFT = 1e-3


class Drifting(PolicyGradient):
    """Takes every recorded log-probability for `DRIFT` more than it is."""

    def batch(self, samples: Samples, context: Context) -> Pairs:
        trajectory = replace(samples.trajectory, log_prob=samples.trajectory.log_prob + DRIFT)
        return super().batch(replace(samples, trajectory=trajectory), context)


def _config(*overrides: str) -> Config:
    return Config.load(TINY, [*SMALLEST, "train.updates_per_iteration=2", *overrides])


@pytest.mark.parametrize(("clip_range", "num_warnings"), [("1e-4", 1), ("1e-2", 0)])
def test_a_run_warns_once_where_its_clip_range_is_below_its_drift(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], clip_range: str, num_warnings: int
):
    config = _config(
        f"run.folder={tmp_path / 'run'}",
        "algorithm.advantage=batch",
        f"algorithm.clip_range={clip_range}",
        "train.iterations=3",
    )
    made = config.algorithm.build()
    algorithm = Drifting(**vars(made))
    prompts: dict[str, Any] = {"train_prompts": CAPTIONS[:1], "held_out_prompts": CAPTIONS[1:]}
    Trainer(config, reward=redness, algorithm=algorithm, quiet=True, **prompts).train()
    for record in lines_of(tmp_path / "run"):
        assert record["rollout_drift_max"] == pytest.approx(DRIFT, abs=1e-5), "of the first update alone"
        assert record["pairs_trained"] == 4
    said = [line for line in capsys.readouterr().err.splitlines() if "rounding alone is clipped" in line]
    assert len(said) == num_warnings
    assert all("by up to 1.0e-03 between" in line and "the clip range of 1.0e-04" in line for line in said)


def _hint(*overrides: str, drift: float = 2e-4) -> str | None:
    config = _config(*overrides)
    algorithm = config.algorithm.build()
    assert isinstance(algorithm, Algorithm)
    return drift_hint(algorithm, config.train, drift)


def test_the_smaller_clip_range_counts():
    assert "more than the clip range of 1.0e-04" in (_hint("algorithm.clip_range_high=1e-2") or "")
    assert _hint("algorithm.clip_range=1e-3") is None
    assert _hint(drift=1e-4) is None
    assert _hint(drift=math.nan) is None


def test_whoever_clips_no_ratio_to_a_recorded_log_prob_is_not_warned():
    assert _hint() is not None
    assert _hint("train.updates_per_iteration=1") is None
    assert _hint("train.updates_per_iteration=1", "train.inner_epochs=2") is not None
    assert drift_hint(reinforce(), Updates(inner_epochs=2), 1.0) is None

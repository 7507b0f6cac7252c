"""Four epochs of TRL 0.23.1's own trainer, recorded by `data/make_trl_epochs.py`, and the same of ours."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from adascope_fast.compat import trl

DATA = Path(__file__).parents[1] / "data"
sys.path.insert(0, str(DATA))
import make_trl_epochs  # noqa: E402 # pyright: ignore[reportMissingImports]

RECORDED: dict[str, Any] = json.loads((DATA / "trl_epochs.json").read_text(encoding="utf-8"))
# Each pair of the three choices is in one of these; the other four take as long again.
QUICK = ("updates_1_inner_1_batch", "updates_1_inner_2_tracked", "updates_2_inner_1_tracked", "updates_2_inner_2_batch")
NAMES = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in make_trl_epochs.runs()]


@pytest.mark.parametrize("name", NAMES)
def test_four_epochs_follow_trl(name: str):
    assert len(RECORDED["logged"]) == 8
    rows, changes = make_trl_epochs.run(trl, make_trl_epochs.SCENES, make_trl_epochs.runs()[name])
    recorded = load_file(DATA / "trl_epochs.safetensors")
    want = {weight: recorded[f"{name}/{weight}"].double() for weight in changes}
    assert len(want) == sum(key.startswith(f"{name}/") for key in recorded)
    got, want = (torch.cat([one.double().flatten() for one in part.values()]) for part in (changes, want))
    cosine = torch.nn.functional.cosine_similarity(got, want, dim=0)
    assert cosine >= 0.99999, cosine
    assert got.norm().item() == pytest.approx(want.norm().item(), rel=1e-3)
    logged = RECORDED["logged"][name]
    assert [sorted(row) for row in rows] == [sorted(row) for row in logged]
    for row, told in zip(rows, logged, strict=True):
        assert row["step"] == told["step"]
        assert row["epoch"] == told["epoch"]
        if "reward" in told:
            assert row["reward"] == pytest.approx(told["reward"], abs=2e-5)
            assert row["reward_mean"] == pytest.approx(told["reward_mean"], abs=1e-5)
            assert row["reward_std"] == pytest.approx(told["reward_std"], abs=1e-5)
        else:
            assert row["inner_epoch"] == told["inner_epoch"]
            assert row["loss"] == pytest.approx(told["loss"], abs=2e-3)
            assert row["approx_kl"] == pytest.approx(told["approx_kl"], rel=0.05, abs=2e-9)
            # Of so few pairs one at the edge of the clip range is a sixteenth or an eighth of all.
            assert row["clipfrac"] == pytest.approx(told["clipfrac"], abs=1 / 16)


def test_the_four_quick_runs_have_every_pair_of_choices():
    parts = [(name.split("_")[1], name.split("_")[3], name.split("_")[4]) for name in QUICK]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert len({(part[first], part[second]) for part in parts}) == 4

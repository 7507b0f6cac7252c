"""Each preset fits into the GPU that it is for, by its own plan, with the largest microbatch that does; no network."""

from typing import Any

import pytest

from adascope_fast.config import Config
from adascope_fast.planning import verdict
from adascope_fast.planning.plan import GIB, Planner

SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "name",
    ["sd15", *(pytest.param(name, marks=SLOW) for name in ("sd21", "sdxl", "sd35_medium", "sd35_large", "flux_dev"))],
)
def test_a_preset_fits_into_its_gpu(name: str, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a network was asked")

    monkeypatch.setattr("adascope_fast.backbones.sources.hf_hub_download", refuse)
    planner = Planner()
    for size in (24, 40, 80):
        config = Config.load(f"{name}-{size}gb")
        monkeypatch.setattr(verdict, "SIZES", (size,))
        (fit,) = verdict.verdict(config, planner)
        assert fit.is_fitting, (size, fit)
        assert config.train.microbatch is not None
        doubled = verdict._set(config, {"train.microbatch": 2 * config.train.microbatch})
        assert verdict.needed_bytes(planner.plan(doubled)) > size * GIB, "a larger microbatch would be faster"
        assert not any("halves the forwards" in note for note in planner.plan(config).notes)

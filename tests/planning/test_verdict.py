"""What fits into a GPU: what is proposed fits when it is planned anew, and nothing smaller would have."""

from pathlib import Path

import pytest
from tiny_pipelines import made

from adascope_fast.config import Config
from adascope_fast.planning import verdict
from adascope_fast.planning.plan import GIB, Planner
from adascope_fast.planning.verdict import CHANGES, Fit, needed_bytes

GUIDED = ["sampler.guidance_scale=3.0", "train.rollout_batch=32", "train.microbatch=32"]


@pytest.fixture(scope="module")
def planner() -> Planner:
    return Planner()


def _in_a_gpu_of(config: Config, num_bytes: float, monkeypatch: pytest.MonkeyPatch, planner: Planner) -> Fit:
    """The verdict on a GPU with that much memory: its "GB" are made to be the number of bytes."""
    monkeypatch.setattr(verdict, "CONTEXT", 0)
    monkeypatch.setattr(verdict, "GIB", num_bytes)
    monkeypatch.setattr(verdict, "SIZES", (1,))
    (fit,) = verdict.verdict(config, planner)
    return fit


def test_what_is_left_free_is_a_tenth_and_a_context(planner: Planner):
    planned = planner.plan(Config())
    parts = planned.encode_bytes, planned.rollout_bytes, planned.decode_bytes, planned.update_bytes[planned.microbatch]
    assert planned.peak_bytes == max(parts)
    assert needed_bytes(planned) == pytest.approx(1.1 * max(parts) + GIB)


def test_a_small_model_fits_everywhere(planner: Planner):
    fits = verdict.verdict(Config(), planner)
    assert [(fit.size, fit.is_fitting, fit.line) for fit in fits] == [(24, True, ""), (40, True, ""), (80, True, "")]
    assert verdict.text(fits).startswith("fits in             24 GB, 40 GB, 80 GB: takes ")
    assert "\n" not in verdict.text(fits)


@pytest.mark.parametrize("share", [0.5, 0.2])
@pytest.mark.parametrize("more", [[], ["model.train=full", "algorithm.kl_weight=0.1"]])
def test_the_change_fits_when_planned_anew_and_no_smaller_one_does(
    share: float, more: list[str], monkeypatch: pytest.MonkeyPatch, planner: Planner
):
    config = Config.load(None, [*GUIDED, *more])
    room = share * planner.plan(config).peak_bytes * 1.1
    fit = _in_a_gpu_of(config, room, monkeypatch, planner)
    assert not fit.is_fitting
    if fit.changes is None:
        smallest = ["train.rollout_batch=1", "train.microbatch=1", "model.offload_text_encoders=true"]
        smallest += ["model.gradient_checkpointing=true", "model.dtype=bfloat16", "model.train=lora"]
        smallest += ["model.quantize=nf4"]
        assert planner.plan(Config.load(None, [*GUIDED, *more, *smallest])).peak_bytes * 1.1 > room
        return
    changed = Config.load(None, [*GUIDED, *more, *fit.line.split()])
    assert planner.plan(changed).peak_bytes * 1.1 == pytest.approx(fit.num_bytes)
    assert fit.num_bytes <= room
    bits = sum(2**number for number, one in enumerate(CHANGES) if one.keys() <= fit.changes.keys())
    if bits:
        batches = {"train.rollout_batch": 1, "train.microbatch": 1}
        before = verdict._set(config, batches)
        assert planner.plan(before).peak_bytes * 1.1 > room, "smaller batches alone do not do"
    for name in ("train.microbatch", "train.rollout_batch"):
        if name in fit.changes:
            doubled = {name: 2 * fit.changes[name]}
            assert planner.plan(verdict._set(changed, doubled)).peak_bytes * 1.1 > room, "the largest that fits"


def test_smaller_batches_come_before_all_else(monkeypatch: pytest.MonkeyPatch, planner: Planner):
    config = Config.load(None, GUIDED)
    planned = planner.plan(config)
    room = 1.1 * max(planned.update_bytes[16], planned.rollout_bytes, planned.decode_bytes)
    fit = _in_a_gpu_of(config, room, monkeypatch, planner)
    assert fit.line == "train.microbatch=16"
    text = verdict.text([fit])
    assert text.splitlines()[1].strip() == fit.line, "a line to copy"


def test_what_fits_nowhere_is_told(monkeypatch: pytest.MonkeyPatch, planner: Planner):
    fit = _in_a_gpu_of(Config.load(None, GUIDED), 2**20, monkeypatch, planner)
    assert fit.changes is None
    assert verdict.text([fit]) == ("does not fit in     1 GB, whatever is changed; train a smaller model or resolution")


def test_guidance_that_doubles_the_forwards_of_flux_is_told(tmp_path: Path, planner: Planner):
    made("flux").save_pretrained(tmp_path / "flux")
    name = f"model.name={tmp_path / 'flux'}"
    guided, plain = (planner.plan(Config.load(None, [name, f"sampler.guidance_scale={g}"])) for g in (3.5, 1.0))
    assert guided.step_flops == 2 * plain.step_flops
    assert any("sampler.guidance_scale=1.0 halves the forwards" in note for note in guided.notes)
    assert not any("halves" in note for note in plain.notes)

"""The end-to-end benchmark: its baselines do our mathematics, and its arithmetic and files are right."""

import json
import sys
from collections.abc import Iterator
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from adascope_fast import backbones, reference
from adascope_fast.algorithms.policy_gradient import Pairs, ddpo
from adascope_fast.engine.engine import Engine
from adascope_fast.engine.settings import Updates
from adascope_fast.rollout import EncodedPrompts, OwnNoise, rollout
from adascope_fast.schedules.settings import Sampler
from adascope_fast.selectors.simple import EveryStep

BENCH = Path(__file__).parents[2] / "bench"
PROMPTS = ["a small red circle on a grey background", "two large blue crosses on a black background"]
GUIDANCE, T = 5.0, 3


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    """`end_to_end` with its baselines, found as they find each other when the scripts run."""
    folders = [str(BENCH), str(BENCH / "baselines")]
    sys.path[:0] = folders
    yield import_module("end_to_end")
    for folder in folders:
        sys.path.remove(folder)


def _setting(bench: Any, model: str = "scenes", **changes: Any) -> Any:
    family = "sd" if model == "scenes" else "sd3"
    values = {"folder": str(backbones.folder_of(model)), "family": family, "num_steps": T, "batch": 2}
    return bench.Setting(**{**values, "guidance_scale": GUIDANCE, **changes})


def _noise(model: str, amount: float) -> dict[str, Any]:
    """The noise of a model's own sampler."""
    return {"eta" if model == "scenes" else "noise_level": amount}


@pytest.mark.parametrize(("model", "noise"), [("scenes", 1.0), ("scenes", 0.4), ("scenes-flow", 0.7)])
def test_the_eager_samplers_are_ours(bench: Any, model: str, noise: float):
    eager = import_module("eager")
    backbone = backbones.load(model, lora_rank=1)
    make = eager.ddim_tables if model == "scenes" else eager.flow_tables
    timesteps, noisy, plain = make(backbone.pipeline.scheduler, 10, noise)
    schedule = backbone.schedule(10, **_noise(model, noise))
    torch.testing.assert_close(timesteps, schedule.timesteps)
    torch.testing.assert_close(noisy, schedule.coef, rtol=1e-5, atol=1e-6)
    assert schedule.ode_coef is not None
    torch.testing.assert_close(plain, schedule.ode_coef, rtol=1e-5, atol=1e-6)


def test_the_eager_log_probability_is_the_reference(bench: Any):
    eager = import_module("eager")
    generator = torch.Generator().manual_seed(0)
    sample, output, following = torch.randn(3, 7, 4, 5, 5, generator=generator).unbind(0)
    coef = torch.tensor([0.8, -0.3, 0.4])
    got = eager.log_likelihood(following, coef[0] * sample + coef[1] * output, coef[2])
    want = reference.transition_log_prob(sample.double(), output.double(), following.double(), coef.expand(7, 3))
    torch.testing.assert_close(got.double(), want.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model", ["scenes", "scenes-flow"])
def test_the_eager_gradient_is_the_packed_one_at_every_step(bench: Any, model: str):
    noise = 1.0 if model == "scenes" else 0.7
    it = import_module("eager").Eager(_setting(bench, model, noise=noise, lora_rank=2))
    backbone = backbones.load(str(backbones.folder_of(model)), lora_rank=2)
    ours = backbone.trainable_parameters()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # a fresh adapter is zero and has no gradient in half of it
        for theirs, parameter in zip(it.parameters, ours, strict=True):
            theirs.copy_(parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05))
    schedule = backbone.schedule(T, **_noise(model, noise))
    optimizer = torch.optim.SGD(ours, lr=1.0)
    settings = Updates(rollout_batch=2, microbatch=4, updates_per_iteration=1, max_grad_norm=1e9)
    engine = Engine(
        backbone, schedule, ddpo(clip_range=1e-2), EveryStep(), lambda images, prompts: images.mean((1, 2, 3)),
        optimizer, settings, sampler=Sampler(guidance_scale=GUIDANCE),
    )  # fmt: skip
    encoded = EncodedPrompts.of(backbone, PROMPTS)
    trajectory = rollout(
        backbone, schedule, encoded, PROMPTS, guidance_scale=GUIDANCE, noise=OwnNoise(1), batch=2
    )  # fmt: skip
    assert schedule.trainable.all()
    advantages, keep = torch.tensor([0.7, -1.3]), torch.ones(2, T, dtype=torch.bool)
    before = torch.cat([parameter.detach().flatten() for parameter in ours])
    pairs = trajectory.pairs(keep)
    rows: Any = Pairs(trajectory, pairs, advantages[pairs[:, 0]], None)
    engine.update(engine.policy(encoded, schedule), rows, T, generator)
    packed = before - torch.cat([parameter.detach().flatten() for parameter in ours])

    it.setting = _setting(bench, model, noise=noise, clip_range=1e-2)
    condition = [
        torch.cat([encoded.negative[name].expand_as(value), value]) for name, value in encoded.condition.items()
    ]
    if model == "scenes":  # scenes-flow has its own way of saying nothing to T5
        torch.testing.assert_close(it.encode(PROMPTS), condition)
    deviation = it.backward(condition, trajectory.latents, trajectory.log_prob, advantages, it.noisy, range(T))
    eager = torch.cat([parameter.grad.flatten() for parameter in it.parameters])
    assert deviation < 1e-4
    assert (eager - packed).norm() < 1e-4 * packed.norm()
    assert packed.norm() > 0


def test_a_key_that_does_not_exist_is_a_note_not_an_error(bench: Any):
    ours, common = import_module("ours"), import_module("common")
    config = ours.configuration(_setting(bench, options={"config": {"train": {"microbatch": 7}}}))
    assert (config.train.microbatch, config.train.rollout_batch, config.sampler.num_steps) == (7, 2, T)
    with pytest.raises(common.NotBuiltError, match=r"not built: no key train\.wings"):
        ours.configuration(_setting(bench, options={"config": {"train": {"wings": 2}}}))
    with pytest.raises(common.NotBuiltError, match=r"not built: no key selector\.wings$"):
        ours.configuration(_setting(bench, options={"config": {"selector": {"wings": 2}}}))


def test_every_step_of_ours_is_every_step_of_the_baselines(bench: Any):
    """On flows the selector's default leaves out the last step; TRL and the eager loop train it."""
    ours = import_module("ours")
    for model in ("scenes", "scenes-flow"):
        it = ours.Ours(_setting(bench, model, noise=1.0 if model == "scenes" else 0.7))
        it.iterate(PROMPTS, None, import_module("common").Clock("cpu"))
        assert it.engine.selector.telemetry()["fraction"] == 1


def test_the_published_models_have_their_published_size(bench: Any):
    models = import_module("models")

    def size(module: Any) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    with torch.device("meta"):
        small, middle, large = (models.build(name) for name in ("sd15", "sdxl", "sd35m"))
    # 859,520,964 and 83,653,863: the parameters of Stable Diffusion 1's UNet and autoencoder.
    assert (size(small.unet), size(small.vae), size(small.text_encoder)) == (859_520_964, 83_653_863, 123_060_480)
    assert 2.2e9 < size(large.transformer) < 2.6e9
    assert (size(middle.unet), size(middle.text_encoder_2)) == (2_567_463_684, 694_659_840)
    assert middle.vae_scale_factor * middle.unet.config.sample_size == 1024
    assert small.vae_scale_factor * small.unet.config.sample_size == 512
    assert large.vae_scale_factor * large.transformer.config.sample_size == 512


def test_the_line_through_the_origin(bench: Any):
    exact = bench.report.fit_through_origin([0.1, 0.5, 1.0], [0.3, 1.5, 3.0])
    assert exact == pytest.approx({"slope_s": 3.0, "r": 1.0, "worst_deviation": 0.0})
    # By hand: slope (1 * 3 + 2 * 4) / (1 + 4) = 2.2; deviations 3 / 2.2 - 1 and 4 / 4.4 - 1.
    bent = bench.report.fit_through_origin([1.0, 2.0], [3.0, 4.0])
    assert bent == pytest.approx({"slope_s": 2.2, "r": 1.0, "worst_deviation": 3 / 2.2 - 1})
    noisy = bench.report.fit_through_origin([1.0, 2.0, 3.0], [1.0, 3.0, 2.0])
    assert noisy["r"] == pytest.approx(0.5)
    with pytest.raises(ValueError, match="two points or more"):
        bench.report.fit_through_origin([1.0], [1.0])


def _repeat(wall: float, cpu: float, update: float) -> dict[str, Any]:
    parts = {"encode": 0.25, "rollout": 1.0, "update": update}
    return {
        "images": 4, "pairs": 20, "ratio_deviation": cpu / 1e6, "peak_mb": 100 * cpu,
        "wall_s": {"all": wall, **parts}, "cpu_s": {"all": cpu, **parts},
    }  # fmt: skip


def test_a_row_is_made_of_medians_and_ratios_of_medians(bench: Any):
    names = {"trl": [9.0, 8.0, 10.0], "eager": [6.0, 6.0, 60.0], "ours_every_step": [3.0, 2.0, 99.0]}
    rows = []
    for name, cpus in names.items():
        row = bench.report.summarise([_repeat(cpu + 1, cpu, cpu / 2) for cpu in cpus], clock="cpu_s", num_steps=10)
        rows.append({"name": name, "label": name, "clock": "cpu_s", **row})
    rows.append({"name": "ours_one_pass", "label": "one pass", "clock": "cpu_s", "note": "not built"})
    for base in ("trl", "eager"):
        bench.report.ratios(rows, base)
    ours = rows[2]
    assert (ours["cpu_s"], ours["wall_s"], ours["rollout_s"], ours["update_s"]) == (3.0, 4.0, 1.25, 1.5)
    assert (ours["fraction_trained"], ours["ms_per_image_step"], ours["peak_mb"]) == (0.5, 75.0, 9900)
    assert ours["times_trl"] == {"wall_s": 2.5, "cpu_s": 3.0}
    assert ours["times_eager"]["cpu_s"] == 2.0
    table = bench.report.markdown(rows).splitlines()
    assert table[-2].endswith("| 3.00 | 2.00 |")
    assert "| one pass | not built |" in table[-1]
    assert len({line.count("|") for line in table}) == 1
    sweep = {"fit": {"worst_deviation": 0.06}}
    met = {goal["goal"]: goal["met"] for goal in bench.report.goals(rows, sweep)}
    assert list(met.values()) == [True, None, None, False]


def test_flop_shares_count_what_the_algorithm_needs(bench: Any):
    flops = {"forward": 2.0, "forward_backward": 5.0, "matrix_rate": 100.0}
    row: dict[str, Any] = {"rollout_s": 3.0, "update_s": 2.0, "repeats": [{"images": 4, "pairs": 20}]}
    bench.report.flop_share(row, flops, num_steps=10, is_one_pass=False)
    assert row["flop_share_update"] == 20 * 5 / 2 / 100
    assert row["flop_share"] == pytest.approx((4 * 10 * 2 + 20 * 5) / 5 / 100)
    bench.report.flop_share(row, flops, num_steps=10, is_one_pass=True)
    assert row["flop_share_update"] is None
    assert row["flop_share"] == pytest.approx((4 * 10 * 2 + 20 * 3) / 5 / 100)


def test_the_file_says_where_when_and_how_it_was_measured(bench: Any, tmp_path: Path):
    path = tmp_path / "new" / "result.json"
    bench.report.write(path, [{"model": "scenes"}], device="no GPU used", started=0.0, load=[1.0, 2.0, 3.0])
    result = json.loads(path.read_text())
    assert result["models"] == [{"model": "scenes"}]
    assert result["load_average"]["before"] == [1.0, 2.0, 3.0]
    assert result["machine"].endswith("cores, no GPU used")
    assert result["command"].startswith("python bench/end_to_end.py")
    assert {"date", "commit", "seconds"} <= result.keys()


def test_a_variant_that_dies_or_is_not_built_leaves_a_note(bench: Any, tmp_path: Path):
    answers = tmp_path / "answers.py"
    answers.write_text(
        "import json\nprint(json.dumps({'tokens': [1]}), flush=True)\n"
        "print(json.dumps({'got': json.loads(input())}), flush=True)\ninput()\nraise SystemExit('out of memory')\n"
    )
    refuses = tmp_path / "refuses.py"
    refuses.write_text('print(\'{"not_built": "no key"}\')')
    variants = [bench.Variant("answers", "", answers), bench.Variant("refuses", "", refuses)]
    with bench.workers(variants, _setting(bench), "", tmp_path) as (first, second):
        assert first.ask("run", keep=None) == {"got": {"op": "run", "keep": None}}
        assert first.ask("run") == {}
        assert first.note == "failed: out of memory"
        assert first.ask("run") == {}
        assert (second.note, second.ask("run")) == ("no key", {})
    missing = bench.Worker(bench.Variant("trl", "", bench.TRL), _setting(bench), str(tmp_path / "none"), tmp_path)
    assert "make bench-cpu makes it" in missing.note
    missing.close()


def test_variants_that_read_a_prompt_differently_are_refused(bench: Any, tmp_path: Path):
    variants = []
    for name in ("one", "two"):
        script = tmp_path / f"{name}.py"
        script.write_text(f'print(\'{{"tokens": ["{name}"]}}\')\ninput()')
        variants.append(bench.Variant(name, "", script))
    with (
        pytest.raises(RuntimeError, match="must see the same tokens"),
        bench.workers(variants, _setting(bench), "", tmp_path),
    ):
        pass


def test_the_ladder_adds_one_feature_at_a_time(bench: Any):
    for is_gpu in (False, True):
        rows = bench.ladder(4, is_gpu=is_gpu)
        flat = [
            {(section, key): value for section, keys in row.options["config"].items() for key, value in keys.items()}
            | {"interval": row.is_interval}
            for row in rows
        ]
        changed = [len(set(after.items()) - set(before.items())) for before, after in pairwise(flat)]
        assert changed == [1] * (len(rows) - 1)
        assert rows[-2].is_one_pass
        assert rows[-1].options["config"]["sampler"] == {"tail_share": 0.4}


def test_every_iteration_has_new_prompts_and_the_interval_scales(bench: Any):
    batches = bench.prompt_batches(8)
    first, second = next(batches), next(batches)
    assert len(set(first) | set(second)) == 16
    assert (bench.interval(50), bench.interval(10)) == ([5, 32], [1, 6])

"""AWM and DiffusionNFT from the command line: every selector, the second-order solver, and what follows a run."""

import math
from pathlib import Path

import pytest
import torch
from command_line import call, refused
from safetensors.torch import load_file
from small_runs import lines_of

from adascope_fast import schedules
from adascope_fast.config import Config
from adascope_fast.training.trainer import Trainer

TINY = Path(__file__).parents[2] / "configs" / "tiny.toml"
SMALLEST = [
    "reward.name=jpeg_compressibility",
    "sampler.num_steps=5",
    "train.prompts_per_iteration=1",
    "train.learning_rate=0.01",
    "evaluation.num_prompts=1",
    "evaluation.samples_per_prompt=1",
    "algorithm.kl_weight=0.1",
]
SOLVER = "sampler.kind=dpm_solver"
NFT, AWM = "algorithm.name=diffusion_nft", "algorithm.name=awm"


def _trained(folder: Path, *overrides: str) -> list[dict]:
    outcome = call("train", TINY, *SMALLEST, *overrides, f"run.folder={folder}")
    assert outcome.code == 0, outcome
    return lines_of(folder)


@pytest.mark.parametrize("algorithm", [NFT, AWM])
@pytest.mark.parametrize(
    ("selector", "kept"),
    [
        (["selector.name=adascope"], None),
        (["selector.name=adascope", "selector.mask_source=previous"], None),
        (["selector.name=every_step"], [{0, 1, 2, 3}] * 2),
        (["selector.name=static_range", "selector.start=1", "selector.end=3"], [{1, 2}] * 2),
        (["selector.name=random_fraction", "selector.fraction=0.4"], None),
        (["selector.name=window", "selector.shift_every=1"], [{0, 1}, {1, 2}]),
        (["selector.name=fast_window", "selector.end=2"], [{0, 1}] * 2),
    ],
    ids=["adascope", "previous", "every_step", "static_range", "random_fraction", "window", "fast_window"],
)
def test_the_solver_trains_with_every_selector(tmp_path: Path, algorithm: str, selector: list[str], kept: list | None):
    records = _trained(tmp_path / "run", "model.name=scenes-flow", SOLVER, algorithm, *selector)
    assert len(records) == 2
    for number, record in enumerate(records):
        assert record["grad_norm"] > 0
        assert record["nonfinite"] == 0
        assert math.isfinite(record["reward_mean"])
        pairs = record["steps"]["pairs"]
        if kept is not None:  # two images, each step once: none has more steps than there are draws
            assert pairs == [2.0 * (step in kept[number]) for step in range(5)]
        if selector == ["selector.name=adascope"]:
            want = [sum(start <= step < end for start, end in record["selector"]["intervals"]) for step in range(5)]
            assert pairs == [2.0 * count / len(record["selector"]["intervals"]) for count in want]
            assert set(record["selector"]["reasons"]) != {"fallback:nonfinite"}
    adapter = load_file(tmp_path / "run" / "adapter" / "pytorch_lora_weights.safetensors")
    assert any(value.abs().max() > 0 for value in adapter.values())


def test_a_diffusion_model_trains_and_is_evaluated_sampled_and_planned_with_the_solver(tmp_path: Path):
    run = tmp_path / "run"
    _trained(run, SOLVER, NFT, "selector.name=every_step", "sampler.guidance_scale=2.0")
    trainer = Trainer(Config.load(run / "config.toml"), quiet=True)
    trainer.prepare()
    assert trainer.schedule.kind == "dpm_solver"
    assert trainer.evaluation_schedule.multistep is not None
    assert call("sample", run, "--prompt", "a large red circle on a grey background", "--num", "1").code == 0
    assert call("plan", run / "config.toml").code == 0
    outcome = call("calibrate", run / "config.toml", "--prompts", "1", f"run.folder={tmp_path / 'calibration'}")
    assert outcome.code == 0, outcome


def test_the_evaluation_may_have_a_sampler_of_its_own(tmp_path: Path):
    config = Config.load(TINY, ["sampler.eta=0.5", f"run.folder={tmp_path / 'run'}"])
    for own, want in ((None, None), ("dpm_solver", "dpm_solver"), ("ddim", "ddim")):
        trainer = Trainer(config.changed([] if own is None else [f"evaluation.kind={own}"]), quiet=True)
        trainer.prepare()
        assert trainer.evaluation_schedule.kind == (want or "ddim")
        usual = torch.equal(trainer.evaluation_schedule.coef, trainer.backbone.schedule(6, kind="ddim").coef)
        assert usual == (own == "ddim"), "the noise of the kind, or that of the sampler"
    line = refused("train", TINY, "evaluation.kind=flow_ode", f"run.folder={tmp_path / 'run'}")
    assert "flow_ode" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([SOLVER], 'ddpo trains steps by their log-probability, got sampler.kind = "dpm_solver", without noise, which'),
        (["sampler.eta=0", "algorithm.name=d3po"], "d3po trains steps by their log-probability, got sampler.eta = 0.0"),
        ([SOLVER, NFT, "sampler.tail_share=0.5"], "a tail of sampler.tail_share is the steps of dpm_solver after the"),
        ([SOLVER, NFT, "sampler.eta=0.5"], 'sampler.kind = "dpm_solver" takes no noise, got sampler.eta = 0.5; remove'),
        ([NFT, "train.update=one_pass", "algorithm.kl_weight=0"], "and diffusion_nft has none; set train.update"),
        ([NFT, "algorithm.num_draws=7"], "algorithm.num_draws must be at most the 6 steps of a rollout, got 7"),
        ([NFT, "algorithm.beta=0"], "algorithm.beta must be above 0, got 0"),
        ([NFT, "algorithm.ema_decay_type=1"], "algorithm.ema_decay_type must be one of none, type_1, type_2, got 1;"),
        ([NFT, "train.samples_per_prompt=1"], "diffusion_nft compares the images of one prompt"),
        ([NFT, "algorithm.clip_range=1"], "algorithm.clip_range belongs to algorithm.name"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(tmp_path: Path, overrides: list[str], message: str):
    assert message in refused("train", TINY, f"run.folder={tmp_path / 'run'}", *overrides)
    assert not (tmp_path / "run").exists(), "nothing is written"


@pytest.mark.parametrize("algorithm", [NFT, AWM])
def test_full_fine_tuning_resumes_bit_for_bit(tmp_path: Path, algorithm: str):
    """Stopped after the first iteration; the moving average and the frozen copy are as large as the denoiser."""
    full = ["model.train=full", SOLVER, algorithm, "selector.name=every_step", "train.learning_rate=1e-4"]
    _trained(tmp_path / "alone", *full)
    _trained(tmp_path / "twice", *full, "train.iterations=1")
    assert call("train", "--resume", tmp_path / "twice", "train.iterations=2").code == 0
    states = [load_file(tmp_path / run / "checkpoints/000002/state.safetensors") for run in ("alone", "twice")]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    averages = [value for name, value in states[0].items() if name.startswith("algorithm.") and value.dim()]
    trained = [value for name, value in states[0].items() if name.startswith("adapter.")]
    assert sum(value.numel() for value in averages) == sum(value.numel() for value in trained)


def test_the_solver_of_a_flow_has_its_levels():
    """So selectors leave its last step out, as that of the other flow samplers."""
    trainer = Trainer(Config.load(TINY, ["model.name=scenes-flow", SOLVER, NFT]), quiet=True)
    trainer.prepare()
    assert trainer.schedule.is_flow
    assert trainer.algorithm.schedule(trainer.schedule).trainable.all()
    levels = trainer.schedule.levels()
    for level, want in zip(levels, schedules.flow_ode(_sigmas(levels[1])).levels(), strict=True):
        torch.testing.assert_close(level, want, rtol=1e-6, atol=1e-6)


def _sigmas(sigma: torch.Tensor) -> torch.Tensor:
    return torch.cat([sigma, torch.zeros(1, dtype=sigma.dtype)])

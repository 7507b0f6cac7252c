"""Every kind of sampler through a training, end to end, and the kinds that a model or an algorithm cannot use."""

import json
import math
from pathlib import Path

import pytest
import torch
from command_line import call, refused
from safetensors.torch import load_file

from adascope_fast.config import Config
from adascope_fast.training.trainer import Trainer

TINY = Path(__file__).parents[2] / "configs" / "tiny.toml"
SMALLEST = [
    "reward.name=jpeg_compressibility",
    "sampler.num_steps=4",
    "selector.name=every_step",
    "train.prompts_per_iteration=1",
    "train.learning_rate=0.01",
    "evaluation.num_prompts=1",
    "evaluation.samples_per_prompt=1",
]
FLOW, DIFFUSION = "model.name=scenes-flow", "model.name=scenes"
GRPO, AWM, D3PO = (f"algorithm.name={name}" for name in ("grpo", "awm", "d3po"))


@pytest.mark.parametrize(
    ("kind", "overrides", "steps"),
    [
        ("ddpm", [DIFFUSION], 4),
        ("ddpm", [DIFFUSION, D3PO], 4),
        ("dance_sde", [FLOW, GRPO], 3),
        ("dance_sde", [FLOW, GRPO, "sampler.eta=0.5", "selector.last_step=train"], 4),
        ("flow_cps", [FLOW, GRPO], 3),
        ("flow_cps", [FLOW, D3PO, "sampler.eta=0.4"], 3),
        ("flow_ode", [FLOW, AWM, "algorithm.num_draws=3"], 3),
    ],
)
def test_a_sampler_trains_end_to_end(tmp_path: Path, kind: str, overrides: list[str], steps: int):
    """`steps` of four have a log_prob and are trained; the last of a flow is left out unless it is asked for."""
    run, settings = tmp_path / "run", [*SMALLEST, *overrides, f"sampler.kind={kind}"]
    outcome = call("train", TINY, *settings, f"run.folder={run}")
    assert outcome.code == 0, outcome
    records = [json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines()]
    assert len(records) == 2
    for record in records:
        assert record["grad_norm"] > 0
        assert math.isfinite(record["loss"])
        assert record["nonfinite"] == 0
        assert math.isfinite(record["reward_mean"])
    if D3PO not in overrides:  # a row is a pair of images there
        assert records[0]["fraction_trained"] == steps / 4
    adapter = load_file(run / "adapter" / "pytorch_lora_weights.safetensors")
    assert any(value.abs().max() > 0 for name, value in adapter.items() if "lora_B" in name or "lora.up" in name)
    trainer = Trainer(Config.load(run / "config.toml"), quiet=True)
    trainer.prepare()
    assert trainer.schedule.kind == kind
    usual = trainer.backbone.schedule(4, kind=kind)
    is_usual = not any(override.startswith("sampler.eta") for override in overrides)
    assert torch.equal(trainer.schedule.coef, usual.coef) == is_usual, "the noise is the configured one"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([DIFFUSION, "sampler.kind=flow_cps"], "flow_cps"),
        ([DIFFUSION, "sampler.kind=flow_ode", AWM], "flow_ode"),
        ([FLOW, GRPO, "sampler.kind=ddpm"], "ddpm"),
        ([FLOW, GRPO, "sampler.kind=ddim"], "ddim"),
        (
            [FLOW, GRPO, "sampler.kind=flow_sde", "sampler.eta=0.5"],
            'sampler.kind = "flow_sde" takes sampler.noise_level',
        ),
        ([DIFFUSION, "sampler.kind=ddpm", "sampler.eta=0.5"], 'sampler.kind = "ddpm" takes no noise, got sampler.eta'),
        ([FLOW, GRPO, "sampler.eta=0.5"], "eta"),
        ([DIFFUSION, "sampler.noise_level=0.5"], "noise_level"),
    ],
)
def test_a_sampler_or_noise_of_another_family_is_one_line(tmp_path: Path, overrides: list[str], message: str):
    line = refused("train", TINY, *SMALLEST, f"run.folder={tmp_path / 'run'}", *overrides)
    assert message in line
    assert not (tmp_path / "run").exists(), "nothing is written"


@pytest.mark.parametrize("algorithm", ["ddpo", "reinforce", "grpo", "dpok", "d3po"])
@pytest.mark.parametrize("selector", ["every_step", "adascope"])
def test_an_algorithm_that_needs_log_probabilities_cannot_train_a_sampler_without_noise(
    tmp_path: Path, algorithm: str, selector: str
):
    overrides = [FLOW, f"algorithm.name={algorithm}", "sampler.kind=flow_ode", f"selector.name={selector}"]
    line = refused("train", TINY, *SMALLEST, f"run.folder={tmp_path / 'run'}", *overrides)
    assert "without noise, which has no log_prob at any step" in line
    assert not (tmp_path / "run").exists(), "nothing is written"

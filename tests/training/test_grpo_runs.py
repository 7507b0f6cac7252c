"""Runs of GRPO's kin from the command line: each with what the paper has around it, with AdaScope, and after a stop."""

import math
from pathlib import Path

import pytest
import torch
from command_line import TINY, call, refused
from safetensors.torch import load_file
from small_runs import SMALLEST, lines_of

FLOW = ["model.name=scenes-flow", "sampler.shift=3.0", "sampler.num_steps=6"]
JPEG = ["reward.name=jpeg_compressibility", "train.samples_per_prompt=4", "train.rollout_batch=3"]
FAST = ["selector.name=fast_window", "selector.window_size=2", "selector.end=4"]
MIX = ["selector.name=window", "selector.start=2", "selector.window_size=2", "selector.shift_every=2"]
RUNS = {
    "flow_grpo_fast": [*FLOW, *FAST],
    "mix_grpo, short tail": [*FLOW, *MIX, "sampler.tail_share=0.4"],
    "mix_grpo, AdaScope": FLOW,
    "dance_grpo": [*FLOW, "sampler.kind=dance_sde", "selector.name=random_fraction", "selector.fraction=0.6"],
    "dance_grpo, diffusion": ["model.train=full", "selector.name=every_step"],
    "grpo_guard": [*FLOW, "selector.name=every_step", "train.updates_per_iteration=2"],
    "grpo_guard, AdaScope": [*FLOW, "algorithm.kl_weight=0.1", "model.train=full"],
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_trains_and_a_stopped_one_repeats_it(tmp_path: Path, name: str):
    settings = [*SMALLEST, *JPEG, *RUNS[name], f"algorithm.name={name.partition(',')[0]}"]
    weights = []
    for folder, first in (("straight", 3), ("stopped", 2)):
        run = tmp_path / folder
        outcome = call("train", TINY, *settings, f"run.folder={run}", f"train.iterations={first}")
        assert outcome.code == 0, outcome
        if first == 2:
            outcome = call("train", "--resume", run, "train.iterations=3")
            assert outcome.code == 0, outcome
        (file,) = (run / "checkpoints").glob("*3/*.safetensors")
        weights.append(load_file(file))
    for tensor, value in weights[0].items():
        assert torch.equal(value, weights[1][tensor]), tensor
    for record in lines_of(tmp_path / "straight"):
        assert record["grad_norm"] > 0
        assert math.isfinite(record["loss"])
        assert record["samples_dropped"] == 0


def test_the_window_saves_what_the_images_of_a_prompt_share(tmp_path: Path):
    """Four images of a prompt, six steps, noise from step 2 on: three of them skip two steps."""
    settings = [*SMALLEST, *JPEG, *FLOW, *MIX, "algorithm.name=mix_grpo", "train.iterations=1"]
    counts = []
    for noise in ("own", "group"):
        run = tmp_path / noise
        assert call("train", TINY, *settings, f"run.folder={run}", f"algorithm.initial_noise={noise}").code == 0
        counts.append(lines_of(run)[0]["forwards_sampled"])
    assert counts == [4 * 6, 4 * 6 - 3 * 2]


@pytest.mark.parametrize("name", ["flow_grpo_fast", "dance_grpo", "mix_grpo", "grpo_guard"])
def test_groups_of_one_and_keys_of_others_are_refused(name: str):
    assert "at least 2, got 1" in refused("train", TINY, f"algorithm.name={name}", "train.samples_per_prompt=1")
    line = refused("train", TINY, f"algorithm.name={name}", "algorithm.initial_noise=all")
    assert "algorithm.initial_noise must be one of own, group" in line
    line = refused("train", TINY, f"algorithm.name={name}", "algorithm.buffer_size=3")
    assert "algorithm.buffer_size belongs to" in line

"""An iteration that replays graphs gives the bits of one that does not: trajectory, statistics and weights.

By the emulation of CUDA graphs; `tests/test_gpu.py` has the same with graphs.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from graph_emulation import Emulation
from graph_runs import SCENES, STEPS, Run, assert_same
from torch import Tensor

from adascope_fast import backbones
from adascope_fast.algorithms import PolicyGradient
from adascope_fast.algorithms.advantages import GroupRelative
from adascope_fast.algorithms.critic import dpok, tdpo
from adascope_fast.algorithms.objectives import score_function
from adascope_fast.algorithms.policy_gradient import dance_grpo, ddpo, grpo, grpo_guard, reinforce
from adascope_fast.algorithms.preference import d3po
from adascope_fast.algorithms.regression import awm, diffusion_nft
from adascope_fast.engine.graphs import Graphs
from adascope_fast.engine.recorded import MICROBATCH, halved_parts
from adascope_fast.rollout import EncodedPrompts
from adascope_fast.schedules.noise import rectified_flow
from adascope_fast.schedules.samplers import dpm_solver
from adascope_fast.selectors.simple import StaticRange
from adascope_fast.selectors.windows import Window


def _same(make: Callable[[Graphs | None], Run]) -> tuple[Graphs, list[str]]:
    """Graphs that have replayed what gave the same bits without them, and what they told."""
    lines: list[str] = []
    graphs = Graphs(Emulation(), tell=lines.append)
    want = make(None)
    assert_same(make(graphs), want)
    return graphs, lines


def _model(name: str, **options: Any) -> Any:
    return backbones.load(name, lora_rank=2, **options)


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
@pytest.mark.parametrize("name", ["scenes", "scenes-flow"])
def test_iterations_of_the_embedded_models(name: str, guidance_scale: float):
    """Two updates each; 6 images in batches of 4 and 2, and 12 pairs in microbatches of 3."""
    options: dict[str, Any] = {"guidance_scale": guidance_scale, "updates_per_iteration": 2, "microbatch": 3}
    graphs, lines = _same(lambda graphs: Run(_model(name), grpo(kl_weight=0.1), graphs, **options, folds_adapter=True))
    # Of each of four graphs the first use was none: two sizes of batches, an update on policy and one off it.
    assert graphs.num_calls - graphs.num_replays == 4
    assert len(lines) == 4
    assert graphs.num_calls == 3 * (2 * STEPS + 4)


ALGORITHMS: dict[str, Callable[[], Any]] = {
    "ddpo": lambda: ddpo(step_weight="balanced"),
    "reinforce": reinforce,
    "grpo with a KL of its code": lambda: grpo(kl_weight=0.1, kl_form="flow_grpo"),
    "dance_grpo": dance_grpo,
    "grpo_guard": lambda: grpo_guard(kl_weight=0.1, clip_range=0.01),
    "tdpo": lambda: tdpo(value_learning_rate=1e-2, reset_every=2),
    "dpok": lambda: dpok(value_learning_rate=1e-2, clip_range=0.01),
    "d3po": lambda: d3po(beta=2.0),
    "awm": lambda: awm(num_draws=2, ema_kl_weight=0.1, kl_weight=0.1),
    "diffusion_nft": lambda: diffusion_nft(num_draws=2, kl_weight=0.1),
}


@pytest.mark.parametrize("train_guidance", ["both", "conditional"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_iterations_of_every_algorithm(make_toy: Callable, name: str, train_guidance: str):
    once = name == "reinforce"
    options: dict[str, Any] = {"inner_epochs": 1 if once else 2, "guidance_scale": 2.0, "images": 4, "microbatch": 4}
    options |= {"train_guidance": train_guidance, "ema": True, "rollout_batch": 5}
    graphs, lines = _same(lambda graphs: Run(make_toy(), ALGORITHMS[name](), graphs, **options))
    assert graphs.num_calls - graphs.num_replays == len(lines) == (3 if once else 4)


def test_iterations_in_one_pass():
    """The steps that are not kept are replayed, on folded weights; the others are differentiated as they were."""
    options: dict[str, Any] = {"update": "one_pass", "guidance_scale": 2.0, "folds_adapter": True, "iterations": 2}
    graphs, _ = _same(lambda graphs: Run(_model("scenes"), ddpo(), graphs, **options))
    assert graphs.num_calls == 2 * 2 * 2
    assert graphs.num_replays == 6


def test_iterations_with_a_short_tail(make_toy: Callable):
    options: dict[str, Any] = {"tail_share": 0.5, "rollout_batch": 4, "update": "replay"}
    graphs, lines = _same(lambda graphs: Run(make_toy(), ddpo(), graphs, **options))
    assert any("a step of the tail is recorded" in line for line in lines)
    assert graphs.num_replays > graphs.num_calls / 2


def test_iterations_of_a_solver_that_looks_back(make_toy: Callable):
    """Its rollout is not recorded, and a line says so; its updates are."""

    def run(graphs: Graphs | None) -> Run:
        toy = make_toy()
        process = rectified_flow(torch.linspace(1, 0, STEPS + 1), 1000)
        toy.schedule = lambda num_steps: dpm_solver(process, "flow_dpm_solver")
        return Run(toy, diffusion_nft(), graphs, images=4)

    graphs, lines = _same(run)
    why = "flow_dpm_solver looks back at the guess of the step before"
    assert lines[0] == f"CUDA graphs: a step of the rollout runs without: {why}"
    assert [MICROBATCH in line for line in lines] == [False, True]
    assert graphs.num_replays == graphs.num_calls - 1


def test_iterations_whose_sampler_changes(make_toy: Callable):
    """A window of noisy steps moves on, so the tables of the sampler are others in every iteration."""
    window: dict[str, Any] = {"window_size": 2, "shift_every": 1, "window_shift": 1}

    def run(graphs: Graphs | None) -> Run:
        return Run(make_toy(), ddpo(), graphs, selector=Window(**window), microbatch=3)

    graphs, lines = _same(run)
    assert graphs.num_calls - graphs.num_replays == len(lines)
    assert [MICROBATCH in line for line in lines].count(True) == 1, "however many rows the loss is divided by"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_iterations_of_other_types(dtype: torch.dtype):
    """Autocast of float32 weights, and float16 weights whose gradients are scaled; with checkpointing."""
    is_cast = dtype == torch.bfloat16

    def run(graphs: Graphs | None) -> Run:
        options: dict[str, Any] = {} if is_cast else {"dtype": dtype}
        model = _model("scenes", gradient_checkpointing=True, **options)
        autocast = (lambda: torch.autocast("cpu", dtype=dtype)) if is_cast else nullcontext
        few: dict[str, Any] = {"prompts": SCENES[:2], "images": 1, "microbatch": 2, "iterations": 2}
        return Run(model, ddpo(), graphs, autocast=autocast, folds_adapter=True, **few)

    graphs, lines = _same(run)
    assert graphs.num_replays > graphs.num_calls / 2, lines


def test_an_update_of_any_length_is_cut_into_sizes_that_come_again(make_toy: Callable):
    """12 rows in microbatches of 5, 5 and 2; the bits are those of the same cut without graphs."""
    lines: list[str] = []
    want = Run(make_toy(), ddpo(), Graphs(Emulation(), most=0), microbatch=5)
    assert_same(Run(make_toy(), ddpo(), Graphs(Emulation(), tell=lines.append), microbatch=5), want)
    assert [MICROBATCH in line for line in lines].count(True) == 2


def test_iterations_of_all_weights(make_toy: Callable):
    options: dict[str, Any] = {"train": "full", "keep_reference": True}

    def run(graphs: Graphs | None) -> Run:
        return Run(backbones.load("scenes", **options), grpo(kl_weight=0.1), graphs, iterations=2)

    graphs, lines = _same(run)
    assert graphs.num_replays > graphs.num_calls / 2, lines


def test_a_loss_of_ones_own_is_recorded_if_it_says_that_it_may_be(make_toy: Callable):
    class Repeatable(PolicyGradient):
        @property
        def is_repeatable(self) -> bool:
            return True

    def objective(*log_probs: Tensor) -> tuple[Tensor, Tensor]:
        return score_function(*log_probs)

    keys: dict[str, Any] = {"name": "own", "advantage": GroupRelative(), "objective": objective}
    graphs, lines = _same(lambda graphs: Run(make_toy(), PolicyGradient(**keys), graphs))
    assert lines[0] == f"CUDA graphs: {MICROBATCH} runs without: own does not say that its loss is_repeatable"
    recorded, _ = _same(lambda graphs: Run(make_toy(), Repeatable(**keys), graphs))
    assert recorded.num_calls - graphs.num_calls == 3 * 3, "the microbatches"


def test_a_loss_that_waits_for_the_device_runs_without(make_toy: Callable):
    class Waiting(PolicyGradient):
        @property
        def is_repeatable(self) -> bool:
            return True

    def objective(log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor) -> tuple[Tensor, Tensor]:
        return score_function(log_prob, old_log_prob, advantage * (1 + 0 * log_prob.sum().item()))

    keys: dict[str, Any] = {"name": "own", "advantage": GroupRelative(), "objective": objective}
    _, lines = _same(lambda graphs: Run(make_toy(), Waiting(**keys), graphs))
    (line,) = (line for line in lines if MICROBATCH in line)
    assert "cannot be recorded" in line
    assert "waits for the device" in line


def test_memory_that_runs_out_takes_the_graphs_along(make_toy: Callable):
    """And the smaller batches are recorded anew."""
    lines: list[str] = []
    graphs, toy = Graphs(Emulation(), tell=lines.append), make_toy()
    predict, is_scarce = toy.predict, False

    def scarce(sample: Tensor, *rest: Tensor) -> Tensor:
        if is_scarce and len(sample) > 2:
            raise torch.OutOfMemoryError("full")
        return predict(sample, *rest)

    toy.predict = scarce
    run = Run(toy, ddpo(), graphs, iterations=2)
    before, is_scarce = len(lines), True
    batch = SCENES[:2]
    for iteration in range(2):
        run.engine.step(EncodedPrompts.of(toy, batch), batch * 2, iteration=iteration, seed=iteration)
    assert run.engine.rollout_batch == 2
    assert "a step of the rollout is recorded, graph 1 of" in lines[before]


def test_trajectories_are_not_written_over(make_toy: Callable):
    seen = []

    class Keeping(StaticRange):
        def __call__(self, trajectory: Any, iteration: int) -> Tensor:
            seen.append((trajectory, trajectory.latents.clone(), trajectory.schedule.coef.clone()))
            return super().__call__(trajectory, iteration)

    Run(make_toy(), ddpo(), Graphs(Emulation()), selector=Keeping(start=0, end=2))
    assert len(seen) == 3
    for trajectory, latents, coef in seen:
        assert torch.equal(trajectory.latents, latents)
        assert torch.equal(trajectory.schedule.coef, coef)
    assert not torch.equal(seen[0][1], seen[1][1])


def test_offloaded_text_encoders_leave_before_a_replay():
    model = _model("scenes", offload_text_encoders=True)
    moved: list[bool] = []
    place = model._place_text_encoders
    model._place_text_encoders = lambda *, is_near: (moved.append(is_near), place(is_near=is_near))
    Run(model, ddpo(), Graphs(Emulation()), prompts=SCENES[:2], iterations=4)
    steps = "".join("n" if is_near else "a" for is_near in moved)
    assert steps.endswith("na"), "in the last iteration nothing is predicted but in replays"


def test_microbatches_of_any_size_are_those_that_come_again():
    assert [part.stop - part.start for part in halved_parts(250, 64)] == [64, 64, 64, 32, 16, 8, 2]
    assert [part.stop - part.start for part in halved_parts(63, 50)] == [50, 13]
    for length in range(40):
        for size in (1, 2, 3, 7, 16):
            parts = halved_parts(length, size)
            assert [row for part in parts for row in range(part.start, part.stop)] == list(range(length))

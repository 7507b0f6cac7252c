"""What one process of several does in the tests of ranks: iterations whose outcome must not depend on their number.

As a program, `python rank_cases.py OUT CASE...`: one JSON file for each case in the folder OUT, by the first rank, with
samples (rewards, digests of latents), intervals, advantages, gradients and weights.
"""

import hashlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from graph_emulation import Emulation
from preference_sets import write_judged, write_pairs
from torch import Tensor

from adascope_fast import algorithms as named
from adascope_fast.algorithms.policy_gradient import PolicyGradient
from adascope_fast.config import Config
from adascope_fast.distributed.sharded import whole
from adascope_fast.engine.engine import Engine
from adascope_fast.engine.graphs import Graphs
from adascope_fast.rollout import EncodedPrompts, PromptCache
from adascope_fast.selectors.simple import StaticRange
from adascope_fast.training.trainer import Trainer

TESTS = Path(__file__).parent
SMALL = [
    "log.trackers=[]",
    "train.device=cpu",
    "train.prompts_per_iteration=4",
    "train.samples_per_prompt=2",
    "train.rollout_batch=2",
    "sampler.num_steps=6",
    "acceleration.fold_adapter=off",
    "acceleration.channels_last=off",
]
RUNS: dict[str, list[str]] = {
    "scenes": ["quickstart.toml"],
    "scenes, every weight": ["", "model.name=scenes", "model.train=full", "algorithm.kl_weight=0.1"],
    "scenes, average, two updates": ["quickstart.toml", "model.ema_decay=0.9", "train.updates_per_iteration=2"],
    "scenes-flow": ["quickstart_flow.toml"],
    "scenes-flow, every weight": ["", "model.name=scenes-flow", "model.train=full"],
    "judged sets": ["quickstart.toml", "algorithm.name=diffusion_kto", "algorithm.preferences={sets}/judged"],
    "pairs": ["quickstart.toml", "algorithm.name=diffusion_dpo", "algorithm.preferences={sets}/pairs"],
}
PROMPTS = ["a red one", "a red one", "the green", "the green", "see", "see", "an eel", "an eel"]
TOYS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "ddpo": (lambda: named.ddpo(clip_range=0.01), {}),
    "reinforce": (lambda: named.reinforce(), {}),
    "grpo, similarity": (lambda: named.grpo(attribution="similarity", kl_weight=0.1), {}),
    "grpo, one latent a group": (lambda: named.grpo(initial_noise="group"), {"kind": "flow_sde"}),
    "grpo_guard": (lambda: named.grpo_guard(), {"kind": "flow_sde"}),
    "dpok": (lambda: named.dpok(value_learning_rate=1e-2, clip_range=0.01), {}),
    "tdpo": (lambda: named.tdpo(), {}),
    "d3po": (lambda: named.d3po(beta=2.0), {}),
    "spo": (lambda: named.spo(margin=0.0), {}),
    "awm": (lambda: named.awm(num_draws=3), {}),
    "diffusion_nft": (lambda: named.diffusion_nft(beta=0.5, kl_weight=0.1), {}),
    "one pass": (lambda: named.ddpo(), {"inner_epochs": 1, "updates_per_iteration": 1, "update": "one_pass"}),
    "whole samples": (lambda: named.ddpo(), {"minibatch": "samples"}),
    "graphs": (lambda: named.ddpo(clip_range=0.01), {"graphs": True, "microbatch": 2}),
    "NaN": (lambda: named.grpo(), {"score": "nan"}),
}


def _conftest(folder: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"conftest_of_{folder or 'tests'}", TESTS / folder / "conftest.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Watch:
    """Keeps what the iterations of an engine have sampled, chosen and learned."""

    def __init__(self) -> None:
        self.found: list[dict[str, Any]] = []
        self.gradients: list[Tensor] = []

    def step(self, engine: Engine, *arguments: Any, **keys: Any) -> None:
        """An iteration."""
        inner, advantages = engine._optimizer_step, []

        def optimizer_step() -> Tensor:
            parameters = engine._parameters
            self.gradients.append(torch.cat([_flat(parameter.grad) for parameter in parameters]))
            return inner()

        batch = engine.algorithm.batch

        def batched(samples: Any, context: Any) -> Any:
            if isinstance(engine.algorithm, PolicyGradient):
                with mock.patch.object(engine.algorithm, "advantages", wraps=engine.algorithm.advantages) as asked:
                    found: Any = batch(samples, context)
                advantages.append(asked.call_count)
                advantages.append(found.advantage.double().sort().values.tolist())
                return found
            return batch(samples, context)

        with (
            mock.patch.object(engine, "_optimizer_step", optimizer_step),
            mock.patch.object(engine.algorithm, "batch", batched),
        ):
            report = engine.step(*arguments, **keys)
        told = report.values
        names = ("reward_mean", "reward_std", "pairs_trained", "forwards_sampled", "samples_dropped")
        self.found.append(
            {name: told[name] for name in names}
            | {"loss": told["loss"], "grad_norm": told["grad_norm"], "ratio": told["ratio_max_deviation"]}
            | {"rewards": report.rewards.tolist(), "advantages": advantages, "selector": told["selector"]}
            | {"steps": told["steps"], "imbalance": told.get("imbalance"), "ranks": told.get("ranks")}
        )


def _flat(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return whole(tensor).detach().double().flatten()


def of_run(name: str, folder: Path) -> dict[str, Any]:
    """Two iterations of a configuration, and held-out scores after them."""
    config, *changes = [part.format(sets=folder / "sets") for part in RUNS[name]]
    overrides = [*SMALL, *changes, f"run.folder={folder / 'run'}", "evaluation.num_prompts=3"]
    path = TESTS.parent / "configs" / config if config else None
    trainer, watch = Trainer(Config.load(path, overrides), quiet=True), Watch()
    trainer.prepare()
    cache = PromptCache(trainer.backbone)
    for iteration in range(2):
        batch = trainer._batch(iteration)
        watch.step(trainer.engine, cache(batch), batch, iteration=iteration, seed=iteration)
        if trainer.ema is not None:
            trainer.ema.update()
    tensors = trainer.backbone.adapter_tensors() | ({} if trainer.ema is None else trainer.ema.tensors())
    weights = torch.cat([value.double().flatten() for _, value in sorted(tensors.items())])
    return {"iterations": watch.found, "sharing": trainer.sharing} | _numbers(watch.gradients, weights)


def of_toy(name: str, folder: Path) -> dict[str, Any]:
    """Two iterations of an algorithm on a toy, in float64."""
    make, keys = TOYS[name]
    engines, toy = _conftest("engine"), _conftest("").ToyBackbone(torch.float64)
    options = {"inner_epochs": 2, "updates_per_iteration": 2, "learning_rate": 0.02, "rollout_batch": 2} | keys
    if options.get("score") == "nan":
        options["score"] = lambda images, prompts: torch.where(
            torch.tensor(["green" in prompt for prompt in prompts]), torch.nan, images.mean((1, 2, 3))
        )
    if options.get("update") == "one_pass":
        options["selector"] = StaticRange(start=1, end=4)
    if "graphs" in options:
        options["graphs"] = Graphs(Emulation(), tell=lambda line: None)
    engine, watch = engines._engine(toy, make(), **options), Watch()
    encoded = EncodedPrompts.of(toy, PROMPTS)
    for iteration in range(3 if "graphs" in options else 2):
        watch.step(engine, encoded, PROMPTS, iteration=iteration, seed=iteration)
    told = {"is_replayed": engine._recording is not None and engine._recording.graphs.num_replays > 0}
    return {"iterations": watch.found} | told | _numbers(watch.gradients, engines.flat(toy))


def _numbers(gradients: list[Tensor], weights: Tensor) -> dict[str, Any]:
    digest = hashlib.sha256(weights.numpy().tobytes()).hexdigest()
    return {"gradients": [_some(gradient) for gradient in gradients], "weights": _some(weights), "digest": digest}


def _some(values: Tensor) -> list[float]:
    """Every so-manieth value."""
    return values[:: max(1, len(values) // 2000)].tolist()


def main(out: Path, cases: list[str]) -> None:
    """See the module."""
    rank = int(os.environ.get("RANK", "0"))
    folder = out / f"rank{rank}"
    write_pairs(folder / "sets" / "pairs", 4)
    write_judged(folder / "sets" / "judged", 6)
    for case in cases:
        found = (of_run if case in RUNS else of_toy)(case, folder)
        (out / f"{case}.{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        torch.distributed.init_process_group("gloo")
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2:])
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()

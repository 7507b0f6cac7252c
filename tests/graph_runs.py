"""Iterations that replay graphs, and the same without: trajectory, statistics and weights must be equal to the bit.

Rows of an update must be as many as microbatches divide evenly, as both cut them alike only then.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from adascope_fast.backbone import Ema
from adascope_fast.engine.engine import Engine
from adascope_fast.engine.graphs import Graphs
from adascope_fast.engine.settings import Updates
from adascope_fast.rollout import EncodedPrompts
from adascope_fast.schedules.settings import Sampler
from adascope_fast.selectors.simple import StaticRange

SCENES = [
    "a small red circle on a grey background",
    "two large blue crosses on a black background",
    "a large green square on a white background",
]
STEPS = 4


class Run:
    """Iterations of an engine; everything that they leave behind, as bits."""

    def __init__(self, model: Any, algorithm: Any, graphs: Graphs | None, **options: Any) -> None:
        with torch.no_grad():
            for parameter in model.trainable_parameters():
                parameter.add_(0.02)
        self.model, prompts = model, options.pop("prompts", SCENES)
        self.left: list[Tensor] = []
        keys = ("guidance_scale", "tail_share", "train_guidance")
        given: dict[str, Any] = {key: options.pop(key) for key in keys if key in options}
        sampler = Sampler(**{"guidance_scale": 1.0, **given})
        selector = options.pop("selector", StaticRange(start=0, end=2))
        engine_options = {name: options.pop(name) for name in ("folds_adapter", "autocast") if name in options}
        ema = Ema(model.trainable_parameters(), 0.9) if options.pop("ema", False) else None
        iterations, images = options.pop("iterations", 3), options.pop("images", 2)
        settings = Updates(**{"rollout_batch": 4, "microbatch": 4, **options})
        optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=0.01, fused=True)
        self.engine = Engine(
            model, model.schedule(STEPS), algorithm, selector, lambda images, _: images.mean((1, 2, 3)), optimizer,
            settings, sampler=sampler, graphs=graphs, **engine_options,
        )  # fmt: skip
        self.engine.algorithm.batch = self._seen(self.engine.algorithm.batch)
        for iteration in range(iterations):
            chosen = prompts if iteration != 1 else prompts[:-1] + prompts[:1]  # other prompts, and fewer
            batch = [prompt for prompt in chosen for _ in range(images)]
            report = self.engine.step(EncodedPrompts.of(model, batch), batch, iteration=iteration, seed=iteration)
            self.values = {name: value for name, value in report.values.items() if name != "selector"}
            self.left.append(report.rewards)
            if ema is not None:
                ema.update()
                with ema.applied():
                    pass
        self.left += [parameter.detach().clone() for parameter in model.trainable_parameters()]

    def _seen(self, batch: Callable[..., Any]) -> Callable[..., Any]:
        def seen(samples: Any, context: Any) -> Any:
            self.left += [value for value in vars(samples.trajectory).values() if isinstance(value, Tensor)]
            return batch(samples, context)

        return seen


def assert_same(got: Run, want: Run) -> None:
    """All that the runs left, bit for bit."""
    assert len(want.left) == len(got.left)
    for one, other in zip(got.left, want.left, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    told, wanted = ({name: value for name, value in run.values.items() if name != "ranks"} for run in (got, want))
    assert repr(told) == repr(wanted)

"""Sections of the engine: how updates are made (part of `[train]`) and what makes them fast (`[acceleration]`).

Nothing here imports torch.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from adascope_fast.settings import Count, Images, Positive, Section

ROWS_THAT_PAY = 64
"""Rows of a training forward up to which more of them are cheaper each (a quarter on a CPU, from 16 to 64)."""

Switch = Literal["auto", "on", "off"]


def _was_bool(value: Any) -> Any:
    """Runs of earlier versions wrote true or false."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


class Updates(Section):
    """How an iteration's samples are learned from. Batches change memory and speed, not the result beyond rounding."""

    inner_epochs: Images = 1
    """Times that an iteration's samples are gone through, as in TRL, ddpo-pytorch and flow_grpo."""
    updates_per_iteration: Images = 1
    """Optimiser steps in each of them, whatever share of the steps is trained."""
    minibatch: Literal["pairs", "samples"] = "pairs"
    """What an update's share of the samples is drawn from: single (image, step) pairs, or whole images."""
    best_worst_k: Images | None = None
    """Images with the highest reward of each prompt that are trained, and as many with the lowest; absent: all. What an
    advantage compares with is the whole group all the same."""
    update: Literal["replay", "one_pass"] = "replay"
    """`replay`: after the rollout; `one_pass`: kept steps are differentiated while they are sampled, which saves the
    replay's forward pass, allows one update, and needs the steps beforehand."""
    rollout_batch: Images = 16
    """Images denoised at once; halved where memory runs out. Changes memory and speed, not the result."""
    microbatch: Images | None = None
    """(image, step) pairs per backward pass; absent: `rollout_batch` or more; halved where memory runs out."""
    max_grad_norm: Positive = 1.0
    """Gradients are scaled down to this norm."""
    on_nonfinite: Literal["skip", "stop"] = "skip"
    """What to do with an update whose gradient is not finite, and with images that are not: leave them out and count
    them, or stop the run."""
    stop_after: Count = 3
    """Iterations in a row without a finite update, after which the run stops all the same."""

    @property
    def num_updates(self) -> int:
        """Optimiser steps of an iteration."""
        return self.inner_epochs * self.updates_per_iteration

    def usual_microbatch(self, guidance_scale: float) -> int:
        """Pairs of a training forward: `microbatch`, or what pays; guidance makes two rows of each."""
        return self.microbatch or max(self.rollout_batch, ROWS_THAT_PAY // (1 if guidance_scale == 1 else 2))


class Acceleration(Section):
    """What makes the same computation faster; `auto` is what pays on the device at hand.

    None of it may change a result beyond rounding.
    """

    compile: Literal["auto", "off", "regional", "full"] = "auto"
    """torch.compile of the denoiser: its repeated blocks (regional), or the whole of it; `auto`: regional on a GPU."""
    cuda_graphs: Annotated[Switch, BeforeValidator(_was_bool)] = "auto"
    """Steps of a rollout and microbatches of an update that repeat a shape are launched as one CUDA graph each; `auto`:
    off, as no GPU has been seen to do it yet."""
    compile_backend: Literal["inductor", "eager", "aot_eager"] = "inductor"
    """Backend of torch.compile; the others are for finding faults."""
    channels_last: Switch = "auto"
    """Memory layout of convolutions; `auto`: on for UNets and VAEs."""
    fused_optimizer: Switch = "auto"
    """One kernel for all parameters, which also skips an update that is not finite without asking the host."""
    fold_adapter: Switch = "auto"
    """LoRA is added to float32 base weights while nothing is differentiated; `auto`: on."""
    matmul_precision: Literal["highest", "high"] = "highest"
    """`high` lets float32 matrix products use TF32 on a GPU."""

    @property
    def is_fused(self) -> bool:
        """Whether the optimiser updates all parameters in one kernel; it then skips a step without asking the host."""
        return self.fused_optimizer != "off"

    @property
    def folds(self) -> bool:
        """Whether the rollout runs on weights that have the adapter in them, see `backbones.folding`."""
        return self.fold_adapter != "off"

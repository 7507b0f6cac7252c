"""A DDIM scheduler's step with its log-probability: TRL's `scheduler_step`, which is ddpo-pytorch's."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from adascope_fast.compat.ddpo_pytorch import ddim_step_with_logprob


@dataclass
class DDPOSchedulerOutput:
    """Where a step led, in the type of its sample, and the log-probability [b] of that."""

    latents: Tensor
    log_probs: Tensor


def scheduler_step(
    scheduler: Any,
    model_output: Tensor,
    timestep: Tensor | int,
    sample: Tensor,
    eta: float = 0.0,
    use_clipped_model_output: bool = False,
    generator: Any = None,
    prev_sample: Tensor | None = None,
) -> DDPOSchedulerOutput:
    """DDIM with eta (Song et al. 2021, eq. 12 and 16) from a guided output; the log-probability of its result.

    Args:
        timestep: of all samples, or one of each [b].
        use_clipped_model_output: the noise is computed again from a clipped guess.
        prev_sample: where the step led; None: it is drawn here.
    """
    return DDPOSchedulerOutput(
        *ddim_step_with_logprob(
            scheduler, model_output, timestep, sample, eta, use_clipped_model_output, generator, prev_sample
        )
    )


def is_affine(scheduler: Any) -> bool:
    """Whether its steps are affine in the output, as the fused operations have them."""
    return not (scheduler.config.get("clip_sample") or scheduler.config.get("thresholding"))

"""What the step functions of other code bases have in common: rows of a table by timestep, and one step of it.

A scheduler's table is made once for its settings and device, and a timestep's row is found on the device, so that no
step waits for a GPU; the originals search a list and copy to the CPU in every step.

Axes: `n` samples; `coef` [n, 3] is (a, b, std) of x_next ~ N(a * sample + b * output, std^2 I).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from adascope_fast import ops
from adascope_fast.reference import Kind
from adascope_fast.reference.rows import per_row
from adascope_fast.schedules import samplers

Generator = torch.Generator | list[torch.Generator] | None

_tables: WeakKeyDictionary[Any, dict[Any, Any]] = WeakKeyDictionary()


def kept(scheduler: Any, levels: Tensor, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
    """What `make` gives, made once for the scheduler, its noise `levels` and `key`: everything that it depends on."""
    of_scheduler = _tables.setdefault(scheduler, {})
    known = of_scheduler.get(key)
    if known is None or known[0] is not levels:  # `set_timesteps` makes new ones
        if len(of_scheduler) > 64:
            of_scheduler.clear()
        known = of_scheduler[key] = (levels, make())
    return known[1]


def ddim_tables(
    scheduler: Any, eta: float, device: torch.device, *, ends_as_diffusers: bool = False
) -> tuple[Tensor, Tensor]:
    """(coef [T, 3], x0_coef [T, 2]) of every training timestep of a DDIM scheduler.

    Args:
        ends_as_diffusers: the last step goes to the scheduler's final alpha, not to alphas_cumprod[0].
    """
    config, num_steps, alphas = scheduler.config, scheduler.num_inference_steps, scheduler.alphas_cumprod
    total = config.num_train_timesteps

    def make() -> tuple[Tensor, Tensor]:
        table = samplers.ddim(
            alphas,
            torch.arange(total),
            stride=total // num_steps,
            eta=eta,
            prediction_type=config.prediction_type,
            final_alpha_cumprod=float(scheduler.final_alpha_cumprod) if ends_as_diffusers else None,
        )
        return table.coef.to(device), table.x0_coef.to(device)

    key = ("ddim", num_steps, eta, config.prediction_type, ends_as_diffusers, str(device))
    return kept(scheduler, alphas, key, make)


def step(
    sample: Tensor,
    output: Tensor,
    coef: Tensor,
    *,
    prev_sample: Tensor | None,
    generator: Generator,
    kind: Kind = "gaussian",
) -> tuple[Tensor, Tensor]:
    """(prev_sample, log_prob [n]), both float32; where `prev_sample` is given it is that one.

    The log-probability is of prev_sample before it is rounded to another type, as the originals have it. The gradient
    flows to `output`, through a drawn prev_sample too.
    """
    sample = sample.float()
    if prev_sample is not None:
        return prev_sample, ops.transition_log_prob(sample, output, prev_sample.float(), coef, kind=kind)
    noise = randn_tensor(output.shape, generator=generator, device=output.device, dtype=output.dtype)
    if not (output.requires_grad and torch.is_grad_enabled()):
        return ops.transition_step(sample, output, noise, coef, kind=kind)
    drawn = mean_of(sample, output, coef) + per_row(coef[:, 2], sample) * noise.float()
    return drawn, ops.transition_log_prob(sample, output, drawn.detach(), coef, kind=kind)


def mean_of(sample: Tensor, output: Tensor, coef: Tensor) -> Tensor:
    """a * sample + b * output in float32."""
    a, b, _ = (per_row(column, sample) for column in coef.unbind(1))
    return a * sample.float() + b * output.float()


def rows_at(timesteps: Tensor, timestep: Tensor) -> Tensor:
    """The place [n] of each timestep [n] in a schedule's [t], the second where it stands there twice, as in diffusers.

    A timestep that is not there has the place t, where a table of t rows has NaN added.
    """
    is_same = timestep[:, None] == timesteps.to(timestep.dtype)[None]
    count = is_same.cumsum(1)
    wanted = (is_same & (count == count[:, -1:].clamp(max=2))).to(torch.int8)
    return torch.where(count[:, -1] > 0, wanted.argmax(1), len(timesteps))


def with_nan(table: Tensor) -> Tensor:
    """The table with a row of NaN at its end."""
    return torch.cat([table, torch.full_like(table[:1], torch.nan)])


def as_timesteps(timestep: Any, sample: Tensor) -> Tensor:
    """A timestep, or one for each sample, as [n] on the samples' device."""
    known = torch.as_tensor(timestep, device=sample.device)
    if known.ndim == 0 or known.shape == (1,):
        return known.reshape(1).expand(len(sample))
    if known.shape != (len(sample),):
        raise ValueError(
            f"timestep must be one number or one for each of {len(sample)} samples, got shape {list(known.shape)}"
        )
    return known


@contextmanager
def recording(pipeline: Any, take: Callable[..., tuple[Tensor, ...]]) -> Iterator[SimpleNamespace]:
    """Within it the steps of this one pipeline are `take`'s, and recorded; yields `latents`, `log_probs` and `means`.

    The pipeline keeps its own call, so whatever its version of diffusers does around a step is done here too.

    Args:
        take: (scheduler, output, timestep, sample, **options of the pipeline's call) -> (prev_sample, log_prob, mean?).
    """
    own = pipeline.scheduler
    found = SimpleNamespace(latents=[], log_probs=[], means=[])
    scheduler = copy(own)

    def one(
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        eta: float = 0.0,
        generator: Generator = None,
        return_dict: bool = True,
        **options: Any,
    ) -> Any:
        told = take(scheduler, model_output, timestep, sample, eta=eta, generator=generator, **options)
        if not found.latents:
            found.latents.append(sample)
        prev_sample, log_prob, *more = told
        found.latents.append(prev_sample)
        found.log_probs.append(log_prob)
        found.means += more[:1]
        return (prev_sample,) if not return_dict else SimpleNamespace(prev_sample=prev_sample)

    scheduler.step = one
    pipeline.scheduler = scheduler
    try:
        yield found
    finally:
        vars(own).update({name: value for name, value in vars(scheduler).items() if name != "step"})
        pipeline.scheduler = own

"""Sampling trajectories: every step is one row of a table, every sample has its own noise.

`b` samples, `t` steps. Noise is drawn into the table that the latents then overwrite, so it costs no memory, and a
sample's noise depends neither on the samples beside it nor on the layout of the table.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from adascope_fast.backbone import Backbone
from adascope_fast.reference import Kind
from adascope_fast.rollout.denoising import Advance, Denoising, predict
from adascope_fast.rollout.noise import OwnNoise
from adascope_fast.rollout.prompts import EncodedPrompts
from adascope_fast.rollout.shared_start import SharedStart
from adascope_fast.rollout.trajectory import Tables, Trajectory
from adascope_fast.schedules import Schedule
from adascope_fast.schedules.tail import Tails


@torch.no_grad()
def rollout(
    backbone: Backbone,
    schedule: Schedule,
    encoded: EncodedPrompts,
    prompts: Sequence[str],
    *,
    guidance_scale: float,
    noise: OwnNoise,
    batch: int,
    numbers: Sequence[int] | None = None,
    initial: Float[Tensor, "b *latent"] | None = None,
    kind: Kind = "gaussian",
    advance: Advance | None = None,
    tails: Tails | None = None,
    shared: SharedStart | None = None,
    tables: Tables | None = None,
    num_batches: int | None = None,
    on_step: Callable[[int], None] | None = None,
    on_batch: Callable[[slice, Tensor], None] | None = None,
) -> Trajectory:
    """Sample `b = len(prompts)` trajectories.

    Args:
        schedule: on the device of the backbone.
        encoded: must hold every prompt.
        guidance_scale: classifier-free guidance; 1 means none.
        noise: of initial latents and every step.
        batch: samples denoised at once.
        numbers: of the samples among all that have that noise, here or elsewhere; None: 0, 1, ...
        initial: latents to start from in place of drawn ones.
        kind: of the log-probability that is recorded; an `advance` of one's own has its own.
        advance: takes the steps; None: `Denoising`.
        tails: where samples leave the sampler for a shorter way to the picture. The states that they skip are NaN.
        shared: which samples start alike, and take the first steps together; None: each starts on its own.
        tables: what is written to, and what the trajectory is made of; None: new ones.
        num_batches: of the rank that has most, where ranks call one model in step: the denoiser is called as often.
        on_step: called with the number of samples after each step of each batch.
        on_batch: called with (rows, final latents) as soon as a batch is done.
    """
    device, num_steps = schedule.coef.device, schedule.num_steps
    advance = advance or Denoising(backbone, schedule, encoded, guidance_scale, kind)
    prompt_index = encoded.index(prompts, device)
    drawn = torch.empty(len(prompts), num_steps + 1, *backbone.latent_shape, device=device)
    noise.fill([drawn[:, 0], drawn[:, 1:]], range(len(prompts)) if numbers is None else numbers)
    if shared is not None:
        noise.fill([drawn[:, 0]], shared.first)
    tables = Tables.of(drawn, backbone.denoiser) if tables is None else tables.again(drawn)
    latents = tables.latents
    if initial is not None:
        latents[:, 0] = initial
    for start in range(0, len(prompts), batch):
        rows = slice(start, min(start + batch, len(prompts)))
        for step in range(num_steps):
            flags = None if tails is None else tails.start > step
            if shared is not None and step < shared.num_shared:
                flags = shared.is_leader
            elif shared is not None and step == shared.num_shared:
                shared.part(rows, tables)
            samples, at = _walking(rows, flags, device)
            if not len(samples):
                continue
            advance(step, samples, at, tables, prompt_index)
            if on_step is not None:
                on_step(len(samples))
        if tails is not None:
            _finish(advance, tails, rows, latents, prompt_index, on_step)
        if on_batch is not None:
            on_batch(rows, latents[rows, -1])
    idle = 0 if num_batches is None else num_batches + -len(prompts) // batch
    for step in list(range(num_steps)) * idle:
        nobody = torch.zeros(1, *backbone.latent_shape, device=device)
        timestep, index = schedule.timesteps[step : step + 1], torch.zeros(1, dtype=torch.int64, device=device)
        predict(backbone, encoded, nobody, timestep, index, guidance_scale)
    told = tables.x0_correlation, tables.sample_correlation
    return Trajectory(latents, tables.x0, tables.log_prob, schedule, list(prompts), prompt_index, *told)


def _walking(rows: slice, flags: Tensor | None, device: torch.device) -> tuple[Tensor, slice | Tensor]:
    """The samples of a batch whose flag is set, on the CPU, and what picks them from a table on the device."""
    samples = torch.arange(rows.start, rows.stop)
    if flags is None or flags[rows].all():
        return samples, rows
    samples = samples[flags[rows]]
    return samples, samples.to(device, non_blocking=True)


def _finish(
    advance: Advance,
    tails: Tails,
    rows: slice,
    latents: Float[Tensor, "b t+1 *latent"],
    prompt_index: Int64[Tensor, " b"],
    on_step: Callable[[int], None] | None,
) -> None:
    """Take the samples of a batch from where they left the sampler to the picture, the last of the `latents`."""
    device, last = latents.device, torch.zeros_like(latents[rows, -1])
    for number in range(int(tails.count[rows].max())):
        samples, at = _walking(rows, tails.count > number, device)
        if number == 0:
            number_of, start = (x.to(device, non_blocking=True) for x in (samples, tails.start[samples]))
            latents[number_of, -1] = latents[number_of, start]
        x, own = latents[at, -1], slice(None) if isinstance(at, slice) else at - rows.start
        guess = advance.guess(tails.step[at, number], x, prompt_index[at])
        of_x, of_guess, of_last = tails.coef[at, number].view(len(samples), 3, *[1] * (x.dim() - 1)).unbind(1)
        latents[at, -1] = (of_x * x + of_guess * guess + of_last * last[own]).to(latents.dtype)
        last[own] = guess.to(last.dtype)
        if on_step is not None:
            on_step(len(samples))
    for step in range(1, latents.shape[1] - 1):  # the noise of the steps that were not taken
        _, at = _walking(rows, tails.start < step, device)
        latents[at, step] = torch.nan

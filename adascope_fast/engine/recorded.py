"""What of an iteration is recorded: the steps of a rollout, and the microbatches of an update.

`b` samples, `t` steps, `m` samples of a step, `n` rows of a microbatch. One graph serves all steps of all batches of a
size: the host says which step of which samples in numbers on the device. What they pick from lies where it lay in the
last iteration, prompts and schedule as well.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor, nn

from adascope_fast import ops
from adascope_fast.algorithms.algorithm import Algorithm
from adascope_fast.backbone import Backbone
from adascope_fast.backbones.folding import Folding
from adascope_fast.engine.graphs import GradientBuffers, Graphs
from adascope_fast.rollout import Denoising, EncodedPrompts, FlatTables, StepBatch, Tables, predict
from adascope_fast.schedules import Schedule

MICROBATCH = "a microbatch of the update"
STEP = "a step of the rollout"


class Recording:
    """What an engine keeps in its place from one iteration to the next, and the work that is recorded with it."""

    def __init__(
        self, graphs: Graphs, backbone: Backbone, algorithm: Algorithm, parameters: Sequence[nn.Parameter]
    ) -> None:
        self.graphs, self._backbone = graphs, backbone
        self.gradients = GradientBuffers(parameters)
        self.folding = Folding(backbone.denoiser)
        self.records_updates = algorithm.is_repeatable
        self._flat: dict[tuple[int, int], FlatTables] = {}
        if not self.records_updates:
            graphs.refuse(MICROBATCH, f"{algorithm.name} does not say that its loss is_repeatable")

    def start(self) -> None:
        """Once an iteration, before anything is replayed."""
        self.graphs.watch([*self._backbone.denoiser.parameters(), *self._backbone.denoiser.buffers()])
        settle: Callable[[], None] | None = getattr(self._backbone, "settle", None)
        if settle is not None:
            settle()

    def held(self, encoded: EncodedPrompts, schedule: Schedule) -> tuple[EncodedPrompts, Schedule]:
        """The same where graphs read them; prompts with room for as many as the next power of two."""
        hold, room = self.graphs.hold, 1 << (len(encoded.prompts) - 1).bit_length()
        condition = {name: hold(f"condition {name}", x, room=room) for name, x in encoded.condition.items()}
        negative = {name: hold(f"negative {name}", x) for name, x in encoded.negative.items()}
        tables = {name: hold(name, x) for name, x in vars(schedule).items() if isinstance(x, Tensor)}
        return EncodedPrompts(encoded.prompts, condition, negative), dataclasses.replace(schedule, **tables)

    def denoising(self, plain: Denoising, num_samples: int) -> "RecordedDenoising":
        """The same in graphs, for a rollout of so many samples."""
        encoded, schedule = self.held(plain.encoded, plain.schedule)
        size = num_samples, schedule.num_steps
        if size not in self._flat:
            shape = (num_samples, schedule.num_steps + 1, *self._backbone.latent_shape)
            tables = Tables.of(torch.empty(shape, device=schedule.coef.device), self._backbone.denoiser)
            self._flat[size] = FlatTables.like(tables)
        rest = {"guidance_scale": plain.guidance_scale, "kind": plain.kind}
        return RecordedDenoising(self._backbone, schedule, encoded, **rest, graphs=self.graphs, flat=self._flat[size])

    def microbatch(
        self,
        add_gradient: Callable[..., dict[str, Tensor]],
        rows: Any,
        *,
        scale: float,
        host: Any,
        fixed: Sequence[Tensor],
    ) -> dict[str, Tensor]:
        """What `add_gradient(rows, scale)` tells of each row; `scale` is a number on the device."""

        def work(rows: Any, scale: Tensor) -> tuple[tuple[str, ...], Tensor]:
            told = add_gradient(rows, scale)
            return tuple(told), torch.stack([value.detach().float() for value in told.values()])

        on_device = torch.full((), scale, device=fixed[0].device)
        names, values = self.graphs(MICROBATCH, work, packed(rows), on_device, fixed=fixed, host=host)
        return dict(zip(names, values.clone(), strict=True))


def packed(rows: Any) -> Any:
    """The same rows of a loss without the tables that they pick from, which are copied whole otherwise."""
    if isinstance(rows, StepBatch):
        return rows.packed()
    return tuple(packed(part) for part in rows) if type(rows) is tuple else rows


def halved_parts(length: int, size: int) -> list[slice]:
    """Slices of `size` rows, and of half, a quarter, ... of it for the rest: sizes that come again with any length."""
    parts, start = [], 0
    while start < length:
        while size > length - start:
            size -= size // 2
        parts.append(slice(start, start + size))
        start += size
    return parts


@dataclass(frozen=True)
class RecordedDenoising(Denoising):
    """`Denoising` in graphs. Its schedule and its prompts are where graphs read them, see `Graphs.hold`."""

    graphs: Graphs = field(kw_only=True)
    flat: FlatTables = field(kw_only=True)

    def __call__(
        self,
        step: int,
        samples: Int64[Tensor, " m"],
        at: slice | Int64[Tensor, " m"],
        tables: Tables,
        prompt_index: Int64[Tensor, " b"],
    ) -> None:
        """As `Denoising`, in `flat`, whose `tables` are the rollout's."""
        assert tables.latents.data_ptr() == self.flat.latents.data_ptr()
        numbers = self.flat.numbers
        which = numbers[at] if isinstance(at, slice) else at
        where = numbers[step : step + 1], which, prompt_index[at]
        self.graphs(STEP, self._step, *where, fixed=self._fixed, host=self._host)

    def guess(
        self, step: Int64[Tensor, " m"], sample: Float[Tensor, "m *latent"], prompt_index: Int64[Tensor, " m"]
    ) -> Float32[Tensor, "m *latent"]:
        """As `Denoising`; lasts until the next call."""
        where = step.to(sample.device), sample, prompt_index
        return self.graphs("a step of the tail", super().guess, *where, fixed=self._read, host=self._host)

    def _step(self, step: Int64[Tensor, " 1"], samples: Int64[Tensor, " m"], prompt_index: Int64[Tensor, " m"]) -> None:
        flat, schedule, count = self.flat, self.schedule, len(samples)
        rows = samples * (flat.num_steps + 1) + step
        timestep = schedule.timesteps[step].expand(count)
        output, without = predict(
            self.backbone, self.encoded, flat.sample(rows), timestep, prompt_index, self.guidance_scale
        )
        ops.transition_step_with_x0(
            output=output,
            coef=schedule.coef[step].expand(count, 3),
            x0_coef=schedule.x0_coef[step].expand(count, 2),
            output_uncond=without,
            guidance_scale=self.guidance_scale,
            kind=self.kind,
            rows=rows,
            **flat.step,
        )

    @cached_property
    def _fixed(self) -> list[Tensor]:
        return [*(value for value in vars(self.flat).values() if isinstance(value, Tensor)), *self._read]

    @cached_property
    def _read(self) -> list[Tensor]:
        tables = self.schedule.timesteps, self.schedule.coef, self.schedule.x0_coef
        return [*tables, *self.encoded.condition.values(), *self.encoded.negative.values()]

    @cached_property
    def _host(self) -> tuple[Any, ...]:
        return self.guidance_scale, self.kind, tuple(self.encoded.condition)

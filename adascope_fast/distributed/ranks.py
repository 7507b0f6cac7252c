"""The processes of one run: what they tell each other, and what that costs.

Every rank calls a collective in the same order. What is told is the same on all ranks afterwards, bit for bit, so that
decisions are made on each of them from the same numbers. A process alone tells nobody, and nothing costs anything.

Axes: `m` rows of a rank, `b` rows of all of them.
"""

import itertools
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, distributed

T = TypeVar("T")

BUCKET_BYTES = 2**26
"""Of gradients that are added over the ranks in one call."""


class RankLostError(OSError):
    """Another process of the run has ended, or cannot be reached."""


class Ranks:
    """This process among those of a run, which `torch.distributed` has brought together.

    Args:
        device: of what this rank computes; None: the CPU.

    Attributes:
        rank, size: number of this process from 0 on, and how many there are.
        seconds: spent in collectives since `take_cost`: the wait for other ranks, and the transfer.
        num_bytes: sent by this rank meanwhile, as a ring would.
        are_in_step: the model is spread over the ranks, so each must call it as often as the others.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = torch.device("cpu") if device is None else device
        is_one_of_several = distributed.is_available() and distributed.is_initialized()
        self.rank = distributed.get_rank() if is_one_of_several else 0
        self.size = distributed.get_world_size() if is_one_of_several else 1
        self.seconds, self.num_bytes = 0.0, 0
        self.are_in_step = False
        self._events: list[tuple[Any, Any]] = []

    @property
    def is_alone(self) -> bool:
        return self.size == 1

    @property
    def is_first(self) -> bool:
        """Whether this rank writes what the run leaves behind."""
        return self.rank == 0

    def objects(self, value: Any) -> list[Any]:
        """What each rank has given, in their order; small things that pickle between processes of one run."""
        if self.is_alone:
            return [value]
        parts: list[Any] = [None] * self.size
        with self._counted(None, 0):
            distributed.all_gather_object(parts, value)
        return parts

    def of_first(self, value: Any) -> Any:
        """What the first rank has given; that of the others does not matter."""
        if self.is_alone:
            return value
        told = [value]
        with self._counted(None, 0):
            distributed.broadcast_object_list(told, src=0)
        return told[0]

    def by_first(self, work: Callable[[], T]) -> T:
        """What `work` gives on the first rank, which alone does it; what it raises is raised on every rank.

        On the others it has an attribute `is_told`, since the first rank tells it.
        """
        if self.is_alone:
            return work()
        found: tuple[Any, Exception | None] = None, None
        if self.is_first:
            try:
                found = work(), None
            except Exception as error:
                found = None, error
        value, error = self.of_first((found[0], _plain(found[1])))
        if error is None:
            return value
        if self.is_first and found[1] is not None:
            raise found[1]
        error.is_told = True
        raise error

    def tensors_of_first(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of the first rank, on the CPU of each."""
        if self.is_alone:
            return tensors
        shapes = self.of_first({name: (value.shape, value.dtype) for name, value in tensors.items()})
        found = {}
        for name, (shape, dtype) in shapes.items():
            value = tensors[name] if self.is_first else torch.empty(shape, dtype=dtype)
            sent = value.to(self.device)
            with self._counted(sent, sent.nbytes if self.is_first else 0):
                distributed.broadcast(sent, src=0)
            found[name] = value if self.is_first else sent.cpu()
        return found

    def to_first(self, values: Tensor, bounds: Sequence[int]) -> Tensor:
        """The rows of all ranks on the first one, on the others none."""
        if self.is_alone:
            return values
        rows = [values if rank == 0 else values[:0] for rank in range(self.size)]
        counts = [stop - start if self.is_first else 0 for start, stop in itertools.pairwise(bounds)]
        return self.exchanged(rows, counts)

    def whole(self, values: Tensor, bounds: Sequence[int]) -> Tensor:
        """The rows [b, ...] of all ranks; of this one rows bounds[rank] to bounds[rank + 1], [m, ...]."""
        if self.is_alone:
            return values
        counts = [stop - start for start, stop in itertools.pairwise(bounds)]
        assert len(values) == counts[self.rank], (len(values), counts)
        most = max(counts)
        sent = values.new_zeros(most, *values.shape[1:])
        sent[: len(values)] = values
        if values.dtype == torch.bool:  # not every backend sends flags
            sent = sent.view(torch.uint8)
        parts = [torch.empty_like(sent) for _ in counts]
        with self._counted(values, sent.nbytes * (self.size - 1)):
            distributed.all_gather(parts, sent)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)]).view(values.dtype)

    def exchanged(self, rows: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
        """The rows that the ranks have for this one, in their order.

        Args:
            rows: [m, ...] for each rank.
            counts: how many rows come from each.
        """
        sent = torch.cat(list(rows)).contiguous()
        if self.is_alone:
            return sent
        got = sent.new_empty(sum(counts), *sent.shape[1:])
        others = sum(part.nbytes for number, part in enumerate(rows) if number != self.rank)
        with self._counted(sent, others):
            distributed.all_to_all_single(got, sent, list(counts), [len(part) for part in rows])
        return got

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the ranks, in place: a few large messages, in a fixed order."""
        if self.is_alone:
            return
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            with self._counted(flat, 2 * flat.nbytes * (self.size - 1) // self.size):
                distributed.all_reduce(flat)
            for tensor, part in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def take_cost(self) -> tuple[float, int]:
        """(seconds, bytes) since the last call; waits for the device."""
        for start, end in self._events:
            end.synchronize()
            self.seconds += start.elapsed_time(end) / 1000
        found = self.seconds, self.num_bytes
        self._events, self.seconds, self.num_bytes = [], 0.0, 0
        return found

    def first_unlike(self, value: Any) -> tuple[int, list[Any]] | None:
        """The first rank whose value is not that of rank 0, and those of all; None where all have the same."""
        told = self.objects(value)
        other = next((rank for rank, one in enumerate(told) if one != told[0]), None)
        return None if other is None else (other, told)

    def refuse_difference(self, what: str, value: Any) -> None:
        """ValueError on every rank where `value` is not the same on all of them.

        Args:
            what: how an error calls it.
        """
        if (found := self.first_unlike(value)) is not None:
            other, told = found
            raise ValueError(
                f"all processes of a run must have the same {what}, got {told[0]!r} on rank 0 and {told[other]!r} on "
                f"rank {other}; start them all from the same files, with the same arguments and versions"
            )

    @contextmanager
    def _counted(self, like: Tensor | None, num_bytes: int) -> Iterator[None]:
        """Count a collective. On a GPU its time is that between two marks in the stream: the host does not wait."""
        self.num_bytes += num_bytes
        on_gpu = like is not None and like.is_cuda
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if on_gpu else []
        start = time.perf_counter()
        try:
            if marks:
                marks[0].record()
            yield
            if marks:
                marks[1].record()
                self._events.append((marks[0], marks[1]))
        except RuntimeError as error:
            raise _lost(error) from error
        if not marks:
            self.seconds += time.perf_counter() - start


@contextmanager
def tells_of_lost_ranks() -> Iterator[None]:
    """RankLostError where a collective of torch itself fails, as one that gathers a model that ranks hold together."""
    try:
        yield
    except RuntimeError as error:
        if not _is_of_torch_distributed(error):
            raise
        raise _lost(error) from error


def _lost(error: RuntimeError) -> RankLostError:
    return RankLostError(
        f"another process of the run has ended or cannot be reached ({str(error).splitlines()[0][:200]}); its own "
        f"message says why, and the run continues from its newest checkpoint with --resume"
    )


def _is_of_torch_distributed(error: RuntimeError) -> bool:
    """Whether it was raised there: the words of gloo and of NCCL have nothing in common, nor have their types."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(frames) and frames[-1].f_globals.get("__name__", "").startswith("torch.distributed")


def _plain(error: Exception | None) -> Any:
    """An error that other processes can be sent: its words, and whether it is of a value or of the system."""
    if error is None:
        return None
    kinds: tuple[type[Exception], ...] = (FloatingPointError, ValueError, OSError)
    kind = next((kind for kind in kinds if isinstance(error, kind)), RuntimeError)
    return kind(str(error))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in groups of one type and about `BUCKET_BYTES`."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and (tensor.dtype != bucket[0].dtype or sum(one.nbytes for one in bucket) >= BUCKET_BYTES):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def bounds_of(count: int, batch: int, size: int, *, needs_all: bool = True) -> list[int]:
    """Which samples each of `size` ranks has: rank r those from bounds[r] to bounds[r + 1].

    They are dealt out in whole batches, the same ones for any number of ranks: a sample is denoised with the same
    neighbours, and so has the same bits.

    Args:
        needs_all: whether a rank without samples is a mistake.

    Raises:
        ValueError: there are fewer batches than ranks, and all are needed.
    """
    num_batches = -(-count // batch)
    if num_batches < size and needs_all:
        raise ValueError(
            f"each process needs a batch of its own, and train.rollout_batch = {batch} makes {num_batches} of "
            f"{count} images, for {size} processes; set train.rollout_batch to {max(1, count // size)} or less, or "
            f"start fewer"
        )
    return [min(count, batch * (rank * num_batches // size)) for rank in range(size)] + [count]


def most_batches(bounds: Sequence[int], batch: int) -> int:
    """Batches of the rank that has most of them."""
    return max(-(-(stop - start) // batch) for start, stop in itertools.pairwise(bounds))


def dealt(rows: Tensor, owner: Tensor, size: int) -> tuple[list[Tensor], list[int]]:
    """As many of the rows for each of `size` ranks, but for one: its own, as far as that goes, then what others have.

    Besides, how many of the rows lie on each rank.

    Args:
        rows: [n] numbers, in any order, which is kept.
        owner: [n], the rank where each lies.
    """
    held, count = owner.cpu().numpy(), len(rows)
    room = np.array([count * (rank + 1) // size - count * rank // size for rank in range(size)])
    taker = np.full(count, -1)
    for rank in range(size):
        own = np.flatnonzero(held == rank)[: room[rank]]
        taker[own] = rank
        room[rank] -= len(own)
    taker[taker < 0] = np.repeat(np.arange(size), room)
    shares = [rows[torch.from_numpy(np.flatnonzero(taker == rank)).to(rows.device)] for rank in range(size)]
    return shares, np.bincount(held, minlength=size).tolist()


def gathered(
    prompts: list[str], sensed: dict[str, np.ndarray] | None
) -> tuple[list[str], dict[str, np.ndarray] | None, slice]:
    """(prompts, curves) of all ranks in the order of the ranks, and which rows are this rank's.

    Without `torch.distributed`, or with one rank, what was given. Every rank calls it, in the same iteration.
    """
    ranks = Ranks()
    if ranks.is_alone:
        return prompts, sensed, slice(0, len(prompts))
    parts = ranks.objects((prompts, sensed))
    first = sum(len(part[0]) for part in parts[: ranks.rank])
    curves = None
    if sensed is not None:
        curves = {name: np.concatenate([part[1][name] for part in parts]) for name in sensed}
    return [prompt for part in parts for prompt in part[0]], curves, slice(first, first + len(prompts))

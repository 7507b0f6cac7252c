"""What each process of a run did, by the iterations' own account of it: nothing where there was one process."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]
HEADINGS = ("process", "sampled, images x steps", "trained, rows", "idle", "waiting", "sent", "peak memory", "MFU")


def table(stats: Sequence[Record]) -> list[tuple[str, ...]]:
    """A row for each process, a cell for each of `HEADINGS`; of what no process told, "-".

    Idle is the share of an iteration that a process spends in messages. The least of the processes in an iteration is
    taken for the transfer, and what another has above it for waiting. Both are means over the iterations.
    """
    told = [ranks for record in stats if len(ranks := _ranks(record)) > 1]
    size = max((len(ranks) for ranks in told), default=0)
    return [_row(rank, [ranks for ranks in told if rank < len(ranks)]) for rank in range(size)]


def imbalance(stats: Sequence[Record]) -> str:
    """How unevenly the pairs lay before they were dealt out, in words; empty where that is not known."""
    known = [value for record in stats if math.isfinite(value := _number(record, "imbalance"))]
    if not known:
        return ""
    return (
        f"Before the pairs were dealt out, the process that had most of them had {max(known):.0%} more than the mean "
        f"at worst, {sum(known) / len(known):.0%} on average; each trains as many as the others."
    )


def _row(rank: int, told: Sequence[Sequence[Record]]) -> tuple[str, ...]:
    own = [ranks[rank] for ranks in told]
    idle = [_number(one, "idle_share") for one in own]
    least = [min(_number(one, "idle_share") for one in ranks) for ranks in told]
    waiting = [share - low for share, low in zip(idle, least, strict=True)]
    sampled, trained, num_bytes = (
        [_number(one, name) for one in own] for name in ("forwards_sampled", "rows_trained", "bytes_sent")
    )
    memory = [_number(one, "peak_memory_mb") for one in own]
    mfu = [_number(one, "mfu") for one in own]
    return (
        str(rank),
        _told(sum(sampled), "{:,.0f}"),
        _told(sum(trained), "{:,.0f}"),
        _told(_mean(idle), "{:.1%}"),
        _told(_mean(waiting), "{:.1%}"),
        _told(_mean(num_bytes) / 2**20, "{:,.1f} MiB an iteration"),
        _told(max(memory), "{:,.0f} MB"),
        _told(_mean(mfu), "{:.1%}"),
    )


def _ranks(record: Record) -> list[Record]:
    ranks = record.get("ranks")
    return [one for one in ranks if isinstance(one, Mapping)] if isinstance(ranks, list) else []


def _number(record: Record, key: str) -> float:
    value = record.get(key)
    return float(value) if isinstance(value, int | float) else math.nan


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _told(value: float, form: str) -> str:
    return form.format(value) if math.isfinite(value) else "-"

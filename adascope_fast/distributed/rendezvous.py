"""How the processes of a run find each other at each start, undisturbed by what a start before has left behind.

torchrun keeps one store for all its starts, without telling them apart (pytorch/pytorch#135712), and its count of
restarts is each machine's own. A process that comes early would read the address of one that has ended.
"""

import secrets
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from torch import distributed
from torch.distributed import PrefixStore, Store

METHOD = "adascope-fast://"
"""`init_method` of a process group whose processes are told of by the environment, as with `env://`."""

POLL_SECONDS = 0.02
PATIENCE = timedelta(minutes=10)


def agreed(store: Store, rank: int, size: int, patience: timedelta = PATIENCE) -> str:
    """A name of this start, the same on all its processes and on those of no other start.

    Each process asks under a word that it alone knows, so what it is answered was written in this start.

    Raises:
        DistStoreError, DistNetworkError: processes did not come within `patience`, or the store is not there.
    """
    mine = secrets.token_hex(16)
    if rank:
        store.set(f"asks/{rank}", mine)
        store.wait([f"answer/{mine}"], patience)
        name = store.get(f"answer/{mine}").decode()
        store.set(f"{name}/{rank}", "is here")
        return name
    missing, until = set(range(1, size)), time.monotonic() + patience.total_seconds()
    while missing:
        for other in missing:
            if store.check([f"asks/{other}"]):  # which may be of a start before, and is then read by nobody
                store.set(f"answer/{store.get(f'asks/{other}').decode()}", mine)
        missing = {other for other in missing if not store.check([f"{mine}/{other}"])}
        if missing and time.monotonic() > until:
            raise distributed.DistStoreError(
                f"{size} processes are to start together, and {len(missing)} did not come within {patience}"
            )
        time.sleep(POLL_SECONDS)
    return mine


def _rendezvous(url: str, timeout: timedelta = PATIENCE, **keys: Any) -> Iterator[tuple[Store, int, int]]:
    query = url.partition("?")[2]
    found = distributed.rendezvous(f"env://?{query}", timeout=timeout, **keys)
    for store, rank, size in found:
        yield PrefixStore(agreed(PrefixStore("adascope-fast", store), rank, size, timeout), store), rank, size


distributed.register_rendezvous_handler(METHOD.partition(":")[0], _rendezvous)

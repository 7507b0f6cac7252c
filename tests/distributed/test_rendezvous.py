"""Processes of one start agree on a name of it, whatever a start before has left in the store that torchrun keeps."""

import threading
from datetime import timedelta

import pytest
from torch import distributed
from torch.distributed import HashStore, PrefixStore, Store

from adascope_fast.distributed import rendezvous
from adascope_fast.distributed.rendezvous import agreed


def _start(store: Store, size: int, order: list[int], pause: float = 0.1) -> list[str]:
    """What each of `size` processes is given, which come one after the other in `order`."""
    names = [""] * size

    def come(rank: int) -> None:
        names[rank] = agreed(store, rank, size, timedelta(seconds=20))

    threads = [threading.Thread(target=come, args=(rank,)) for rank in order]
    for thread in threads:
        thread.start()
        thread.join(pause)
    for thread in threads:
        thread.join()
    return names


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 0, 2]])
def test_every_process_is_given_the_name_of_this_start_alone(order: list[int]) -> None:
    store = HashStore()
    starts = [_start(store, 3, order) for _ in range(3)]
    assert all(len(set(names)) == 1 and names[0] for names in starts)
    assert len({names[0] for names in starts}) == 3


def test_a_start_of_fewer_processes_follows_one_of_more() -> None:
    store = HashStore()
    assert len(set(_start(store, 4, [0, 1, 2, 3]))) == 1
    assert len(set(_start(store, 2, [0, 1]))) == 1


def test_what_a_start_before_has_written_is_not_seen() -> None:
    store = HashStore()
    for want in ("first", "second"):
        seen = [PrefixStore(name, store) for name in _start(store, 2, [0, 1])]
        assert not seen[1].check(["address"])
        seen[0].set("address", want)
        assert seen[1].get("address") == want.encode()


def test_a_process_that_does_not_come_is_told_of() -> None:
    with pytest.raises(distributed.DistStoreError, match="2 processes are to start together, and 1 did not come"):
        agreed(HashStore(), 0, 2, timedelta(seconds=0.1))


def test_a_process_group_is_made_by_the_method(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    store, rank, size = next(distributed.rendezvous(rendezvous.METHOD))
    assert (rank, size) == (0, 1)
    store.set("word", "read")
    assert store.get("word") == b"read"

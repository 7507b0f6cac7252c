"""What is told where another process of a run has ended, whoever called the collective that fails."""

import pytest

from adascope_fast.distributed import RankLostError, tells_of_lost_ranks


def test_a_collective_of_torch_that_fails_is_told_as_a_lost_rank() -> None:
    with pytest.raises(RankLostError, match=r"another process of the run has ended .*--resume"), tells_of_lost_ranks():
        _raise_in("torch.distributed.distributed_c10d", "Connection reset by peer")


def test_an_error_of_ours_is_no_lost_rank() -> None:
    with pytest.raises(RuntimeError, match="expected a tensor") as caught, tells_of_lost_ranks():
        _raise_in("adascope_fast.engine", "expected a tensor")
    assert not isinstance(caught.value, RankLostError)


def _raise_in(module: str, words: str) -> None:
    exec("raise RuntimeError(words)", {"__name__": module, "words": words})

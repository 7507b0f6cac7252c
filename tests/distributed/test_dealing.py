"""How samples and pairs are dealt out to ranks."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adascope_fast.distributed import bounds_of, dealt, most_batches
from adascope_fast.engine.engine import even_parts
from adascope_fast.rollout import OwnNoise


@given(st.integers(1, 200), st.integers(1, 20), st.integers(1, 9))
def test_samples_are_dealt_out_in_whole_batches(count: int, batch: int, size: int) -> None:
    bounds = bounds_of(count, batch, size, needs_all=False)
    assert bounds[0] == 0
    assert bounds[-1] == count
    assert all(bound % batch == 0 for bound in bounds[:-1])
    shares = [-(-(stop - start) // batch) for start, stop in itertools.pairwise(bounds)]
    assert max(shares) - min(shares) <= 1
    assert most_batches(bounds, batch) == max(shares)


def test_a_process_without_a_batch_is_refused() -> None:
    words = r"train\.rollout_batch = 16 makes 2 of 32 images, for 3 processes; set train\.rollout_batch to 10 or less"
    with pytest.raises(ValueError, match=words):
        bounds_of(32, 16, 3)


@given(st.lists(st.integers(0, 3), max_size=60))
def test_every_rank_has_as_many_rows_its_own_first(owners: list[int]) -> None:
    rows, owner = torch.randperm(len(owners)) + 100, torch.tensor(owners, dtype=torch.int64)
    shares, lying = dealt(rows, owner, 4)
    assert sorted(torch.cat(shares).tolist()) == sorted(rows.tolist())
    lengths = [len(share) for share in shares]
    assert max(lengths) - min(lengths) <= 1
    assert lying == [owners.count(rank) for rank in range(4)]
    place = {row: place for place, row in enumerate(rows.tolist())}
    for rank, share in enumerate(shares):
        order = [place[row] for row in share.tolist()]
        assert order == sorted(order), "in the order in which they were drawn"
        own = sum(owners[one] == rank for one in order)
        assert own == min(lying[rank], lengths[rank]), "nothing is moved that could stay"


@given(st.integers(1, 100), st.integers(1, 30))
def test_parts_are_even(length: int, size: int) -> None:
    parts = even_parts(length, size)
    assert [number for part in parts for number in range(part.start, part.stop)] == list(range(length))
    lengths = [part.stop - part.start for part in parts]
    assert max(lengths) <= size
    assert max(lengths) - min(lengths) <= 1


def test_the_noise_of_a_sample_is_its_own() -> None:
    noise, cpu = OwnNoise(5), torch.device("cpu")
    whole = noise.of(range(6), (2, 3), cpu)
    assert torch.equal(noise.of([4, 1], (2, 3), cpu), whole[[4, 1]])
    assert not torch.equal(OwnNoise(6).of(range(6), (2, 3), cpu), whole)
    assert not torch.equal(noise.of_use(0).of(range(6), (2, 3), cpu), noise.of_use(1).of(range(6), (2, 3), cpu))
    many = noise.of(range(4000), (16,), cpu)
    assert many.mean().abs() < 4 / 64000**0.5
    assert abs(many.std().item() - 1) < 0.02
    neighbours = (many[1:] * many[:-1]).mean().item()
    assert abs(neighbours) < 4 / 64000**0.5, "samples with neighbouring numbers have nothing in common"


def test_seeds_differ_in_what_a_generator_reads_of_them() -> None:
    seeds = {OwnNoise(2**61 - 7).seed(number) % 2**32 for number in range(100_000)}
    assert len(seeds) == 100_000

"""`bench/scaling.py`: bytes by hand and as two processes count them, and its idle time in the limits."""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adascope_fast import distributed
from adascope_fast.distributed.ranks import _buckets

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    """`scaling`, with the folder it is started from in the path."""
    sys.path.insert(0, str(BENCH))
    yield import_module("scaling")
    sys.path.remove(str(BENCH))


def test_two_processes_send_the_bytes_that_are_predicted(bench: Any):
    rows = bench.counted(2, ["scenes"])
    assert len(rows) == 4, "two iterations of each"
    assert not bench.unequal(rows)
    assert any(row["predicted"]["states of moved pairs"] for row in rows), "so pairs had to move"
    rows[0]["counted"] += 1
    assert bench.unequal(rows) == rows[:1]


def test_bytes_by_hand(bench: Any):
    # Rank 0 drew samples 0 and 1, rank 1 sample 2. Of 4 pairs each trains two: pair (1, 5) goes from 0 to 1.
    shape = bench.Shape([0, 2, 3], steps=10, state_bytes=100, gradients=[400, 80])
    first, second = bench.sent(shape, [[(0, 3), (0, 4), (1, 5), (2, 6)]])
    assert first == {
        "finite images": 2,
        "numbers of samples": 4 * 31 * 2,
        "chosen steps": 20,
        "gradients": 480,  # twice its half
        "statistics of rows": 4 * 10 * 2,
        "states of moved pairs": 200,  # before and after the step
    }
    assert second == first | {"states of moved pairs": 0}
    # Neighbouring steps share a state: 5, 6 and 7 of sample 0.
    shape = bench.Shape([0, 1, 2], steps=10, state_bytes=100, gradients=[])
    first, _ = bench.sent(shape, [[(0, 3), (0, 4), (0, 5), (0, 6)]])
    assert first["states of moved pairs"] == 300


def test_gradients_go_in_as_many_messages_as_the_ranks_add_them_in(bench: Any):
    tensors = [torch.empty(size, device="meta") for size in (2**23, 2**24, 5, 2**22, 2**25)]
    wanted = [sum(one.nbytes for one in bucket) for bucket in _buckets(tensors)]
    assert bench.buckets([tensor.nbytes for tensor in tensors]) == wanted
    assert len(wanted) > 1


def test_pairs_are_dealt_as_the_ranks_deal_them(bench: Any):
    draw = np.random.default_rng(3)
    bounds = [0, 4, 6, 12]
    pairs = [(sample, step) for sample, step in draw.integers((12, 9), size=(41, 2)).tolist()]
    owner = torch.tensor([bench.owner(sample, bounds) for sample, _ in pairs])
    shares, held = distributed.dealt(torch.arange(41), owner, 3)
    found = bench.dealt(pairs, bounds)
    assert [sorted(part) for part in found] == [sorted(pairs[row] for row in share) for share in shares]
    assert held == [int((owner == rank).sum()) for rank in range(3)]


def test_parts_of_a_model_by_hand(bench: Any):
    # 5 rows of 3 on 2 ranks are padded to 3 rows each: 36 bytes to the other one, 7 times, and once a gradient.
    group = [(torch.Size((5, 3)), 4, True), (torch.Size((4,)), 2, False)]
    assert bench.gathered([group], 2, calls=7, updates=1) == 7 * (36 + 4) + 36


def _load(bench: Any) -> Any:
    return bench.Load(
        images=8, batch=4, steps=10, fraction=0.5, rollout_flops=1e13, row_flops=3e12, state_bytes=65536,
        gradients=[4 * 10**6], weights=[10**9, 10**9], microbatch=4,
    )  # fmt: skip


def test_idle_time_in_the_limits(bench: Any):
    load = _load(bench)
    ideal = bench.Assumed(
        nvlink_gb_s=1e9, nvlink_us=0.0, infiniband_gb_s=1e9, infiniband_us=0.0, jitter=0.0, spread=0.0, object_us=0.0
    )
    row = bench.computed("toy", load, 64, ideal)
    assert row["idle_share_in_all"] == pytest.approx(0, abs=1e-3)
    # 8 images of 10 TFLOP and 40 pairs of 3 TFLOP at 0.4 x 989 TFLOP/s
    assert row["seconds"] == pytest.approx((8 * 10 + 40 * 3) / (0.4 * 989), abs=1e-3)
    late = bench.computed("toy", load, 64, bench.Assumed(jitter=0.1))
    assert late["idle_share"]["stragglers"] > 0.15, "the slowest of 64 is 2.4 deviations late"
    slow = bench.computed("toy", load, 64, bench.Assumed(infiniband_gb_s=0.01))
    assert slow["idle_share"]["messages"] > late["idle_share"]["messages"]
    assert slow["bytes_sent"] == late["bytes_sent"]


def test_pairs_that_are_dealt_out_leave_a_rank_one_pair_at_most(bench: Any):
    load, assumed = _load(bench), bench.Assumed(spread=0.5)
    for size in (2, 7, 64):
        lie, trained = bench.held(load, size, assumed)
        assert (lie.sum(1) == trained.sum(1)).all()
        assert (np.ptp(trained, axis=1) <= 1).all()
    assert bench.computed("toy", load, 64, assumed)["pairs_of_the_fullest_rank"] > 0.3


def test_a_rank_of_few_batches_waits_for_one_of_more(bench: Any):
    assert bench.dealt_batches(384, 128) == 0
    assert bench.dealt_batches(384, 256) == pytest.approx(0.25)


def test_the_mean_of_the_largest_draw(bench: Any):
    assert bench.slowest(1) == pytest.approx(0, abs=1e-6)
    assert bench.slowest(2) == pytest.approx(1 / np.sqrt(np.pi), rel=1e-6)
    assert bench.slowest(512) == pytest.approx(3.04, abs=0.02)


def test_a_model_in_parts_sends_its_weights_at_each_call(bench: Any):
    load = _load(bench)
    row = bench.computed("toy", load, 8, bench.Assumed(spread=0.0), in_parts=True)
    # 2 batches of 10 steps, and 40 pairs of a rank in 2 updates of 5 microbatches, forward and backward
    assert row["bytes_sent"]["weights"] == pytest.approx((20 + 2 * 10) * 2e9 * 7 / 8)


def test_the_page_shows_what_was_written(bench: Any):
    written = json.loads((BENCH / "results" / "scaling.json").read_text())
    lines = bench.table(written["computed"]).splitlines()
    page = (BENCH.parent / "docs" / "scaling.md").read_text().splitlines()
    shown = [line for line in page if line.startswith(tuple(f"| {name}, " for name in bench.MODELS))]
    assert len(shown) == 15
    assert not set(shown) - set(lines)
    assert lines[0] in page
    assert not bench.unequal(written["counted"])
    assert written["assumed"] == asdict(bench.Assumed())

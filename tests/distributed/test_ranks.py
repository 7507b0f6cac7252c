"""The same decisions on any number of ranks: a gather that is played by hand, and two real gloo processes."""

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adascope_fast.adascope import selector as module
from adascope_fast.adascope.selector import AdaScope
from adascope_fast.adascope.sensing import Curves

T = 30
PROMPTS = ["a", "b", "a", "c", "b", "a", "c"]


def curves(seed: int, b: int) -> Curves:
    """Structure that settles and preference that saturates, with noise; one sample is not finite."""
    rng, i = np.random.default_rng(seed), np.arange(T + 1)
    decay, gain = rng.uniform(0.6, 3, (b, 1)), rng.uniform(2, 12, (b, 1))
    structure = 0.2 + 0.05 * np.exp(-i / decay) * (-1.0) ** i + rng.normal(0, 1e-3, (b, T + 1))
    preference = 1 - np.exp(-i / gain) + rng.normal(0, 1e-2, (b, T + 1))
    preference[int(rng.integers(b)), 3] = np.nan
    return Curves(torch.tensor(preference), structure=torch.tensor(structure))


def _split(whole: Curves, cuts: list[int]) -> list[tuple[Curves, list[str]]]:
    ends = [0, *sorted(cuts), len(PROMPTS)]
    rows = [slice(low, high) for low, high in pairwise(ends)]
    assert whole.structure is not None
    return [(Curves(whole.preference[part], structure=whole.structure[part]), PROMPTS[part]) for part in rows]


@settings(max_examples=25)
@given(
    st.integers(0, 10**6),
    st.lists(st.integers(1, len(PROMPTS) - 1), min_size=1, max_size=3, unique=True),
    st.sampled_from(["prompt", "sample", "batch"]),
    st.sampled_from(["current", "previous"]),
)
def test_splitting_the_batch_over_ranks_changes_no_decision(seed: int, cuts: list[int], pooling: Any, mask_source: Any):
    alone = AdaScope(pooling=pooling, mask_source=mask_source)
    ranks = [AdaScope(pooling=pooling, mask_source=mask_source) for _ in range(len(cuts) + 1)]
    for iteration in range(3):
        whole = curves(seed + iteration, len(PROMPTS))
        want = alone.decide(whole, PROMPTS)
        parts = _split(whole, cuts)
        sent = [(prompts, module._to_host(part)) for part, prompts in parts]
        every = {name: np.concatenate([values[name] for _, values in sent]) for name in sent[0][1]}
        got, first = [], 0
        for selector, (part, prompts) in zip(ranks, parts, strict=True):
            own = slice(first, first + len(prompts))
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(module, "gathered", lambda *_, every=every, own=own: (PROMPTS, every, own))
                got.append(selector.decide(part, prompts))
            first += len(prompts)
        assert torch.equal(torch.cat(got), want)
        assert all(selector.state_dict() == alone.state_dict() for selector in ranks)
        assert all(selector.telemetry() == alone.telemetry() for selector in ranks)


WORKER = """
import importlib.util, json, sys
import torch
from torch import distributed

path, rank, world, store = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
spec = importlib.util.spec_from_file_location("case", path)
case = importlib.util.module_from_spec(spec)
spec.loader.exec_module(case)
distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
part, prompts = case._split(case.curves(5, len(case.PROMPTS)), [3])[rank]
selector = case.AdaScope()
keep = selector.decide(part, prompts)
print(json.dumps({"keep": keep.int().tolist(), "state": selector.state_dict(), "told": selector.telemetry()}))
distributed.destroy_process_group()
"""


def test_two_processes_decide_as_one(tmp_path: Path):
    """Prompts "a" and "b" have samples on both ranks."""
    command = [sys.executable, "-W", "ignore", "-c", WORKER, __file__]
    started = [
        subprocess.Popen([*command, str(rank), "2", str(tmp_path / "store")], stdout=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    found = []
    for process in started:
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 0
        found.append(json.loads(out.splitlines()[-1]))
    alone = AdaScope()
    keep = alone.decide(curves(5, len(PROMPTS)), PROMPTS)
    assert [row for one in found for row in one["keep"]] == keep.int().tolist()
    assert found[0]["state"] == found[1]["state"] == alone.state_dict()
    assert found[0]["told"] == found[1]["told"] == json.loads(json.dumps(alone.telemetry()))

"""An iteration costs few launches beside the denoiser, and no copy of a latent: counted by `bench/kernels/traffic.py`.

It runs as a program, since Triton's interpreter, which stands in for a GPU, is chosen when Triton is imported.
"""

import importlib.util
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

if find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)

CHECKOUT = Path(__file__).parents[2]


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"bench_{name}", CHECKOUT / "bench" / "kernels" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look it up
    spec.loader.exec_module(module)
    return module


traffic, counting = _load("traffic"), _load("counting")
CASES = {"scenes": ("bfloat16", list(traffic.CASES), ["6"]), "scenes-flow": ("float32", ["plain"], ["6", "12"])}


@pytest.fixture(scope="module", params=CASES)
def rows(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the iterations of a model cost now."""
    out = tmp_path_factory.mktemp("traffic") / "traffic.json"
    dtype, cases, steps = CASES[request.param]
    command = [sys.executable, str(CHECKOUT / "bench" / "kernels" / "traffic.py"), "--models", request.param]
    command += ["--dtypes", dtype, "--cases", *cases, "--steps", *steps, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text(encoding="utf-8"))["after"]["rows"]


def _of(rows: list[dict[str, Any]], part: str) -> list[dict[str, Any]]:
    found = [row for row in rows if row["part"] == part]
    assert found
    return found


def test_a_rollout_step_is_two_launches_with_structure_included(rows: list[dict[str, Any]]) -> None:
    for row in _of(rows, "rollout step"):
        assert row["launches"] == 2
        assert row["latent_lines"] == {}


def test_an_update_microbatch_is_two_launches(rows: list[dict[str, Any]]) -> None:
    for row in _of(rows, "update microbatch"):
        assert 0 < row["launches"] <= 2
        assert row["latent_lines"] == {}


def test_sensing_is_as_few_launches_whatever_the_number_of_steps(rows: list[dict[str, Any]]) -> None:
    sensed = _of(rows, "sensing")
    assert len({row["launches"] for row in sensed}) == 1
    assert len({row["num_steps"] for row in sensed}) == len(CASES[sensed[0]["model"]][2])
    for row in sensed:
        assert 0 < row["launches"] <= 3
        assert row["latent_lines"] == {}


def test_the_readme_shows_the_committed_counts() -> None:
    result = json.loads(traffic.RESULTS.read_text(encoding="utf-8"))
    assert result["before"]["versions"] == result["after"]["versions"]
    assert traffic.comparison(result) in (CHECKOUT / "kernels" / "README.md").read_text(encoding="utf-8")


class Doubling(nn.Module):
    """A denoiser of many operations."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.clone() * self.weight + x.clone()) * 2


def _lines(counts: Any) -> list[str]:
    return [one.name for one in counts.operations if not one.is_models]


def test_operations_are_counted_with_their_bytes_and_views_are_not() -> None:
    counts = counting.Counting(Doubling(), latent_size=12)
    x, table = torch.zeros(5, 12), torch.zeros(9, 12)
    with counts.everything():
        _ = (x.view(60)[None].expand(3, -1).transpose(0, 1), torch.empty(12), x.detach(), x.unbind(0))
        assert _lines(counts.cut()) == []
        x.t().contiguous()  # 60 read, 60 written
        x.to(torch.bfloat16)  # 240 bytes read, 120 written
        table[torch.tensor([1, 2])]  # 24 read and written, and two numbers of 8 bytes
        table[2:4] = x[:2]  # 24 read, 24 written
        torch.add(x, x.new_ones(()).expand(5, 12), out=torch.empty(5, 12))  # 60 read, 60 written, and one number
        small = x[0, :3] * 2
        del small
    found = counts.cut()
    large = [one for one in found.operations if one.is_large]
    assert [one.name for one in large] == ["clone", "_to_copy", "index", "copy_", "add"]
    assert [one.num_bytes for one in large] == [480, 360, 2 * 96 + 16, 192, 484]
    told = found.told(num_elements=60)
    assert told["latent_operations"] == 5
    assert told["small_operations"] == len(found.operations) - 5
    assert told["launches"] == told["model_input_operations"] == told["kernel_bytes"] == 0


def test_the_denoiser_and_what_it_is_given_are_left_out() -> None:
    model = Doubling()
    counts = counting.Counting(model, latent_size=12)
    table, leaf = torch.ones(9, 12), torch.ones(2, 12)
    with counts.everything():
        output = model(x=table[torch.tensor([1, 2])].to(torch.bfloat16))
        double = output.double()
        assert [one.name for one in counts.cut().operations if one.is_models] == ["index", "_to_copy"]
        torch.autograd.backward([double], [leaf.double()])
        after = leaf + 1
    assert model.weight.grad is not None
    assert _lines(counts.cut()) == ["_to_copy", "_to_copy", "add"]  # of the leaf, of the gradient; and after it
    assert after.shape == leaf.shape

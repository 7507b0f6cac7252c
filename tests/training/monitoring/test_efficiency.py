"""The share of a GPU's matrix rate: worked by hand, and counted by the same rules as a plan's."""

from typing import Any

import pytest
import torch

from adascope_fast.config import Config
from adascope_fast.planning.plan import plan
from adascope_fast.training.monitoring import efficiency
from adascope_fast.training.monitoring.efficiency import Efficiency, flops, peak_flops


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10G", None),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("Tesla T4", None),
    ],
)
def test_the_peak_is_that_of_the_device_that_is_named(name: str, tflops: float | None):
    assert peak_flops(name) == (None if tflops is None else tflops * 1e12)


def test_the_share_of_each_rank_by_hand():
    # (30 steps x 2 + 10 rows x 5) FLOP = 110 FLOP in 2 + 3 s at 100 FLOP/s
    record: dict[str, Any] = {
        "ranks": [
            {"seconds": {"rollout": 2.0, "update": 3.0}, "forwards_sampled": 30, "rows_trained": 10},
            {"seconds": {"rollout": 2.0, "update": 3.0}, "forwards_sampled": 30, "rows_trained": 0},
        ]
    }
    Efficiency(100.0, forward=2.0, trained=5.0).add(record)
    assert [rank["mfu"] for rank in record["ranks"]] == [0.22, 0.12]


def test_a_cpu_has_no_share_and_an_unknown_gpu_says_so(monkeypatch: pytest.MonkeyPatch):
    record: dict[str, Any] = {"ranks": [{"seconds": {"rollout": 1.0}, "forwards_sampled": 1, "rows_trained": 1}]}
    on_cpu = Efficiency.of(Config(), torch.device("cpu"), is_given=False)
    on_cpu.add(record)
    assert "mfu" not in record["ranks"][0]
    assert not on_cpu.why_not
    monkeypatch.setattr(efficiency.torch.cuda, "get_device_name", lambda device: "Tesla T4")
    unknown = Efficiency.of(Config(), torch.device("cuda"), is_given=False)
    unknown.add(record)
    assert "mfu" not in record["ranks"][0]
    assert "the matrix rate of Tesla T4 is not listed" in unknown.why_not
    monkeypatch.setattr(efficiency.torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert "passed in Python" in Efficiency.of(Config(), torch.device("cuda"), is_given=True).why_not
    known = Efficiency.of(Config(), torch.device("cuda"), is_given=False)
    known.add(record)
    assert 0 <= record["ranks"][0]["mfu"] < 1e-3


def test_operations_are_those_of_a_plan_without_what_checkpointing_computes_again():
    guided = Config.load(None, ["sampler.guidance_scale=3.0"])
    planned, counted = plan(guided), flops(guided)
    assert counted == {"forward": planned.step_flops, "trained": planned.training_flops}
    assert flops(Config.load(None, ["sampler.guidance_scale=3.0", "model.gradient_checkpointing=true"])) == counted
    bare = flops(Config.load(None, ["sampler.guidance_scale=1.0"]))
    assert counted["forward"] == 2 * bare["forward"]
    half = flops(Config.load(None, ["sampler.guidance_scale=3.0", "sampler.train_guidance=conditional"]))
    assert half["trained"] == counted["trained"] - (bare["trained"] - bare["forward"])
    once = flops(
        Config.load(
            None,
            [
                "train.update=one_pass",
                "selector.mask_source=previous",
                "train.inner_epochs=1",
                "train.updates_per_iteration=1",
            ],
        )
    )
    assert once["trained"] < flops(Config())["trained"]

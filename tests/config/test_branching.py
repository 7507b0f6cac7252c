"""What a configuration of SPO cannot be: each is refused in a line that says the rule, the value and the next step."""

import pytest

from adascope_fast.algorithms.settings import Spo
from adascope_fast.config import Config, ConfigError

SPO = "algorithm.name=spo"


def _refused(*overrides: str) -> str:
    with pytest.raises(ConfigError) as raised:
        Config.load(None, [SPO, *overrides])
    return str(raised.value)


def test_the_defaults_are_the_published_ones():
    algorithm = Config.load(None, [SPO]).algorithm
    assert isinstance(algorithm, Spo)
    assert (algorithm.beta, algorithm.clip_range, algorithm.margin, algorithm.num_candidates) == (10.0, 0.1, 0.3, 4)
    assert [algorithm.first_step(steps) for steps in (1, 4, 20, 50)] == [0, 1, 4, 10]
    assert Spo(branch_from=7).first_step(20) == 7


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ["algorithm.branch_from=20"],
            "algorithm.branch_from must be one of the 20 steps of a rollout, 0 to 19, got 20; lower it, or raise "
            "sampler.num_steps",
        ),
        (
            ["sampler.eta=0"],
            "spo trains steps by their log-probability, got sampler.eta = 0.0, without noise, which has no log_prob at "
            'any step; choose a sampler with noise, or algorithm.name = "awm" or "diffusion_nft"',
        ),
        (
            ["sampler.kind=flow_ode", "model.name=scenes-flow"],
            'spo trains steps by their log-probability, got sampler.kind = "flow_ode", without noise, which has no '
            'log_prob at any step; choose a sampler with noise, or algorithm.name = "awm" or "diffusion_nft"',
        ),
        (
            ["selector.name=static_range", "selector.start=0", "selector.end=4"],
            "spo trains steps from algorithm.branch_from = 4 on, got selector.end = 4; lower "
            "algorithm.branch_from, or have the selector keep later steps",
        ),
        (
            ["selector.name=window", "selector.window_size=4"],
            "spo trains steps from algorithm.branch_from = 4 on, got a selector whose first window ends at step 4; "
            "lower algorithm.branch_from, or have the selector keep later steps",
        ),
        (
            ["train.update=one_pass"],
            'one_pass is for advantages that weigh a whole sample, and spo has none; set train.update = "replay"',
        ),
        (
            ["sampler.tail_share=0.5"],
            "sampler.tail_share = 0.5 needs the steps before the rollout, got selector.mask_source = 'current'; set it "
            'to "previous", or set sampler.tail_share = 1.0',
        ),
    ],
)
def test_what_cannot_be_is_refused(overrides: list[str], line: str):
    assert _refused(*overrides) == line


@pytest.mark.parametrize(
    ("key", "rule"),
    [
        ("num_candidates=1", "algorithm.num_candidates must be at least 2, got 1"),
        ("margin=1", "algorithm.margin must be below 1, got 1"),
        ("temperature=0", "algorithm.temperature must be above 0, got 0"),
        ("branch_from=-1", "algorithm.branch_from must be at least 0, got -1"),
        ("beta=0", "algorithm.beta must be above 0, got 0"),
    ],
)
def test_keys_have_bounds(key: str, rule: str):
    assert rule in _refused(f"algorithm.{key}")


def test_what_can_be_is_taken():
    Config.load(None, [SPO, "train.samples_per_prompt=1"])  # a pair needs one image
    Config.load(None, [SPO, "selector.name=window", "selector.window_size=5"])
    Config.load(None, [SPO, "selector.name=late_start", "sampler.tail_share=0.5", "selector.end=10"])
    Config.load(None, [SPO, "selector.name=static_range", "selector.start=0", "selector.end=5"])

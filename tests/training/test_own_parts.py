"""An algorithm and a selector of one's own: as objects, by `module:object` with arguments, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from command_line import call, refused
from safetensors.torch import load_file
from torch import Tensor

from adascope_fast.algorithms.policy_gradient import grpo
from adascope_fast.config import Config
from adascope_fast.selectors.simple import StaticRange
from adascope_fast.training.trainer import Trainer

TINY = Path(__file__).parents[2] / "configs" / "tiny.toml"
CAPTIONS = ["a large red circle on a grey background", "two small blue crosses on a black background"]
SMALLEST = [
    "sampler.num_steps=4",
    "train.prompts_per_iteration=1",
    "train.updates_per_iteration=2",
    "train.learning_rate=0.01",
    "evaluation.num_prompts=1",
    "evaluation.samples_per_prompt=1",
]
GRPO = ["algorithm.name=grpo", "algorithm.clip_range=0.5", "algorithm.advantage_scale=group"]
RANGE = ["selector.name=static_range", "selector.start=1", "selector.end=3"]

MODULE = """
import torch
from adascope_fast.algorithms.policy_gradient import grpo
from adascope_fast.selectors.protocol import Stateless

def my_grpo(*, clip, scale="group"):
    return grpo(clip_range=clip, advantage_scale=scale)

class MyRange(Stateless):
    def __init__(self, first, count=2):
        self.first, self.count = first, count

    def ahead(self, prompts, schedule, iteration):
        return self._keep_interval(prompts, schedule, self.first, self.first + self.count)

made_range = MyRange(1)

class Half:
    def __call__(self, trajectory, iteration):
        return torch.ones_like(trajectory.log_prob, dtype=torch.bool)

    def ahead(self, prompts, schedule, iteration):
        return None

half = Half()

def needs_an_argument(size):
    return half
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module in the current folder."""
    name = f"parts_of_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.syspath_prepend(".")  # restores sys.path afterwards
    monkeypatch.chdir(tmp_path)
    return name


def redness(images: Tensor, prompts: list[str]) -> Tensor:
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


def _trained(folder: Path, *overrides: str, **parts: object) -> dict[str, Tensor]:
    """The adapter of a run of two iterations."""
    config = Config.load(TINY, [*SMALLEST, f"run.folder={folder}", *overrides])
    given = {"reward": redness, "train_prompts": CAPTIONS[:1], "held_out_prompts": CAPTIONS[1:], "quiet": True}
    Trainer(config, **given, **parts).train()  # type: ignore[arg-type]
    return load_file(folder / "adapter" / "pytorch_lora_weights.safetensors")


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """What the configuration as it is trains, DDPO with AdaScope."""
    return _trained(tmp_path_factory.mktemp("plain") / "run")


def test_an_algorithm_given_as_an_object_is_trained_instead_of_the_configured_one(tmp_path: Path, plain: dict):
    got = _trained(tmp_path / "got", algorithm=grpo(clip_range=0.5, advantage_scale="group"))
    assert _same(got, _trained(tmp_path / "want", *GRPO))
    assert not _same(got, plain)


def test_a_selector_given_as_an_object_is_asked_instead_of_the_configured_one(tmp_path: Path, plain: dict):
    got = _trained(tmp_path / "got", selector=StaticRange(start=1, end=3))
    assert _same(got, _trained(tmp_path / "want", *RANGE))
    assert not _same(got, plain)
    record = json.loads((tmp_path / "got" / "stats.jsonl").read_text().splitlines()[-1])
    assert record["selector"] == {"start": 1, "end": 3, "fraction": 0.5}
    assert record["pairs_trained"] == 2 * 2


def test_an_algorithm_by_module_and_object_is_made_from_its_other_keys(tmp_path: Path, module: str):
    own = [f"algorithm.name={module}:my_grpo", "algorithm.clip=0.5"]
    want = _trained(tmp_path / "want", *GRPO)
    assert _same(_trained(tmp_path / "got", *own), want)
    assert not _same(_trained(tmp_path / "other", *own, "algorithm.scale=global", "algorithm.clip=1e-9"), want)
    written = Config.load(tmp_path / "got" / "config.toml").algorithm
    assert written.keys() == {"clip": 0.5}
    assert written.name == f"{module}:my_grpo"


@pytest.mark.parametrize("keys", [["MyRange", "first=1"], ["MyRange", "first=1", "count=2"], ["made_range"]])
def test_a_selector_by_module_and_object_is_made_from_its_other_keys(tmp_path: Path, module: str, keys: list[str]):
    name, *arguments = keys
    own = [f"selector.name={module}:{name}", *(f"selector.{argument}" for argument in arguments)]
    got = _trained(tmp_path / "got", *own)
    assert _same(got, _trained(tmp_path / "want", *RANGE))
    record = json.loads((tmp_path / "got" / "stats.jsonl").read_text().splitlines()[0])
    assert (record["selector"]["start"], record["selector"]["end"]) == (1, 3)


def test_own_parts_in_a_file_train_and_resume_from_the_command_line(tmp_path: Path, module: str):
    text = f'[algorithm]\nname = "{module}:my_grpo"\nclip = 0.5\n\n[selector]\nname = "{module}:MyRange"\nfirst = 1\n'
    (tmp_path / "own.toml").write_text(TINY.read_text() + text)
    outcome = call("train", tmp_path / "own.toml", *SMALLEST, f"run.folder={tmp_path / 'run'}", "train.iterations=1")
    assert outcome.code == 0, outcome
    assert call("train", "--resume", tmp_path / "run", "train.iterations=2").code == 0
    records = [json.loads(line) for line in (tmp_path / "run" / "stats.jsonl").read_text().splitlines()]
    assert [record["selector"]["start"] for record in records] == [1, 1]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["selector.name=MODULE:half"], "selector 'MODULE:half' lacks the methods sampler, gains, senses, telemetry"),
        (["selector.name=MODULE:needs_an_argument"], "lacks the methods "),
        (
            ["selector.name=MODULE:MyRange"],
            'selector.name = "MODULE:MyRange" could not be made from no keys: TypeError: ',
        ),
        (
            ["selector.name=MODULE:MyRange", "selector.last=1"],
            'selector.name = "MODULE:MyRange" could not be made from last: TypeError: ',
        ),
        (
            ["selector.name=MODULE:absent"],
            'selector.name = "MODULE:absent" could not be imported: MODULE.py has no absent; check the name',
        ),
        (["algorithm.name=MODULE:half"], "algorithm 'MODULE:half' must be an instance of adascope_fast.Algorithm, got"),
        (["algorithm.name=MODULE:my_grpo"], "algorithm 'MODULE:my_grpo' must be an instance of adascope_fast."),
        (
            ["algorithm.name=MODULE:my_grpo", "algorithm.clop=1"],
            'algorithm.name = "MODULE:my_grpo" could not be made from clop: TypeError: ',
        ),
        (
            ["algorithm.name=no_such_module:it"],
            'algorithm.name = "no_such_module:it" could not be imported: there is no module no_such_module;',
        ),
    ],
)
def test_what_is_no_algorithm_or_selector_is_one_line(tmp_path: Path, module: str, overrides: list[str], message: str):
    given = [override.replace("MODULE", module) for override in overrides]
    line = refused("train", TINY, *SMALLEST, f"run.folder={tmp_path / 'run'}", *given)
    assert message.replace("MODULE", module) in line
    assert not (tmp_path / "run").exists(), "nothing is written"

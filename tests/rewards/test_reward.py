"""How a reward is called: on its own copy, in a context of its own; what it raises or returns, and what it takes."""

import asyncio
import inspect
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import SMALLEST, TINY, call, refused
from safetensors.torch import load_file
from torch import Tensor, nn

from adascope_fast import rewards
from adascope_fast.config import Config
from adascope_fast.rewards.scene_attributes import SceneAttributes
from adascope_fast.settings import blamed

IMAGES, PROMPTS = torch.rand(4, 3, 5, 7, generator=torch.Generator().manual_seed(0)), list("abcd")


def _own(images: Tensor, *rest: Any) -> Tensor:
    return images[:, 0].mean((1, 2))


class Meddler:
    """Changes all that it is given, and what surrounds it."""

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        scores = images[:, 0].mean((1, 2)).clone()
        images.sub_(0.5).div_(0.5)
        images.requires_grad_(True)
        prompts.clear()
        torch.set_grad_enabled(True)
        self.kept = scores
        return scores

    def breakdown(self, images: Tensor, prompts: list[str]) -> dict[str, Any]:
        self(images, prompts)
        return {"a": np.float32(0.5), "b": torch.tensor(2)}


@pytest.mark.parametrize("call_it", [rewards.score, rewards.score_guesses, rewards.breakdown])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_reward_can_change_nothing_that_it_is_given(call_it: Callable[..., Any], context: Callable[[], Any]):
    with context():
        images, prompts, enabled = IMAGES.clone(), list(PROMPTS), torch.is_grad_enabled()
        before = images.clone()
        call_it(Meddler(), images, prompts)
        assert torch.equal(images, before)
        assert not images.requires_grad
        assert prompts == PROMPTS
        assert torch.is_grad_enabled() == enabled


def test_scores_are_their_own_and_carry_no_gradient():
    weight = torch.ones(4, requires_grad=True)

    def kept(images: Tensor, prompts: Sequence[str]) -> Tensor:
        with torch.enable_grad():
            return weight * 2

    scores = rewards.score(kept, IMAGES, PROMPTS)
    assert not scores.requires_grad
    meddler = Meddler()
    scores = rewards.score(meddler, IMAGES, PROMPTS)
    meddler.kept.zero_()
    assert torch.equal(scores, _own(IMAGES))
    assert rewards.breakdown(meddler, IMAGES, PROMPTS) == {"a": 0.5, "b": 2.0}
    assert rewards.breakdown(_own, IMAGES, PROMPTS) == {}


def test_a_reward_may_differentiate_within_whatever_surrounds_it():
    def slope(images: Tensor, prompts: Sequence[str]) -> Tensor:
        assert not torch.is_grad_enabled()
        assert not torch.is_autocast_enabled("cpu")
        with torch.enable_grad():
            images.requires_grad_(True)
            (gradient,) = torch.autograd.grad((images**2).sum(), images)
        return gradient.sum((1, 2, 3))

    want = (2 * IMAGES).sum((1, 2, 3))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(rewards.score(slope, IMAGES.clone(), PROMPTS), want)


RAISES = """
import sys, threading
class Odd(BaseException):
    pass
class Mute(Exception):
    def __str__(self):
        raise RuntimeError
def inner(kind):
    if kind == 0: raise ZeroDivisionError("division\\nby zero")
    if kind == 1: sys.exit(3)
    if kind == 2: raise Odd("odd")
    if kind == 3: raise Mute
    if kind == 4: return [][0]
    if kind == 5: return __import__("json").loads("{")
    if kind == 6: raise ValueError
    raise KeyboardInterrupt
class Reward:
    def __init__(self, kind=0): self.kind = kind
    def __call__(self, images, prompts): return inner(self.kind)
    def breakdown(self, images, prompts): return inner(self.kind)
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Writes a module into the current folder; its name."""
    monkeypatch.syspath_prepend(".")  # restores sys.path afterwards
    monkeypatch.chdir(tmp_path)

    def write(text: str) -> str:
        name = f"own_{tmp_path.name}_{len(list(tmp_path.glob('own_*')))}"
        (tmp_path / f"{name}.py").write_text(text)
        return name

    return write


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (0, "ZeroDivisionError: division by zero at MODULE.py:9 (inner)"),
        (1, "SystemExit: 3 at MODULE.py:10 (inner)"),
        (2, "Odd: odd at MODULE.py:11 (inner)"),
        (3, "Mute: (its message could not be made) at MODULE.py:12 (inner)"),
        (4, "IndexError: list index out of range at MODULE.py:13 (inner)"),
        (5, "JSONDecodeError: Expecting property name enclosed in double quotes: line 1 column 2 (char 1) at "
            "MODULE.py:14 (inner)"),
        (6, "ValueError at MODULE.py:15 (inner)"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("call_it", [rewards.score, rewards.score_guesses, rewards.breakdown])
def test_whatever_a_reward_raises_is_one_line_that_says_where(
    module: Callable[[str], str], kind: int, said: str, call_it: Callable[..., Any]
):
    name = module(RAISES)
    reward = rewards.load(Config.load(None, [f"reward.name={name}:Reward", f"reward.kind={kind}"]).reward)
    with pytest.raises(ValueError, match="reward 'Reward' raised ") as caught:
        call_it(reward, IMAGES, PROMPTS)
    assert str(caught.value) == (
        f"reward 'Reward' raised {said.replace('MODULE', name)}; correct it there "
        f"(ADASCOPE_FAST_DEBUG=1 shows the rest)"
    )
    assert type(caught.value.__cause__).__name__ == said.split(":")[0].split(" ")[0]


def test_ctrl_c_and_a_full_gpu_pass_through(module: Callable[[str], str]):
    reward = rewards.load(Config.load(None, [f"reward.name={module(RAISES)}:Reward", "reward.kind=7"]).reward)
    with pytest.raises(KeyboardInterrupt):
        rewards.score(reward, IMAGES, PROMPTS)

    def full(images: Tensor, prompts: Sequence[str]) -> Tensor:
        raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError):
        rewards.score(full, IMAGES, PROMPTS)


def test_our_own_rewards_say_themselves_what_is_wrong():
    with pytest.raises(ValueError, match=r"^scene captions read "):
        rewards.score(SceneAttributes(), IMAGES, PROMPTS)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("raise RuntimeError('no\\nweights')", "its module MODULE raised RuntimeError: no weights at MODULE.py:1 ("),
        ("import sys; sys.exit()", "its module MODULE raised SystemExit at MODULE.py:1 (<module>); correct it there"),
        ("x = 1\nx x", "its module MODULE raised SyntaxError: invalid syntax at MODULE.py:2; correct it there"),
        ("import no_such_one", "its module MODULE raised ModuleNotFoundError: No module named 'no_such_one' at "
         "MODULE.py:1 (<module>); install no_such_one, or correct the import"),
        ("from json import nothing", "its module MODULE raised ImportError: cannot import name 'nothing' from"),
        ("def its(images, prompts): pass", "MODULE.py has no it; did you mean its?"),
        ("def __getattr__(name): raise OSError('gone')", "MODULE.py has no it (OSError: gone at MODULE.py:1 "
         "(__getattr__)); check the name behind the colon"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("section", ["reward", "algorithm", "selector"])
def test_a_module_that_cannot_be_imported_is_named_with_its_key(
    module: Callable[[str], str], section: str, text: str, said: str
):
    name = module(text)
    own = getattr(Config.load(None, [f"{section}.name={name}:it"]), section)
    with pytest.raises(ValueError, match="could not be imported") as caught:
        own.build()
    line = str(caught.value)
    assert line.startswith(f'{section}.name = "{name}:it" could not be imported: {said.replace("MODULE", name)}')
    assert "\n" not in line
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize("section", ["reward", "algorithm", "selector"])
def test_what_cannot_be_made_is_told_with_its_key_and_ctrl_c_passes(module: Callable[[str], str], section: str):
    name = module("def it(size):\n    if size == 1: raise KeyboardInterrupt\n    return 1 / (size - size)\n")
    made = [f"{section}.name={name}:it", f"{section}.size=2"]
    with pytest.raises(ValueError, match="could not be made") as caught:
        getattr(Config.load(None, made), section).build()
    assert str(caught.value) == (
        f'{section}.name = "{name}:it" could not be made from size: ZeroDivisionError: division by zero at '
        f"{name}.py:3 (it); give what it takes, or correct it"
    )
    with pytest.raises(KeyboardInterrupt):
        getattr(Config.load(None, [made[0], f"{section}.size=1"]), section).build()
    (Path(f"{name}.py")).with_name("stopped_early.py").write_text("raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        getattr(Config.load(None, [f"{section}.name=stopped_early:it"]), section).build()


def test_an_error_of_installed_code_alone_is_placed_there():
    with pytest.raises(ValueError, match="Expecting") as caught:
        json.loads("{")
    assert caught.value.__traceback__ is not None
    assert Path(__file__).name in blamed(caught.value), "the innermost place of one's own"
    caught.value.__traceback__ = caught.value.__traceback__.tb_next
    assert blamed(caught.value).endswith("(raw_decode)")


class Scorer(nn.Module):
    def forward(self, images: Tensor, prompts: Sequence[str], metadata: Any) -> Tensor:
        assert metadata == [{}] * len(prompts)
        return _own(images)


def _ddpo(images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Any:
    assert metadata == [{}] * len(prompts)
    return _own(images).numpy(), {}


def _optional(images: Tensor, prompts: Sequence[str], metadata: Any = None) -> Any:
    assert metadata is None
    return list(_own(images)), {"info": 1}


@pytest.mark.parametrize("reward", [_ddpo, _optional, Scorer(), _own, lambda *given: _own(given[0]),
                                    lambda images, prompts, *rest, **more: (_own(images).tolist(), None)])  # fmt: skip
def test_the_fields_signatures_and_returns_are_accepted(reward: Any):
    scores = rewards.score(rewards.given(reward), IMAGES, PROMPTS)
    torch.testing.assert_close(scores, _own(IMAGES))
    two = rewards.score(rewards.given(reward), IMAGES[:2], PROMPTS[:2])
    torch.testing.assert_close(two, _own(IMAGES[:2]))


def test_two_numbers_are_scores_and_no_info():
    assert rewards.score(lambda images, prompts: (1.0, 2.0), IMAGES[:2], ["a", "b"]).tolist() == [1, 2]  # type: ignore[arg-type,return-value]


def test_the_signature_is_looked_at_once(monkeypatch: pytest.MonkeyPatch):
    reward = rewards.given(_ddpo)
    monkeypatch.setattr(inspect, "signature", None)
    rewards.score(reward, IMAGES, PROMPTS)
    assert reward.__name__ == "_ddpo"


async def _later(images: Tensor, prompts: Sequence[str]) -> Tensor:
    await asyncio.sleep(0)
    return _own(images)


@pytest.mark.parametrize(
    ("reward", "got"),
    [
        (lambda images: 0, r"got <lambda>\(images\); take these and return a score for each image"),
        (lambda: 0, r"got <lambda>\(\); take these"),
        (lambda a, b, c, d: 0, r"got <lambda>\(a, b, c, d\); take these"),
        (lambda images, *, prompts: 0, r"got <lambda>\(images, \*, prompts\); take these"),
        (3, "got int; name a function"),
        (Scorer, "got the class Scorer; give an instance of it"),
        (_later, "got a coroutine; call asyncio.run in a function, and give that"),
    ],
)
def test_a_signature_that_fits_neither_is_refused_by_name(reward: Any, got: str):
    rule = r"must be a function of \(images, prompts\) or \(images, prompts, metadata\), "
    with pytest.raises(ValueError, match=f"^reward '.*' {rule}{got}"):
        rewards.given(reward)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (3, "must be a dict of numbers by name, got int"),
        ({"a": "b"}, "must be a dict of numbers by name, got dict"),
        ({"a": float("nan")}, "must have finite numbers, got nan for 'a'"),
    ],
)
def test_a_breakdown_that_is_none_is_refused(parts: Any, message: str):
    class Parted:
        def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
            return _own(images)

        def breakdown(self, images: Tensor, prompts: list[str]) -> Any:
            return parts

    with pytest.raises(ValueError, match=f"^breakdown of reward 'Parted' {message}"):
        rewards.breakdown(Parted(), IMAGES, PROMPTS)


@pytest.mark.parametrize("count", [2, 3, 17])
@pytest.mark.parametrize("value", [0.0, -3.5, 1e6])
def test_equal_rewards_have_a_hint(count: int, value: float):
    said = rewards.constant_hint(torch.full((count,), value))
    assert said is not None
    assert said.startswith(f"all {count} rewards of this iteration are {value:g}, so no image is better than another")
    assert rewards.constant_hint([value] * (count - 1) + [value + 1]) is None
    assert rewards.constant_hint([value]) is None
    assert rewards.constant_hint([float("nan")] * count) is None


def test_a_reward_that_cannot_judge_the_prompts_says_so_at_once():
    rewards.check_prompts(_own, ["a cat"], "prompts.train")
    with pytest.raises(ValueError, match=r"got 1 others in prompts.train, first 'a cat'; choose another reward"):
        rewards.check_prompts(SceneAttributes(), ["a cat"], "prompts.train")


WALKS = """
import random
import numpy as np
import torch

def calm(images, prompts):
    return images[:, 0].mean((1, 2))

def wild(images, prompts, metadata):
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(len(prompts))
    torch.rand(3)
    torch.set_grad_enabled(True)
    scores = images[:, 0].mean((1, 2)).clone()
    images.zero_()
    return scores, {}
"""


def test_a_run_does_not_see_what_its_reward_does_besides_scoring(module: Callable[[str], str], tmp_path: Path):
    name = module(WALKS)
    trained = []
    for function in ("calm", "wild"):
        folder = tmp_path / function
        finished = call("train", TINY, *SMALLEST, f"reward.name={name}:{function}", f"run.folder={folder}")
        assert finished.code == 0, finished
        images = (folder / "samples" / "after.png").read_bytes()
        trained.append((load_file(folder / "adapter" / "pytorch_lora_weights.safetensors"), images))
    (calm, calm_images), (wild, wild_images) = trained
    assert all(torch.equal(calm[key], wild[key]) for key in calm)
    assert calm_images == wild_images


def test_a_reward_that_raises_is_one_line_and_exit_code_2(
    module: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    name = module(RAISES)
    run = ["train", TINY, *SMALLEST, f"run.folder={tmp_path / 'run'}", f"reward.name={name}:Reward"]
    assert refused(*run, "reward.kind=1").startswith(f"error: reward 'Reward' raised SystemExit: 3 at {name}.py:10 (")


def test_what_is_given_once_is_not_given_metadata_twice():
    def counted(images: Tensor, prompts: list[str], metadata: list[dict]) -> list[float]:
        return [float(one.get("count", 0)) for one in metadata]

    once = rewards.given(counted)
    assert rewards.given(once) is once
    assert rewards.score(rewards.given(once), torch.zeros(1, 3, 2, 2), ["a"]).tolist() == [0.0]

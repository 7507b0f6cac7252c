"""What a reward is, how it is called, and its scores, checked. Higher is better, always.

A reward is the user's code, and nothing that it does reaches the training but its scores: it gets a copy of the images
and of the prompts, runs without gradient and without autocast, and may enable both within. The training draws from
generators of its own, so what a reward does to torch's, NumPy's or Python's random state does not matter. Whatever it
raises, `sys.exit` included, becomes one line that says where; running out of a GPU's memory is left to the engine,
which halves its batch.

The signature is (images, prompts), or the field's (images, prompts, metadata) with a dict for each prompt: the fields
that its line of the prompt file has besides, empty where it has none. Scores may come as (scores, info), as in
ddpo-pytorch and TRL.
"""

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from adascope_fast.backbone import Reward as Reward
from adascope_fast.settings import Own, Section, blamed


def load(settings: Section) -> Reward:
    """The reward that a `[reward]` section describes, as `given` returns it."""
    name = settings.name if isinstance(settings, Own) else None
    return given(settings.build(), name)


def given(reward: Any, name: str | None = None) -> Reward:
    """A reward as a function of (images, prompts): itself, or with the metadata that it asks for besides.

    Args:
        name: what an error calls it; None: its own.

    Raises:
        ValueError: it takes neither (images, prompts) nor (images, prompts, metadata).
    """
    if isinstance(reward, _WithMetadata):
        return reward
    shown = repr(name or _name(reward))
    rule = f"reward {shown} must be a function of (images, prompts) or (images, prompts, metadata)"
    if not callable(reward):
        raise ValueError(f"{rule}, got {type(reward).__name__}; name a function")
    if isinstance(reward, type):
        raise ValueError(f"{rule}, got the class {reward.__name__}; give an instance of it")
    if inspect.iscoroutinefunction(reward) or inspect.iscoroutinefunction(getattr(reward, "__call__", None)):  # noqa: B004
        raise ValueError(f"{rule}, got a coroutine; call asyncio.run in a function, and give that")
    try:
        signature = inspect.signature(reward.forward if isinstance(reward, torch.nn.Module) else reward)
    except (TypeError, ValueError):  # written in C: it says nothing of what it takes
        return cast(Reward, reward)
    if _fits(signature, 2):
        return cast(Reward, reward)
    if _fits(signature, 3):
        return _WithMetadata(reward)
    raise ValueError(f"{rule}, got {shown[1:-1]}{signature}; take these and return a score for each image")


def eight_bits(images: Tensor) -> np.ndarray:
    """Images [b, 3, h, w] in [0, 1] as [b, h, w, 3] of 8 bits, as a file holds them."""
    return (images.float() * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def takes_metadata(reward: Any) -> bool:
    """Whether a reward, as `given` returns it, asks for the metadata of prompts: it has a method `take_metadata`."""
    return callable(getattr(reward, "take_metadata", None))


def hand_metadata(reward: Any, metadata: Mapping[str, Mapping[str, Any]]) -> None:
    """Tell a reward that takes it what is known of each prompt; nothing is told to others."""
    if takes_metadata(reward):
        with _calling(reward):
            reward.take_metadata(metadata)


def score(reward: Reward, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """The reward's scores [b] as float32 on the images' device; ValueError unless one finite number an image."""
    scores = score_guesses(reward, images, prompts)
    _refuse_not_finite(f"reward {_name(reward)!r}", scores, prompts)
    return scores


def score_guesses(reward: Reward, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """The same of unfinished images, some of which cannot be judged: their scores may be NaN."""
    if has_parts(reward):
        return weighed(parts(reward, images, prompts), weights(reward))
    returned: Any = _called(reward, reward, images, prompts)
    scores = returned[0] if _has_info(returned) else returned
    return _scores(reward, scores, images, prompts)


def has_parts(reward: Any) -> bool:
    """Whether it has a method `parts`, (images, prompts) -> {name: scores}; its scores are their weighted sum then."""
    return callable(getattr(reward, "parts", None))


def weights(reward: Any) -> dict[str, float]:
    """What its parts are weighed by: its attribute `weights`; a part that is not in there has weight 1."""
    return {str(name): float(weight) for name, weight in getattr(reward, "weights", {}).items()}


def weighed(parts: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """The weighted sum of scores."""
    return torch.stack([weights.get(name, 1.0) * scores for name, scores in parts.items()]).sum(0)


class Scorer:
    """A reward with parts as the engine asks for it: checked scores, and those of each part with them."""

    def __init__(self, reward: Reward) -> None:
        self.reward, self.weights = reward, weights(reward)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """The weighted sum [b]."""
        return self.with_parts(images, prompts)[0]

    def with_parts(self, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum [b], and the scores [b] of each part."""
        found = parts(self.reward, images, prompts)
        for name, scores in found.items():
            _refuse_not_finite(f"part {name!r} of reward {_name(self.reward)!r}", scores, prompts)
        return weighed(found, self.weights), found


def parts(reward: Any, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Scores [b] of each part of a reward with parts, called and checked as its scores are; they may be NaN."""
    found: Any = _called(reward, reward.parts, images, prompts)
    if not isinstance(found, Mapping) or not found:
        raise ValueError(
            f"parts of reward {_name(reward)!r} must be scores by name, got {type(found).__name__} with "
            f"{len(found) if isinstance(found, Mapping) else 'no'} names; return a dict of them"
        )
    return {str(name): _scores(reward, scores, images, prompts) for name, scores in found.items()}


def _refuse_not_finite(what: str, scores: Tensor, prompts: Sequence[str]) -> None:
    if not bool(scores.isfinite().all()):
        first = int((~scores.isfinite()).nonzero()[0, 0])
        raise ValueError(
            f"{what} must be finite, got {scores[first].item()} for {prompts[first][:80]!r}; "
            f"return a low score where an image cannot be judged"
        )


def _scores(reward: Any, scores: Any, images: Tensor, prompts: Sequence[str]) -> Tensor:
    try:
        if torch.as_tensor(scores).is_complex():
            raise TypeError("a complex number is neither higher nor lower than another")
        scores = torch.as_tensor(scores, dtype=torch.float32).detach().to(images.device, copy=True)
    except Exception as error:  # a sequence of the user's own may raise anything
        raise ValueError(
            f"reward {_name(reward)!r} must return a tensor or numbers, got {type(scores).__name__}: "
            f"{' '.join(str(error).split())}; return one number an image"
        ) from error
    if scores.shape != (len(prompts),):
        raise ValueError(
            f"reward {_name(reward)!r} must return one number an image, shape [{len(prompts)}], "
            f"got shape {list(scores.shape)}; reduce over everything but the first axis"
        )
    return scores


def breakdown(reward: Reward, images: Tensor, prompts: Sequence[str]) -> dict[str, float]:
    """The reward's parts by name, called and checked as its scores are; empty where it has no method `breakdown`."""
    method = getattr(reward, "breakdown", None)
    if method is None:
        return {}
    parts: Any = _called(reward, method, images, prompts)
    try:
        found = {str(name): float(part) for name, part in parts.items()}
        wrong = [name for name, part in found.items() if not math.isfinite(part)]
    except Exception as error:
        raise ValueError(
            f"breakdown of reward {_name(reward)!r} must be a dict of numbers by name, got {type(parts).__name__} "
            f"({' '.join(str(error).split())[:200]}); return such a dict"
        ) from error
    if wrong:
        raise ValueError(
            f"breakdown of reward {_name(reward)!r} must have finite numbers, got {found[wrong[0]]} for {wrong[0]!r}; "
            f"leave it out where it cannot be told"
        )
    return found


def check_prompts(reward: Reward, prompts: Sequence[str], where: str) -> None:
    """ValueError where a reward says, by its method `check_prompts`, that it cannot judge one of the prompts.

    Args:
        where: what an error calls the prompts, such as `prompts.train`.
    """
    method = getattr(reward, "check_prompts", None)
    if method is not None:
        with _calling(reward):
            method(list(prompts), where)


def training_begins(reward: Reward, folder: Path, *, images: Mapping[str, int]) -> str | None:
    """What a reward says of a training that begins, by its method `training_begins`; None where it has none.

    Args:
        folder: the run's, where a reward may keep a folder of its own.
        images: how many it will be asked for, by what they are of.
    """
    method = getattr(reward, "training_begins", None)
    if method is None:
        return None
    with _calling(reward):
        return method(folder, images)


def refuses_several(reward: Any) -> str:
    """Why a reward cannot serve several processes at once, by its attribute `refuses_several`; "" where it can."""
    return getattr(reward, "refuses_several", "")


def training_stage(reward: Reward, words: str) -> None:
    """Tell a reward that has a method `training_stage` what the next images are of."""
    method = getattr(reward, "training_stage", None)
    if method is not None:
        with _calling(reward):
            method(words)


def training_ends(reward: Reward) -> None:
    """Tell a reward that has a method `training_ends` that the training has ended, however it did."""
    method = getattr(reward, "training_ends", None)
    if method is not None:
        with _calling(reward):
            method()


def constant_hint(rewards: Tensor | Sequence[float]) -> str | None:
    """What to say, in one line, of rewards of an iteration that are all equal; None where they differ or are few."""
    values = torch.as_tensor(rewards, dtype=torch.float32).flatten()
    if len(values) < 2 or not bool((values == values[0]).all()):
        return None
    return (
        f"all {len(values)} rewards of this iteration are {values[0].item():g}, so no image is better than another and "
        f"nothing is learned from them; check that the reward looks at its images, which lie in [0, 1], and that it "
        f"neither rounds nor cuts its scores"
    )


class _WithMetadata:
    """A function of (images, prompts, metadata) as one of (images, prompts); all else is its own."""

    def __init__(self, reward: Callable[..., Any]) -> None:
        self._reward = self.__wrapped__ = reward
        self.__name__ = _name(reward)
        self._metadata: Mapping[str, Mapping[str, Any]] = {}

    def __call__(self, images: Tensor, prompts: list[str]) -> Any:
        own = [copy.deepcopy(dict(self._metadata.get(prompt, {}))) for prompt in prompts]
        return self._reward(images, prompts, own)

    def take_metadata(self, metadata: Mapping[str, Mapping[str, Any]]) -> None:
        """What is known of each prompt."""
        self._metadata = metadata

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_reward"], name)


def _fits(signature: inspect.Signature, count: int) -> bool:
    try:
        signature.bind(*[None] * count)
    except TypeError:
        return False
    return True


def _has_info(returned: Any) -> bool:
    """Whether a reward returned (scores, info): two values the first of which is no number."""
    return isinstance(returned, tuple) and len(returned) == 2 and _is_many(returned[0])


def _is_many(scores: Any) -> bool:
    if isinstance(scores, Mapping):
        return False
    return getattr(scores, "ndim", 0) > 0 or isinstance(scores, Sequence)


def _called(reward: Any, function: Callable[..., Any], images: Tensor, prompts: Sequence[str]) -> Any:
    """What `function` of a reward says of its own copy of the images and prompts."""
    with torch.inference_mode(False):
        own = images.detach().clone()  # of inference mode's images too, a tensor like any other
    with _calling(reward), torch.inference_mode(False), torch.no_grad(), torch.autocast(own.device.type, enabled=False):
        return function(own, list(prompts))


@contextmanager
def _calling(reward: Any) -> Iterator[None]:
    """Within it a reward's code runs, and what it raises is one line; of our own what says already what is wrong."""
    try:
        yield
    except (KeyboardInterrupt, torch.OutOfMemoryError):
        raise
    except BaseException as error:
        if isinstance(error, ValueError | OSError) and _is_ours(reward):
            raise
        raise ValueError(
            f"reward {_name(reward)!r} raised {blamed(error)}; correct it there (ADASCOPE_FAST_DEBUG=1 shows the rest)"
        ) from error


def _is_ours(reward: Any) -> bool:
    return str(getattr(reward, "__module__", "")).startswith("adascope_fast.") and not isinstance(reward, _WithMetadata)


def _name(reward: Any) -> str:
    return getattr(reward, "name", None) or getattr(reward, "__name__", type(reward).__name__)

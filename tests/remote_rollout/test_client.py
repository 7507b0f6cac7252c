"""Rollouts of a server are those of the training itself, and whatever would silently be others is refused."""

import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from reward_servers import answering, http
from rollout_servers import CAPTIONS, Seeds, ask, digest_of, drawing_of, loaded
from torch import Tensor

from adascope_fast.backbones.folding import Folding
from adascope_fast.remote_rollout import wire
from adascope_fast.remote_rollout.client import RemoteRollout, refuse_drift
from adascope_fast.rollout import PromptCache, SharedStart, Trajectory, rollout
from adascope_fast.serving import client as serving_client

T = 4
PROMPTS = [*CAPTIONS, CAPTIONS[0]]
SEEDS = [7, 2**62 + 11, 40_000]
TOLD = ("latents", "x0", "log_prob", "x0_correlation", "sample_correlation")


@pytest.fixture(autouse=True)
def _in_haste(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving_client, "FIRST_PAUSE", 0.01)


@pytest.fixture(scope="module")
def model() -> Any:
    return loaded()


def _remotely(remote: RemoteRollout, model: Any, *, batch: int = 2, **keys: Any) -> Trajectory:
    schedule = keys.pop("schedule", None) or model.schedule(T)
    index = PromptCache(model)(PROMPTS).index(PROMPTS, torch.device("cpu"))
    usual = {"seeds": SEEDS, "guidance_scale": 1.0, "kind": "gaussian", "batch": batch}
    return remote(PROMPTS, index, schedule, **usual | keys)


def _here(
    model: Any, *, batch: int = 2, guidance_scale: float = 1.0, kind: Any = "gaussian", **keys: Any
) -> Trajectory:
    encoded, schedule = PromptCache(model)(PROMPTS), keys.pop("schedule", None) or model.schedule(T)
    usual = {"guidance_scale": guidance_scale, "kind": kind, "batch": batch, "noise": Seeds(0, tuple(SEEDS))}
    with Folding(model.denoiser):
        return rollout(model, schedule, encoded, PROMPTS, **usual, **keys)


def _refuse_difference(one: Trajectory, other: Trajectory) -> None:
    for name in TOLD:
        mine, theirs = getattr(one, name), getattr(other, name)
        assert mine.stride() == theirs.stride(), name
        torch.testing.assert_close(mine, theirs, rtol=0.0, atol=0.0, equal_nan=True, msg=name)
    assert one.prompts == other.prompts
    assert torch.equal(one.prompt_index, other.prompt_index)


@pytest.mark.parametrize(
    ("name", "scale", "kind"), [("scenes", 2.0, "gaussian"), ("scenes-flow", 1.0, "squared_error")]
)
def test_a_rollout_is_bit_for_bit_that_of_the_training(name: str, scale: float, kind: Any):
    model, seen = loaded(name), []
    with drawing_of(loaded(name)) as (url, _):
        keys: dict[str, Any] = {"guidance_scale": scale, "kind": kind}
        found = _remotely(ask(url, model), model, on_batch=lambda rows, x: seen.append((rows, x.clone())), **keys)
    expected = _here(model, **keys)
    _refuse_difference(found, expected)
    assert [rows for rows, _ in seen] == [slice(0, 2), slice(2, 3)]
    assert torch.equal(torch.cat([latents for _, latents in seen]), expected.latents[:, -1])
    assert expected.log_prob.isfinite().any()


def test_the_noise_of_a_sample_is_of_its_seed_whatever_the_others_are(model: Any):
    with drawing_of(loaded()) as (url, _):
        remote = ask(url, model)
        together, alone = _remotely(remote, model, batch=1), _remotely(remote, model, batch=1, seeds=[SEEDS[0], 3, 5])
    assert torch.equal(together.latents[0], alone.latents[0])
    assert not torch.equal(together.latents[1, 0], alone.latents[1, 0])


def test_samples_of_a_prompt_can_start_alike(model: Any):
    schedule = model.schedule(T)
    late = replace(schedule, coef=schedule.coef * torch.tensor([[1.0, 1, 0], [1, 1, 1], [1, 1, 1], [1, 1, 1]]))
    shared = SharedStart.of(PROMPTS, late)
    with drawing_of(loaded()) as (url, _):
        found = _remotely(ask(url, model), model, batch=1, schedule=late, start_seeds=[SEEDS[0], SEEDS[1], SEEDS[0]])
    _refuse_difference(found, _here(model, batch=1, schedule=late, shared=shared))
    assert torch.equal(found.latents[0, :2], found.latents[2, :2]), "the first step has no noise"
    assert not torch.equal(found.latents[0, 2], found.latents[2, 2])


def test_guesses_that_nothing_looks_at_stay_there(model: Any):
    with drawing_of(loaded()) as (url, _):
        remote = ask(url, model)
        remote.suit(kind="gaussian", needs_x0="", may_need_x0=False, shares_start=False)
        found, expected = _remotely(remote, model), _here(model)
    assert found.x0.isnan().all()
    for name in ("latents", "log_prob", "x0_correlation", "sample_correlation"):
        assert torch.equal(getattr(found, name).nan_to_num(9), getattr(expected, name).nan_to_num(9))


def test_weights_that_have_moved_are_sent_before_the_next_rollout(model: Any):
    mine = loaded()
    with drawing_of(loaded()) as (url, drawing):
        remote = ask(url, mine)
        first = _remotely(remote, mine)
        held = drawing.weights
        with torch.no_grad():
            mine.trainable_parameters()[0].add_(0.05)
        second = _remotely(remote, mine)
        assert drawing.weights != held
    _refuse_difference(second, _here(mine))
    assert not torch.equal(first.log_prob, second.log_prob)


def test_every_weight_goes_there_where_every_weight_is_trained():
    mine, theirs = (loaded(train="full") for _ in range(2))
    with drawing_of(theirs, most_bytes=2**27) as (url, _):
        remote = ask(url, mine)
        with torch.no_grad():
            for parameter in mine.trainable_parameters():
                parameter.mul_(1.01)
        found = _remotely(remote, mine)
    _refuse_difference(found, _here(mine))


def test_a_server_that_has_lost_its_weights_is_sent_them_again(model: Any, caplog: pytest.LogCaptureFixture):
    with drawing_of(loaded()) as (url, drawing):
        remote = ask(url, model)
        expected = _remotely(remote, model)
        drawing.weights = ""  # as one that was started anew
        _refuse_difference(_remotely(remote, model), expected)
    assert not caplog.records


def test_another_training_that_uses_the_server_is_told(model: Any):
    weights, asked = wire.digest(model.adapter_file()[0]), []

    def answer(path: str, before: int) -> bytes:
        asked.append(path)
        if path == "/weights":
            return http(json.dumps({"version": 1, "weights": weights}))
        return http("holds others", "409 Conflict") if before % 2 else http(json.dumps(_described(model)))

    with answering(answer) as url, pytest.raises(ValueError, match=r"answered 409 \(holds others\)"):
        _remotely(ask(url, model, patience=60.0), model, batch=3)
    assert asked == ["/rollout", "/weights", "/rollout"] * 4


def test_a_wrong_token_is_told_at_once(model: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("ADASCOPE_FAST_ROLLOUT_TOKEN", raising=False)
    with drawing_of(loaded()) as (url, _):
        with pytest.raises(
            ValueError, match=r"answered 401 .*; set the environment variable ADASCOPE_FAST_ROLLOUT_TOK"
        ):
            ask(url, model, token="wrong" * 4)
        with pytest.raises(ValueError, match="a rollout server asks for its token, and the environment variable"):
            ask(url, model, token=None)


def test_another_model_is_refused(model: Any):
    said = "has another model than this training: scenes with the digest"
    with drawing_of(loaded(lora_rank=8)) as (url, _), pytest.raises(ValueError, match=said):
        ask(url, model)


def test_weights_that_are_too_long_are_told_before_they_are_sent(model: Any):
    with drawing_of(loaded(), most_bytes=2**16) as (url, drawing):
        with pytest.raises(ValueError, match=r"takes requests of at most 65536 bytes, .*; start it with --max-bytes"):
            _remotely(ask(url, model), model)
        assert not drawing.weights


# Servers that answer what they are told to, as one of another engine might.


def _described(model: Any, **change: Any) -> dict[str, Any]:
    shown = wire.Served(
        "told", digest_of(model), "x 1", list(model.latent_shape), "", "seeds", True, True, True, [], 2**24
    )
    return shown.write() | {"kinds": ["gaussian"]} | change


@contextmanager
def _telling(
    model: Any, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], about: Any = None, **description: Any
) -> Iterator[str]:
    """The address of a server whose rollouts are those of here, changed."""
    found = _here(model)
    tensors = change({name: getattr(found, name).clone() for name in TOLD})
    weights = wire.digest(model.adapter_file()[0])
    told = {"version": 1, "weights": weights, "model": digest_of(model)} | (about or {})
    body = wire.write_file({name: value.contiguous() for name, value in tensors.items()}, told)

    def answer(path: str, before: int) -> bytes:
        if path == "/rollout" and not before:
            return http(json.dumps(_described(model, **description)))
        return http(json.dumps({"version": 1, "weights": weights})) if path == "/weights" else http(body)

    with answering(answer) as url:
        yield url


def _without(*names: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda told: {name: value for name, value in told.items() if name not in names}


def _with(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda told: told | {name: change(told[name])}


def _spoiled(at: tuple[Any, ...]) -> Callable[[Tensor], Tensor]:
    def spoil(value: Tensor) -> Tensor:
        value[at] = torch.nan
        return value

    return spoil


@pytest.mark.parametrize(
    ("change", "about", "said"),
    [
        (dict, {"weights": "0" * 64}, "has drawn with the weights 000000000000, and was asked for those of now, "),
        (dict, {"weights": None}, "does not say which weights of which model it was drawn with"),
        (dict, {"model": "0" * 64}, "has another model than this training: a model with the digest 000000000000"),
        (dict, {"version": 2}, "an answer speaks version 2 of the wire, this adascope-fast 1"),
        (
            _with("log_prob", lambda x: x[:, :-1]),
            {},
            r"log_prob must be float32 of shape \[3, 4\], got F32 of \[3, 3\]",
        ),
        (_with("latents", lambda x: x[:, 1:]), {}, "latents must be float32 of shape"),
        (_with("latents", lambda x: x.bfloat16()), {}, "latents must be float32 of shape .*, got BF16"),
        (_without("x0"), {}, "the tensors must be latents, log_prob, x0, x0_correlation, sample_correlation, got"),
        (_with("log_prob", _spoiled((1, 2))), {}, "has given log_prob that are not finite, of an image that is"),
        (_with("latents", _spoiled((1, 2, 0, 3, 3))), {}, "has given latents that are not finite, of an image that is"),
        (
            _with("latents", lambda x: x.roll(1, 0)),
            {},
            "has a sample of the seed 7 that does not start from that seed's",
        ),
    ],
)
def test_an_answer_that_is_another_than_it_should_be_is_refused(model: Any, change: Any, about: Any, said: str):
    with _telling(model, change, about) as url, pytest.raises(ValueError, match=said) as caught:
        _remotely(ask(url, model), model, batch=3)
    assert str(caught.value).startswith(f"the rollout server at {url} ")
    assert str(caught.value).isprintable()


def test_an_image_that_is_not_finite_is_the_trainings_to_leave_out(model: Any):
    with _telling(model, _with("latents", _spoiled((1, slice(2, None))))) as url:
        found = _remotely(ask(url, model), model, batch=3)
    assert found.latents[:, -1].isfinite().flatten(1).all(1).tolist() == [True, False, True]


def test_a_server_that_tells_less_gives_a_trajectory_without_it(model: Any):
    tables = {"x0", "x0_correlation", "sample_correlation"}
    with _telling(model, _without(*tables), has_x0=False, has_correlations=False, noise="own") as url:
        remote = ask(url, model)
        found, expected = _remotely(remote, model, batch=3), _here(model)
        assert found.x0_correlation is found.sample_correlation is None
        assert torch.equal(found.latents, expected.latents)
        assert found.x0.isnan().all()
        remote.suit(kind="gaussian", needs_x0="", may_need_x0=False, shares_start=True)
        with pytest.raises(ValueError, match=r"does not tell the guesses .* \(x0\), and the selector needs them"):
            remote.suit(kind="gaussian", needs_x0="the selector", may_need_x0=True, shares_start=False)
        with pytest.raises(ValueError, match='has no log_prob of the kind "squared_error", only gaussian; correct it'):
            remote.suit(kind="squared_error", needs_x0="", may_need_x0=False, shares_start=False)
    said = r'a start of its own, got algorithm\.initial_noise = "group"'
    with _telling(model, dict, shares_start=False) as url, pytest.raises(ValueError, match=said):
        ask(url, model).suit(kind="gaussian", needs_x0="", may_need_x0=False, shares_start=True)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 2}, "speaks version 2 of the wire, this adascope-fast 1"),
        ({"latent_shape": "4"}, "has not the fields"),
        ({"noise": "some"}, "has not the fields"),
        ({"has_x0": 1}, "has not the fields"),
        ({"kinds": None}, "has not the fields"),
        ({"latent_shape": [4, 1, 1]}, r"has latents of shape \[4, 1, 1\], got \["),
    ],
)
def test_a_description_that_is_none_is_told(model: Any, change: dict[str, Any], said: str):
    body = json.dumps(_described(model, **change))
    with answering(lambda path, before: http(body)) as url, pytest.raises(ValueError, match=said):
        ask(url, model)


def test_the_servers_word_on_the_weights_it_holds_is_read(model: Any):
    def answer(path: str, before: int) -> bytes:
        return http(json.dumps(_described(model) if path == "/rollout" else {"version": 1, "weights": "f" * 64}))

    with answering(answer) as url, pytest.raises(ValueError, match="and says that it holds ffffffffffff; correct"):
        _remotely(ask(url, model), model)


def test_random_state_is_left_alone(model: Any):
    with drawing_of(loaded()) as (url, _):
        random.seed(0)
        state, torch_state = random.getstate(), torch.get_rng_state()
        _remotely(ask(url, model), model)
    assert random.getstate() == state
    assert torch.equal(torch.get_rng_state(), torch_state)


def test_drift_has_a_bound():
    refuse_drift(0.01, 0.01)
    refuse_drift(float("nan"), 0.01)  # of an update that is not finite, which train.on_nonfinite sees to
    with pytest.raises(ValueError, match=r"within rollout.max_drift = 0.01 .*, got a difference of 0.0101: it samples"):
        refuse_drift(0.0101, 0.01)

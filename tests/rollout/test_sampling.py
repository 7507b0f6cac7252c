"""Sampling: plain diffusers' pictures where there is no noise, log-probabilities that a hand computation confirms."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline
from torch import Tensor

from adascope_fast import backbones, ops
from adascope_fast.rollout import EncodedPrompts, OwnNoise, PromptCache, Trajectory, predict, rollout
from adascope_fast.schedules import Schedule
from adascope_fast.training.draw import draw, initial_latents

CAPTIONS = ["two small red circles on a grey background", "a large blue cross at the left on a white background"]
PLAIN = {"scenes": StableDiffusionPipeline, "scenes-flow": StableDiffusion3Pipeline}
# What the plain pipeline must be told: no noise; and one token of the T5 that says nothing.
PLAIN_OPTIONS = {"scenes": {"eta": 0.0}, "scenes-flow": {"max_sequence_length": 1, "prompt_3": [""] * 4}}


@pytest.fixture(scope="module", params=list(PLAIN))
def model(request: pytest.FixtureRequest) -> backbones.PipelineBackbone:
    return backbones.load(request.param, lora_rank=2)


@pytest.fixture(scope="module")
def plain(model: backbones.PipelineBackbone) -> DiffusionPipeline:
    pipeline = PLAIN[model.name].from_pretrained(backbones.folder_of(model.name))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _sample(
    backbone: Any,
    schedule: Schedule,
    prompts: list[str],
    *,
    guidance_scale: float = 1.0,
    batch: int = 100,
    initial: Tensor | None = None,
) -> tuple[EncodedPrompts, Trajectory]:
    encoded = EncodedPrompts.of(backbone, prompts)
    options = {"guidance_scale": guidance_scale, "noise": OwnNoise(3), "batch": batch, "initial": initial}
    return encoded, rollout(backbone, schedule, encoded, prompts, **options)


def _stochastic(backbone: Any, num_steps: int) -> Schedule:
    return backbone.schedule(num_steps)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_without_noise_the_latents_are_plain_diffusers_own(model, plain, guidance_scale: float):
    initial = initial_latents(model, [1, 2]).repeat(2, 1, 1, 1)
    prompts = [prompt for prompt in CAPTIONS for _ in range(2)]
    _, trajectory = _sample(
        model, model.deterministic_schedule(4), prompts, guidance_scale=guidance_scale, initial=initial
    )
    theirs = plain(
        prompts,
        latents=initial.clone(),
        num_inference_steps=4,
        guidance_scale=guidance_scale,
        output_type="latent",
        **PLAIN_OPTIONS[model.name],
    )
    torch.testing.assert_close(trajectory.latents[:, -1], theirs.images, rtol=0, atol=1e-4)


def test_draw_gives_the_pictures_of_plain_diffusers(model, plain):
    ours = draw(model, CAPTIONS, [5, 6], num_steps=3, guidance_scale=2.0, batch=3)
    prompts = [prompt for prompt in CAPTIONS for _ in range(2)]
    noise = [torch.randn(1, 8, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (5, 6)]
    theirs = plain(
        prompts,
        latents=torch.cat(noise * 2),
        num_inference_steps=3,
        guidance_scale=2.0,
        output_type="pt",
        **PLAIN_OPTIONS[model.name],
    )
    torch.testing.assert_close(ours, theirs.images, rtol=0, atol=1e-4)


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
def test_log_prob_is_that_of_a_normal_distribution_in_float64(model, guidance_scale: float):
    schedule = _stochastic(model, 4)
    _, trajectory = _sample(model, schedule, CAPTIONS, guidance_scale=guidance_scale)
    condition, negative = model.encode(CAPTIONS), model.encode([""] * 2)
    with torch.no_grad():
        for step in range(4):
            sample, following = trajectory.latents[:, step], trajectory.latents[:, step + 1].double()
            timestep = schedule.timesteps[step].expand(2)
            output = model.predict(sample, timestep, condition).double()
            if guidance_scale != 1:
                without = model.predict(sample, timestep, negative).double()
                output = without + guidance_scale * (output - without)
            weight_sample, weight_output, std = schedule.coef[step].double()
            mean = weight_sample * sample.double() + weight_output * output
            want = torch.distributions.Normal(mean, std).log_prob(following).mean((1, 2, 3))
            torch.testing.assert_close(trajectory.log_prob[:, step].double(), want, rtol=0, atol=2e-5)


def test_x0_is_the_clean_latent_that_the_output_means(model):
    schedule = _stochastic(model, 4)
    _, trajectory = _sample(model, schedule, CAPTIONS)
    with torch.no_grad():
        for step in range(4):
            sample, timestep = trajectory.latents[:, step], schedule.timesteps[step]
            output = model.predict(sample, timestep.expand(2), model.encode(CAPTIONS))
            if model.name == "scenes":  # v = signal * noise - sigma * x0
                alpha = model.pipeline.scheduler.alphas_cumprod[int(timestep)].item()
                want = math.sqrt(alpha) * sample - math.sqrt(1 - alpha) * output
            else:  # v = noise - x0
                want = sample - timestep / 1000 * output
            torch.testing.assert_close(trajectory.x0[:, step], want, rtol=0, atol=1e-4)


def test_replayed_log_prob_is_the_rollouts(model):
    schedule = _stochastic(model, 3)
    encoded, trajectory = _sample(model, schedule, CAPTIONS, guidance_scale=1.5)
    pairs = torch.tensor([[1, 2], [0, 0], [1, 0], [0, 1], [0, 2]])
    rows = trajectory.gather(pairs)
    output, without = predict(model, encoded, rows.sample, rows.timestep, rows.prompt_index, 1.5)
    replayed = ops.guided_transition_log_prob(rows.sample, output, without, 1.5, rows.prev_sample, rows.coef)
    torch.testing.assert_close(replayed, trajectory.log_prob[pairs[:, 0], pairs[:, 1]], rtol=0, atol=2e-5)
    assert replayed.requires_grad


def test_a_sample_does_not_depend_on_the_rollout_batch(model):
    prompts, schedule = [*CAPTIONS, CAPTIONS[0]], _stochastic(model, 3)
    _, whole = _sample(model, schedule, prompts)
    _, parts = _sample(model, schedule, prompts, batch=2)
    assert torch.equal(whole.latents[:, 0], parts.latents[:, 0])
    torch.testing.assert_close(whole.latents, parts.latents, rtol=0, atol=1e-5)
    torch.testing.assert_close(whole.log_prob, parts.log_prob, rtol=0, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 3, 7, 50])
def test_the_noise_is_the_same_bit_for_bit_in_any_batch(make_toy: Callable, batch: int):
    toy = make_toy()
    toy.layers.requires_grad_(False)[2].weight.zero_()  # the output no longer depends on anything that could round
    prompts = [f"prompt {index % 3}" for index in range(7)]
    _, whole = _sample(toy, _stochastic(toy, 5), prompts)
    _, parts = _sample(toy, _stochastic(toy, 5), prompts, batch=batch)
    assert torch.equal(whole.latents, parts.latents)
    assert torch.equal(whole.log_prob, parts.log_prob)
    assert whole.latents[:, 1:].flatten(0, 1).unique(dim=0).shape[0] == 35, "no two steps share their noise"


def test_noise_has_the_std_of_the_table(make_toy: Callable):
    toy = make_toy()
    schedule = _stochastic(toy, 3)
    encoded, trajectory = _sample(toy, schedule, ["a prompt"] * 400)
    for step in range(3):
        sample, index = trajectory.latents[:, step], torch.zeros(400, dtype=torch.int64)
        output, _ = predict(toy, encoded, sample, schedule.timesteps[step].expand(400), index, 1.0)
        mean = schedule.coef[step, 0] * sample + schedule.coef[step, 1] * output
        noise = (trajectory.latents[:, step + 1] - mean).detach() / schedule.coef[step, 2]
        assert noise.std().item() == pytest.approx(1, abs=0.03)  # 7200 numbers: 3.6 standard errors
        assert noise.mean().item() == pytest.approx(0, abs=0.05)


def test_each_distinct_prompt_is_encoded_once_and_every_sample_finds_its_own(make_toy: Callable):
    encoded = EncodedPrompts.of(make_toy(), ["bb", "a", "bb", "ee"])
    assert encoded.prompts == ["bb", "a", "ee"]
    assert len(encoded.condition["text"]) == 3
    assert len(encoded.negative["text"]) == 1
    assert encoded.index(["ee", "bb", "a"], torch.device("cpu")).tolist() == [2, 0, 1]


def test_given_latents_are_where_the_rollout_starts_and_progress_counts_every_step(make_toy: Callable):
    toy, counted = make_toy(), []
    initial = torch.arange(5 * 18.0).view(5, 2, 3, 3) / 90
    encoded = EncodedPrompts.of(toy, ["a"] * 5)
    trajectory = rollout(
        toy,
        _stochastic(toy, 4),
        encoded,
        ["a"] * 5,
        guidance_scale=2.0,
        noise=OwnNoise(0),
        batch=2,
        initial=initial,
        on_step=counted.append,
    )
    assert torch.equal(trajectory.latents[:, 0], initial)
    assert (sum(counted), len(counted)) == (5 * 4, 3 * 4)
    assert toy.num_rows == 2 * 5 * 4, "guidance doubles the rows, nothing else does"


def test_the_cache_encodes_each_prompt_once_and_alone(make_toy: Callable):
    toy = make_toy()
    encode, seen = toy.encode, []
    toy.encode = lambda prompts: (seen.append(list(prompts)), encode(prompts))[1]
    cache = PromptCache(toy, max_bytes=3 * 3 * 4)  # three prompts of three float32
    for prompts in (["bb", "a", "bb"], ["a", "ee"], ["see", "a"]):
        got, want = cache(prompts), EncodedPrompts.of(make_toy(), prompts)
        assert got.prompts == want.prompts
        assert torch.equal(got.condition["text"], want.condition["text"])
        assert torch.equal(got.negative["text"], want.negative["text"])
    assert seen == [["bb"], ["a"], [""], ["ee"], ["see"]]
    cache(["bb", "a"])
    assert seen[5:] == [["bb"]], "the least recently used prompt had to go, the others stayed"

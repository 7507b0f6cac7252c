"""The recorded pipelines: every state and log-probability is that of the step function on the pipeline's own noise."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from tiny_pipelines import made
from torch import Tensor

from adascope_fast.compat import ddpo_pytorch, flow_grpo
from adascope_fast.compat.wrap import wrap
from adascope_fast.engine.settings import Acceleration

PROMPTS = ["a red circle on a grey background", "a blue cross on a black background"]


@pytest.fixture(scope="module")
def sd() -> Any:
    pipeline = made("sd")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def sd3() -> Any:
    pipeline = made("sd3")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def flux() -> Any:
    pipeline = made("flux")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_an_sd_rollout_is_the_unets_outputs_stepped_on_the_generators_noise(sd: Any):
    images, nsfw, latents, log_probs = ddpo_pytorch.pipeline_with_logprob(
        sd, PROMPTS, num_inference_steps=4, guidance_scale=3.0, eta=1.0, generator=seeded(), output_type="pt"
    )
    assert nsfw is None
    assert (len(latents), len(log_probs), images.shape) == (5, 4, (2, 3, 16, 16))
    generator = seeded()
    x = torch.randn(2, 4, 8, 8, generator=generator) * sd.scheduler.init_noise_sigma
    assert torch.equal(x, latents[0])
    with torch.no_grad():
        cond, uncond = sd.encode_prompt(PROMPTS, torch.device("cpu"), 1, True)
        for number, timestep in enumerate(sd.scheduler.timesteps):
            outputs = [sd.unet(x, timestep, encoder_hidden_states=text).sample for text in (cond, uncond)]
            output = outputs[1] + 3.0 * (outputs[0] - outputs[1])
            now = sd.scheduler.alphas_cumprod[timestep].double()
            following = sd.scheduler.alphas_cumprod[max(int(timestep) - 250, 0)].double()
            x0 = (x - (1 - now).sqrt() * output) / now.sqrt()
            std = ((1 - following) / (1 - now) * (1 - now / following)).sqrt()
            mean = following.sqrt() * x0 + (1 - following - std**2).clamp(min=0).sqrt() * output
            noise = torch.randn(2, 4, 8, 8, generator=generator)
            torch.testing.assert_close(latents[number + 1], (mean + std * noise).float(), rtol=1e-3, atol=1e-3)
            x = latents[number + 1]
            wanted = (-((x - mean) ** 2) / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi)).mean((1, 2, 3))
            torch.testing.assert_close(log_probs[number], wanted.float(), rtol=1e-3, atol=1e-3)


def test_the_pipeline_is_as_before_and_its_scheduler_knows_the_steps(sd: Any):
    own = sd.scheduler
    ddpo_pytorch.pipeline_with_logprob(sd, PROMPTS, num_inference_steps=3, eta=1.0, output_type="latent")
    assert sd.scheduler is own
    assert "step" not in vars(own)
    assert own.num_inference_steps == 3
    _, log_prob = ddpo_pytorch.ddim_step_with_logprob(
        own, torch.zeros(1, 4, 8, 8), own.timesteps[0], torch.zeros(1, 4, 8, 8), eta=1.0
    )
    assert log_prob.isfinite().all()


def test_a_callback_hears_of_every_step(sd: Any):
    heard: list[tuple[int, Tensor]] = []
    ddpo_pytorch.pipeline_with_logprob(
        sd,
        PROMPTS,
        num_inference_steps=4,
        eta=1.0,
        output_type="latent",
        callback=lambda number, timestep, latents: heard.append((number, latents)),
        callback_steps=2,
    )
    assert [number for number, _ in heard] == [0, 2]


@pytest.mark.parametrize("sde_type", ["sde", "cps"])
def test_an_sd3_rollout_is_recorded_with_means(sd3: Any, sde_type: str):
    torch.manual_seed(11)
    images, latents, log_probs, means = flow_grpo.pipeline_with_logprob(
        sd3,
        PROMPTS,
        num_inference_steps=3,
        guidance_scale=2.0,
        height=16,
        width=16,
        generator=seeded(),
        output_type="pt",
        noise_level=0.6,
        sde_type=sde_type,
        return_prev_sample_mean=True,
    )
    assert (len(latents), len(log_probs), len(means), len(images)) == (4, 3, 3, 2)
    torch.manual_seed(11)
    for number in range(3):
        sigma, following = sd3.scheduler.sigmas[number : number + 2]
        std = following * math.sin(0.6 * math.pi / 2)
        if sde_type == "sde":
            below = sd3.scheduler.sigmas[1] if sigma == 1 else sigma
            std = (sigma / (1 - below)).sqrt() * 0.6 * (sigma - following).sqrt()
        noise = torch.randn(latents[0].shape)
        torch.testing.assert_close(latents[number + 1], means[number] + std * noise, rtol=1e-4, atol=1e-4)


def test_a_flux_rollout_has_positions_that_its_transformer_takes(flux: Any):
    images, latents, image_ids, text_ids, log_probs = flow_grpo.pipeline_with_logprob(
        flux, PROMPTS, num_inference_steps=2, height=16, width=16, output_type="pt", max_sequence_length=16
    )
    assert (len(latents), len(log_probs), len(images)) == (3, 2, 2)
    cond, pooled, expected = flux.encode_prompt(PROMPTS, None, max_sequence_length=16)
    assert torch.equal(text_ids, expected)
    with torch.no_grad():
        output = flux.transformer(
            hidden_states=latents[0],
            timestep=flux.scheduler.timesteps[:1].expand(2) / 1000,
            guidance=torch.full([2], 3.5),
            pooled_projections=pooled,
            encoder_hidden_states=cond,
            txt_ids=text_ids,
            img_ids=image_ids,
            return_dict=False,
        )[0]
    _, log_prob, *_ = flow_grpo.sde_step_with_logprob(
        flux.scheduler, output, flux.scheduler.timesteps[:1].expand(2), latents[0], prev_sample=latents[1]
    )
    torch.testing.assert_close(log_prob, log_probs[0], rtol=1e-4, atol=1e-4)


def test_trackers_give_their_originals_advantages():
    tracker = ddpo_pytorch.PerPromptStatTracker(buffer_size=4, min_count=3)
    prompts, rewards = np.array(["a", "b", "a", "b"]), np.array([1.0, 2.0, 3.0, 6.0])
    batch = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
    np.testing.assert_allclose(tracker.update(prompts, rewards), batch)
    again = tracker.update(prompts, rewards)
    known = np.array([1.0, 3.0, 1.0, 3.0])
    np.testing.assert_allclose(again[[0, 2]], (rewards[[0, 2]] - known.mean()) / (known.std() + 1e-6))
    assert tracker.get_stats()["b"]["count"] == 4
    groups = flow_grpo.PerPromptStatTracker()
    found = groups.update(["a", "b", "a", "b"], rewards)
    np.testing.assert_allclose(found, [-1 / 1.0001, -2 / 2.0001, 1 / 1.0001, 2 / 2.0001])
    assert groups.get_stats() == (2, 2)
    groups.clear()
    shared = flow_grpo.PerPromptStatTracker(global_std=True).update(["a", "b", "a", "b"], rewards)
    np.testing.assert_allclose(shared, np.array([-1, -2, 1, 2]) / (rewards.std() + 1e-4))
    for kind, expected in (("rwr", rewards), ("sft", [0, 0, 1, 1]), ("dpo", [-1, -1, 1, 1])):
        np.testing.assert_allclose(groups.update(["a", "b", "a", "b"], rewards, type=kind), expected)
        groups.clear()


@pytest.mark.parametrize(("given", "said"), [({"type": "gardo"}, "is not here"), ({"type": "best"}, "must be grpo")])
def test_what_a_tracker_has_not_is_refused(given: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=said):
        flow_grpo.PerPromptStatTracker().update(["a"], [1.0], **given)


@pytest.mark.parametrize("name", ["sd", "sd-v", "sd3", "flux"])
def test_a_wrapped_pipeline_draws_the_same_images_and_unwraps(name: str):
    pipeline = made(name)
    pipeline.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"num_inference_steps": 4, "output_type": "pt"}
    options |= {} if name.startswith("sd") and name != "sd3" else {"height": 16, "width": 16, "max_sequence_length": 16}
    before = pipeline(PROMPTS, generator=seeded(), **options).images
    own = pipeline.scheduler
    fast = wrap(pipeline)
    assert pipeline.scheduler is not own
    torch.testing.assert_close(fast(PROMPTS, generator=seeded(), **options).images, before, rtol=1e-3, atol=1e-3)
    assert fast.explain()["step"].startswith("one pass over the latents")
    with pytest.raises(ValueError, match="wrapped once"):
        wrap(pipeline)
    assert fast.unwrap() is pipeline
    assert pipeline.scheduler is own
    again = pipeline(PROMPTS, generator=seeded(), **options).images
    torch.testing.assert_close(again, before, rtol=1e-4, atol=1e-4)


def test_a_wrapped_pipeline_steps_with_noise_and_log_probs(sd: Any):
    own = sd(PROMPTS, num_inference_steps=4, eta=0.7, generator=seeded(), output_type="pt").images
    with wrap(sd) as fast:
        again = fast(PROMPTS, num_inference_steps=4, eta=0.7, generator=seeded(), output_type="pt").images
        torch.testing.assert_close(again, own, rtol=1e-3, atol=1e-3)
        images, latents, log_probs = fast.with_logprob(PROMPTS, num_inference_steps=4, eta=1.0, output_type="pt")
        assert (len(images), len(latents), len(log_probs)) == (2, 5, 4)
        assert all(one.isfinite().all() for one in log_probs)


def test_what_is_not_replaced_says_why():
    pipeline = made("sdxl")
    with wrap(pipeline) as fast:
        assert "EulerDiscreteScheduler's own" in fast.explain()["step"]
        with pytest.raises(ValueError, match="with_logprob is of SD"):
            fast.with_logprob("a cat")
    clipping = made("sd")
    clipping.scheduler.register_to_config(clip_sample=True)
    with wrap(clipping) as fast:
        assert "clips its guess" in fast.explain()["step"]
    with pytest.raises(ValueError, match="must be one of"):
        wrap(torch.nn.Linear(1, 1))


def test_a_pipeline_that_cannot_be_wrapped_is_left_as_it_was():
    pipeline = made("sd")
    own = pipeline.scheduler
    with pytest.raises(ValueError, match="needs a CUDA device"):
        wrap(pipeline, Acceleration(cuda_graphs="on"))
    assert pipeline.scheduler is own
    with wrap(pipeline) as fast:
        assert fast.explain()["step"].startswith("one pass")

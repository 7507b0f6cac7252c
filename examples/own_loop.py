"""AdaScope in a training loop of your own: plain diffusers and peft, with our operations and `AdaScope.decide`.

    python examples/own_loop.py [--iterations 10] [--num-steps 20] [--samples-per-prompt 8]

Neither our trainer nor our rollout takes part. Axes: `b` samples, `t` steps, `n` packed (sample, step) pairs.
"""

import argparse

import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig

from adascope_fast import AdaScope, Schedule, curves_of_guesses, ops
from adascope_fast.algorithms.advantages import GroupRelative
from adascope_fast.backbones import ASSETS
from adascope_fast.rewards.scene_attributes import SceneAttributes

PROMPTS = ["a small red circle on a grey background", "two large blue crosses on a black background"]
CLIP_RANGE = 5e-3


def main() -> None:
    """Train LoRA weights of the embedded model on `scene_attributes`; a line an iteration."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--num-steps", type=int, default=20)
    parser.add_argument("--samples-per-prompt", type=int, default=8)
    chosen = parser.parse_args()
    prompts = [prompt for prompt in PROMPTS for _ in range(chosen.samples_per_prompt)]
    generator = torch.Generator().manual_seed(0)

    torch.manual_seed(0)  # of the adapter's weights
    pipe = StableDiffusionPipeline.from_pretrained(ASSETS / "scenes")
    pipe.unet.requires_grad_(False)
    pipe.unet.add_adapter(LoraConfig(r=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    parameters = [parameter for parameter in pipe.unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)

    schedule = Schedule.from_diffusers(pipe.scheduler, chosen.num_steps, eta=1.0)
    adascope, advantage, reward = AdaScope(), GroupRelative(), SceneAttributes()
    with torch.no_grad():
        text, _ = pipe.encode_prompt(prompts, "cpu", 1, False)

    for iteration in range(chosen.iterations):
        latents, guesses, old_log_prob = rollout(pipe, schedule, text, generator)
        with torch.no_grad():
            decoded = pipe.vae.decode(latents[:, -1] / pipe.vae.config.scaling_factor).sample
        rewards = reward((decoded / 2 + 0.5).clamp(0, 1), prompts)
        advantages = advantage(rewards, prompts, schedule.num_steps)  # [b, t]

        keep = adascope.decide(
            curves_of_guesses(guesses, latents[:, -1]), prompts, log_snr=schedule.log_snr, trainable=schedule.trainable
        )
        sample, step = keep.nonzero().unbind(1)  # [n] each: what is not kept costs nothing from here on
        optimizer.zero_grad()
        for part in torch.randperm(len(sample), generator=generator).split(64):
            b, t = sample[part], step[part]
            output = pipe.unet(latents[b, t], schedule.timesteps[t], encoder_hidden_states=text[b]).sample
            log_prob = ops.transition_log_prob(latents[b, t], output, latents[b, t + 1], schedule.coef[t])
            loss, _ = ops.clipped_policy_loss(log_prob, old_log_prob[b, t], advantages[b, t], clip_range=CLIP_RANGE)
            (loss.sum() / len(sample)).backward()  # a fixed divisor: the size of a part cannot matter
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        intervals = adascope.telemetry()["intervals"]
        print(
            f"{iteration}: reward {rewards.mean():.3f}, {keep.float().mean():.0%} of the steps, intervals {intervals}"
        )


@torch.no_grad()
def rollout(
    pipe: StableDiffusionPipeline, schedule: Schedule, text: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents [b, t + 1, ...], guesses of the final latent [b, t, ...] and log-probabilities [b, t]."""
    num, size = len(text), pipe.unet.config.sample_size
    latents = [torch.randn(num, pipe.unet.config.in_channels, size, size, generator=generator)]
    guesses, log_probs = [], []
    for t in range(schedule.num_steps):
        timestep = schedule.timesteps[t].expand(num)
        output = pipe.unet(latents[-1], timestep, encoder_hidden_states=text).sample
        noise = torch.randn(latents[-1].shape, generator=generator)
        of_x, of_output = schedule.x0_coef[t]
        guesses.append(of_x * latents[-1] + of_output * output)
        prev_sample, log_prob = ops.transition_step(latents[-1], output, noise, schedule.coef[t].expand(num, 3))
        latents.append(prev_sample)
        log_probs.append(log_prob)
    return torch.stack(latents, 1), torch.stack(guesses, 1), torch.stack(log_probs, 1)


if __name__ == "__main__":
    main()

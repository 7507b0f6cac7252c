"""B1, B2, B3: DDPO as one would write it today in plain diffusers, peft and PyTorch, with nothing of ours.

B1: SDPA attention, guidance batched, coefficients in device tables, log-probabilities and latents kept on the device,
fused AdamW, no host sync in rollout or update; one denoiser call a timestep, gradients accumulated over the timesteps.
B2: B1 with `torch.compile` on the denoiser (options: compile = a mode).
B3: B1 with Flow-GRPO-Fast's steps (options: window = size): noise in one random window of the first half, the
deterministic step elsewhere, and only the window trained.
"""

import contextlib
import random
from typing import Any

import torch
from common import Clock, NotBuiltError, Setting, Variant, load_reward, serve
from diffusers import DiffusionPipeline
from peft import LoraConfig
from torch import Tensor

SD_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
SD3_TARGETS = [f"attn.{name}" for name in (*SD_TARGETS, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")]


class Eager(Variant):
    """One iteration of DDPO (Black et al. 2023) with a fixed divisor, statistics of the batch, one optimiser step."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        torch.backends.cuda.matmul.allow_tf32 = True
        self.device = torch.device(setting.device)
        self.dtype = getattr(torch, setting.dtype)
        pipe: Any = DiffusionPipeline.from_pretrained(
            setting.folder, dtype=self.dtype, use_safetensors=True, local_files_only=True
        )
        pipe.set_progress_bar_config(disable=True)
        self.pipe = pipe.to(self.device)
        is_sd = setting.family != "sd3"
        self.denoiser: Any = pipe.unet if is_sd else pipe.transformer
        for module in (pipe.vae, pipe.text_encoder, self.denoiser):
            module.requires_grad_(False).eval()
        rank, targets = setting.lora_rank, SD_TARGETS if is_sd else SD3_TARGETS
        self.denoiser.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))
        self.parameters = [parameter for parameter in self.denoiser.parameters() if parameter.requires_grad]
        for parameter in self.parameters:
            parameter.data = parameter.data.float()
        if "compile" in setting.options:
            self.denoiser.compile(mode=setting.options["compile"])
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=setting.learning_rate, weight_decay=1e-4, fused=setting.device == "cuda"
        )
        make_tables = ddim_tables if is_sd else flow_tables
        self.timesteps, self.noisy, self.plain = (
            table.to(self.device) for table in make_tables(pipe.scheduler, setting.num_steps, setting.noise)
        )
        self.reward = load_reward()
        self._random = random.Random(setting.seed)

    def iterate(self, prompts: list[str], keep: tuple[int, int] | None, clock: Clock) -> dict[str, Any]:
        """One iteration on one picture of each prompt."""
        num_steps, coef = self.setting.num_steps, self.noisy
        start, end = keep or (0, num_steps)
        size = self.setting.options.get("window")
        if size is not None:
            if keep is not None:
                raise NotBuiltError("Flow-GRPO-Fast draws its own window")
            start = self._random.randint(0, num_steps // 2 - size)
            end = start + size
            coef = self.plain.clone()
            coef[start:end] = self.noisy[start:end]
        with clock("rollout"):
            condition = self.encode(prompts)
            latents, log_prob = self.rollout(condition, len(prompts), coef)
        with clock("reward"):
            rewards = self.reward(self.decode(latents[:, -1]), prompts).to(self.device)
            advantage = ((rewards - rewards.mean()) / (rewards.std(correction=0) + 1e-8)).clamp(-5, 5)
        with clock("update"):
            steps = range(start, end)
            deviation = self.backward(condition, latents, log_prob, advantage, coef, steps)
            torch.nn.utils.clip_grad_norm_(self.parameters, self.setting.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
        images = len(prompts)
        return {"images": images, "pairs": images * (end - start), "ratio_deviation": deviation.item()}

    @torch.no_grad()
    def rollout(self, condition: list[Tensor], count: int, coef: Tensor) -> tuple[Tensor, Tensor]:
        """(latents [b, t+1, ...], log_prob [b, t])."""
        config, num_steps = self.denoiser.config, self.setting.num_steps
        shape = (count, num_steps + 1, config.in_channels, config.sample_size, config.sample_size)
        latents = torch.randn(shape, device=self.device)
        log_prob = torch.zeros(count, num_steps, device=self.device)
        for step in range(num_steps):
            sample, noise = latents[:, step], latents[:, step + 1]
            output = self.guided(sample, self.timesteps[step].expand(count), condition)
            mean = coef[step, 0] * sample + coef[step, 1] * output
            latents[:, step + 1] = mean + coef[step, 2] * noise
            log_prob[:, step] = log_likelihood(latents[:, step + 1], mean, coef[step, 2])
        return latents, log_prob

    def backward(
        self,
        condition: list[Tensor],
        latents: Tensor,
        old_log_prob: Tensor,
        advantage: Tensor,
        coef: Tensor,
        steps: range,
    ) -> Tensor:
        """Accumulate the gradient of the clipped loss, one step at a time; the largest |ratio - 1|, on the device."""
        clip, count = self.setting.clip_range, len(latents)
        deviation = torch.zeros((), device=self.device)
        for step in steps:
            sample = latents[:, step]
            output = self.guided(sample, self.timesteps[step].expand(count), condition)
            mean = coef[step, 0] * sample + coef[step, 1] * output
            log_prob = log_likelihood(latents[:, step + 1], mean, coef[step, 2])
            ratio = (log_prob - old_log_prob[:, step]).exp()
            loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip)).mean()
            (loss / len(steps)).backward()
            deviation = torch.maximum(deviation, (ratio.detach() - 1).abs().max())
        return deviation

    def guided(self, sample: Tensor, timestep: Tensor, condition: list[Tensor]) -> Tensor:
        """Model output [b, ...] with guidance, both halves in one call, float32."""
        scale, twice = self.setting.guidance_scale, sample.to(self.dtype)
        if scale != 1:
            twice, timestep = torch.cat([twice, twice]), torch.cat([timestep, timestep])
        mixed = self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype) if mixed else contextlib.nullcontext():
            if self.setting.family == "sdxl":
                added = {"text_embeds": condition[1], "time_ids": condition[2]}
                output = self.denoiser(twice, timestep, condition[0], added_cond_kwargs=added, return_dict=False)[0]
            elif self.setting.family == "sd":
                output = self.denoiser(twice, timestep, condition[0], return_dict=False)[0]
            else:
                output = self.denoiser(
                    hidden_states=twice,
                    timestep=timestep,
                    encoder_hidden_states=condition[0],
                    pooled_projections=condition[1],
                    return_dict=False,
                )[0]
        output = output.float()
        if scale == 1:
            return output
        without, with_prompt = output.chunk(2)
        return without + scale * (with_prompt - without)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> list[Tensor]:
        """Text tensors, the unconditional half first; each distinct prompt encoded once."""
        distinct = list(dict.fromkeys(prompts))
        rows = torch.tensor([distinct.index(prompt) for prompt in prompts], device=self.device)
        if self.setting.family == "sd":
            found = [self.pipe.encode_prompt(distinct, self.device, 1, False)[0]]
            empty = [self.pipe.encode_prompt([""], self.device, 1, False)[0]]
        elif self.setting.family == "sdxl":
            options: dict[str, Any] = {"device": self.device, "do_classifier_free_guidance": False}
            found = list(self.pipe.encode_prompt(distinct, **options)[::2])
            empty = [torch.zeros_like(value[:1]) for value in found]  # as SDXL's pipeline has it
            side = self.denoiser.config.sample_size * self.pipe.vae_scale_factor
            size = torch.tensor([[side, side, 0, 0, side, side]], device=self.device, dtype=found[0].dtype)
            found, empty = [*found, size.expand(len(distinct), 6)], [*empty, size]
        else:
            found = list(self.pipe.encode_prompt(distinct, None, None, do_classifier_free_guidance=False)[::2])
            empty = list(self.pipe.encode_prompt([""], None, None, do_classifier_free_guidance=False)[::2])
        values = [value[rows] for value in found]
        if self.setting.guidance_scale == 1:
            return values
        return [torch.cat([none.expand_as(value), value]) for none, value in zip(empty, values, strict=True)]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures in [0, 1]."""
        config = self.pipe.vae.config
        scaled = latents.to(self.dtype) / config.scaling_factor + (config.shift_factor or 0.0)
        return (self.pipe.vae.decode(scaled, return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)

    def flops(self) -> dict[str, float]:
        """Counted by PyTorch on one picture and one step, guidance included."""
        from torch.utils.flop_counter import FlopCounterMode

        config = self.denoiser.config
        sample = torch.randn(1, config.in_channels, config.sample_size, config.sample_size, device=self.device)
        condition = self.encode(["a"])
        with torch.no_grad(), FlopCounterMode(display=False) as forward:
            self.guided(sample, self.timesteps[:1], condition)
        with FlopCounterMode(display=False) as both:
            self.guided(sample, self.timesteps[:1], condition).sum().backward()
        self.optimizer.zero_grad()
        found = {"forward": forward.get_total_flops(), "forward_backward": both.get_total_flops()}
        return found | ({"matrix_rate": matrix_rate(self.dtype)} if self.setting.device == "cuda" else {})

    def tokens(self, prompt: str) -> list[int]:
        """Padded to the model's length."""
        tokenizer = self.pipe.tokenizer
        return tokenizer(prompt, padding="max_length", max_length=tokenizer.model_max_length).input_ids


def matrix_rate(dtype: torch.dtype, size: int = 8192) -> float:
    """FLOP/s of the best of ten square matrix products on the GPU."""
    left, right = torch.randn(2, size, size, device="cuda", dtype=dtype)
    times = []
    for _ in range(12):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        left @ right
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return 2 * size**3 / min(times[2:])


def log_likelihood(value: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Mean over the latent of log N(value; mean, std^2), [b]; -inf + inf at std = 0 is of no interest."""
    return torch.distributions.Normal(mean, std, validate_args=False).log_prob(value).flatten(1).mean(1)


def ddim_tables(scheduler: Any, num_steps: int, eta: float) -> tuple[Tensor, Tensor, Tensor]:
    """(timesteps [t], rows (a, b, std) [t, 3] with eta, the same with eta 0) of DDIM, "leading" steps as diffusers."""
    config = scheduler.config
    stride = config.num_train_timesteps // num_steps
    timesteps = torch.arange(num_steps - 1, -1, -1) * stride + config.steps_offset
    alphas = scheduler.alphas_cumprod.double()
    final = torch.ones((), dtype=torch.float64) if config.set_alpha_to_one else alphas[0]
    now = alphas[timesteps]
    after = torch.where(timesteps >= stride, alphas[(timesteps - stride).clamp(min=0)], final)

    def rows(eta: float) -> Tensor:
        variance = eta**2 * (1 - after) / (1 - now) * (1 - now / after)
        kept = (1 - after - variance).clamp(min=0).sqrt()
        if config.prediction_type == "epsilon":
            x0, noise = (now.rsqrt(), -((1 - now) / now).sqrt()), (torch.zeros_like(now), torch.ones_like(now))
        elif config.prediction_type == "v_prediction":
            x0, noise = (now.sqrt(), -(1 - now).sqrt()), ((1 - now).sqrt(), now.sqrt())
        else:
            raise NotBuiltError(f"epsilon and v_prediction are built, not {config.prediction_type}")
        mean = [after.sqrt() * from_x0 + kept * from_noise for from_x0, from_noise in zip(x0, noise, strict=True)]
        return torch.stack([*mean, variance.sqrt()], 1).float()

    return timesteps.float(), rows(eta), rows(0.0)


def flow_tables(scheduler: Any, num_steps: int, noise_level: float) -> tuple[Tensor, Tensor, Tensor]:
    """The same of Flow-GRPO's SDE, and of Euler's steps."""
    scheduler.set_timesteps(num_steps)
    sigmas = scheduler.sigmas.double().cpu()
    now, step = sigmas[:-1], sigmas.diff()
    spread = noise_level * (now / (1 - torch.where(now == 1, sigmas[1], now))).sqrt()
    drift = spread.square() / (2 * now)
    noisy = torch.stack([1 + drift * step, step * (1 + drift * (1 - now)), spread * (-step).sqrt()], 1)
    plain = torch.stack([torch.ones_like(step), step, torch.zeros_like(step)], 1)
    return scheduler.timesteps.float().cpu(), noisy.float(), plain.float()


if __name__ == "__main__":
    serve(Eager)

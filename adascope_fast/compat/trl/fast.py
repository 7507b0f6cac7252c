"""What makes an epoch faster than TRL's: one rollout and one update through this engine's parts, with TRL's numbers.

Axes: `b` samples of an epoch, `t` steps, `n` (sample, step) pairs of an update. A training forward has pairs of several
steps in it, a rollout's all batches of an epoch; the LoRA is folded in while nothing is differentiated, prompts are
encoded once, and no step waits for the device.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adascope_fast import ops
from adascope_fast.backbone import Condition
from adascope_fast.backbones.base import Options, PipelineBackbone
from adascope_fast.backbones.folding import Folding
from adascope_fast.backbones.loading import family_of
from adascope_fast.backbones.pipeline.state import refuse_state
from adascope_fast.compat.trl.step import scheduler_step
from adascope_fast.engine.engine import even_parts
from adascope_fast.rollout import Denoising, EncodedPrompts, Tables, Trajectory
from adascope_fast.schedules import Schedule

CONDITION = {"text": "prompt_embeds", "pooled": "pooled_prompt_embeds", "time_ids": "time_ids"}
"""TRL's name, in a batch of samples, of what a backbone tells the denoiser."""


class _GivenLayers:
    """A backbone whose trained layers are those that the pipeline's `get_trainable_layers` names."""

    wrapper: Any
    trained: list[nn.Parameter]
    pipeline: Any
    denoiser: Any
    denoiser_name: str

    def _refuse_state(self) -> None:
        train = "lora" if self.wrapper.use_lora else "full"
        refuse_state(self.pipeline, self.denoiser_name, train=train, adapted=self.denoiser_name)

    def _refuse_parts_and_settings(self) -> None:
        """A scheduler that clips is none of the engine's, but `Update` has a way for it."""
        given = self.pipeline.scheduler
        self.pipeline.scheduler = type(given).from_config(given.config, clip_sample=False, thresholding=False)
        try:
            super()._refuse_parts_and_settings()  # type: ignore[misc]
        finally:
            self.pipeline.scheduler = given

    def _make_weights(self) -> Any:
        self.trained = trained_layers(self.wrapper)
        inside = {id(parameter) for parameter in self.denoiser.parameters()}
        if any(id(parameter) not in inside for parameter in self.trained):
            raise ValueError(
                "get_trainable_layers must name parameters of the UNet, got others; name layers of sd_pipeline.unet"
            )
        for parameter in self.trained:
            parameter.requires_grad_(True)
            parameter.data = parameter.data.float()
        if len(self.trained) == len(inside):
            self.denoiser.float()  # its buffers too

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The layers' parameters."""
        return self.trained


def trained_layers(wrapper: Any) -> list[nn.Parameter]:
    """The parameters that a pipeline has trained, in TRL's order."""
    layers = wrapper.get_trainable_layers()
    found = layers if isinstance(layers, list) else [one for one in layers.parameters() if one.requires_grad]
    if not found:
        raise ValueError(
            "get_trainable_layers must name layers that ask for gradients, got none; call requires_grad_(True) on them"
        )
    return found


def backbone_of(wrapper: Any, seed: int) -> PipelineBackbone:
    """The wrapped diffusers pipeline as this engine sees it; ValueError where it cannot be trained."""
    pipeline = wrapper.sd_pipeline
    name = next((base.__name__ for base in type(pipeline).__mro__ if base.__name__.endswith("Pipeline")), "")
    family = family_of(name)
    made = type(family.__name__, (_GivenLayers, family), {"wrapper": wrapper})
    return made(pipeline, name, Options(train="lora" if wrapper.use_lora else "full", seed=seed))


@torch.no_grad()
def sampled(
    backbone: PipelineBackbone,
    schedule: Schedule,
    encoded: EncodedPrompts,
    prompts: list[str],
    noise: Tensor,
    *,
    guidance_scale: float,
    batch: int,
    folds: bool,
    on_step: Callable[[], object],
) -> Trajectory:
    """The trajectories of prompts [b] from the noise [b, t + 1, ...] of their start and of every step."""
    index = encoded.index(prompts, schedule.coef.device)
    tables = Tables.of(noise, backbone.denoiser)
    denoising = Denoising(backbone, schedule, encoded, guidance_scale)
    with folded(backbone if folds else None):
        for start in range(0, len(prompts), batch):
            rows = slice(start, min(start + batch, len(prompts)))
            for step in range(schedule.num_steps):
                denoising(step, torch.arange(rows.start, rows.stop), rows, tables, index)
                on_step()
    told = tables.x0_correlation, tables.sample_correlation
    return Trajectory(tables.latents, tables.x0, tables.log_prob, schedule, list(prompts), index, *told)


@dataclass(frozen=True)
class Pairs:
    """The (sample, step) pairs of an update: tensors [n, ...], and what the denoiser is told of each sample."""

    latents: Tensor
    next_latents: Tensor
    timesteps: Tensor
    log_probs: Tensor
    advantages: Tensor
    sample: Tensor
    condition: Condition
    negative: Condition

    @classmethod
    def of(cls, batches: Sequence[dict[str, Tensor]], num_steps: int) -> "Pairs":
        """Those of the first `num_steps` columns, less those that a selector has left out (`keep`)."""
        whole = {name: torch.cat([one[name] for one in batches]) for name in batches[0]}
        count = len(whole["advantages"])
        keep = whole["keep"][:, :num_steps]
        sample, column = keep.nonzero(as_tuple=True)
        at = {name: whole[name][sample, column] for name in ("latents", "next_latents", "timesteps", "log_probs")}
        known = {name: key for name, key in CONDITION.items() if key in whole}
        assert count == len(keep)
        return cls(
            **at,
            advantages=whole["advantages"][sample],
            sample=sample,
            condition={name: whole[key] for name, key in known.items()},
            negative={name: whole[f"negative_{key}"] for name, key in known.items()},
        )

    def __len__(self) -> int:
        return len(self.sample)

    def told(self, part: slice, *, is_guided: bool) -> Condition:
        """What the denoiser is told of some pairs: of the conditional rows, then of the unconditional ones."""
        own = {name: value[self.sample[part]] for name, value in self.condition.items()}
        if not is_guided:
            return own
        return {name: torch.cat([value, self.negative[name][self.sample[part]]]) for name, value in own.items()}


class Update:
    """The gradient of the clipped loss, in microbatches.

    Args:
        coef_of: rows (sample weight, output weight, std) of timesteps; None where steps are not affine in the output.
        train_scale: guidance of the training forward; 1 for none.
    """

    def __init__(
        self,
        backbone: PipelineBackbone,
        scheduler: Any,
        coef_of: Callable[[Tensor], Tensor] | None,
        *,
        eta: float,
        train_scale: float,
        clip_range: float,
        advantage_clip: float,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.backbone, self.scheduler, self.coef_of, self.eta = backbone, scheduler, coef_of, eta
        self.train_scale, self.clip_range, self.advantage_clip = train_scale, clip_range, advantage_clip
        self.autocast = autocast

    def accumulate(self, pairs: Pairs, microbatch: int, *, is_on_policy: bool) -> dict[str, Tensor]:
        """Add the gradient of the pairs' mean loss; means of loss, approx_kl and clipfrac.

        Args:
            is_on_policy: no weight has moved since the rollout, so every ratio is 1.
        """
        told: list[dict[str, Tensor]] = []
        for part in even_parts(len(pairs), microbatch):
            told.append(self._add(pairs, part, is_on_policy=is_on_policy))
        return {name: torch.cat([one[name] for one in told]).mean() for name in told[0]}

    def _add(self, pairs: Pairs, part: slice, *, is_on_policy: bool) -> dict[str, Tensor]:
        is_guided = self.train_scale != 1
        latents, next_latents = pairs.latents[part], pairs.next_latents[part]
        timesteps, old = pairs.timesteps[part], pairs.log_probs[part]
        advantages = pairs.advantages[part].clamp(-self.advantage_clip, self.advantage_clip)
        with self.autocast():
            outputs = self.backbone.predict(
                torch.cat([latents, latents]) if is_guided else latents,
                (torch.cat([timesteps, timesteps]) if is_guided else timesteps).float(),
                pairs.told(part, is_guided=is_guided),
            )
        leaf, size = outputs.detach().requires_grad_(), len(latents)
        own, without = (leaf[:size], leaf[size:]) if is_guided else (leaf, None)
        if self.coef_of is None:
            return self._plain(outputs, leaf, (own, without), pairs, part, advantages, is_on_policy=is_on_policy)
        loss, stats, *gradients = ops.transition_policy_grad(
            latents,
            own,
            next_latents,
            self.coef_of(timesteps),
            None if is_on_policy else old,
            advantages.float(),
            clip_range=self.clip_range,
            output_uncond=without,
            guidance_scale=self.train_scale,
            scale=1 / len(pairs),
        )
        found = [gradient for gradient in gradients if gradient is not None]
        outputs.backward(found[0] if len(found) == 1 else torch.cat(found))
        return {"loss": loss, "approx_kl": stats["approx_kl"], "clipfrac": stats["clipfrac"]}

    def _plain(
        self,
        outputs: Tensor,
        leaf: Tensor,
        halves: tuple[Tensor, Tensor | None],
        pairs: Pairs,
        part: slice,
        advantages: Tensor,
        *,
        is_on_policy: bool,
    ) -> dict[str, Tensor]:
        """The same of steps that clip or threshold the guess."""
        output = ops.guide(halves[0].float(), None if halves[1] is None else halves[1].float(), self.train_scale)
        step = scheduler_step(
            self.scheduler, output, pairs.timesteps[part], pairs.latents[part], self.eta,
            prev_sample=pairs.next_latents[part],
        )  # fmt: skip
        old = step.log_probs.detach() if is_on_policy else pairs.log_probs[part]
        loss, ratio = ops.clipped_policy_loss(step.log_probs, old, advantages.float(), clip_range=self.clip_range)
        (gradient,) = torch.autograd.grad(loss.sum() / len(pairs), leaf)
        outputs.backward(gradient)
        difference = (step.log_probs - old).detach()
        clipfrac = ((ratio.detach() - 1).abs() > self.clip_range).float()
        return {"loss": loss.detach(), "approx_kl": 0.5 * difference.square(), "clipfrac": clipfrac}


def folded(backbone: PipelineBackbone | None) -> AbstractContextManager[Any]:
    """The adapter folded into the weights, for a rollout through the pipeline itself."""
    return nullcontext() if backbone is None else Folding(backbone.denoiser)

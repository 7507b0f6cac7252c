"""TRL 0.23.1's `DDPOTrainer` on this engine: its arguments, methods, random draws and numbers.

How it differs: a training forward has pairs of several steps in it, a rollout's all batches of an epoch, and the first
update of an epoch takes its own log-probability as the old one, so its ratio is 1 exactly. What TRL does wrong by its
own description is done right and listed in docs/migrating.md: resuming, integer rewards, the model card.

A subclass may override `calculate_loss`, `loss`, `compute_rewards`, `step`, `_generate_samples`,
`_train_batched_samples`, `_setup_optimizer`, or methods of the pipeline. They are then used, on TRL's slower way where
that is one; `explain()` says which.
"""

import contextlib
import logging
from collections.abc import Callable, Mapping
from concurrent import futures
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, get_available_trackers
from accelerate.utils import set_seed
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from adascope_fast.adascope import LatentSensor
from adascope_fast.adascope.settings import AdaScope
from adascope_fast.compat.trl import checkpoints
from adascope_fast.compat.trl.card import model_card
from adascope_fast.compat.trl.config import DDPOConfig
from adascope_fast.compat.trl.fast import CONDITION, Pairs, Update, backbone_of, folded, sampled, trained_layers
from adascope_fast.compat.trl.pipelines import DDPOStableDiffusionPipeline, _DiffusersPipeline
from adascope_fast.compat.trl.statistics import PerPromptStatTracker
from adascope_fast.compat.trl.step import is_affine
from adascope_fast.engine.acceleration import Acceleration, accelerate, halving
from adascope_fast.engine.optimizer import adamw_8bit
from adascope_fast.engine.settings import Updates
from adascope_fast.rollout import PromptCache, Trajectory
from adascope_fast.schedules import Schedule
from adascope_fast.selectors.protocol import TimestepSelector

logger = logging.getLogger(__name__)

Samples = dict[str, Tensor]


class DDPOTrainer(PyTorchModelHubMixin):
    """DDPO on a Stable Diffusion pipeline, as TRL 0.23.1 has it.

    Args:
        config: see `DDPOConfig`.
        reward_function: (images [b, 3, h, w] in [0, 1], prompts, metadata) -> (rewards [b], anything for the hook).
        prompt_function: () -> (prompt, metadata), called once for each image.
        sd_pipeline: what is trained.
        image_samples_hook: called once an epoch with [[images, prompts, metadata, rewards, reward metadata], ...],
            one for each sampling batch, the global step, and the first tracker.
        selector: steps to train: "every_step", as TRL, "adascope", or one of `adascope_fast.selectors`.
        acceleration: see `adascope_fast.engine.settings.Acceleration`; None: its defaults.
        rollout_batch: images denoised at once; None: 16, or a sampling batch; halved where memory runs out.
        microbatch: (image, step) pairs of a training forward; None: what pays; halved where memory runs out.

    Raises:
        ValueError: a field, a pipeline or their combination cannot be honoured; the message names it.
    """

    _tag_names = ["adascope-fast", "trl", "ddpo"]  # noqa: RUF012 - as in TRL, for subclasses to replace

    def __init__(
        self,
        config: DDPOConfig,
        reward_function: Callable[[Tensor, tuple[str, ...], tuple[Any, ...]], Any],
        prompt_function: Callable[[], tuple[str, Any]],
        sd_pipeline: DDPOStableDiffusionPipeline,
        image_samples_hook: Callable[[Any, Any, Any], Any] | None = None,
        *,
        selector: str | TimestepSelector = "every_step",
        acceleration: Acceleration | None = None,
        rollout_batch: int | None = None,
        microbatch: int | None = None,
    ) -> None:
        if image_samples_hook is None:
            logger.warning("no image_samples_hook is given, so no images are logged")
        self.prompt_fn, self.reward_fn, self.config = prompt_function, reward_function, config
        self.image_samples_callback = image_samples_hook
        self._hub_mixin_config = {name: _as_json(value) for name, value in vars(config).items()}
        self.num_train_timesteps = int(config.sample_num_steps * config.train_timestep_fraction)
        _refuse(config, self.num_train_timesteps)
        project = checkpoints.project_of(config)
        resumed = checkpoints.find(config, project)
        self.accelerator = Accelerator(
            log_with=config.log_with,
            mixed_precision=config.mixed_precision,
            project_config=project,
            gradient_accumulation_steps=config.train_gradient_accumulation_steps * self.num_train_timesteps,
            **config.accelerator_kwargs,
        )
        if self.accelerator.num_processes > 1:
            raise ValueError(
                f"a DDPOTrainer here uses one process, and accelerate started {self.accelerator.num_processes}; "
                f"launch it with one, on one GPU"
            )
        is_okay, message = self._config_check()
        if not is_okay:
            raise ValueError(message)
        self._start_trackers()
        set_seed(config.seed, device_specific=True)
        self.sd_pipeline: Any = sd_pipeline
        self._prepare_models(Acceleration() if acceleration is None else acceleration)
        self._prepare_prompts()
        if config.per_prompt_stat_tracking:
            self.stat_tracker = PerPromptStatTracker(
                config.per_prompt_stat_tracking_buffer_size, config.per_prompt_stat_tracking_min_count
            )
        given = sd_pipeline.autocast
        self.autocast: Any = self.accelerator.autocast if given in (None, contextlib.nullcontext) else given
        if config.async_reward_computation:
            self.executor = futures.ThreadPoolExecutor(max_workers=config.max_workers)
        self._prepare_steps(selector)
        for name, size in (("rollout_batch", rollout_batch), ("microbatch", microbatch)):
            if size is not None and size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}; leave it out for the usual size")
        self._rollout_batch = rollout_batch or max(16, config.sample_batch_size)
        usual = Updates(rollout_batch=self._rollout_batch).usual_microbatch(self._train_scale)
        self._microbatch = microbatch or max(usual, config.train_batch_size)
        self._has_moved, self._trajectory = False, None
        self._card_told: dict[str, Any] = {}
        self.first_epoch, self._first_global_step = 0, 0
        if resumed is not None:
            self.first_epoch, self._first_global_step = checkpoints.restore(self, resumed)
            logger.info("resumed from %s at epoch %d", resumed, self.first_epoch)

    # What is built once.

    def _start_trackers(self) -> None:
        config = self.config
        values: dict[str, Any] = {"ddpo_trainer_config": config.to_dict()}
        if config.log_with == "tensorboard":
            values = {
                name: value if isinstance(value, int | float | str) else str(value)
                for name, value in config.to_dict().items()
            }
        self.accelerator.init_trackers(config.tracker_project_name, config=values, init_kwargs=config.tracker_kwargs)

    def _prepare_models(self, acceleration: Acceleration) -> None:
        config, pipeline, device = self.config, self.sd_pipeline, self.accelerator.device
        if acceleration.cuda_graphs == "on":
            raise ValueError(
                'acceleration.cuda_graphs = "on" is of adascope_fast.Trainer, and a DDPOTrainer has none; leave it out'
            )
        dtypes = {"fp16": torch.float16, "bf16": torch.bfloat16}
        self._dtype = dtypes.get(self.accelerator.mixed_precision, torch.float32)
        encoders = [pipeline.text_encoder]
        if isinstance(pipeline, _DiffusersPipeline) and "text_encoder_2" in pipeline.sd_pipeline.components:
            encoders.append(pipeline.sd_pipeline.text_encoder_2)
        for model in (pipeline.vae, *encoders, pipeline.unet):
            model.to(device, *([] if model.dtype == self._dtype else [self._dtype]))
        if config.allow_tf32 and torch.cuda.is_available():
            acceleration = acceleration.model_copy(update={"matmul_precision": "high"})
        self._backbone: Any = None
        self.acceleration: dict[str, str] = {}
        if isinstance(pipeline, _DiffusersPipeline):
            self._backbone = backbone_of(pipeline, config.seed)
            self._backbone.to(device)
            trained = self._backbone.trainable_parameters()
            self.acceleration = accelerate(pipeline.unet, acceleration, device, decoder=pipeline.vae)
        else:
            trained = trained_layers(pipeline)
        pipeline.set_progress_bar_config(
            position=1,
            disable=not self.accelerator.is_local_main_process,
            leave=False,
            desc="Timestep",
            dynamic_ncols=True,
        )
        self._is_fused, self._folds = acceleration.is_fused, acceleration.folds
        self.trainable_layers: list[nn.Parameter] = trained
        self.optimizer = self._setup_optimizer(self.trainable_layers)

    def _prepare_prompts(self) -> None:
        negative = self.config.negative_prompts or ""
        self._cache: PromptCache | None = None
        self._negative: dict[str, Tensor] = {}
        if self._backbone is None:
            self.neg_prompt_embed = self._embedded([negative])[1]
            self._negative = {"text": self.neg_prompt_embed}
            return
        self._cache = PromptCache(self._backbone, negative_prompt=negative)
        self._negative = self._cache([negative]).negative
        self.neg_prompt_embed = self._negative["text"]

    def _prepare_steps(self, selector: str | TimestepSelector) -> None:
        config, pipeline, backbone = self.config, self.sd_pipeline, self._backbone
        scale = config.sample_guidance_scale
        self._rollout_scale = scale if scale > 1 else 1.0
        self._train_scale = scale if config.train_cfg else 1.0
        pipeline.scheduler.set_timesteps(config.sample_num_steps, device=self.accelerator.device)
        self._slow: dict[str, str] = {}
        if backbone is None:
            self._slow["rollout"] = self._slow["update"] = f"{type(pipeline).__name__} is no pipeline of this package"
        for part, names in {"rollout": ("__call__", "scheduler_step"), "update": ("scheduler_step",)}.items():
            for name in names:
                if _is_overridden(pipeline, name):
                    self._slow.setdefault(part, f"{type(pipeline).__name__} overrides {name}")
        self._schedule: Schedule | None = None
        if backbone is not None and not is_affine(pipeline.scheduler):
            self._slow.setdefault("rollout", "the scheduler clips or thresholds its guess")
        elif backbone is not None:
            self._schedule = backbone.schedule(config.sample_num_steps, kind="ddim", eta=config.sample_eta)
        self._trainable = torch.ones(config.sample_num_steps, dtype=torch.bool, device=self.accelerator.device)
        self._current = self._schedule
        if self._schedule is not None:
            self._trainable = self._schedule.trainable
            self._index = torch.zeros(pipeline.scheduler.config.num_train_timesteps, dtype=torch.int64)
            self._index[self._schedule.timesteps.long().cpu()] = torch.arange(config.sample_num_steps)
            self._index = self._index.to(self.accelerator.device)
        if not bool(self._trainable.all()):
            left_out = (~self._trainable).nonzero()[:, 0].tolist()
            logger.warning(
                "steps %s have no noise and so no log_prob: they are not trained (in TRL the loss becomes NaN); "
                "steps_offset = 1 of the scheduler gives them some",
                left_out,
            )
        self._selector = self._selector_of(selector)
        self._update = self._update_of()

    def _selector_of(self, selector: str | TimestepSelector) -> TimestepSelector | None:
        if isinstance(selector, str) and selector == "every_step":
            return None
        if isinstance(selector, str) and selector != "adascope":
            raise ValueError(
                f'selector must be "every_step", "adascope" or a selector, got {selector!r}; adascope_fast.selectors '
                f"has more"
            )
        if self.config.train_timestep_fraction < 1:
            raise ValueError(
                f"a selector chooses the steps, and train_timestep_fraction draws them, got "
                f"{self.config.train_timestep_fraction:g}; leave it at 1"
            )
        if "rollout" in self._slow:
            raise ValueError(
                f"a selector looks at a rollout of this engine, and {self._slow['rollout']}; leave selector at "
                f'"every_step"'
            )
        return AdaScope().build(sensor=LatentSensor()) if isinstance(selector, str) else selector

    def _update_of(self) -> Update | None:
        if "update" in self._slow:
            return None
        config = self.config
        return Update(
            self._backbone,
            self.sd_pipeline.scheduler,
            None if self._schedule is None else self._coef_of,
            eta=config.sample_eta,
            train_scale=self._train_scale,
            clip_range=config.train_clip_range,
            advantage_clip=config.train_adv_clip_max,
            autocast=lambda: self.accelerator.autocast(),
        )

    def _coef_of(self, timesteps: Tensor) -> Tensor:
        assert self._current is not None
        return self._current.coef[self._index[timesteps]]

    def _setup_optimizer(self, trainable_layers_parameters: Any) -> torch.optim.Optimizer:
        """AdamW of the trained parameters; a subclass may give another."""
        config = self.config
        settings: dict[str, Any] = {
            "lr": config.train_learning_rate,
            "betas": (config.train_adam_beta1, config.train_adam_beta2),
            "weight_decay": config.train_adam_weight_decay,
            "eps": config.train_adam_epsilon,
        }
        if config.train_use_8bit_adam:
            return adamw_8bit(trainable_layers_parameters, **settings)
        return torch.optim.AdamW(trainable_layers_parameters, fused=self._is_fused, **settings)

    def _config_check(self) -> tuple[bool, str]:
        """Whether the batches of an epoch fit into one another, and what does not."""
        config = self.config
        samples = config.sample_batch_size * config.sample_num_batches_per_epoch
        of_update = config.train_batch_size * config.train_gradient_accumulation_steps
        if config.sample_batch_size % config.train_batch_size:
            return False, (
                f"sample_batch_size must be a multiple of train_batch_size, got {config.sample_batch_size} and "
                f"{config.train_batch_size}; change one of them"
            )
        if samples % of_update:
            return False, (
                f"the images of an epoch (sample_batch_size * sample_num_batches_per_epoch) must be a multiple of "
                f"those of an update (train_batch_size * train_gradient_accumulation_steps), got {samples} and "
                f"{of_update}; change one of the four"
            )
        return True, ""

    def _why_slow(self) -> dict[str, str]:
        """What goes TRL's way, and why; a method may be replaced on the instance too, at any time."""
        own = [
            name
            for name in ("calculate_loss", "loss")
            if getattr(getattr(self, name), "__func__", None) is not vars(DDPOTrainer)[name]
        ]
        why = {"update": f"{type(self).__name__} overrides {' and '.join(own)}"} if own else {}
        return self._slow | why

    def explain(self) -> str:
        """What runs on this engine's fast way and what does not, and why, line by line."""
        slow = {part: f"TRL's way: {why}" for part, why in self._why_slow().items()}
        batch, pairs = self._rollout_batch, self._microbatch
        fast = {
            "rollout": f"up to {batch} images in a forward",
            "update": f"up to {pairs} (image, step) pairs in a forward",
        }
        if self._folds:
            fast["rollout"] += ", LoRA folded in where weights are float32"
        if self._schedule is None and "update" not in slow:
            fast["update"] += "; the step in plain PyTorch, as the scheduler clips or thresholds its guess"
        steps = "every step" if self._selector is None else type(self._selector).__name__
        lines = fast | slow | {"steps": steps} | self.acceleration
        return "\n".join(f"{part}: {told}" for part, told in lines.items())

    # An epoch.

    def train(self, epochs: int | None = None) -> None:
        """Train up to `epochs`; None: `num_epochs` of the configuration. A resumed run begins where it was left."""
        epochs = self.config.num_epochs if epochs is None else epochs
        checkpoints.refuse_others(self.accelerator, self.config, range(self.first_epoch, epochs))
        global_step = self._first_global_step
        for epoch in range(self.first_epoch, epochs):
            global_step = self.step(epoch, global_step)

    def step(self, epoch: int, global_step: int) -> int:
        """One epoch: sample, score, call the hook, update, save if it is time; the next global step."""
        config, device = self.config, self.accelerator.device
        if self._selector is not None and self._schedule is not None:
            self._current = self._selector.sampler(self._schedule, epoch)
        batches, prompt_image_data = self._generate_samples(
            iterations=config.sample_num_batches_per_epoch, batch_size=config.sample_batch_size
        )
        samples: Samples = {name: torch.cat([one[name] for one in batches]) for name in batches[0]}
        count, num_steps = samples["timesteps"].shape
        scored, rewards_metadata = self.compute_rewards(prompt_image_data, is_async=config.async_reward_computation)
        for number, image_data in enumerate(prompt_image_data):
            image_data.extend([scored[number], rewards_metadata[number]])
        if self.image_samples_callback is not None:
            trackers = self.accelerator.trackers
            self.image_samples_callback(prompt_image_data, global_step, trackers[0] if trackers else _NoTracker())
        rewards = _checked(torch.cat([one.reshape(-1) for one in scored]), count)
        self.accelerator.log(
            {
                "reward": rewards,
                "epoch": epoch,
                "reward_mean": float(rewards.mean()),
                "reward_std": float(rewards.std()),
            },
            step=global_step,
        )
        prompt_ids = samples.pop("prompt_ids")
        if config.per_prompt_stat_tracking:
            prompts = self.sd_pipeline.tokenizer.batch_decode(prompt_ids.cpu().numpy(), skip_special_tokens=True)
            advantages = self.stat_tracker.update(prompts, rewards)
        else:
            advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-8)
        samples["advantages"] = torch.as_tensor(advantages).to(device)
        samples["keep"] = self._kept(count, epoch)
        for inner_epoch in range(config.train_num_inner_epochs):
            order = torch.randperm(count, device=device)
            samples = {name: value[order] for name, value in samples.items()}
            columns = torch.stack([torch.randperm(num_steps, device=device) for _ in range(count)])
            rows = torch.arange(count, device=device)[:, None]
            for name in ("timesteps", "latents", "next_latents", "log_probs", "keep"):
                samples[name] = samples[name][rows, columns]
            size = config.train_batch_size
            batched = [
                {name: value[start : start + size] for name, value in samples.items()}
                for start in range(0, count, size)
            ]
            self.sd_pipeline.unet.train()
            global_step = self._train_batched_samples(inner_epoch, epoch, global_step, batched)
        if epoch != 0 and epoch % config.save_freq == 0:
            checkpoints.save(self, epoch, global_step)
        return global_step

    def compute_rewards(self, prompt_image_pairs: list[Any], is_async: bool = False) -> Any:
        """(rewards, metadata): what the reward function says of each batch, in threads if `is_async`."""
        if is_async:
            returned = list(self.executor.map(lambda pair: self.reward_fn(*pair), prompt_image_pairs))
        else:
            returned = [self.reward_fn(*pair) for pair in prompt_image_pairs]
        found = []
        for one in returned:
            if not isinstance(one, tuple | list) or len(one) != 2:
                raise ValueError(
                    f"reward_function must return (rewards, metadata), got {type(one).__name__}; return rewards, {{}}"
                )
            found.append((torch.as_tensor(one[0], device=self.accelerator.device), one[1]))
        return zip(*found, strict=True)

    def _generate_samples(self, iterations: int, batch_size: int) -> tuple[list[Samples], list[list[Any]]]:
        """Batches of samples, and [images, prompts, metadata] of each; prompts and noise are drawn in TRL's order."""
        self.sd_pipeline.unet.eval()
        self._has_moved, self._trajectory = False, None
        if "rollout" in self._slow:
            return self._generate_through_the_pipeline(iterations, batch_size)
        backbone, schedule, device = self._backbone, self._current, self.accelerator.device
        assert schedule is not None
        assert self._cache is not None
        size, chosen, noise = (batch_size, *backbone.latent_shape), [], []
        for _ in range(iterations):
            prompts, metadata = zip(*[self.prompt_fn() for _ in range(batch_size)], strict=True)
            chosen.append(([str(prompt) for prompt in prompts], prompts, metadata))
            start = torch.randn(size, device=device, dtype=self._dtype).float()
            noise.append(
                torch.stack([start, *(torch.randn(size, device=device) for _ in range(schedule.num_steps))], 1)
            )
        texts = [text for one, _, _ in chosen for text in one]
        encoded = self._cache(texts)

        def attempt(batch: int) -> Trajectory:
            total = schedule.num_steps * -(-len(texts) // batch)
            with self.sd_pipeline.sd_pipeline.progress_bar(total=total) as bar, self.accelerator.autocast():
                return sampled(
                    backbone, schedule, encoded, texts, torch.cat(noise), guidance_scale=self._rollout_scale,
                    batch=batch, folds=self._folds, on_step=bar.update,
                )  # fmt: skip

        trajectory, self._rollout_batch = halving(attempt, self._rollout_batch, "rollout_batch")
        self._trajectory = trajectory
        timesteps = self.sd_pipeline.scheduler.timesteps.to(device).repeat(batch_size, 1)
        samples, pairs = [], []
        for number, (own, prompts, metadata) in enumerate(chosen):
            rows = slice(number * batch_size, (number + 1) * batch_size)
            index = trajectory.prompt_index[rows]
            told = {key: encoded.condition[name][index] for name, key in CONDITION.items() if name in encoded.condition}
            samples.append(
                {
                    "prompt_ids": self._token_ids(own),
                    **told,
                    "timesteps": timesteps,
                    "latents": trajectory.latents[rows, :-1],
                    "next_latents": trajectory.latents[rows, 1:],
                    "log_probs": trajectory.log_prob[rows],
                    **self._negative_of(batch_size),
                }
            )
            images = backbone.decode(trajectory.latents[rows, -1])
            pairs.append([images.to(self.sd_pipeline.vae.dtype), prompts, metadata])
        return samples, pairs

    @torch.no_grad()
    def _generate_through_the_pipeline(self, iterations: int, batch_size: int) -> tuple[list[Samples], list[list[Any]]]:
        samples, pairs, config = [], [], self.config
        for _ in range(iterations):
            prompts, metadata = zip(*[self.prompt_fn() for _ in range(batch_size)], strict=True)
            token_ids, embeds = self._embedded([str(prompt) for prompt in prompts])
            told = {"prompt_embeds": embeds}
            if self._cache is not None:
                encoded = self._cache([str(prompt) for prompt in prompts])
                index = encoded.index([str(prompt) for prompt in prompts], self.accelerator.device)
                told = {CONDITION[name]: value[index] for name, value in encoded.condition.items()}
            told |= self._negative_of(batch_size)
            given = {name: value for name, value in told.items() if "time_ids" not in name}
            with self.accelerator.autocast(), folded(self._backbone if self._folds else None):
                output = self.sd_pipeline(
                    **given,
                    num_inference_steps=config.sample_num_steps,
                    guidance_scale=config.sample_guidance_scale,
                    eta=config.sample_eta,
                    output_type="pt",
                )
            latents = torch.stack(output.latents, dim=1)
            samples.append(
                {
                    "prompt_ids": token_ids,
                    **told,
                    "timesteps": self.sd_pipeline.scheduler.timesteps.repeat(batch_size, 1),
                    "latents": latents[:, :-1],
                    "next_latents": latents[:, 1:],
                    "log_probs": torch.stack(output.log_probs, dim=1),
                }
            )
            pairs.append([output.images, prompts, metadata])
        return samples, pairs

    def _negative_of(self, count: int) -> Samples:
        return {
            f"negative_{CONDITION[name]}": value.expand(count, *value.shape[1:])
            for name, value in self._negative.items()
        }

    def _token_ids(self, texts: list[str]) -> Tensor:
        tokenizer = self.sd_pipeline.tokenizer
        length = tokenizer.model_max_length
        found = tokenizer(texts, return_tensors="pt", padding="max_length", truncation=True, max_length=length)
        return found.input_ids.to(self.accelerator.device)

    @torch.no_grad()
    def _embedded(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        token_ids = self._token_ids(texts)
        return token_ids, self.sd_pipeline.text_encoder(token_ids)[0]

    def _kept(self, count: int, epoch: int) -> Tensor:
        """The steps [b, t] to train, in their order."""
        if self._selector is None or self._trajectory is None:
            return self._trainable.expand(count, -1)
        return self._selector(self._trajectory, epoch)

    def _train_batched_samples(
        self, inner_epoch: int, epoch: int, global_step: int, batched_samples: list[Samples]
    ) -> int:
        """The optimiser updates of an inner epoch, each told to the trackers; the next global step."""
        size, is_slow = self.config.train_gradient_accumulation_steps, "update" in self._why_slow()
        for start in range(0, len(batched_samples), size):
            group = self._with_keep(batched_samples[start : start + size])
            told = self._gradient_through_calculate_loss(group) if is_slow else self._gradient(group)
            self._optimizer_step()
            told |= {"epoch": epoch, "inner_epoch": inner_epoch}
            if self.accelerator.trackers:
                values = {name: value.item() if isinstance(value, Tensor) else value for name, value in told.items()}
                self.accelerator.log(values, step=global_step)
            global_step += 1
        return global_step

    def _gradient(self, group: list[Samples]) -> dict[str, Any]:
        assert self._update is not None
        pairs, update = Pairs.of(group, self.num_train_timesteps), self._update
        # The rollout has the training's outputs if both are guided alike, no weight has moved, and nothing is dropped.
        is_on_policy = (
            not self._has_moved and self._train_scale == self._rollout_scale and not _drops(self.sd_pipeline.unet)
        )

        def attempt(microbatch: int) -> dict[str, Tensor]:
            self.optimizer.zero_grad(set_to_none=True)
            return update.accumulate(pairs, microbatch, is_on_policy=is_on_policy)

        told, self._microbatch = halving(attempt, self._microbatch, "microbatch")
        return told

    def _gradient_through_calculate_loss(self, group: list[Samples]) -> dict[str, Any]:
        """TRL's way: one call for each step of each training batch, or, of chosen steps, for as many pairs."""
        self.optimizer.zero_grad(set_to_none=True)
        rows = []
        for sample in group:
            keep = sample["keep"][:, : self.num_train_timesteps]
            if bool(keep.all()):
                rows += [(sample, slice(None), column) for column in range(self.num_train_timesteps)]
            else:
                chosen = keep.nonzero().split(self.config.train_batch_size)
                rows += [(sample, *pairs.unbind(1)) for pairs in chosen if len(pairs)]
        sizes = [len(sample["advantages"][at]) for sample, at, _ in rows]
        told: dict[str, list[Tensor]] = {"loss": [], "approx_kl": [], "clipfrac": []}
        scale = getattr(self._backbone, "_gradient_scale", 1.0)
        for (sample, at, column), size in zip(rows, sizes, strict=True):
            own = {name: value[at] for name, value in sample.items() if "embeds" in name or "time_ids" in name}
            values = self.calculate_loss(
                sample["latents"][at, column],
                sample["timesteps"][at, column],
                sample["next_latents"][at, column],
                sample["log_probs"][at, column],
                sample["advantages"][at],
                self._embeds(own),
            )
            share = size / sum(sizes)
            (values[0] * (share * scale)).backward()
            for name, value in zip(told, values, strict=True):
                told[name].append(value.detach() * share)
        return {name: torch.stack(values).sum() for name, values in told.items()}

    def _with_keep(self, group: list[Samples]) -> list[Samples]:
        """The same; samples without `keep` have all of their steps trained. ValueError where there are none."""
        group = [
            sample if "keep" in sample else sample | {"keep": torch.ones_like(sample["timesteps"], dtype=torch.bool)}
            for sample in group
        ]
        if not any(bool(sample["keep"][:, : self.num_train_timesteps].any()) for sample in group):
            raise ValueError(
                "an update needs at least one (image, step) pair, got none of its images' steps; keep more with the "
                "selector, or raise train_gradient_accumulation_steps"
            )
        return group

    def _embeds(self, sample: Mapping[str, Tensor]) -> Any:
        """What `calculate_loss` is given of the prompts: a tensor, and of SDXL a dict of them."""
        is_both, found = self.config.train_cfg, {}
        for name, key in CONDITION.items():
            if key in sample:
                found[name] = torch.cat([sample[f"negative_{key}"], sample[key]]) if is_both else sample[key]
        return found["text"] if len(found) == 1 else found

    def _optimizer_step(self) -> None:
        norm = nn.utils.clip_grad_norm_(self.trainable_layers, self.config.train_max_grad_norm)
        if norm.isfinite():
            self.optimizer.step()
        else:
            logger.warning("an update is left out, its gradient is not finite")
        self.optimizer.zero_grad(set_to_none=True)
        self._has_moved = True

    def calculate_loss(
        self,
        latents: Tensor,
        timesteps: Tensor,
        next_latents: Tensor,
        log_probs: Tensor,
        advantages: Tensor,
        embeds: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, approx_kl, clipfrac) of some samples at one step each; a subclass may override it.

        Args:
            latents, next_latents: before and after the step, [b, c, h, w].
            timesteps, log_probs, advantages: of each sample, [b]; the log-probability is the rollout's.
            embeds: of the prompts, [2 b, ...] with those of the negative prompts first if `train_cfg`, else [b, ...].
                SDXL has a dict of "text", "pooled" and "time_ids".
        """
        config, is_guided = self.config, self.config.train_cfg
        text, added = embeds, {}
        if isinstance(embeds, Mapping):
            text = embeds["text"]
            added = {"added_cond_kwargs": {"text_embeds": embeds["pooled"], "time_ids": embeds["time_ids"]}}
        with self.autocast():
            shown = torch.cat([latents] * 2) if is_guided else latents
            at = torch.cat([timesteps] * 2) if is_guided else timesteps
            output = self.sd_pipeline.unet(shown.to(text.dtype), at, text, **added).sample.float()
            if is_guided:
                without, with_prompt = output.chunk(2)
                output = without + config.sample_guidance_scale * (with_prompt - without)
            log_prob = self.sd_pipeline.scheduler_step(
                output, timesteps, latents, eta=config.sample_eta, prev_sample=next_latents
            ).log_probs
        advantages = advantages.clamp(-config.train_adv_clip_max, config.train_adv_clip_max)
        ratio = torch.exp(log_prob - log_probs)
        loss = self.loss(advantages, config.train_clip_range, ratio)
        approx_kl = 0.5 * (log_prob - log_probs).square().mean()
        clipfrac = ((ratio - 1).abs() > config.train_clip_range).float().mean()
        return loss, approx_kl, clipfrac

    def loss(self, advantages: Tensor, clip_range: float, ratio: Tensor) -> Tensor:
        """PPO's clipped loss, its mean; a subclass may override it."""
        clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
        return torch.maximum(-advantages * ratio, -advantages * clipped).mean()

    # What is kept.

    def save_model(self, output_dir: Any) -> None:
        """The same as `save_pretrained`; TRL's own example calls it, and TRL's trainer has it not."""
        self.save_pretrained(output_dir)

    def _save_pretrained(self, save_directory: Path) -> None:
        self.sd_pipeline.save_pretrained(save_directory)
        self._write_card(Path(save_directory))

    def push_to_hub(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, repo_id: str | None = None, *, dataset_name: str | None = None, **kwargs: Any
    ) -> str:
        """Save and upload the model, see huggingface_hub; `repo_id` None: the name of the run or the experiment."""
        self._card_told = {"dataset_name": dataset_name}
        name = repo_id or self.config.run_name or self.config.exp_name
        if not name:
            raise ValueError('push_to_hub needs the name of a repository, got none; pass repo_id="you/model"')
        return super().push_to_hub(name, **kwargs)

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write README.md into `config.output_dir`; `save_pretrained` writes one beside the model."""
        self._card_told = {"model_name": model_name, "dataset_name": dataset_name, "tags": tags}
        self._write_card(Path(self.config.output_dir))

    def _write_card(self, folder: Path) -> None:
        given = {name: value for name, value in self._card_told.items() if value is not None}
        told: dict[str, Any] = {"model_name": self.config.run_name or None} | given
        base = getattr(self.sd_pipeline, "pretrained_model", None)
        folder.mkdir(parents=True, exist_ok=True)
        card = model_card(self.config, tag_names=self._tag_names, base_model=base, **told)
        (folder / "README.md").write_text(card, encoding="utf-8")


class _NoTracker(GeneralTracker):
    """What the hook is given where nothing is logged: it takes everything and keeps nothing."""

    def __init__(self) -> None:
        super().__init__(_blank=True)

    def log_images(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Nothing."""


def _refuse(config: DDPOConfig, num_train_timesteps: int) -> None:
    if config.sample_eta <= 0:
        raise ValueError(
            f"sample_eta must be above 0, got {config.sample_eta:g}: steps without noise have no log_prob (TRL's loss "
            f"is NaN); set it to 1"
        )
    if not 0 < config.train_timestep_fraction <= 1 or num_train_timesteps < 1:
        raise ValueError(
            f"train_timestep_fraction must leave at least one of {config.sample_num_steps} steps, got "
            f"{config.train_timestep_fraction:g}; set it above {1 / config.sample_num_steps:g}, up to 1"
        )
    if config.negative_prompts is not None and not isinstance(config.negative_prompts, str):
        raise ValueError(
            f"negative_prompts is one text for all images, got {type(config.negative_prompts).__name__}; pass a string"
        )
    if isinstance(config.log_with, str):
        installed = sorted(str(tracker) for tracker in get_available_trackers())
        if config.log_with not in (*installed, "all"):
            raise ValueError(
                f"log_with must be an installed tracker ({', '.join(installed) or 'none'}), got {config.log_with!r}; "
                f"pip install it, or leave log_with out"
            )


def _checked(rewards: Tensor, count: int) -> np.ndarray:
    if len(rewards) != count:
        raise ValueError(
            f"reward_function must give one reward for each image, got {len(rewards)} for {count}; return [b] rewards"
        )
    values = rewards.detach().cpu()
    values = (values if values.is_floating_point() and values.dtype.itemsize >= 4 else values.float()).numpy()
    if not np.isfinite(values).all():
        number = int(np.flatnonzero(~np.isfinite(values))[0])
        raise ValueError(
            f"rewards must be finite, got {values[number]} for image {number} of the epoch; check reward_function"
        )
    return values


def _is_overridden(pipeline: Any, name: str) -> bool:
    """Whether the method is none of this package's."""
    owner = next((one for one in type(pipeline).__mro__ if name in vars(one)), object)
    return not owner.__module__.startswith("adascope_fast.compat.trl")


def _drops(unet: Any) -> bool:
    return any(isinstance(layer, nn.Dropout) and layer.p > 0 and layer.training for layer in unet.modules())


def _as_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _as_json(one) for name, one in value.items()}
    return value if isinstance(value, int | float | str | bool | None) else str(value)

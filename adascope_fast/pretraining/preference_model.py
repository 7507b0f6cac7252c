"""A step-aware preference model for a configuration: images of the untrained model, ranked by its reward."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from adascope_fast import rewards
from adascope_fast.algorithms.settings import Awm
from adascope_fast.config import Config, ConfigError
from adascope_fast.preferences import RatedImages, StepAwareModel, fit, held_out_accuracy
from adascope_fast.rollout import EncodedPrompts, OwnNoise, rollout
from adascope_fast.selectors.settings import EveryStep
from adascope_fast.training.monitoring.progress import Progress
from adascope_fast.training.trainer import Trainer

BATCH = 64
LEARNING_RATE = 3e-3


@dataclass(frozen=True)
class Made:
    """A preference model and how well it ranks images of prompts that it was not trained on."""

    model: StepAwareModel
    accuracy: list[float]
    """At each state that a step leads to, from noise to image."""
    num_pairs: int
    trained_on: str
    seconds: float

    def text(self) -> str:
        """Lines for people."""
        size = sum(parameter.numel() for parameter in self.model.parameters())
        lines = [
            f"{size} parameters, trained on {self.trained_on}, {self.seconds:.0f} s; ranked as the reward ranks, of "
            f"{self.num_pairs} pairs of held-out prompts:"
        ]
        count = len(self.accuracy)
        for state, share in enumerate(self.accuracy, 1):
            lines.append(f"  after step {state:3} of {count}  {share:.3f}")
        return "\n".join(lines)


def make(
    config: Config, *, num_prompts: int, num_samples: int, num_steps: int, progress: Progress | None = None
) -> Made:
    """Sample `num_samples` images of each of `num_prompts` prompts, and a quarter as many held-out ones; then train.

    The rollouts are as an iteration's: sampler, guidance and seed are the configuration's. Nothing of its algorithm and
    selector matters.

    Args:
        progress: what tells how far it is; None: it is quiet.
    """
    started, progress = time.perf_counter(), progress or Progress(quiet=True)
    plain = Awm(kl_weight=0.0, ema_kl_weight=0.0)  # one that any sampler will do for, and that keeps no reference
    sections = {"algorithm": plain, "selector": EveryStep(), "sensing": None}
    trainer = Trainer(config.model_copy(update=sections))
    trainer.prepare()
    generator = torch.Generator(trainer.schedule.coef.device).manual_seed(config.run.seed)
    held_out = trainer.held_out[: max(1, num_prompts // 4)]
    seen, noise = trainer.train_prompts[:num_prompts], OwnNoise(config.run.seed)
    with progress.stage("drawing", (len(seen) + len(held_out)) * num_samples, "image") as on_images:
        trained = _judged(trainer, seen, num_samples, noise.of_use(0), on_images)
        other = _judged(trainer, held_out, num_samples, noise.of_use(1), on_images)
    if not len(other.pairs()):
        raise ConfigError(
            "the images of held-out prompts must differ in their rewards, or nobody can tell what was learned, got "
            f"{len(held_out)} prompts without a difference; ask for more images with --samples"
        )
    widths = {name: value.shape[-1] for name, value in trained.condition.items()}
    with torch.random.fork_rng():
        torch.manual_seed(config.run.seed)
        model = StepAwareModel(trainer.backbone.name, trainer.backbone.latent_shape, widths)
    model.to(trained.clean.device)
    with progress.stage("fitting", num_steps) as on_step:
        fit(
            model,
            trained,
            num_steps=num_steps,
            batch=BATCH,
            learning_rate=LEARNING_RATE,
            generator=generator,
            on_step=lambda step, loss: on_step(1),
        )
    accuracy, num_pairs = held_out_accuracy(model, other, batch=4 * BATCH, generator=generator)
    levels = [
        {"timestep": round(timestep, 3), "accuracy": round(share, 4)}
        for timestep, share in zip(other.levels()[2].tolist(), accuracy, strict=True)
    ]
    model.told = {"reward": config.reward.name, "held_out": {"pairs": num_pairs, "levels": levels}}
    count = len(trained.clean)
    trained_on = f"{len(trained.pairs())} pairs of {count} images of {count // num_samples} prompts"
    return Made(model, accuracy, num_pairs, trained_on, time.perf_counter() - started)


@torch.no_grad()
def _judged(
    trainer: Trainer,
    prompts: list[str],
    num_samples: int,
    noise: OwnNoise,
    on_images: Callable[[int], None],
) -> RatedImages:
    """Images of the model and their rewards, some prompts at a time: a trajectory holds every state."""
    config, backbone = trainer.config, trainer.backbone
    encoded, at_once = EncodedPrompts.of(backbone, prompts), max(1, config.train.rollout_batch // num_samples)
    repeated = [prompt for prompt in prompts for _ in range(num_samples)]
    clean, scores = [], []
    for start in range(0, len(repeated), at_once * num_samples):
        texts = repeated[start : start + at_once * num_samples]
        with trainer.autocast():
            trajectory = rollout(
                backbone,
                trainer.schedule,
                encoded,
                texts,
                guidance_scale=config.sampler.guidance_scale,
                noise=noise,
                numbers=range(start, start + len(texts)),
                batch=config.train.rollout_batch,
            )
        clean.append(trajectory.latents[:, -1].clone())
        scores.append(rewards.score(trainer.reward, backbone.decode(clean[-1]), texts))
        on_images(len(texts))
    return RatedImages.of(torch.cat(clean), torch.cat(scores), repeated, encoded, trainer.schedule)

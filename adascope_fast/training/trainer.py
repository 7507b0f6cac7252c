"""The outer loop: evaluate, iterate, log, checkpoint, evaluate again, report.

Everything random in iteration i is drawn from seeds made of (run.seed, i), so a resumed run needs no generator state
and repeats the run that was left alone bit for bit.
"""

import hashlib
import random
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from diffusers import DiffusionPipeline
from torch import Tensor

from adascope_fast import backbones, prompts, reporting, rewards
from adascope_fast.adascope.settings import Semantic
from adascope_fast.algorithms.algorithm import Algorithm
from adascope_fast.backbone import Ema
from adascope_fast.config import Config
from adascope_fast.engine.acceleration import accelerate
from adascope_fast.engine.engine import Engine
from adascope_fast.reporting.images import save_grid
from adascope_fast.rewards.clip import ClipSimilarity
from adascope_fast.rollout import PromptCache
from adascope_fast.selectors.protocol import TimestepSelector
from adascope_fast.training import checkpoint
from adascope_fast.training.building import (
    accelerator_of,
    algorithm_of,
    clip_of,
    complete,
    optimizer_of,
    refuse_other,
    selector_of,
    sensor_of,
)
from adascope_fast.training.evaluation import HeldOutScores, evaluate, interval
from adascope_fast.training.progress import Progress
from adascope_fast.training.run_folder import RunFolder


@dataclass(frozen=True)
class Result:
    """What a finished run achieved; `before`, `after` and `difference` hold mean, low and high."""

    before: dict[str, Any]
    after: dict[str, Any]
    difference: dict[str, float]
    fraction_trained: float
    seconds: dict[str, float]
    folder: Path
    report: Path


class Trainer:
    """RL fine-tuning of one model as a `Config` says; the other arguments replace what it names.

    >>> Trainer(Config.load("configs/quickstart.toml"), reward=my_reward).train()

    Args:
        config: everything that decides the run.
        reward: (pictures [b, 3, h, w] in [0, 1], prompts) -> [b]; higher is better.
        train_prompts, held_out_prompts: lists in place of `config.prompts`.
        pipeline: a loaded diffusers pipeline in place of `config.model.name`.
        algorithm: in place of `config.algorithm`.
        selector: in place of `config.selector`.
        quiet: no progress bars.
    """

    def __init__(
        self,
        config: Config,
        *,
        reward: rewards.Reward | None = None,
        train_prompts: Sequence[str] | None = None,
        held_out_prompts: Sequence[str] | None = None,
        pipeline: DiffusionPipeline | None = None,
        algorithm: Algorithm | None = None,
        selector: TimestepSelector | None = None,
        quiet: bool = False,
    ) -> None:
        self.config = config
        self.reward = reward or rewards.load(config.reward)
        self.similarity = ClipSimilarity.load(config.evaluation.clip) if config.evaluation.clip else None
        self.train_prompts = _given(train_prompts, config.prompts.train, "train_prompts")
        held_out = _given(held_out_prompts, config.prompts.held_out, "held_out_prompts")
        self.held_out = held_out[: config.evaluation.num_prompts]
        if algorithm is not None:
            refuse_other(algorithm, "given")
        if selector is not None:
            complete(selector, TimestepSelector, "selector", "given")
        self._pipeline, self._algorithm, self._selector = pipeline, algorithm, selector
        self._progress = Progress(quiet=quiet)
        if isinstance(config.sensing, Semantic):  # a missing CLIP is told before a large model is loaded
            clip_of(config.sensing, config.model.name if pipeline is None else type(pipeline).__name__)
        if pipeline is None:
            backbones.check(config.model.name, base=config.model.base, revision=config.model.revision)

    def train(self, *, overwrite: bool = False) -> Result:
        """Run from the start. Ctrl-C leaves a run that `resume` continues."""
        start = time.perf_counter()
        RunFolder.check(self.config, overwrite=overwrite)
        self.prepare()  # may refuse; only then is an older run replaced
        return self._run(RunFolder.create(self.config, overwrite=overwrite), start)

    def resume(self) -> Result:
        """Continue the run in `config.run.folder` from its newest checkpoint."""
        start = time.perf_counter()
        folder = RunFolder.open(Path(self.config.run.folder))
        self.prepare()
        return self._run(folder, start)

    def _run(self, folder: RunFolder, start: float) -> Result:
        device = self.accelerator.device
        if self.config.log.trackers:
            self.accelerator.init_trackers("tensorboard", config=_flat(self.config.model_dump()))
        folder.describe("running", device, 0.0, self.acceleration)
        status = "interrupted"
        try:
            self._iterate(folder)
            status = "finished"
        finally:
            self._progress.close()
            self.accelerator.end_training()
            seconds = time.perf_counter() - start
            folder.describe(status, device, seconds, self.acceleration)
            report = reporting.write_report(folder.path)
        return self._result(folder, report, seconds)

    def prepare(self) -> None:
        """Load the model and build what trains it, as `train` does first; may refuse."""
        config, train = self.config, self.config.train
        self.accelerator = accelerator_of(config)
        set_seed(config.run.seed)
        self.algorithm = self._algorithm or algorithm_of(config)
        self.backbone = backbones.load(
            self._pipeline if self._pipeline is not None else config.model.name,
            **config.model.options(),
            seed=_seed(config.run.seed, "adapter"),
            keep_reference=self.algorithm.needs_reference,
        )
        self.backbone.to(self.accelerator.device)
        decay = config.model.average_decay
        self.ema = Ema(self.backbone.trainable_parameters(), decay) if decay else None
        sampler = config.sampler
        self.schedule = self.backbone.schedule(
            sampler.num_steps, kind=sampler.kind, eta=sampler.eta, noise_level=sampler.noise_level
        )
        if not self.algorithm.schedule(self.schedule).trainable.any():
            raise ValueError(
                f"{self.algorithm.name} trains steps by their log-probability, and without noise the sampler "
                f"{self.schedule.kind} has no log_prob at any step; choose one with noise, or set "
                f'algorithm.name = "awm"'
            )
        acceleration = config.acceleration
        device, vae = self.accelerator.device, self.backbone.vae
        chosen = accelerate(self.backbone.denoiser, acceleration, device, decoder=vae)
        self.acceleration = {"attention": self.backbone.attention, **chosen}
        self.optimizer = optimizer_of(config, self.backbone.trainable_parameters())
        sensor = sensor_of(config, self.backbone, self.reward, Path(config.run.folder))
        self.selector = self._selector or selector_of(config, sensor)
        self.engine = Engine(
            self.backbone,
            self.schedule,
            self.algorithm,
            self.selector,
            self.score,
            self.optimizer,
            train,
            sampler=sampler,
            folds_adapter=acceleration.folds,
            autocast=lambda: self.accelerator.autocast(),
            progress=self._progress.part,
        )

    def _iterate(self, folder: RunFolder) -> None:
        train = self.config.train
        first = self._restore(folder)
        if "before" not in folder.read("evaluation.json"):
            self._evaluate(folder, "before", iteration=0)
        self._progress.start(first, train.iterations)
        cache = PromptCache(self.backbone)
        for iteration in range(first, train.iterations):
            started, cpu = time.perf_counter(), time.process_time()
            batch = self.prompts_of(iteration)
            report = self.engine.step(
                cache(batch), batch, iteration=iteration, seed=_seed(self.config.run.seed, "rollout", iteration)
            )
            if self.ema is not None:
                self.ema.update()
            known = sum(report.seconds.values())
            taken = time.perf_counter() - started
            report.seconds["other"] = taken - known
            record = {"iteration": iteration, **report.values, "learning_rate": train.learning_rate}
            record["sensing_share"] = report.seconds["sensing"] / taken
            record["cpu_seconds"] = time.process_time() - cpu
            # First the log, then the checkpoint: what is logged beyond the checkpoint is made again after a kill.
            folder.log(record | {"seconds": report.seconds})
            is_last = iteration + 1 == train.iterations
            if (iteration + 1) % train.checkpoint_every == 0 or is_last:
                self._save(folder, iteration + 1)
            self._progress.done(record)
            if self.config.log.trackers:
                numbers = {key: value for key, value in record.items() if isinstance(value, int | float)}
                self.accelerator.log(numbers | {f"seconds/{k}": v for k, v in report.seconds.items()}, step=iteration)
            every = self.config.evaluation.every
            if every and (iteration + 1) % every == 0 and not is_last:
                self._evaluate(folder, None, iteration=iteration + 1)
        self._evaluate(folder, "after", iteration=train.iterations)
        with self._averaged():
            self.backbone.save_adapter(folder.adapter)

    def _restore(self, folder: RunFolder) -> int:
        """Load the newest checkpoint if there is one; the iteration to continue with."""
        found = folder.load_checkpoint()
        if found is None:
            return 0
        tensors, state = found
        self.backbone.load_adapter_tensors(checkpoint.select(tensors, "adapter"))
        if self.ema is not None:
            self.ema.load(checkpoint.select(tensors, "ema"))
        checkpoint.load_optimizer_tensors(self.optimizer, checkpoint.select(tensors, "optimizer"))
        self.algorithm.load_state_dict(state["algorithm"])
        self.algorithm.load_tensors(checkpoint.select(tensors, "algorithm"))
        self.selector.load_state_dict(state["selector"])
        return state["next_iteration"]

    def _save(self, folder: RunFolder, next_iteration: int) -> None:
        tensors = checkpoint.prefixed(self.backbone.adapter_tensors(), "adapter")
        tensors |= checkpoint.prefixed(checkpoint.optimizer_tensors(self.optimizer), "optimizer")
        tensors |= checkpoint.prefixed(self.ema.tensors() if self.ema else {}, "ema")
        tensors |= checkpoint.prefixed(self.algorithm.tensors(), "algorithm")
        state = {"algorithm": self.algorithm.state_dict(), "selector": self.selector.state_dict()}
        folder.save_checkpoint(next_iteration, tensors, state, self.config.train.keep_checkpoints)

    def prompts_of(self, iteration: int) -> list[str]:
        """This iteration's prompts, each repeated for its group; a short list is gone through several times."""
        rng = random.Random(_seed(self.config.run.seed, "prompts", iteration))
        count = self.config.train.prompts_per_iteration
        rounds = -(-count // len(self.train_prompts))
        chosen = rng.sample(self.train_prompts * rounds, count)
        return [prompt for prompt in chosen for _ in range(self.config.train.samples_per_prompt)]

    def _evaluate(self, folder: RunFolder, name: str | None, *, iteration: int) -> None:
        """Add an evaluation to `evaluation.json`; `name` is "before", "after", or None for one in between."""
        settings, sampler = self.config.evaluation, self.config.sampler
        schedule = self.backbone.schedule(
            settings.num_steps or sampler.num_steps,
            kind=sampler.kind,
            eta=sampler.eta,
            noise_level=sampler.noise_level,
        )
        total = len(self.held_out) * settings.samples_per_prompt * schedule.num_steps
        scale = settings.guidance_scale
        with self._progress.evaluation(total) as on_step, self.accelerator.autocast(), self._averaged():
            evaluation = evaluate(
                self.backbone,
                schedule,
                self.score,
                self.held_out,
                samples_per_prompt=settings.samples_per_prompt,
                guidance_scale=sampler.guidance_scale if scale is None else scale,
                seed=settings.seed,
                batch=self.config.train.rollout_batch,
                num_shown=settings.grid_prompts,
                breakdown=getattr(self.reward, "breakdown", None),
                similarity=self.similarity,
                on_step=on_step,
            )
        self._record(folder, evaluation, name, iteration)

    def _record(self, folder: RunFolder, evaluation: HeldOutScores, name: str | None, iteration: int) -> None:
        values = folder.read("evaluation.json") or {"reward": self.config.reward.name, "history": []}
        summary = evaluation.summary()
        shown = ("mean", "low", "high", "diversity", "contrast")
        point = {"iteration": iteration, **{key: summary[key] for key in shown}}
        values["history"] = [*(old for old in values["history"] if old["iteration"] < iteration), point]
        if name is not None:
            values[name] = summary | {"scores": evaluation.scores.tolist()}
            columns = self.config.evaluation.samples_per_prompt
            save_grid(evaluation.shown, columns, folder.samples / f"{name}.png")
            shown = self.held_out[: self.config.evaluation.grid_prompts]
            folder.write(
                "samples/grid.json", {"prompts": shown, "columns": columns, "tile": evaluation.shown.shape[-1]}
            )
        if name == "after":
            before = torch.tensor(values["before"]["scores"])
            values["difference"] = interval(evaluation.scores - before)
        folder.write("evaluation.json", values)

    def _averaged(self) -> AbstractContextManager[None]:
        """Within it the model has its averaged weights, if the configuration asks for an average."""
        return nullcontext() if self.ema is None else self.ema.applied()

    def score(self, images: Tensor, texts: list[str]) -> Tensor:
        """The reward [b] of pictures [b, 3, h, w] and their prompts, checked."""
        return rewards.score(self.reward, images, texts)

    def _result(self, folder: RunFolder, report: Path, seconds: float) -> Result:
        stats, values = folder.stats(), folder.read("evaluation.json")
        parts: dict[str, float] = {}
        for record in stats:
            for name, part in record["seconds"].items():
                parts[name] = parts.get(name, 0.0) + part
        fraction = sum(record["fraction_trained"] for record in stats) / max(1, len(stats))
        return Result(
            values["before"],
            values["after"],
            values["difference"],
            fraction,
            parts | {"run": seconds},
            folder.path,
            report,
        )


def _given(values: Sequence[str] | None, source: str, name: str) -> list[str]:
    if values is None:
        return prompts.load(source)
    if not values:
        raise ValueError(f"{name} needs at least one prompt, got an empty list")
    return [prompts.checked(value, f"{name}[{index}]") for index, value in enumerate(values)]


def _seed(*parts: Any) -> int:
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as `section.field`, in types that trackers take."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, int | float | str | bool) else str(value)
    return flat

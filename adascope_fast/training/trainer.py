"""The outer loop: evaluate, iterate, log, checkpoint, evaluate again, report.

Everything random in iteration i is drawn from seeds made of (run.seed, i), so a resumed run needs no generator state
and repeats the run that was left alone bit for bit.
"""

import hashlib
import inspect
import logging
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import set_seed
from safetensors import SafetensorError
from torch import Tensor

from adascope_fast import backbones, reporting, rewards
from adascope_fast import prompts as prompt_sets
from adascope_fast.adascope.settings import RewardOnly, Semantic
from adascope_fast.algorithms.algorithm import Algorithm
from adascope_fast.backbone import Ema
from adascope_fast.config import Config, ConfigError
from adascope_fast.distributed import Ranks, bounds_of, tells_of_lost_ranks
from adascope_fast.engine.acceleration import accelerate, autocast_of, graphs_of
from adascope_fast.engine.drift import drift_hint
from adascope_fast.engine.engine import Engine
from adascope_fast.loading import follow_umask
from adascope_fast.remote_rollout.client import RemoteRollout, refuse_drift
from adascope_fast.remote_rollout.settings import Local
from adascope_fast.reporting.files import is_run
from adascope_fast.reporting.images import GAP, save_grid
from adascope_fast.rewards.clip import ClipSimilarity
from adascope_fast.rollout import PromptCache
from adascope_fast.selectors.protocol import TimestepSelector
from adascope_fast.settings import Own
from adascope_fast.training import checkpoint, hub, origin, trust
from adascope_fast.training.building import (
    accelerator_of,
    algorithm_of,
    clip_of,
    complete,
    optimizer_of,
    rates_of,
    refuse_other,
    selector_of,
    sensor_of,
    suited,
)
from adascope_fast.training.evaluation import HeldOutScores, evaluate, interval
from adascope_fast.training.monitoring import best, prometheus
from adascope_fast.training.monitoring.callbacks import Callbacks, HeldOut
from adascope_fast.training.monitoring.efficiency import Efficiency
from adascope_fast.training.monitoring.nonfinite import NonFinite, remedy
from adascope_fast.training.monitoring.progress import Progress, import_libraries
from adascope_fast.training.monitoring.trackers import Trackers
from adascope_fast.training.run_folder import NoFolder, RunFolder, load_run_files, refuse_another
from adascope_fast.training.sharing import (
    WHOLE,
    is_in_parts,
    refuse_elsewhere,
    refuse_unlike,
    refuse_unlike_weights,
    settled,
    share,
    tell_uneven,
)
from adascope_fast.training.starting import start_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

logger = logging.getLogger(__name__)


class Stopped(KeyboardInterrupt):
    """The run was asked to stop, and has a checkpoint of its last iteration."""


@dataclass(frozen=True)
class _Started:
    """What a run that goes on was made of."""

    first: int
    before: dict[str, origin.Part]
    changes: list[str]
    signature: str
    is_signed_anew: bool
    """This user made the run, and it goes on with another address."""
    state: dict[str, Any] | None


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
    reward: str
    samples_dropped: int
    """Images of the training that were not finite."""
    updates_skipped: int
    """Updates whose gradient was not finite."""


class Trainer:
    """RL fine-tuning of one model as a `Config` says; the other arguments replace what it names.

    >>> Trainer("scenes", reward="jpeg_compressibility", train__iterations=5).train()

    Args:
        config: everything that decides the run: a `Config`, a .toml file, a preset (`sd15`), the name or path of a
            model, which is trained with the defaults of everything else, or a loaded pipeline, with the same defaults.
        reward: (images [b, 3, h, w] in [0, 1], prompts) -> [b], higher is better; or what `reward.name` takes.
        prompts: a list to train on, of texts, or of dicts with `prompt` and what a reward is given as its metadata;
            without `held_out_prompts`, `prompts.held_out_share` of them is held out, drawn by `prompts.seed`.
        train_prompts, held_out_prompts: such lists in place of `config.prompts`.
        pipeline: a loaded diffusers pipeline in place of `config.model.name`.
        algorithm: in place of `config.algorithm`.
        selector: in place of `config.selector`.
        callbacks: told what happens, and may end the run; see `Callback`.
        quiet: no progress bars.
        settings: keys of the configuration as `section__key`.
    """

    def __init__(
        self,
        config: "Config | str | Path | DiffusionPipeline",
        reward: rewards.Reward | str | None = None,
        prompts: prompt_sets.Given | None = None,
        *,
        train_prompts: prompt_sets.Given | None = None,
        held_out_prompts: prompt_sets.Given | None = None,
        pipeline: "DiffusionPipeline | None" = None,
        algorithm: Algorithm | None = None,
        selector: TimestepSelector | None = None,
        callbacks: Sequence[Any] = (),
        quiet: bool = False,
        **settings: Any,
    ) -> None:
        start = start_of(
            config,
            settings,
            reward=reward,
            pipeline=pipeline,
            prompts=prompts,
            train_prompts=train_prompts,
            held_out_prompts=held_out_prompts,
        )
        config, reward, pipeline = start.config, start.reward, start.pipeline
        train_prompts, held_out_prompts = start.train_prompts, start.held_out_prompts
        self.config, self._callbacks = config, Callbacks(callbacks)
        given = {
            "reward": reward,
            "train_prompts": train_prompts,
            "held_out_prompts": held_out_prompts,
            "algorithm": algorithm,
            "selector": selector,
        }
        self._given = {name for name, value in given.items() if value is not None}
        self.reward = rewards.load(config.reward) if reward is None else rewards.given(reward)
        self._refuse_mixing_of_one_reward()
        config.log.refuse_no_prometheus()
        self.similarity = ClipSimilarity.load(config.evaluation.clip) if config.evaluation.clip else None
        self.train_prompts, held_out = prompt_sets.chosen(
            config.prompts, train=train_prompts, held_out=held_out_prompts
        )
        self.held_out = held_out[: config.evaluation.num_prompts]
        if len(held_out) < config.evaluation.num_prompts:
            asked = config.evaluation.num_prompts
            logger.warning("evaluation.num_prompts is %d, and all %d held-out prompts are used", asked, len(held_out))
        self._metadata: dict[str, dict[str, Any]] = {}
        if rewards.takes_metadata(self.reward):
            self._metadata = prompt_sets.metadata(config.prompts, train=train_prompts, held_out=held_out_prompts)
            rewards.hand_metadata(self.reward, self._metadata)
        rewards.check_prompts(self.reward, self.train_prompts, "prompts.train")
        rewards.check_prompts(self.reward, self.held_out, "prompts.held_out")
        if pipeline is not None and train_prompts is None and config.prompts.train == "scenes:train":
            logger.warning("the pipeline is trained on the captions of scenes: pass train_prompts= for others")
        if algorithm is not None:
            refuse_other(algorithm, "given")
        if selector is not None:
            complete(selector, TimestepSelector, "selector", "given")
        self._pipeline, self._algorithm, self._selector = pipeline, algorithm, selector
        self._progress, self._is_stopped = Progress(quiet=quiet), False
        self._found: checkpoint.Checkpoint | None = None
        self.sharing = WHOLE
        self._stopped_by: str | None = None
        self._part_before: origin.Part | None = None
        self._remote: RemoteRollout | None = None
        if isinstance(config.sensing, Semantic):  # a missing CLIP is told before a large model is loaded
            clip_of(config.sensing, config.model.name if pipeline is None else type(pipeline).__name__)
        if pipeline is None:
            import_libraries(self._progress)
            backbones.check(config.model.name, base=config.model.base, revision=config.model.revision)

    def train(self, *, overwrite: bool = False) -> Result:
        """Run from the start. Ctrl-C leaves a run that `resume` continues.

        Raises:
            FloatingPointError: images, updates or weights are not finite, and `train.on_nonfinite` and
                `train.stop_after` say to stop; nothing is exported.
            ConfigError: `config.run.folder` exists and is not to be overwritten, or another process has it.
        """
        self._start = time.perf_counter()
        self._join()
        self.ranks.by_first(lambda: RunFolder.check(self.config, overwrite=overwrite))
        self.prepare()  # may refuse; only then is an older run replaced
        self._connect()
        parts = self._parts()
        refuse_unlike(self.ranks, self.config, self.reward, parts, self.backbone)
        folder = self._folder(lambda: RunFolder.create(self.config, overwrite=overwrite, heading=_heading(parts)))
        try:
            if self.ranks.is_first:
                origin.write(folder.path, parts, signature=trust.signature(self.config))
            return self._run(folder, 0)
        finally:
            folder.close()

    def resume(self, *, accept_changes: bool = False) -> Result:
        """Continue the run in `config.run.folder` from its newest whole checkpoint.

        Args:
            accept_changes: go on with another reward, pipeline or other part than before, and write down that it is.

        Raises:
            FloatingPointError: as `train`.
            ConfigError: there is nothing to do, another process has the run, no checkpoint is whole, the configuration
                changes what must be repeated, or what the run was made of is not what it was. Nothing has changed.
        """
        self._start = time.perf_counter()
        self._join()
        folder = self._folder(lambda: RunFolder.open(Path(self.config.run.folder)))
        try:
            found = self.ranks.by_first(lambda: self._started(folder, accept_changes=accept_changes))
            self.prepare()
            self._connect()
            now = self._parts()
            refuse_unlike(self.ranks, self.config, self.reward, now, self.backbone)
            self.ranks.by_first(lambda: self._goes_on(folder, found, now, accept_changes=accept_changes))
            if found.state is not None:
                self._restore(self.ranks.tensors_of_first(self._found.tensors if self._found else {}), found.state)
            return self._run(folder, found.first)
        finally:
            folder.close()

    def train_or_resume(self) -> Result:
        """`resume` where the run's folder has a checkpoint, else `train`, in place of a run that has none.

        So the same command starts a run and, after a failure or a preemption, goes on with it.
        """
        self._join()
        path = Path(self.config.run.folder)
        has_some = self.ranks.objects(bool(checkpoint.numbered(path / "checkpoints")))
        self.ranks.by_first(lambda: refuse_elsewhere(path, has_some))
        if has_some[0]:
            return self.resume()
        return self.train(overwrite=self.ranks.by_first(lambda: is_run(path)))

    def is_asked(self, is_so: bool) -> bool:
        """Whether any process of the run was asked for something: a machine that joins later has had no restart."""
        self._join()
        return any(self.ranks.objects(is_so))

    def push_to_hub(
        self, repo_id: str, *, base: str | None = None, private: bool = False, token: str | None = None
    ) -> str:
        """Upload the finished run with a model card; arguments, result and errors are those of `hub.push`."""
        self._join()
        folder = Path(self.config.run.folder)
        return self.ranks.by_first(lambda: hub.push(folder, repo_id, base=base, private=private, token=token))

    def _join(self) -> None:
        """Meet the other processes of the run, if there are any."""
        if hasattr(self, "accelerator"):
            return
        self.accelerator = accelerator_of(self.config)
        self.ranks = Ranks(self.accelerator.device)
        if not self.ranks.is_first:
            self._progress = Progress(quiet=True)

    def _folder(self, opened: Callable[[], RunFolder]) -> Any:
        """The run's folder on the first rank, which has it alone; on the others what takes its place."""
        held: list[RunFolder] = []
        self.ranks.by_first(lambda: held.append(opened()))
        return held[0] if held else NoFolder(Path(self.config.run.folder))

    def _started(self, folder: RunFolder, *, accept_changes: bool) -> "_Started":
        """What the run to be continued has, by the files of its folder; ConfigError where that cannot be."""
        started = load_run_files(folder.path)
        refuse_another(started.config, self.config)
        found = started.checkpoint
        first = 0 if found is None else found.next_iteration
        self._refuse_nothing_to_do(folder, first)
        before, changes, signed = origin.read(folder.path)
        if not accept_changes:
            origin.refuse_changed(folder.path, origin.differences(before, self._named_parts()))
        self._found = found
        self._tell_other_decay(started.config.train.iterations, first)
        is_ours = trust.is_signed(started.config, signed) and signed != trust.signature(self.config)
        return _Started(first, before, changes, signed, is_ours, None if found is None else found.state)

    def _tell_other_decay(self, iterations: int, first: int) -> None:
        """A line where the rates of what is left follow from another number of iterations than those before."""
        train = self.config.train
        if train.lr_schedule != "constant" and train.iterations != iterations:
            logger.warning(
                "train.iterations was %d and is %d: from iteration %d on the learning rate is that of a run of %d "
                "iterations (train.lr_schedule = %s)",
                iterations,
                train.iterations,
                first,
                train.iterations,
                f'"{train.lr_schedule}"',
            )

    def _goes_on(
        self, folder: RunFolder, started: "_Started", now: dict[str, origin.Part], *, accept_changes: bool
    ) -> None:
        """Write down that the run goes on, with what has changed; ConfigError where that was not accepted."""
        changed = origin.differences(started.before, now)
        if not accept_changes:
            origin.refuse_changed(folder.path, changed)
        folder.restore(self._found)
        folder.write_config(self.config)
        if changed or started.is_signed_anew:
            changes = [*started.changes, *(f"from iteration {started.first} on: {change}" for change in changed)]
            signature = trust.signature(self.config) if started.is_signed_anew else started.signature
            origin.write(folder.path, now, signature=signature, changes=changes)

    def _refuse_nothing_to_do(self, folder: RunFolder, done: int) -> None:
        wanted, is_finished = self.config.train.iterations, folder.read("run.json").get("status") == "finished"
        if done > wanted or (done == wanted and is_finished):
            raise ConfigError(
                f"the run in {str(folder.path)!r} has made {done} iterations, and train.iterations = {wanted} leaves "
                f"nothing to do; set train.iterations to more than {done} to train on"
            )

    def _refuse_mixing_of_one_reward(self) -> None:
        section = self.config.algorithm
        mixing = getattr(section, "mixing", None)
        if mixing is None or rewards.has_parts(self.reward) or mixing == type(section).model_fields["mixing"].default:
            return
        raise ConfigError(
            f'algorithm.mixing = "{mixing}" mixes several rewards, got one, {self._reward_name()}; set reward.name = '
            f'"mixed" with reward.parts, or remove it'
        )

    def _named_parts(self) -> dict[str, origin.Part]:
        """What can be compared before the model is loaded."""
        given = self._given
        return {
            "reward": origin.of_object(self.reward, is_given="reward" in given),
            "train_prompts": origin.of_prompts(
                self.train_prompts, is_given="train_prompts" in given, metadata=self._metadata
            ),
            "held_out_prompts": origin.of_prompts(
                self.held_out, is_given="held_out_prompts" in given, metadata=self._metadata
            ),
        }

    def _parts(self) -> dict[str, origin.Part]:
        """What the run is made of, once `prepare` has loaded it and before it is trained."""
        found = {
            "pipeline": self._pipeline_part(),
            "algorithm": origin.of_object(self.algorithm, is_given="algorithm" in self._given),
            "selector": origin.of_object(self.selector, is_given="selector" in self._given),
        }
        if (known := self.algorithm.preferences) is not None:
            is_given = "algorithm" in self._given
            found["preferences"] = origin.Part(known.name, known.digest, is_given)
        return self._named_parts() | found

    def _pipeline_part(self) -> origin.Part:
        if self._part_before is not None:
            return self._part_before
        components, dtype = self.backbone.pipeline.components, getattr(torch, self.config.model.dtype)
        return origin.of_pipeline(components, self.backbone.name, dtype, is_given=self._pipeline is not None)

    def _run(self, folder: Any, first: int) -> Result:
        self._trackers = Trackers(self.config, is_quiet=not self.ranks.is_first)
        self._not_read = self.backbone.cut_summary([*self.train_prompts, *self.held_out])
        if self._not_read and self.ranks.is_first:
            logger.warning("%s", self._not_read)
        self._describe(folder, "running")
        self._prometheus = prometheus.Prometheus(self.config)
        self.ranks.by_first(self._prometheus.start)
        status, why, report = "failed", "", folder.path / "report.html"
        has_before = self.ranks.of_first("before" in (folder.read("evaluation.json") or {}))
        ahead = self._images_ahead(first, has_before=has_before)
        try:
            if (said := rewards.training_begins(self.reward, folder.path, images=ahead)) and self.ranks.is_first:
                self._progress.say(said)
            with tells_of_lost_ranks():
                self._iterate(folder, first, has_before=has_before)
            status = "finished"
        except KeyboardInterrupt:
            status = "interrupted"
            raise
        except Exception as error:
            why = " ".join(str(error).split()) or type(error).__name__
            raise
        finally:
            self._progress.close()
            self._trackers.close()
            self._prometheus.close()
            try:
                # Where a full disk stopped the run, it is what is told, and not that no more can be written.
                with nullcontext() if status == "finished" else suppress(OSError):
                    self._describe(folder, status, **({"reason": why} if why else {}))
                    if self.ranks.is_first:
                        reporting.write_report(folder.path)
            finally:
                rewards.training_ends(self.reward)
                if self._remote is not None:
                    self._remote.training_ends()
                if status != "finished":
                    self.accelerator.end_training()
        result = self.ranks.by_first(lambda: self._result(folder, report))
        self.accelerator.end_training()
        return result

    def _images_ahead(self, first: int, *, has_before: bool) -> dict[str, int]:
        """The images that the reward will be asked for, by what they are of."""
        train, every = self.config.train, self.config.evaluation.every
        evaluations = 1 + (not has_before)
        evaluations += sum((done + 1) % every == 0 for done in range(first, train.iterations - 1)) if every else 0
        an_evaluation = len(self.held_out) * self.config.evaluation.samples_per_prompt
        iterations = train.iterations - first if self.algorithm.preferences is None else 0
        an_iteration = train.prompts_per_iteration * train.samples_per_prompt
        return {
            f"{iterations} iterations of {an_iteration} images": iterations * an_iteration,
            f"{evaluations} evaluations of {an_evaluation}": evaluations * an_evaluation,
        }

    def _describe(self, folder: Any, status: str, **more: Any) -> None:
        seconds = time.perf_counter() - self._start
        more |= {"prompts_not_read": self._not_read} if self._not_read else {}
        more |= {} if self.ranks.is_alone else {"processes": self.ranks.size, "sharing": self.sharing}
        more |= {"stopped_by": self._stopped_by} if self._stopped_by else {}
        chosen = self.acceleration | ({} if self.graphs is None else {"cuda_graphs": self.graphs.words()})
        folder.describe(status, self.accelerator.device, seconds, chosen, **more)

    def prepare(self) -> None:
        """Load the model and build what trains it, as `train` does first; may refuse."""
        self._join()
        config, train = settled(self.config, self.accelerator, self.ranks), self.config.train
        config = suited(config, self.accelerator.device)
        tell_uneven(self.ranks, train)
        set_seed(config.run.seed)
        self.algorithm = self._algorithm or algorithm_of(config)
        self._refuse_preferences()
        with self._progress.loading("the model" if self._pipeline is not None else config.model.name) as told:
            self.backbone = backbones.load(
                self._pipeline if self._pipeline is not None else config.model.name,
                **config.model.options(),
                seed=_seed(config.run.seed, "adapter"),
                keep_reference=self.algorithm.needs_reference,
                told=told,
            )
        self.autocast = autocast_of(train.mixed_precision, self.accelerator.device.type)
        if train.mixed_precision == "fp16":
            self.backbone.scale_gradients()
        if (known := self.algorithm.preferences) is not None:
            known.refuse_small(self.backbone.resolution)
        self.backbone.to(self.accelerator.device)
        sampler, evaluation = config.sampler, config.evaluation
        own = sampler.table
        self.schedule = self.backbone.schedule(sampler.num_steps, **own)
        if evaluation.kind is not None:
            own = {"kind": evaluation.kind, "shift": sampler.shift}
        self.evaluation_schedule = self.backbone.schedule(evaluation.num_steps or sampler.num_steps, **own)
        if not self.algorithm.schedule(self.schedule).trainable.any():
            raise ValueError(
                f"{self.algorithm.name} trains steps by their log-probability, and without noise the sampler "
                f"{self.schedule.kind} has no log_prob at any step; choose one with noise, or set "
                f'algorithm.name = "awm" or "diffusion_nft"'
            )
        acceleration = config.acceleration
        device, vae = self.accelerator.device, self.backbone.vae
        chosen = accelerate(self.backbone.denoiser, acceleration, device, decoder=vae)
        self.acceleration = {"attention": self.backbone.attention, **chosen}
        if is_in_parts(self.accelerator, self.ranks):
            self._part_before = self._pipeline_part()  # its weights are read before processes cut them into parts
        self.sharing = share(self.backbone, self.accelerator, self.ranks)
        decay = config.model.average_decay
        self.ema = Ema(self.backbone.trainable_parameters(), decay) if decay else None
        self.graphs = graphs_of(acceleration, device, self._progress.say)
        self.optimizer = optimizer_of(config, self.backbone.trainable_parameters())
        self.rate = rates_of(config)
        self.sensor = sensor_of(config, self.backbone, self.reward)
        self.selector = self._selector or selector_of(config, self.sensor)
        self.engine = Engine(
            self.backbone,
            self.schedule,
            self.algorithm,
            self.selector,
            rewards.Scorer(self.reward) if rewards.has_parts(self.reward) else self.score,
            self.optimizer,
            train,
            sampler=sampler,
            folds_adapter=acceleration.folds,
            autocast=self.autocast,
            progress=self._progress.part,
            graphs=self.graphs,
            rate=self.rate,
            ranks=self.ranks,
        )

    def _connect(self) -> None:
        """Have the rollouts drawn where the configuration says; ValueError where that cannot be."""
        section, algorithm = self.config.rollout, self.algorithm
        if isinstance(section, Local):
            return
        digest = origin.of_model(self.backbone, self._pipeline_part())
        keys = {name: value for name, value in section.keys().items() if name != "max_drift"}
        self._remote = RemoteRollout(backbone=self.backbone, model=digest, **keys)
        self._remote.suit(
            kind=algorithm.log_prob_kind(self.schedule),
            needs_x0=_needs_x0(self.config, algorithm),
            may_need_x0=bool(self._given & {"algorithm", "selector"}) or _has_own(self.config),
            shares_start=algorithm.shares_noise,
        )
        self.engine.remote = self._remote

    def _refuse_preferences(self) -> None:
        """ValueError where the algorithm's set does not suit the evaluation or the reward; a warning for overlap."""
        known = self.algorithm.preferences
        if known is None:
            return
        if warning := prompt_sets.overlap(known.prompts, self.held_out, where="algorithm.preferences"):
            logger.warning("%s", warning)
        if isinstance(self.config.sensing, RewardOnly):
            rewards.check_prompts(self.reward, known.prompts, "algorithm.preferences")

    def _iterate(self, folder: Any, first: int, *, has_before: bool) -> None:
        train, ranks = self.config.train, self.ranks
        watch, has_hinted, has_warned = NonFinite(self.config, ranks.of_first(folder.stats())), False, False
        if not has_before:
            self._evaluate(folder, "before", iteration=0)
        efficiency = Efficiency.of(self.config, self.accelerator.device, is_given=self._pipeline is not None)
        if efficiency.why_not:
            self._progress.say(efficiency.why_not)
        self._progress.start(first, train.iterations)
        cache, done = PromptCache(self.backbone), train.iterations
        for iteration in range(first, train.iterations):
            started, cpu = time.perf_counter(), time.process_time()
            batch = self._batch(iteration)
            rewards.training_stage(self.reward, f"iteration {iteration + 1} of {train.iterations}")
            report = self.engine.step(
                cache(batch), batch, iteration=iteration, seed=_seed(self.config.run.seed, "rollout", iteration)
            )
            if not isinstance(rollouts := self.config.rollout, Local):
                refuse_drift(report.values["rollout_drift_max"], rollouts.max_drift)
            if self.ema is not None:
                self.ema.update()
            known = sum(report.seconds.values())
            taken = time.perf_counter() - started
            report.seconds["other"] = taken - known
            last_rate = self.rate((iteration + 1) * train.num_updates - 1)
            record = {"iteration": iteration, **report.values, "learning_rate": last_rate}
            record["sensing_share"] = report.seconds["sensing"] / taken
            record["cpu_seconds"] = time.process_time() - cpu
            record |= self._speed(record, taken) | {"seconds": report.seconds}
            efficiency.add(record)
            self._prometheus.log(record)
            ranks.by_first(lambda record=record: folder.log(record))
            self._trackers.on_iteration(record)
            self._tell(lambda callbacks, record=record: callbacks.on_iteration(record))
            if not has_hinted and (hint := rewards.constant_hint(report.rewards)):
                self._progress.say(hint)
                has_hinted = True
            if not has_warned and (hint := drift_hint(self.algorithm, train, record["rollout_drift_max"])):
                self._progress.say(hint)
                has_warned = True
            watch.add(record)
            is_last = iteration + 1 == train.iterations or self._stopped_by is not None
            every = self.config.evaluation.every
            if every and (iteration + 1) % every == 0 and not is_last:
                self._evaluate(folder, None, iteration=iteration + 1)
                settings, averaged = self.config.evaluation, self._averaged
                if best.looked(folder.path, iteration + 1, settings, self.backbone, averaged=averaged, ranks=ranks):
                    self._stopped_by = self._stopped_by or "evaluation.patience"
                is_last = self._stopped_by is not None
            # The checkpoint has the log and the evaluations so far; what comes after it is made again after a kill.
            is_stopped = any(ranks.objects(self._is_stopped))
            if (iteration + 1) % train.checkpoint_every == 0 or is_last or is_stopped:
                refuse_unlike_weights(self.ranks, self.backbone)
                self._save(folder, iteration + 1)
                self._describe(folder, "running")
            if is_stopped and not is_last:
                raise Stopped
            self._progress.done(record, watch.words())
            done = iteration + 1
            if self._stopped_by is not None:
                self._progress.say(f"{self._stopped_by} ends the run after {done} iterations")
                break
        watch.refuse_nothing_learned()
        self._evaluate(folder, "after", iteration=done)
        with self._averaged():
            if self.config.evaluation.keep_best:
                done = self._take_best(folder, done)
            tensors = self.backbone.adapter_tensors()
            self._refuse_not_finite(tensors)
            ranks.by_first(lambda: self._export(folder, tensors))

    def _take_best(self, folder: Any, last: int) -> int:
        """Take the weights of the best evaluation where it is not the last, and evaluate them as what comes of the run.

        The iteration that they are of.
        """
        found = best.better_than_last(folder.path, last, self.ranks)
        if found is None:
            return last
        iteration, tensors = found
        self.backbone.load_adapter_tensors(tensors)
        self._progress.say(f"the weights after {iteration} iterations are kept, whose held-out reward was the highest")
        self._evaluate(folder, "after", iteration=iteration, is_averaged=True)
        return iteration

    def _export(self, folder: RunFolder, tensors: dict[str, Tensor]) -> None:
        try:
            self.backbone.save_adapter(folder.adapter, tensors)
        except SafetensorError as error:
            raise OSError(f"{folder.adapter} could not be written ({checkpoint.reason(error)})") from None
        follow_umask(folder.adapter)

    def stops_later(self) -> bool:
        """Let the run end with `Stopped` after the iteration at work, with a checkpoint; what a signal calls.

        False, and nothing is done, where it may as well end at once: it was told before, or every iteration begins at a
        checkpoint.
        """
        if self._is_stopped or self.config.train.checkpoint_every == 1:
            return False
        self._is_stopped = True
        return True

    def _speed(self, record: Mapping[str, Any], seconds: float) -> dict[str, float]:
        """Images sampled and pairs trained a second, of all processes."""
        images = self.config.train.prompts_per_iteration * self.config.train.samples_per_prompt
        return {"images_per_second": images / seconds, "pairs_per_second": record["pairs_trained"] / seconds}

    def _refuse_not_finite(self, tensors: dict[str, Tensor]) -> None:
        if name := checkpoint.not_finite(tensors):
            raise FloatingPointError(self._not_finite(name))

    def _not_finite(self, name: str) -> str:
        return f"weights must be finite, and {name} is not any more; {remedy(self.config)}"

    def _restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Take weights, moments and states from a checkpoint."""
        self.backbone.load_adapter_tensors(checkpoint.select(tensors, "adapter"))
        if self.ema is not None:
            self.ema.load(checkpoint.select(tensors, "ema"))
        checkpoint.load_optimizer_tensors(self.optimizer, checkpoint.select(tensors, "optimizer"))
        self.algorithm.load_state_dict(state["algorithm"])
        self.algorithm.load_tensors(checkpoint.select(tensors, "algorithm"))
        self.selector.load_state_dict(state["selector"])
        self.sensor.load_tensors(checkpoint.select(tensors, "sensor"))

    def _save(self, folder: Any, next_iteration: int) -> None:
        tensors = checkpoint.prefixed(self.backbone.adapter_tensors(), "adapter")
        tensors |= checkpoint.prefixed(checkpoint.optimizer_tensors(self.optimizer), "optimizer")
        tensors |= checkpoint.prefixed(self.ema.tensors() if self.ema else {}, "ema")
        tensors |= checkpoint.prefixed(self.algorithm.tensors(), "algorithm")
        tensors |= checkpoint.prefixed(self.sensor.tensors(), "sensor")
        state = {"algorithm": self.algorithm.state_dict(), "selector": self.selector.state_dict()}

        def save() -> Any:
            try:
                return folder.save_checkpoint(
                    next_iteration, tensors, state, self.config, self.config.train.keep_checkpoints
                )
            except checkpoint.NotFiniteError as error:
                raise FloatingPointError(self._not_finite(error.name)) from None

        path = self.ranks.by_first(save)
        self._tell(lambda callbacks: callbacks.on_checkpoint(path))

    def _batch(self, iteration: int) -> list[str]:
        """What this iteration trains on: the prompts of a set's records, or those of a rollout."""
        seed, count = _seed(self.config.run.seed, "prompts", iteration), self.config.train.prompts_per_iteration
        drawn = self.algorithm.draw(seed, count)
        return self.prompts_of(iteration) if drawn is None else drawn

    def prompts_of(self, iteration: int) -> list[str]:
        """This iteration's prompts, each repeated for its group; a short list is gone through several times."""
        rng = random.Random(_seed(self.config.run.seed, "prompts", iteration))
        count = self.config.train.prompts_per_iteration
        rounds = -(-count // len(self.train_prompts))
        chosen = rng.sample(self.train_prompts * rounds, count)
        return [prompt for prompt in chosen for _ in range(self.config.train.samples_per_prompt)]

    def _evaluate(self, folder: Any, name: str | None, *, iteration: int, is_averaged: bool = False) -> None:
        """Add an evaluation to `evaluation.json`; `name` is "before", "after", or None for one in between.

        Args:
            is_averaged: the model has the weights that are to be evaluated.
        """
        averaged = nullcontext() if is_averaged else self._averaged()
        settings, sampler, schedule = self.config.evaluation, self.config.sampler, self.evaluation_schedule
        count, batch = len(self.held_out) * settings.samples_per_prompt, self.config.train.rollout_batch
        start, stop = bounds_of(count, batch, self.ranks.size, needs_all=False)[self.ranks.rank :][:2]
        total = (stop - start) * schedule.num_steps
        scale = settings.guidance_scale
        rewards.training_stage(self.reward, "held-out prompts")  # not when: who judges should not know
        with self._progress.stage("evaluation", total) as on_step, self.autocast(), averaged:
            try:
                evaluation = evaluate(
                    self.backbone,
                    schedule,
                    self.score,
                    self.held_out,
                    samples_per_prompt=settings.samples_per_prompt,
                    guidance_scale=sampler.guidance_scale if scale is None else scale,
                    seed=settings.seed,
                    batch=batch,
                    num_shown=settings.grid_prompts,
                    breakdown=lambda images, texts: rewards.breakdown(self.reward, images, texts),
                    similarity=self.similarity,
                    on_step=on_step,
                    ranks=self.ranks,
                )
            except FloatingPointError as error:
                raise FloatingPointError(f"after {iteration} iterations {error}; {remedy(self.config)}") from None
        self.ranks.by_first(lambda: self._record(folder, evaluation, name, iteration))
        shown = self.held_out[: settings.grid_prompts]
        told = HeldOut(iteration, name, evaluation.summary(), evaluation.shown, shown)
        self._trackers.on_evaluation(told)
        self._tell(lambda callbacks: callbacks.on_evaluation(told))

    def _tell(self, what: Callable[[Callbacks], None]) -> None:
        """Call the callbacks, on the first rank alone; every rank knows which of them has ended the run."""

        def told() -> str | None:
            what(self._callbacks)
            return self._callbacks.stopped_by

        who = self.ranks.by_first(told)
        self._stopped_by = self._stopped_by or (None if who is None else f"callback {who}")

    def _record(self, folder: RunFolder, evaluation: HeldOutScores, name: str | None, iteration: int) -> None:
        values = folder.read("evaluation.json") or {"reward": self._reward_name(), "history": []}
        summary = evaluation.summary()
        shown = ("mean", "low", "high", "diversity", "contrast", "clip_score", "num_not_finite")
        point = {"iteration": iteration, **{key: summary[key] for key in shown if key in summary}}
        others = [old for old in values["history"] if old["iteration"] != iteration]
        values["history"] = sorted([*others, point], key=lambda one: one["iteration"])
        if name is not None:
            values[name] = summary | {"scores": evaluation.scores.tolist()}
            columns = self.config.evaluation.samples_per_prompt
            save_grid(evaluation.shown, columns, folder.samples / f"{name}.png")
            shown = self.held_out[: self.config.evaluation.grid_prompts]
            side = evaluation.shown.shape[-1]
            folder.write("samples/grid.json", {"prompts": shown, "columns": columns, "tile": side, "gap": GAP})
        if name == "after":
            rows = values["before"]["scores"]
            before = torch.tensor([[math.nan if score is None else score for score in row] for row in rows])
            values["difference"] = interval(evaluation.scores - before)
        folder.write("evaluation.json", values)

    def _averaged(self) -> AbstractContextManager[None]:
        """Within it the model has its averaged weights, if the configuration asks for an average."""
        return nullcontext() if self.ema is None else self.ema.applied()

    def score(self, images: Tensor, texts: list[str]) -> Tensor:
        """The reward [b] of pictures [b, 3, h, w] and their prompts, checked."""
        return rewards.score(self.reward, images, texts)

    def _reward_name(self) -> str:
        if "reward" not in self._given:
            return self.config.reward.name
        return origin.name_of(inspect.unwrap(self.reward)).rpartition(":")[2]

    def _result(self, folder: RunFolder, report: Path) -> Result:
        stats, values = folder.stats(), folder.read("evaluation.json")
        seconds = folder.read("run.json")["seconds_total"]
        parts: dict[str, float] = {}
        for record in stats:
            for name, part in record["seconds"].items():
                parts[name] = parts.get(name, 0.0) + part
        fraction = sum(record["fraction_trained"] for record in stats) / max(1, len(stats))
        known = {when: _with_nan(values[when]) for when in ("before", "after", "difference")}
        return Result(
            **known,
            fraction_trained=fraction,
            seconds=parts | {"run": seconds},
            folder=folder.path,
            report=report,
            reward=values["reward"],
            samples_dropped=sum(record.get("samples_dropped") or 0 for record in stats),
            updates_skipped=sum(record.get("updates_skipped") or 0 for record in stats),
        )


def _heading(parts: Mapping[str, origin.Part]) -> str:
    """Comment lines of `config.toml` about what was passed in Python."""
    lines = [f"# {name} = {part.name}: passed in Python" for name, part in parts.items() if part.is_given]
    return "".join(f"{' '.join(line.split())}\n" for line in lines) + ("\n" if lines else "")


def _has_own(config: Config) -> bool:
    """Whether the algorithm or the selector is the user's own."""
    return isinstance(config.algorithm, Own) or isinstance(config.selector, Own)


def _needs_x0(config: Config, algorithm: Algorithm) -> str:
    """What of a training looks at the guesses of the final latents, in words; "" where nothing does."""
    if algorithm.needs_x0:
        return f'algorithm.name = "{algorithm.name}"'
    if getattr(config.algorithm, "attribution", None) == "similarity":
        return 'algorithm.attribution = "similarity"'
    is_sensed = config.sensing is not None and getattr(config.selector, "is_sensed", True)
    return f'selector.name = "{config.selector.name}", which senses' if is_sensed else ""


def _with_nan(estimate: dict[str, Any]) -> dict[str, Any]:
    """The same with NaN where JSON has null."""
    nan = {name: math.nan for name in ("mean", "low", "high") if estimate.get(name) is None}
    return estimate | nan


def _seed(*parts: Any) -> int:
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1

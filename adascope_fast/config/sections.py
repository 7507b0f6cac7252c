"""Sections that belong to the run as a whole: `[run]`, `[train]`, `[evaluation]` and `[log]`."""

from importlib.util import find_spec
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from adascope_fast.engine.settings import Updates
from adascope_fast.schedules.settings import Kind
from adascope_fast.settings import (
    MOST_IMAGES,
    Count,
    CountOrZero,
    Decay,
    Guidance,
    Images,
    LearningRate,
    PositiveOrZero,
    Section,
    Seed,
    Share,
    Steps,
    Text,
    only_with,
)


class Run(Section):
    """Where the run lives and what makes it repeatable."""

    folder: Text = "runs/run"
    """Folder for everything the run writes; never overwritten unasked."""
    seed: Seed = 0
    """Seed of every random draw of the training."""


class Train(Updates):
    """How much is sampled and how it is learned from."""

    iterations: CountOrZero = 20
    """Rounds of rollout, reward and update."""
    prompts_per_iteration: Images = 8
    """Different prompts in a rollout."""
    samples_per_prompt: Images = 4
    """Images drawn for each of them."""
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """`adamw_8bit`: bitsandbytes' AdamW, whose moments take 2 bytes a weight in place of 8 (extra `bnb`); tensors of
    fewer than 4,096 elements keep theirs whole."""
    learning_rate: LearningRate = 3e-4
    """AdamW learning rate; with a schedule, the highest."""
    lr_schedule: Literal["constant", "linear", "cosine", "cosine_with_restarts"] = "constant"
    """Course of the learning rate over all updates of the run after the warm-up, by diffusers' names; all but
    `constant` fall to 0 behind the last update, whose number follows from `iterations`."""
    lr_cycles: Annotated[Count, only_with(lr_schedule=["cosine_with_restarts"])] = 1
    """Times that the rate falls."""
    warmup_updates: CountOrZero = 0
    """Optimiser updates in which the rate rises evenly, from 0 at the first; with any `lr_schedule`."""
    weight_decay: PositiveOrZero = 1e-4
    """AdamW weight decay."""
    adam_beta1: Decay = 0.9
    """AdamW decay of the first moment."""
    adam_beta2: Decay = 0.999
    """AdamW decay of the second moment."""
    adam_epsilon: Share = 1e-8
    """AdamW epsilon."""
    checkpoint_every: Count = 1
    """Iterations between checkpoints."""
    keep_checkpoints: Count = 2
    """Newest checkpoints to keep."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Autocast of the denoiser; log-probabilities stay float32. With `fp16` gradients are scaled on their way through
    it, as with `model.dtype = "float16"`."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """`auto` takes the GPU where there is one; `mps`, Apple's, was never run."""

    def examine(self) -> None:
        """ValueError where bitsandbytes is asked for and not installed."""
        if self.optimizer == "adamw_8bit" and find_spec("bitsandbytes") is None:
            raise ValueError(
                'train.optimizer = "adamw_8bit" needs bitsandbytes, which is not installed; '
                "pip install 'adascope-fast[bnb]', or set it to \"adamw\""
            )

    @property
    def total_updates(self) -> int:
        """Optimiser updates of the run, which its learning rates follow from."""
        return self.iterations * self.num_updates

    @model_validator(mode="after")
    def _can_be_meant(self) -> Self:
        if self.learning_rate * self.weight_decay >= 1:
            raise ValueError(
                "train.learning_rate times train.weight_decay is the share of every weight that an update takes away, "
                f"so it must be below 1, got {self.learning_rate} times {self.weight_decay}; lower train.weight_decay"
            )
        if 0 < self.total_updates <= self.warmup_updates:
            raise ValueError(
                "a warm-up ends within the run, so train.warmup_updates must be below its "
                f"{self.total_updates} updates (train.iterations times those of each), got {self.warmup_updates}; "
                "lower it, or raise train.iterations"
            )
        if self.best_worst_k is not None and 2 * self.best_worst_k >= self.samples_per_prompt:
            raise ValueError(
                f"train.best_worst_k leaves images of a prompt out, so twice it must be below train.samples_per_prompt "
                f"= {self.samples_per_prompt}, got {self.best_worst_k}; lower it, raise train.samples_per_prompt, or "
                f"remove it"
            )
        images = self.prompts_per_iteration * self.samples_per_prompt
        if images > MOST_IMAGES:
            raise ValueError(
                f"an iteration has at most {MOST_IMAGES} images, got train.prompts_per_iteration = "
                f"{self.prompts_per_iteration} times train.samples_per_prompt = {self.samples_per_prompt}; lower one"
            )
        return self


class Evaluation(Section):
    """How the held-out reward is measured; the same seeds before and after."""

    num_prompts: Images = 48
    """Held-out prompts."""
    samples_per_prompt: Images = 4
    """Images for each of them."""
    num_steps: Steps | None = None
    """Denoising steps; absent: those of the sampler."""
    kind: Kind | None = None
    """`sampler.kind` of the evaluation, with that kind's usual noise; absent: the sampler's kind and noise."""
    guidance_scale: Guidance | None = None
    """Guidance; absent: that of the sampler."""
    seed: Seed = 12345
    """Seed of the evaluation's noise, apart from `run.seed`."""
    grid_prompts: Images = 8
    """Prompts shown in the before/after images."""
    clip: Text | None = None
    """CLIP whose mean similarity is reported beside the reward, as `reward.clip`; absent: none."""
    every: CountOrZero = 0
    """Iterations between evaluations in the course of training; 0: only before and after."""
    patience: CountOrZero = 0
    """Evaluations in a row without a higher held-out reward after which the training ends; 0: it goes on to its end."""
    keep_best: bool = False
    """Export the weights of the evaluation with the highest held-out reward, not the last ones. The best of several
    evaluations on the same prompts is better there than it would be on others, since it was chosen by them."""

    @model_validator(mode="after")
    def _is_looked_at_in_between(self) -> Self:
        asked = [name for name in ("patience", "keep_best") if getattr(self, name)]
        if asked and not self.every:
            raise ValueError(
                f"evaluation.{asked[0]} goes by evaluations in the course of training, got evaluation.every = 0; set "
                f"evaluation.every"
            )
        return self


TRACKERS = ("tensorboard", "wandb", "trackio", "swanlab", "mlflow", "aim", "comet_ml", "clearml", "dvclive")
"""accelerate's, each by the module that it needs."""
RUN_NAME = {
    "clearml": "task_name",
    "mlflow": "run_name",
    "swanlab": "experiment_name",
    "trackio": "name",
    "wandb": "name",
}
"""What trackers call the argument with the run's name; the others have none."""


def address_of(text: str) -> tuple[str, int]:
    """(host, port) of `host:port`, without a host on loopback; ValueError where it is none."""
    host, _, port = text.rpartition(":")
    if not port.isascii() or not port.isdigit() or int(port) > 65535 or any(letter in host for letter in "/ @"):
        raise ValueError(f"log.prometheus is HOST:PORT, got {text!r}; write it as 127.0.0.1:9464")
    return host.removeprefix("[").removesuffix("]") or "127.0.0.1", int(port)


def _is_address(text: str) -> str:
    address_of(text)
    return text


class Log(Section):
    """Where the numbers and images go besides the run folder."""

    trackers: list[Text] = Field(default=["tensorboard"])
    """accelerate's trackers by name (`tensorboard`, `wandb`, `trackio`, ...), which must be installed; empty: none."""
    project: Text = "adascope-fast"
    """What the trackers call the project; TensorBoard has none, its files are in the run's folder."""
    run_name: Text | None = None
    """What clearml, mlflow, swanlab, trackio and wandb call the run; absent: the name of its folder."""
    prometheus: Annotated[Text, AfterValidator(_is_address)] | None = None
    """Address at which Prometheus reads the last iteration's numbers, as `127.0.0.1:9464`; absent: none."""

    def examine(self) -> None:
        """ValueError where a tracker is not installed, or what Prometheus needs, or a name is one that none takes."""
        self.refuse_no_prometheus()
        self._refuse_a_name_of_nothing()
        for tracker in self.trackers:
            if tracker not in TRACKERS or find_spec(tracker) is None:
                known = [name for name in TRACKERS if find_spec(name)]
                raise ValueError(
                    f"log.trackers are installed ones ({', '.join(known) or 'none'}), got {tracker!r}; "
                    + (f"pip install {tracker}" if tracker in TRACKERS else f"choose among {', '.join(TRACKERS)}")
                    + ", or set log.trackers = []"
                )

    def _refuse_a_name_of_nothing(self) -> None:
        """With no tracker at all a name is idle, as a resumed run may have it; with others, it is a slip."""
        takes_project = [name for name in self.trackers if name != "tensorboard"]
        takes_name = [name for name in self.trackers if name in RUN_NAME]
        for key, value, takers, which in (
            ("project", self.project, takes_project, "a tracker other than tensorboard"),
            ("run_name", self.run_name, takes_name, f"one of {', '.join(RUN_NAME)}"),
        ):
            if self.trackers and not takers and value != type(self).model_fields[key].default:
                raise ValueError(
                    f"log.{key} is for {which} in log.trackers, got {value!r} with log.trackers = {self.trackers}; "
                    f"name one, or remove log.{key}"
                )

    def refuse_no_prometheus(self) -> None:
        """ValueError where the package that answers Prometheus is asked for and not installed."""
        if self.prometheus is not None and find_spec("prometheus_client") is None:
            raise ValueError(
                f"log.prometheus needs the package prometheus_client, which is not installed, got "
                f"{self.prometheus!r}; pip install 'adascope-fast[prometheus]', or remove it"
            )

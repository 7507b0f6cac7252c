"""The configuration of a run: a tree of sections, read from TOML and checked before anything is loaded.

`Config()` is a valid small run. A file sets what differs from it, `section.field=value` overrides set what differs from
the file, and `to_toml` writes the result in full. Whatever is wrong raises `ConfigError` with one line: the rule, the
value, the next step. Each section is declared by the component that it configures; a section that offers a choice has
the keys of what was chosen and no others.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, Tag, ValidationError, model_validator

from adascope_fast.adascope.settings import AdaScope, Complement, Latent, RewardOnly, Semantic
from adascope_fast.algorithms.settings import (
    Awm,
    D3po,
    DanceGrpo,
    Ddpo,
    DiffusionDpo,
    DiffusionKto,
    DiffusionNft,
    Dpok,
    FlowGrpoFast,
    Grpo,
    GrpoGuard,
    MixGrpo,
    OwnAlgorithm,
    Reinforce,
    Spo,
    Tdpo,
)
from adascope_fast.backbones.settings import EMBEDDED_NAMES, Model
from adascope_fast.config.presets import values_of
from adascope_fast.config.sections import Evaluation, Log, Run, Train
from adascope_fast.config.sources import SENSED, ConfigError, Override, apply_overrides, explain
from adascope_fast.config.writing import toml_of
from adascope_fast.engine.settings import Acceleration
from adascope_fast.prompts.settings import Prompts, held_out_of
from adascope_fast.remote_rollout.settings import Local
from adascope_fast.remote_rollout.settings import Remote as RemoteRollout
from adascope_fast.rewards.settings import (
    Aesthetic,
    ClipSimilarity,
    GenEval,
    Hpsv2,
    ImageReward,
    JpegCompressibility,
    JpegIncompressibility,
    Judge,
    Mixed,
    Ocr,
    OwnReward,
    PickScore,
    Remote,
    SceneAttributes,
    asks_people,
)
from adascope_fast.schedules.settings import Sampler
from adascope_fast.selectors.settings import (
    EveryStep,
    FastWindow,
    LateStart,
    OwnSelector,
    RandomFraction,
    StaticRange,
    Threshold,
    Window,
)
from adascope_fast.settings import OWN, Section, chosen_by, or_none

# The registries: a choice of each section is one line.
AnyReward = Annotated[
    Annotated[SceneAttributes, Tag("scene_attributes")]
    | Annotated[JpegCompressibility, Tag("jpeg_compressibility")]
    | Annotated[JpegIncompressibility, Tag("jpeg_incompressibility")]
    | Annotated[ClipSimilarity, Tag("clip_similarity")]
    | Annotated[Judge, Tag("judge")]
    | Annotated[Remote, Tag("remote")]
    | Annotated[PickScore, Tag("pick_score")]
    | Annotated[Hpsv2, Tag("hpsv2")]
    | Annotated[Aesthetic, Tag("aesthetic")]
    | Annotated[ImageReward, Tag("image_reward")]
    | Annotated[Ocr, Tag("ocr")]
    | Annotated[GenEval, Tag("geneval")]
    | Annotated[Mixed, Tag("mixed")]
    | Annotated[OwnReward, Tag(OWN)],
    chosen_by("name", "scene_attributes"),
]
AnyAlgorithm = Annotated[
    Annotated[Ddpo, Tag("ddpo")]
    | Annotated[Reinforce, Tag("reinforce")]
    | Annotated[Grpo, Tag("grpo")]
    | Annotated[FlowGrpoFast, Tag("flow_grpo_fast")]
    | Annotated[DanceGrpo, Tag("dance_grpo")]
    | Annotated[MixGrpo, Tag("mix_grpo")]
    | Annotated[GrpoGuard, Tag("grpo_guard")]
    | Annotated[Dpok, Tag("dpok")]
    | Annotated[Tdpo, Tag("tdpo")]
    | Annotated[D3po, Tag("d3po")]
    | Annotated[Spo, Tag("spo")]
    | Annotated[DiffusionDpo, Tag("diffusion_dpo")]
    | Annotated[DiffusionKto, Tag("diffusion_kto")]
    | Annotated[Awm, Tag("awm")]
    | Annotated[DiffusionNft, Tag("diffusion_nft")]
    | Annotated[OwnAlgorithm, Tag(OWN)],
    chosen_by("name", "ddpo"),
]
AnySelector = Annotated[
    Annotated[AdaScope, Tag("adascope")]
    | Annotated[Complement, Tag("complement")]
    | Annotated[EveryStep, Tag("every_step")]
    | Annotated[RandomFraction, Tag("random_fraction")]
    | Annotated[StaticRange, Tag("static_range")]
    | Annotated[LateStart, Tag("late_start")]
    | Annotated[Threshold, Tag("threshold")]
    | Annotated[Window, Tag("window")]
    | Annotated[FastWindow, Tag("fast_window")]
    | Annotated[OwnSelector, Tag(OWN)],
    chosen_by("name", "adascope"),
]
AnyRollout = Annotated[
    Annotated[Local, Tag("local")] | Annotated[RemoteRollout, Tag("remote")], chosen_by("name", "local")
]
AnySensing = Annotated[
    Annotated[Latent, Tag("latent")] | Annotated[Semantic, Tag("semantic")] | Annotated[RewardOnly, Tag("reward_only")],
    chosen_by("kind", "latent"),
]

logger = logging.getLogger(__name__)


class Config(Section):
    """Everything that decides a run."""

    run: Run = Run()
    model: Model = Model()
    prompts: Prompts = Prompts()
    reward: AnyReward = SceneAttributes()
    sampler: Sampler = Sampler()
    rollout: AnyRollout = Local()
    algorithm: AnyAlgorithm = Ddpo()
    selector: AnySelector = AdaScope()
    sensing: AnySensing | None = Field(default=None, validate_default=False)
    """Absent where the selector senses nothing."""
    train: Train = Train()
    acceleration: Acceleration = Acceleration()
    evaluation: Evaluation = Evaluation()
    log: Log = Log()

    @model_validator(mode="before")
    @classmethod
    def _senses_what_the_selector_needs(cls, values: Any) -> Any:
        if isinstance(values, dict) and "sensing" not in values and _senses(values.get("selector", {})):
            return values | {"sensing": {}}
        return values

    @model_validator(mode="before")
    @classmethod
    def _prompts_suit_the_model(cls, values: Any) -> Any:
        """Where no prompts are named, or a built-in set's training part alone, what is meant is written out."""
        if not isinstance(values, dict) or not isinstance(named := values.get("prompts", {}), dict | Prompts):
            return values
        given = dict(named) if isinstance(named, dict) else named.model_dump(exclude_none=True)
        model = values.get("model", {})
        name = model.get("name", EMBEDDED_NAMES[0]) if isinstance(model, dict) else getattr(model, "name", None)
        if "train" not in given and "held_out" not in given and name in EMBEDDED_NAMES:
            given["train"] = "scenes:train"
        if "train" in given and "held_out" not in given and (other := held_out_of(given["train"])):
            given["held_out"] = other
        return values | {"prompts": given}

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        steps, start, end = self.sampler.num_steps, _of(self.selector, "start"), _of(self.selector, "end")
        if max(start or 0, (end or 1) - 1) >= steps:
            raise ValueError(
                f"selector.start and selector.end must lie within the {steps} steps of a rollout, "
                f"got start = {or_none(start)} and end = {or_none(end)}; "
                f"set selector.end to {steps} or less, or raise sampler.num_steps"
            )
        self._steps_suit_the_rollout(steps)
        smallest = _of(self.algorithm, "smallest_group") or 1
        if self.train.samples_per_prompt < smallest:
            raise ValueError(
                f"{self.algorithm.name} compares the images of one prompt, so train.samples_per_prompt must be at "
                f'least {smallest}, got {self.train.samples_per_prompt}; raise it, or set algorithm.name = "ddpo"'
            )
        if self.sensing is not None and not isinstance(self.selector, AdaScope):
            raise ValueError(
                f'[sensing] is what AdaScope sees of a rollout, got selector.name = "{self.selector.name}"; '
                f'remove sensing.{next(iter(self.sensing.model_fields_set), "kind")}, or set selector.name = "adascope"'
            )
        if _of(self.algorithm, "attribution") == "gain":
            self._every_rollout_is_sensed()
        if isinstance(self.selector, AdaScope) and self.sensing is not None:
            self._can_be_sensed(self.selector, self.sensing)
        if isinstance(self.algorithm, DiffusionDpo | DiffusionKto):
            self._suits_a_set(self.algorithm)
        self._updates_suit_the_algorithm()
        self._sampler_suits_the_algorithm()
        if asks_people(self.reward):
            self._only_finished_images_are_judged()
        if isinstance(self.algorithm, Spo):
            self._can_branch(self.algorithm, steps)
        if self.model.train == "full" and self.acceleration.fold_adapter == "on":
            raise ValueError(
                'acceleration.fold_adapter = "on" folds a LoRA adapter, got model.train = "full", which has none; set '
                'it to "auto", or model.train = "lora"'
            )
        if isinstance(self.rollout, RemoteRollout):
            self._can_be_drawn_elsewhere()
        if self.sampler.tail_share < 1:
            self._knows_the_steps_beforehand(
                f"sampler.tail_share = {self.sampler.tail_share}", "sampler.tail_share = 1.0"
            )
        return self

    def _steps_suit_the_rollout(self, steps: int) -> None:
        """What counts steps has room in a rollout; a default that has not means all of them."""
        selector, start, end = self.selector, _of(self.selector, "start") or 0, _of(self.selector, "end") or steps
        room = {"selector.window_size": end - start, "selector.window_shift": end - start}
        room |= {"selector.persistence": steps, "sensing.stride": steps, "algorithm.num_draws": steps}
        for key, most in room.items():
            section, _, name = key.partition(".")
            part = getattr(self, section)
            value = _of(part, name)
            if value is not None and value > most and value != type(part).model_fields[name].default:
                where = f"the {most} steps of its range" if most < steps else f"the {steps} steps of a rollout"
                raise ValueError(
                    f"{key} must be at most {where}, got {value}; set it to {most} or less, or raise sampler.num_steps"
                )
        if isinstance(selector, LateStart):
            first, last = selector.range_of(steps)
            if first >= last:
                raise ValueError(
                    f"selector.start is a fifth of the {steps} steps where it is absent, {first}, and must be below "
                    f"selector.end, got {last}; set selector.start, or raise selector.end"
                )
        if isinstance(selector, Window) and selector.shift_decay == "exponential" and selector.decay_from >= steps:
            raise ValueError(
                f"selector.decay_from must be below the {steps} steps of a rollout, or nothing ever decays, got "
                f'{selector.decay_from}; lower it, or set selector.shift_decay = "none"'
            )

    def _only_finished_images_are_judged(self) -> None:
        if self.sensing is not None and self.sensing.kind != "latent":
            raise ValueError(
                f'people judge finished images alone, and sensing.kind = "{self.sensing.kind}" shows the reward all '
                f'others, got it with reward.name = "{self.reward.name}"; set sensing.kind = "latent"'
            )
        if _of(self.algorithm, "preference_model") == "reward":
            raise ValueError(
                f"people judge finished images alone, and {self.algorithm.name} shows the reward the candidates of "
                f'every step, got it with reward.name = "{self.reward.name}"; set algorithm.preference_model to a '
                f"folder made by train-preference-model, or algorithm.name to another"
            )

    def _can_branch(self, algorithm: Spo, steps: int) -> None:
        first = algorithm.first_step(steps)
        if first >= steps:
            raise ValueError(
                f"algorithm.branch_from must be one of the {steps} steps of a rollout, 0 to {steps - 1}, got {first}; "
                f"lower it, or raise sampler.num_steps"
            )
        selector, end = self.selector, _of(self.selector, "end")
        got = f"selector.end = {end}"
        if isinstance(selector, Window | FastWindow):
            end = (selector.start or 0) + selector.window_size
            got = f"a selector whose first window ends at step {end}"
        if end is not None and end <= first:
            raise ValueError(
                f"spo trains steps from algorithm.branch_from = {first} on, got {got}; "
                f"lower algorithm.branch_from, or have the selector keep later steps"
            )

    def _every_rollout_is_sensed(self) -> None:
        if not isinstance(self.selector, AdaScope) or self.sensing is None:
            raise ValueError(
                'algorithm.attribution = "gain" needs a selector that senses the preference, got selector.name = '
                f'"{self.selector.name}"; set it to "adascope", or algorithm.attribution to "similarity"'
            )
        if self.sensing.every != 1 or not self.selector.is_sensed:
            raise ValueError(
                'algorithm.attribution = "gain" needs every rollout sensed, got sensing.every = '
                f'{self.sensing.every} and selector.rule = "{self.selector.rule}"; set sensing.every = 1 and a rule '
                f'that senses, or algorithm.attribution to "similarity"'
            )

    def _can_be_sensed(self, selector: AdaScope, sensing: Latent | RewardOnly) -> None:
        if selector.rule == "knee_causal" and not sensing.is_causal:
            raise ValueError(
                "knee_causal decides while sampling, so it needs sensing.kind semantic or reward_only and "
                f"sensing.stride = 1, got {sensing.kind} and {_of(sensing, 'stride') or 'no stride'}; the latent mode "
                "compares with the final latent, and values between strides with later ones; set them so, or "
                'selector.rule = "knee"'
            )
        if selector.pooling == "sample" and isinstance(sensing, RewardOnly) and sensing.num_samples != 0:
            raise ValueError(
                f"selector.pooling = sample decides for each image, so sensing.num_samples must be 0 (all), got "
                f'{sensing.num_samples}; set it so, or selector.pooling = "prompt"'
            )

    def _updates_suit_the_algorithm(self) -> None:
        train, name = self.train, self.algorithm.name
        images = train.prompts_per_iteration * train.samples_per_prompt
        parts, what = images, "images"
        if train.minibatch == "pairs":
            parts, what = images * self.sampler.num_steps, "(image, step) pairs"
        if train.updates_per_iteration > parts:
            raise ValueError(
                f"train.updates_per_iteration must be at most the {parts} {what} of an iteration, got "
                f"{train.updates_per_iteration}; lower it"
            )
        if images == 1 and _of(self.algorithm, "advantage") == "batch":
            raise ValueError(
                'algorithm.advantage = "batch" compares the images of an iteration, got 1; raise '
                "train.samples_per_prompt or train.prompts_per_iteration"
            )
        if name == "reinforce" and train.num_updates != 1:
            raise ValueError(
                "reinforce is right for one update after each rollout, got train.updates_per_iteration = "
                f"{train.updates_per_iteration} and train.inner_epochs = {train.inner_epochs}; set both to 1, or "
                'algorithm.name = "ddpo"'
            )
        if train.update != "one_pass":
            return
        if train.num_updates != 1 or _of(self.algorithm, "kl_weight"):
            raise ValueError(
                "one_pass needs train.updates_per_iteration = 1, train.inner_epochs = 1 and algorithm.kl_weight = 0, "
                f"got {train.updates_per_iteration}, {train.inner_epochs} and {_of(self.algorithm, 'kl_weight') or 0}; "
                f'set them so, or train.update = "replay"'
            )
        if name == "grpo_guard":
            raise ValueError(
                "one_pass is for the plain likelihood ratio, and grpo_guard has its own; set train.update = "
                '"replay", or algorithm.name = "grpo"'
            )
        if _of(self.algorithm, "weighs_whole_samples") is False:
            raise ValueError(
                f"one_pass is for advantages that weigh a whole sample, and {name} has none; "
                f'set train.update = "replay"'
            )
        self._knows_the_steps_beforehand("one_pass", 'train.update = "replay"')

    def _suits_a_set(self, algorithm: DiffusionDpo | DiffusionKto) -> None:
        """An algorithm that learns from a set has it, and nothing is asked of rollouts that it does not make."""
        name, train = algorithm.name, self.train
        if algorithm.preferences is None:
            raise ValueError(
                f"{name} learns from a set of preferences, got algorithm.preferences = none; set it to the folder of "
                f"one, or make one with: adascope-fast make-preferences CONFIG.toml --out FOLDER --pairs 400"
            )
        rows = train.prompts_per_iteration * algorithm.num_draws
        if train.updates_per_iteration > rows:
            raise ValueError(
                f"train.updates_per_iteration must be at most the {rows} rows of an iteration "
                f"(train.prompts_per_iteration times algorithm.num_draws), got {train.updates_per_iteration}; lower it"
            )
        if self.sampler.tail_share < 1:
            raise ValueError(
                f"sampler.tail_share shortens rollouts that are trained on, and {name} trains on none, got "
                f"{self.sampler.tail_share}; set it to 1.0"
            )
        if self.sampler.train_guidance is not None:
            raise ValueError(
                f"{name} trains the conditional output alone, without guidance, got sampler.train_guidance = "
                f'"{self.sampler.train_guidance}"; remove it'
            )
        if isinstance(self.selector, AdaScope) and self.selector.pooling == "sample":
            raise ValueError(
                f"{name} takes the interval of a picture's prompt, since no rollout made the picture, got "
                f'selector.pooling = "sample"; set it to "prompt" or "batch"'
            )

    def _sampler_suits_the_algorithm(self) -> None:
        sampler = self.sampler
        if _of(self.algorithm, "needs_log_prob") and sampler.is_deterministic:
            got = f'sampler.kind = "{sampler.kind}"' if sampler.eta is None else f"sampler.eta = {sampler.eta}"
            raise ValueError(
                f"{self.algorithm.name} trains steps by their log-probability, got {got}, without noise, which has no "
                f'log_prob at any step; choose a sampler with noise, or algorithm.name = "awm" or "diffusion_nft"'
            )
        if self.algorithm.name == "grpo_guard" and self.sampler.kind in ("ddim", "ddpm"):
            raise ValueError(
                f'grpo_guard divides by the dt of a flow sampler\'s steps, got sampler.kind = "{self.sampler.kind}"; '
                f'set it to "flow_sde" and train a flow model, or algorithm.name = "grpo"'
            )

    def _can_be_drawn_elsewhere(self) -> None:
        """A rollout server takes every step of the sampler, without gradient, and knows of no candidates."""
        reasons = {
            'train.update = "one_pass"': (self.train.update == "one_pass", 'train.update = "replay"'),
            f"sampler.tail_share = {self.sampler.tail_share}": (
                self.sampler.tail_share < 1,
                "sampler.tail_share = 1.0",
            ),
            'sampler.kind = "dpm_solver"': (self.sampler.kind == "dpm_solver", "another sampler.kind"),
            'algorithm.name = "spo"': (isinstance(self.algorithm, Spo), "another algorithm.name"),
        }
        for got, (is_so, otherwise) in reasons.items():
            if is_so:
                raise ValueError(
                    f"a rollout server takes every step of the sampler by itself and without gradient, got {got} with "
                    f'rollout.name = "remote"; set {otherwise}, or rollout.name = "local"'
                )

    def _knows_the_steps_beforehand(self, what: str, otherwise: str) -> None:
        attribution = _of(self.algorithm, "attribution")
        if attribution in ("gain", "similarity"):
            raise ValueError(
                f'{what} needs the weights before the rollout, got algorithm.attribution = "{attribution}"; '
                f'set it to "uniform" or "discount", or {otherwise}'
            )
        if isinstance(self.selector, AdaScope) and self.selector.mask_source != "previous":
            raise ValueError(
                f"{what} needs the steps before the rollout, got selector.mask_source = "
                f'{self.selector.mask_source!r}; set it to "previous", or set {otherwise}'
            )

    @classmethod
    def load(cls, path: Path | str | None, overrides: Sequence[Override] = ()) -> Self:
        """The validated configuration of a TOML file or a preset (`sd15`), with overrides on top.

        None is neither, the defaults alone.

        An override that makes another choice (`selector.name=every_step`) drops the file's keys of the choice that it
        replaces; a warning says which.
        """
        values: dict[str, Any] = {} if path is None else values_of(path)
        values, left_out = apply_overrides(cls, values, overrides)
        config = cls.of(values)
        for line in left_out:
            logger.warning("%s", line)
        return config

    def changed(self, overrides: Sequence[Override]) -> Self:
        """The same with overrides on top; `ConfigError` where they are wrong."""
        values, left_out = apply_overrides(type(self), self.model_dump(exclude_none=True), overrides)
        config = self.of(values)
        for line in left_out:
            logger.warning("%s", line)
        return config

    @classmethod
    def of(cls, values: dict[str, Any]) -> Self:
        """The validated configuration of nested plain values; `ConfigError` where they are wrong."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ConfigError(explain(cls, values, error)) from None

    def examine(self) -> None:
        """ValueError where what a section names is not there, as far as that is told without importing torch."""
        for _, section in self:
            if section is not None:
                section.examine()

    def to_toml(self) -> str:
        """The resolved configuration as TOML, every key written out; one that is not set is a comment."""
        return toml_of(self)


def _senses(selector: Any) -> bool:
    name = selector.get("name", "adascope") if isinstance(selector, dict) else getattr(selector, "name", None)
    return name in SENSED


def _of(section: Section, key: str) -> Any:
    """A key that not every choice of a section has; None where it has not."""
    return getattr(section, key, None)

"""The configuration of a run: typed sections with defaults, read from TOML and checked before anything is loaded.

`Config()` is a valid small run. A file sets what differs from it, `section.field=value` overrides set what differs from
the file, and `to_toml` writes the result in full. Whatever is wrong raises `ConfigError` with one line: the rule, the
value, the next step. The keys and their meaning are in `config_sections` and `config_selection`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import tomli_w
from pydantic import ValidationError, model_validator

from adascope_fast.config.sections import (
    AccelerationChoice,
    AlgorithmChoice,
    Evaluation,
    Log,
    Model,
    Prompts,
    RewardChoice,
    Run,
    Sampler,
    Train,
)
from adascope_fast.config.selection import SelectorChoice as SelectorChoice
from adascope_fast.config.selection import Sensing
from adascope_fast.config.sources import ConfigError as ConfigError
from adascope_fast.config.sources import apply_overrides, explain, read_toml
from adascope_fast.config.types import Section, or_none


class Config(Section):
    """Everything that decides a run."""

    run: Run = Run()
    model: Model = Model()
    prompts: Prompts = Prompts()
    reward: RewardChoice = RewardChoice()
    sampler: Sampler = Sampler()
    algorithm: AlgorithmChoice = AlgorithmChoice()
    selector: SelectorChoice = SelectorChoice()
    sensing: Sensing = Sensing()
    train: Train = Train()
    acceleration: AccelerationChoice = AccelerationChoice()
    evaluation: Evaluation = Evaluation()
    log: Log = Log()

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        last = max(self.selector.start or 0, (self.selector.end or 1) - 1)
        if last >= self.sampler.num_steps:
            raise ValueError(
                f"selector.start and selector.end must lie within the {self.sampler.num_steps} steps of a rollout, "
                f"got start = {or_none(self.selector.start)} and end = {or_none(self.selector.end)}; "
                f"set selector.end to {self.sampler.num_steps} or less, or raise sampler.num_steps"
            )
        if self.algorithm.name == "grpo" and self.train.samples_per_prompt < 2:
            raise ValueError(
                "grpo compares the pictures of one prompt, so train.samples_per_prompt must be at least 2, "
                f'got {self.train.samples_per_prompt}; raise it, or set algorithm.name = "ddpo"'
            )
        if self.algorithm.attribution == "gain" and self.selector.name not in ("adascope", "complement"):
            raise ValueError(
                'algorithm.attribution = "gain" needs a selector that senses the preference, got selector.name = '
                f'"{self.selector.name}"; set it to "adascope", or algorithm.attribution to "similarity"'
            )
        if self.train.update == "one_pass":
            self._can_be_one_pass()
        if self.sampler.tail_share < 1:
            self._knows_the_steps_beforehand(
                f"sampler.tail_share = {self.sampler.tail_share}", "sampler.tail_share = 1.0"
            )
        if self.selector.name in ("adascope", "complement"):
            self._can_be_sensed()
        return self

    def _can_be_sensed(self) -> None:
        selector, sensing = self.selector, self.sensing
        is_always = sensing.sense_every == 1 and selector.rule not in ("fixed", "schedule")
        if self.algorithm.attribution == "gain" and not is_always:
            raise ValueError(
                'algorithm.attribution = "gain" needs every rollout sensed, got sensing.every = '
                f'{sensing.sense_every} and selector.rule = "{selector.rule}"; set sensing.every = 1 and a rule that '
                f'senses, or algorithm.attribution to "similarity"'
            )
        if selector.rule == "knee_causal" and (sensing.kind == "latent" or sensing.stride > 1):
            raise ValueError(
                "knee_causal decides while sampling, so it needs sensing.kind semantic or reward_only and "
                f"sensing.stride = 1, got {sensing.kind} and {sensing.stride}; the latent mode compares with the final "
                f'latent, and values between strides with later ones; set them so, or selector.rule = "knee"'
            )
        if selector.pooling == "sample" and sensing.kind != "latent" and sensing.num_samples != 0:
            raise ValueError(
                f"selector.pooling = sample decides for each picture, so sensing.num_samples must be 0 (all), got "
                f'{sensing.num_samples}; set it so, or selector.pooling = "prompt"'
            )
        if selector.min_fraction > selector.max_fraction:
            raise ValueError(
                "selector.min_fraction must not exceed selector.max_fraction, got "
                f"{selector.min_fraction} and {selector.max_fraction}; raise the latter"
            )
        if selector.fallback is not None and selector.fallback[0] >= selector.fallback[1]:
            raise ValueError(
                f"selector.fallback is [start, end] with start below end, got {selector.fallback}; "
                f"set for example selector.fallback = [0.1, 0.64]"
            )

    def _can_be_one_pass(self) -> None:
        if self.train.updates_per_iteration != 1 or self.algorithm.kl_weight:
            raise ValueError(
                "one_pass needs train.updates_per_iteration = 1 and algorithm.kl_weight = 0, got "
                f"{self.train.updates_per_iteration} and {self.algorithm.kl_weight}; "
                f'set them so, or train.update = "replay"'
            )
        self._knows_the_steps_beforehand("one_pass", 'train.update = "replay"')

    def _knows_the_steps_beforehand(self, what: str, otherwise: str) -> None:
        if self.algorithm.attribution in ("gain", "similarity"):
            raise ValueError(
                f"{what} needs the weights before the rollout, got algorithm.attribution = "
                f'"{self.algorithm.attribution}"; set it to "uniform" or "discount", or {otherwise}'
            )
        if self.selector.name in ("adascope", "complement") and self.selector.mask_source != "previous":
            raise ValueError(
                f"{what} needs the steps before the rollout, got selector.mask_source = "
                f'{self.selector.mask_source!r}; set it to "previous", or set {otherwise}'
            )

    @classmethod
    def load(cls, path: Path | str | None, overrides: Sequence[str] = ()) -> Self:
        """The validated configuration of a TOML file (None: no file) with `section.field=value` overrides on top."""
        values: dict[str, Any] = {} if path is None else read_toml(Path(path))
        values = apply_overrides(cls, values, overrides)
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ConfigError(explain(cls, values, error)) from None

    def to_toml(self) -> str:
        """The resolved configuration as TOML, every field written out; fields that are None are left out."""
        return tomli_w.dumps(self.model_dump(exclude_none=True))

"""What a run folder says of its configuration: every key, with its value or with what it does where none is set."""

import re
import tomllib
from itertools import takewhile

import pytest

from adascope_fast.config import Config
from adascope_fast.settings import OWN, choices_of, fields_of, key_of

NEEDED = {
    "diffusion_dpo": ["algorithm.preferences=set"],
    "diffusion_kto": ["algorithm.preferences=set"],
    "mix_grpo": ["sampler.num_steps=25"],
    "mixed": ["reward.parts={jpeg_compressibility = 1.0, 'my_module:score' = {weight = 0.5, note = 'b'}}"],
    "random_fraction": ["selector.fraction=0.5"],
    "remote": ["reward.url=http://127.0.0.1:8400"],
    "static_range": ["selector.start=2", "selector.end=7"],
    "threshold": ["selector.uncertainty_low=0.1", "selector.uncertainty_high=0.5"],
}
CHOICES = [
    (section, key_of(info.annotation), choice)
    for section, info in Config.model_fields.items()
    for choice in choices_of(info.annotation)
    if choice != OWN
]


def _load(section: str, key: str, choice: str) -> Config:
    needed = [f"{section}.{one.partition('.')[2]}" if choice == "remote" else one for one in NEEDED.get(choice, [])]
    return Config.load(None, [*([f"{section}.{key}={choice}"] if choice else []), *needed])


def _sections(text: str) -> dict[str, list[str]]:
    parts = re.split(r"^\[(\w+)\]$", text, flags=re.MULTILINE)[1:]
    return {name: body.splitlines() for name, body in zip(parts[::2], parts[1::2], strict=True)}


@pytest.mark.parametrize(("section", "key", "choice"), CHOICES, ids=lambda value: str(value))
def test_every_key_is_there_and_the_text_reads_back(section: str, key: str, choice: str):
    config = _load(section, key, choice)
    text = config.to_toml()
    assert Config.of(tomllib.loads(text)) == config
    for name, lines in _sections(text).items():
        part = getattr(config, name)
        own = list(takewhile(lambda line: not line.startswith("["), lines))
        said = {match[1] for line in own if (match := re.match(r"(?:# )?(\w+)(?: =|, not set: )", line))}
        tables = {match[1] for line in lines if (match := re.match(rf"\[{name}\.(\w+)", line))}
        assert said | tables == set(fields_of(type(part))), name


def test_a_key_that_is_not_set_says_what_it_then_does():
    lines = Config.load(None, ["model.lora_rank=4", "sampler.guidance_scale=3.0", "sampler.num_steps=10"]).to_toml()
    for line in (
        "# ema_decay = 0.8, not set: 0.8 for LoRA, else 0 (none)",
        "# lora_alpha = 4, not set: the rank, so the scale is 1",
        "# microbatch = 32, not set: `rollout_batch` or more",
        "# num_steps = 10, not set: those of the sampler",
        '# train_guidance = "both", not set: the algorithm\'s own',
        "# resolution, not set: the model's own",
    ):
        assert f"\n{line}\n" in lines
    assert "\n# ema_decay = 0.0, not set: " in Config.load(None, ["model.train=full"]).to_toml()
    assert "\nema_decay = 0.5\n" in Config.load(None, ["model.ema_decay=0.5"]).to_toml()


def test_keys_of_your_own_are_written_whatever_they_hold():
    own = {"name": "my_module:make", "a": [{"b": 1}], "c": {"d": {"e": [1, 2]}}, "f": [], "g": "[reward]\nx = 1"}
    config = Config.of({"reward": own})
    assert Config.of(tomllib.loads(config.to_toml())) == config
    assert tomllib.loads(config.to_toml())["reward"] == own


def test_every_key_without_a_default_says_what_it_does_when_absent():
    for name, info in Config.model_fields.items():
        for choice, part in choices_of(info.annotation).items():
            for key, field in fields_of(part).items():
                if not field.is_required() and field.default is None:
                    assert re.search(r"absent:\s", field.description or ""), f"{name} {choice}.{key}"

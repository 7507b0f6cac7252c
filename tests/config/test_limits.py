"""Values that are legal by their type and cannot be meant, and files that are no configuration: told by key or file."""

import os
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest

from adascope_fast.backbones import EMBEDDED
from adascope_fast.backbones.settings import EMBEDDED_NAMES
from adascope_fast.config import Config, ConfigError
from adascope_fast.config.sources import MOST_BYTES
from adascope_fast.settings import OWN, choices_of, key_of, one_line, unprintable


def _refused(*overrides: str, path: Path | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        Config.load(path, overrides)
    line = str(caught.value)
    assert not unprintable(line)
    assert len(line) < 500
    return line


def _types(annotation: Any) -> set[type]:
    if get_origin(annotation) is Annotated:
        return _types(get_args(annotation)[0])
    if isinstance(annotation, type) or get_origin(annotation) in (list, tuple, Literal):
        return {annotation} if isinstance(annotation, type) else set()
    return set().union(*map(_types, get_args(annotation)))


def _keys(*kinds: type) -> list[Any]:
    """The overrides that a key of these types needs beside it, and the key, for each key of each choice."""
    found = []
    for section, info in Config.model_fields.items():
        for choice, part in choices_of(info.annotation).items():
            for name, field in part.model_fields.items():
                if choice == OWN or not _types(field.annotation) & set(kinds):
                    continue
                beside = [f"{section}.{key_of(info.annotation)}={choice}"] if choice else []
                beside += [
                    f"{section}.{other}={(it.examples or [0])[0]}"
                    for other, it in part.model_fields.items()
                    if it.is_required() and other != name
                ]
                found.append(pytest.param(beside, f"{section}.{name}", id=f"{choice}-{section}.{name}"))
    return found


@pytest.mark.parametrize(("beside", "key"), _keys(int, float))
@pytest.mark.parametrize("value", ["1" + "0" * 22, "-" + "9" * 30, "1" + "0" * 400, "0x" + "f" * 9000])
def test_every_number_has_bounds_that_are_told_by_key(beside: list[str], key: str, value: str):
    if value.startswith("0x"):
        assert "of 36000 bits" in _refused(*beside, f"{key}={value}")
    assert _refused(*beside, f"{key}={value}").startswith(f"{key} must be ")


@pytest.mark.parametrize(("beside", "key"), _keys(float))
@pytest.mark.parametrize("value", ["inf", "-inf", "nan", "1e308", "1e400"])
def test_every_number_is_finite_and_moderate(beside: list[str], key: str, value: str):
    assert _refused(*beside, f"{key}={value}").startswith(f"{key} must be ")


@pytest.mark.parametrize(("beside", "key"), _keys(str))
@pytest.mark.parametrize("value", ["a\0b", "a\nb", "\x1b[1m", "a\x85b", "a\u2028b", "x" * 5000, "a\udcff"])
def test_every_text_is_printable_and_short(beside: list[str], key: str, value: str):
    assert _refused(*beside, f"{key}={value}").startswith(f"{key} must ")


@pytest.mark.parametrize(
    ("overrides", "want"),
    [
        (["run.folder=a\0b"], 'run.folder must have no control character, got "a\\x00b" with U+0000; remove it'),
        (["model.name=a\nb"], 'model.name must have no control character, got "a\\nb" with U+000A; remove it'),
        (["run.seed=4294967296"], "run.seed must be below 4294967296, got 4294967296; set run.seed to less than"),
        (["model.resolution=100000"], "model.resolution must be at most 16384, got 100000"),
        (["sampler.num_steps=1000000000"], "sampler.num_steps must be at most 10000, got 1000000000"),
        (["model.lora_targets=[]"], "model.lora_targets must be a list that is not empty, got []"),
        (["train.learning_rate=1e-300"], "train.learning_rate is zero in float32, got 1e-300; set train.learning_rate"),
        (["algorithm.clip_range=1e-44"], "algorithm.clip_range is zero in float32, got 1e-44"),
        (["train.learning_rate=300.0"], "train.learning_rate must be at most 10, got 300.0"),
        (
            ["train.weight_decay=1e5", "train.learning_rate=1e-4"],
            "train.learning_rate times train.weight_decay is the share of every weight that an update takes away, so "
            "it must be below 1, got 0.0001 times 100000.0; lower train.weight_decay",
        ),
        (
            ["train.iterations=5", "train.updates_per_iteration=2", "train.warmup_updates=10"],
            "a warm-up ends within the run, so train.warmup_updates must be below its 10 updates (train.iterations "
            "times those of each), got 10; lower it, or raise train.iterations",
        ),
        (["train.lr_cycles=2"], "train.lr_cycles"),
        (
            ["train.prompts_per_iteration=100000", "train.samples_per_prompt=100"],
            "an iteration has at most 1000000 images, got train.prompts_per_iteration = 100000 times "
            "train.samples_per_prompt = 100; lower one",
        ),
        (
            ["algorithm.clip_range=0.2", "algorithm.clip_range_high=0.1"],
            "algorithm.clip_range_high must be at least algorithm.clip_range, got 0.1 and 0.2; raise it, or leave it",
        ),
        (
            ["selector.name=window", "selector.window_size=21"],
            "selector.window_size must be at most the 20 steps of a rollout, got 21; set it to 20 or less, or raise",
        ),
        (
            ["selector.name=fast_window", "selector.start=4", "selector.end=9", "selector.window_size=6"],
            "selector.window_size must be at most the 5 steps of its range, got 6; set it to 5 or less",
        ),
        (["selector.name=window", "selector.window_shift=40"], "selector.window_shift must be at most the 20 steps"),
        (["selector.persistence=21"], "selector.persistence must be at most the 20 steps of a rollout, got 21"),
        (["sensing.kind=semantic", "sensing.stride=21"], "sensing.stride must be at most the 20 steps of a rollout"),
        (["algorithm.name=awm", "algorithm.num_draws=21"], "algorithm.num_draws must be at most the 20 steps of a"),
        (
            ["selector.name=late_start", "selector.end=3"],
            "selector.start is a fifth of the 20 steps where it is absent, 4, and must be below selector.end, got 3;",
        ),
        (
            ["selector.name=window", "selector.shift_decay=exponential", "sampler.num_steps=10"],
            "selector.decay_from must be below the 10 steps of a rollout, or nothing ever decays, got 13; lower it",
        ),
        (
            ["train.updates_per_iteration=33", "train.minibatch=samples"],
            "train.updates_per_iteration must be at most the 32 images of an iteration, got 33; lower it",
        ),
        (
            ["train.updates_per_iteration=641"],
            "train.updates_per_iteration must be at most the 640 (image, step) pairs of an iteration, got 641",
        ),
        (
            ["algorithm.advantage=batch", "train.prompts_per_iteration=1", "train.samples_per_prompt=1"],
            'algorithm.advantage = "batch" compares the images of an iteration, got 1; raise',
        ),
        (
            ["train.best_worst_k=2"],
            "train.best_worst_k leaves images of a prompt out, so twice it must be below train.samples_per_prompt = 4, "
            "got 2; lower it, raise",
        ),
        (
            ["model.train=full", "acceleration.fold_adapter=on"],
            'acceleration.fold_adapter = "on" folds a LoRA adapter, got model.train = "full", which has none; set it',
        ),
        (
            ["acceleration.cuda_graphs=always"],
            'acceleration.cuda_graphs must be one of auto, on, off, got "always"; set for example',
        ),
        (
            ["prompts.train=scenes:held_out"],
            "the held-out part of a built-in set is there to judge by, got prompts.train = 'scenes:held_out' alone; "
            'set prompts.train = "scenes:train"',
        ),
        (["prompts.held_out_share=1.0"], "prompts.held_out_share must be below 1, got 1.0"),
        (["prompts.held_out=a.txt"], "prompts.train must be named where prompts.held_out is, got"),
        (
            ["prompts.train=a", "prompts.held_out=a"],
            "prompts.held_out must be prompts that are not trained on, got 'a'",
        ),
        (["sensing.kind=[[1]]"], "sensing.kind must be one of latent, semantic, reward_only, got [[1]]"),
        (["selector.name={a = 1}"], "selector.name must be one of "),
        (["reward.name=os:system:x"], 'reward.name must be module:object, got "os:system:x"; write for example'),
        (["reward.name=a/b.py:f"], 'reward.name must be module:object, got "a/b.py:f"'),
        (["reward.name=" + "a" * 300 + ":f"], "reward.name must have at most 200 characters, got 302; shorten it"),
        (["a\nb.c=1"], "unknown key a\\nb.c = 1; the sections are run, "),
    ],
)
def test_what_cannot_be_meant_is_one_line(overrides: list[str], want: str):
    assert _refused(*overrides).startswith(want)


def test_true_and_false_of_earlier_runs_are_on_and_off():
    for before, now in (("true", "on"), ("false", "off")):
        assert Config.load(None, [f"acceleration.cuda_graphs={before}"]).acceleration.cuda_graphs == now
    assert Config().acceleration.cuda_graphs == "auto"


def test_defaults_that_a_short_rollout_has_no_room_for_mean_all_of_it():
    for selector in ("window", "fast_window", "adascope", "every_step"):
        config = Config.load(None, [f"selector.name={selector}", "sampler.num_steps=1"])
        assert Config.of(tomllib.loads(config.to_toml())) == config
    assert Config.load(None, ["sensing.kind=semantic", "sampler.num_steps=2"])
    assert Config.load(None, ["algorithm.name=awm", "sampler.num_steps=2"])


def test_prompts_are_the_scenes_for_embedded_models_alone(tmp_path: Path):
    assert set(EMBEDDED) == set(EMBEDDED_NAMES)
    for name in EMBEDDED_NAMES:
        chosen = Config.load(None, [f"model.name={name}"]).prompts
        assert (chosen.train, chosen.held_out) == ("scenes:train", "scenes:held_out")
    other = Config.load(None, ["model.name=somebody/some-model"])
    assert (other.prompts.train, other.prompts.held_out) == (None, None)
    assert Config.of(tomllib.loads(other.to_toml())) == other
    animals = Config.load(None, ["model.name=somebody/some-model", "prompts.train=animals:train"])
    assert animals.prompts.held_out == "animals:held_out"
    alone = Config.load(None, ["prompts.train=a.txt"]).prompts
    assert (alone.train, alone.held_out) == ("a.txt", None)
    named = Config.load(None, ["prompts.train=a.txt", "prompts.held_out=b.txt"]).prompts
    assert (named.train, named.held_out) == ("a.txt", "b.txt")


@pytest.mark.parametrize("name", ["sd15", "sd35_medium"])
def test_the_large_configurations_train_on_animals(name: str):
    config = Config.load(name)
    assert (config.prompts.train, config.prompts.held_out) == ("animals:train", "animals:held_out")
    assert config.evaluation.num_prompts == 9


@pytest.mark.parametrize(
    ("content", "want"),
    [
        (b"x = " + b"[" * 5000, "FILE has lists or tables more than 8 deep; put field = value lines below a [section]"),
        (b"a." * 5000 + b"b = 1", "FILE has lists or tables more than 8 deep"),
        (b"x = [[[[[[[[[1]]]]]]]]]", "FILE has lists or tables more than 8 deep"),
        (b"x = " + b"9" * 5000, "FILE has a value that cannot be read (Exceeds the limit"),
        (b"d = 2020-13-01", "FILE"),
        (b"#" * (MOST_BYTES + 1), f"a configuration file has at most {MOST_BYTES} bytes, got FILE with "),
        (b"\xff\xfe[\x00", "FILE must be UTF-8 text, got a byte that is not at 0; save it as UTF-8"),
        (b"[run]\nfolder = 'a\0b'", "FILE line 2 is not TOML: "),
        (b'[run]\nfolder = "a\\u0000b"', 'run.folder must have no control character, got "a\\x00b" with U+0000'),
        (b'["a\\nb"]\nq = 1', "unknown key a\\nb = {q = 1}"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_configuration_is_one_line(tmp_path: Path, content: bytes, want: str):
    path = tmp_path / "config.toml"
    path.write_bytes(content)
    assert _refused(path=path).startswith(want.replace("FILE", str(path)))


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_byte_order_mark_and_windows_lines_are_read(tmp_path: Path, end: str):
    path = tmp_path / "config.toml"
    path.write_bytes(b"\xef\xbb\xbf" + f"[run]{end}seed = 3{end}".encode())
    assert Config.load(path).run.seed == 3


def test_what_is_no_regular_file_is_refused(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.toml")
    for path in (tmp_path / "pipe.toml", Path("/dev/null")):
        want = f"a configuration is a file, got {path}, which is a device or a pipe; save it to a file"
        assert _refused(path=path) == want
    assert _refused(path=tmp_path / ("x" * 300)).startswith((f"{tmp_path}", "a configuration file must exist"))


def test_one_line_escapes_what_would_break_it():
    assert one_line("a\nb\x00c\ud800é") == "a\\nb\\x00c\\ud800é"

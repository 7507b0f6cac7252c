"""Every rule of the configuration, and the whole line that its breach prints: the rule, the value, the next step."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from adascope_fast.algorithms.settings import Grpo
from adascope_fast.config import Config, ConfigError
from adascope_fast.selectors.settings import EveryStep, StaticRange
from adascope_fast.settings import OWN, Own, choices_of, key_of

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.toml"))
SECTIONS = (
    "run, model, prompts, reward, sampler, rollout, algorithm, selector, sensing, train, acceleration, evaluation, log"
)


def _error(path: Path | None, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        Config.load(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def _file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_that_is_shipped_is_valid_and_writes_to_a_folder_of_its_own(path: Path):
    config = Config.load(path)
    assert config.run.folder == f"runs/{path.stem}"


def test_defaults_are_a_valid_run():
    config = Config()
    assert config == Config.load(None)
    assert config.train.prompts_per_iteration * config.train.samples_per_prompt > 0
    assert config.selector.name == "adascope"


def test_file_then_overrides(tmp_path: Path):
    path = _file(tmp_path, '[train]\niterations = 7\nlearning_rate = 1\n[model]\nlora_targets = ["to_q"]\n')
    config = Config.load(path, ["train.iterations=9", "sampler.num_steps = 12", "train.iterations=11"])
    assert config.train.iterations == 11
    assert config.sampler.num_steps == 12
    assert config.train.learning_rate == 1.0
    assert config.model.lora_targets == ["to_q"]
    assert config.train.microbatch == Config().train.microbatch


@pytest.mark.parametrize(
    ("override", "section", "field", "want"),
    [
        ("run.folder=runs/a", "run", "folder", "runs/a"),
        ("run.folder='runs/a b'", "run", "folder", "runs/a b"),
        ("run.folder=a=b", "run", "folder", "a=b"),
        ("run.folder=12", "run", "folder", "12"),
        ("run.folder=2026-01-31", "run", "folder", "2026-01-31"),
        ("run.seed=3", "run", "seed", 3),
        ("selector.name=every_step", "selector", "name", "every_step"),
        ("model.gradient_checkpointing=true", "model", "gradient_checkpointing", True),
        ('model.lora_targets=["to_q", "to_v"]', "model", "lora_targets", ["to_q", "to_v"]),
        ("log.trackers=[]", "log", "trackers", []),
    ],
)
def test_override_values(override: str, section: str, field: str, want: object):
    assert getattr(getattr(Config.load(None, [override]), section), field) == want


def test_resolved_toml_is_complete_and_reads_back(tmp_path: Path):
    config = Config.load(None, ["model.lora_alpha=8", "run.folder='a \"quoted\" <b>'", "evaluation.guidance_scale=3"])
    text = config.to_toml()
    assert Config.load(_file(tmp_path, text)) == config
    written = tomllib.loads(text)
    assert "lora_targets" not in written["model"]  # None has no spelling in TOML
    assert written["train"]["adam_epsilon"] == 1e-8
    assert set(written) == set(SECTIONS.split(", "))


@given(
    st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), min_size=1),
    st.floats(min_value=1e-30, max_value=10),
    st.integers(min_value=0, max_value=2**32 - 1),
)
def test_any_value_survives_the_round_trip(folder: str, learning_rate: float, seed: int):
    config = Config.model_validate({"run": {"folder": folder, "seed": seed}, "train": {"learning_rate": learning_rate}})
    assert Config.model_validate(tomllib.loads(config.to_toml())) == config


def test_every_field_is_described():
    for name, section in Config.model_fields.items():
        for choice, part in choices_of(section.annotation).items():
            assert part.__doc__, f"{name} {choice}"
            for field, info in part.model_fields.items():
                if field != key_of(section.annotation) or choice == OWN:
                    assert info.description, f"{name} {choice}.{field}"


def test_config_is_immutable():
    with pytest.raises(ValidationError, match="frozen"):
        Config().train.iterations = 3  # pyright: ignore[reportAttributeAccessIssue]


def test_reading_a_configuration_loads_no_torch():
    code = "import sys, adascope_fast.config; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("override", "want"),
    [
        ("train.iteration=5", "unknown key train.iteration = 5; did you mean train.iterations?"),
        ("trian.iterations=5", "unknown key trian.iterations = 5; did you mean train.iterations?"),
        ("train.clip_range=1", "unknown key train.clip_range = 1; did you mean algorithm.clip_range?"),
        ("iterations=5", "unknown key iterations = 5; did you mean train.iterations?"),
        ("samplr=5", "unknown key samplr = 5; did you mean sampler?"),
        ("train.iterations.x=5", "unknown key train.iterations.x = 5; did you mean train.iterations?"),
        ("xyzzy.q=a", f'unknown key xyzzy.q = "a"; the sections are {SECTIONS}'),
        ("log.xyzzy=1", "unknown key log.xyzzy = 1; log has trackers, project, run_name, prometheus"),
        ("train=3", "train is a section, got train = 3; set one of its fields, such as train.iterations"),
        (
            "train.iterations",
            "an override is section.field=value, got \"train.iterations\" without '='; "
            "write for example train.iterations=...",
        ),
        (
            "train",
            "an override is section.field=value, got \"train\" without '='; write for example train.iterations=...",
        ),
        (
            "train.iterations=five",
            'train.iterations must be a whole number, got "five" (text); write for example train.iterations = 20',
        ),
        (
            "train.iterations=5.5",
            "train.iterations must be a whole number, got 5.5 (a number); write for example train.iterations = 20",
        ),
        (
            "train.microbatch=true",
            "train.microbatch must be a whole number, got true (true or false); write for example train.microbatch = 1",
        ),
        (
            "train.learning_rate=fast",
            'train.learning_rate must be a number, got "fast" (text); write for example train.learning_rate = 0.0003',
        ),
        (
            "sampler.guidance_scale=half",
            'sampler.guidance_scale must be a number, got "half" (text); '
            "write for example sampler.guidance_scale = 1.0",
        ),
        (
            "train.learning_rate=inf",
            "train.learning_rate must be a finite number, got inf (a number); "
            "write for example train.learning_rate = 0.0003",
        ),
        (
            "model.gradient_checkpointing=1",
            "model.gradient_checkpointing must be true or false, got 1 (a whole number); "
            "write for example model.gradient_checkpointing = false",
        ),
        (
            "model.lora_targets=to_q",
            'model.lora_targets must be a list, got "to_q" (text); write for example model.lora_targets = ["name"]',
        ),
        (
            "log.trackers=[3]",
            "each item of log.trackers must be text, got 3 (a whole number); "
            'write for example log.trackers = ["tensorboard"]',
        ),
        (
            "run.folder=",
            'run.folder must be text that is not empty, got "" (text); write for example run.folder = "runs/run"',
        ),
        (
            "train.rollout_batch=-4",
            "train.rollout_batch must be at least 1, got -4; set train.rollout_batch to 1 or more",
        ),
        ("train.microbatch=0", "train.microbatch must be at least 1, got 0; set train.microbatch to 1 or more"),
        (
            "run.seed=3\nfolder = 4",
            'run.seed must be a whole number, got "3\\nfolder = 4" (text); write for example run.seed = 0',
        ),
        ("run.seed=-1", "run.seed must be at least 0, got -1; set run.seed to 0 or more"),
        ("sampler.eta=1.5", "sampler.eta must be at most 1, got 1.5; set sampler.eta to 1 or less"),
        ("sampler.tail_share=0", "sampler.tail_share must be above 0, got 0; set sampler.tail_share to more than 0"),
        ("train.adam_beta1=1", "train.adam_beta1 must be below 1, got 1; set train.adam_beta1 to less than 1"),
        (
            "algorithm.name=dppo",
            "algorithm.name must be one of ddpo, reinforce, grpo, flow_grpo_fast, dance_grpo, mix_grpo, grpo_guard, "
            "dpok, tdpo, d3po, spo, diffusion_dpo, diffusion_kto, awm, diffusion_nft, module:object, "
            'got "dppo"; set for example algorithm.name = "tdpo"',
        ),
        (
            "train.mixed_precision=bfloat16",
            'train.mixed_precision must be one of no, bf16, fp16, got "bfloat16"; '
            'set for example train.mixed_precision = "bf16"',
        ),
        (
            "train.device=3",
            'train.device must be one of auto, cpu, cuda, mps, got 3; set for example train.device = "auto"',
        ),
        (
            "selector.name=random_fraction",
            "random_fraction needs selector.fraction, got none; set for example selector.fraction = 0.5",
        ),
        (
            "selector.name=static_range",
            "static_range needs selector.start, got none; set for example selector.start = 2 (and 1 more)",
        ),
        (
            "selector.name=threshold",
            "threshold needs selector.uncertainty_low, got none; "
            "set for example selector.uncertainty_low = 0.02 (and 1 more)",
        ),
        (
            "selector.fraction=0.5",
            'selector.fraction belongs to selector.name = "random_fraction", got selector.fraction = 0.5 with '
            '"adascope"; remove it, or change selector.name',
        ),
        (
            "sensing.stride=2",
            'sensing.stride belongs to sensing.kind = "semantic" or "reward_only", got sensing.stride = 2 with '
            '"latent"; remove it, or change sensing.kind',
        ),
        (
            "reward.clip=scenes-clip",
            'reward.clip belongs to reward.name = "clip_similarity" or "aesthetic" or "geneval", got reward.clip = '
            '"scenes-clip" with '
            '"scene_attributes"; remove it, or change reward.name',
        ),
        (
            "algorithm.min_count=64",
            "algorithm.min_count must not exceed algorithm.buffer_size, got 64 with a buffer of 32; "
            "raise the buffer or lower the count",
        ),
        (
            "algorithm.per_prompt_buffer=64",
            "algorithm.per_prompt_buffer is called algorithm.buffer_size now, got algorithm.per_prompt_buffer = 64; "
            "rename it",
        ),
        (
            "algorithm.per_prompt_min_count=8",
            "algorithm.per_prompt_min_count is called algorithm.min_count now, "
            "got algorithm.per_prompt_min_count = 8; rename it",
        ),
        (
            "algorithm.gamma=0.5",
            'algorithm.gamma has a meaning with algorithm.attribution = "discount" alone, got 0.5 with "uniform"; '
            "remove it, or change algorithm.attribution",
        ),
        (
            "algorithm.kl_form=output",
            'algorithm.kl_form = "output" is the form of a KL, got algorithm.kl_weight = 0; '
            "remove it, or set algorithm.kl_weight",
        ),
        (
            "sampler.train_guidance=conditional",
            'sampler.train_guidance = "conditional" says which outputs carry gradient under guidance, got '
            "sampler.guidance_scale = 1, which is none; remove it, or raise the scale",
        ),
        (
            "model.train=full\nlora_alpha = 3",
            'model.train must be one of lora, full, got "full\\nlora_alpha = 3"; set for example model.train = "lora"',
        ),
    ],
)
def test_one_line_for_a_bad_override(override: str, want: str):
    assert _error(None, override) == want


def _one(*overrides: str) -> str:
    return _error(None, *overrides)


def test_a_range_of_steps_lies_within_the_rollout_and_is_not_empty():
    late = "selector.name=late_start"
    assert _one(late, "selector.start=5", "selector.end=5") == (
        "selector.start must be below selector.end, got start = 5 and end = 5; set selector.end to 6 or more"
    )
    rule = "selector.start and selector.end must lie within the 20 steps of a rollout"
    step = "set selector.end to 20 or less, or raise sampler.num_steps"
    assert _one(late, "selector.end=21") == f"{rule}, got start = none and end = 21; {step}"
    assert _one(late, "selector.start=20") == f"{rule}, got start = 20 and end = none; {step}"
    whole = Config.load(None, ["selector.name=static_range", "selector.start=0", "selector.end=20"])
    assert isinstance(whole.selector, StaticRange)
    assert (whole.selector.start, whole.selector.end) == (0, 20)


def test_rules_that_span_sections():
    for algorithm in ("grpo", "d3po", "awm"):
        assert _one(f"algorithm.name={algorithm}", "train.samples_per_prompt=1") == (
            f"{algorithm} compares the images of one prompt, so train.samples_per_prompt must be at least 2, got 1; "
            'raise it, or set algorithm.name = "ddpo"'
        )
    assert _one("algorithm.attribution=gain", "selector.name=every_step") == (
        'algorithm.attribution = "gain" needs a selector that senses the preference, got selector.name = "every_step"; '
        'set it to "adascope", or algorithm.attribution to "similarity"'
    )
    assert _one("sampler.tail_share=0.4") == (
        "sampler.tail_share = 0.4 needs the steps before the rollout, got selector.mask_source = 'current'; "
        'set it to "previous", or set sampler.tail_share = 1.0'
    )
    for overrides, every, rule in (
        (["sensing.kind=semantic"], 2, "knee"),
        (["selector.rule=schedule"], 1, "schedule"),
    ):
        assert _one("algorithm.attribution=gain", *overrides) == (
            f'algorithm.attribution = "gain" needs every rollout sensed, got sensing.every = {every} and '
            f'selector.rule = "{rule}"; set sensing.every = 1 and a rule that senses, or algorithm.attribution to '
            f'"similarity"'
        )
    assert Config.load(None, ["algorithm.attribution=gain", "sensing.kind=semantic", "sensing.every=1"])
    assert _one("selector.name=every_step", "sensing.kind=semantic") == (
        '[sensing] is what AdaScope sees of a rollout, got selector.name = "every_step"; remove sensing.kind, or set '
        'selector.name = "adascope"'
    )
    assert _one("selector.rule=knee_causal") == (
        "knee_causal decides while sampling, so it needs sensing.kind semantic or reward_only and sensing.stride = 1, "
        "got latent and no stride; the latent mode compares with the final latent, and values between strides with "
        'later ones; set them so, or selector.rule = "knee"'
    )


def test_rules_within_a_section():
    threshold = "selector.name=threshold"
    assert _one(threshold, "selector.uncertainty_low=0.2", "selector.uncertainty_high=0.1") == (
        "selector.uncertainty_low must be below selector.uncertainty_high, got 0.2 and 0.1; swap them"
    )
    window = "selector.name=window"
    assert _one(window, "selector.window_order=random", "selector.shift_decay=linear") == (
        'selector.shift_every does not decay with random windows, got selector.shift_decay = "linear"; '
        'set it to "none", or selector.window_order = "progressive"'
    )
    assert _one(window, "selector.shift_decay=linear", "selector.shift_every_min=30") == (
        "selector.shift_every_min must not exceed selector.shift_every, got 30 and 25; lower it"
    )
    assert _one(window, "selector.shift_every_min=3") == (
        'selector.shift_every_min has a meaning with selector.shift_decay = "linear" alone, got 3 with "none"; '
        "remove it, or change selector.shift_decay"
    )
    assert _one("selector.rule=literal", "selector.kappa=0.5") == (
        'selector.kappa has a meaning with selector.rule = "knee" or "knee_causal" alone, got 0.5 with "literal"; '
        "remove it, or change selector.rule"
    )
    assert _one("sampler.kind=ddim", "sampler.noise_level=0.5") == (
        'sampler.kind = "ddim" takes sampler.eta, got sampler.noise_level = 0.5; remove it'
    )
    assert _one("sampler.kind=ddpm", "sampler.eta=0.5") == (
        'sampler.kind = "ddpm" takes no noise, got sampler.eta = 0.5; remove it'
    )
    assert _one("model.train=full", "model.lora_alpha=3") == (
        'model.lora_alpha has a meaning with model.train = "lora" alone, got 3 with "full"; remove it, or change '
        "model.train"
    )


def test_what_a_file_says_of_another_choice_is_left_out_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = tmp_path / "mine.toml"
    path.write_text('[model]\nlora_rank = 4\n[train]\nlr_schedule = "cosine_with_restarts"\nlr_cycles = 3\n')
    config = Config.load(path, ["model.train=full", "train.lr_schedule=cosine"])
    assert (config.model.lora_rank, config.train.lr_cycles) == (16, 1)
    assert caplog.messages == [
        'model.train = "full" leaves out the file\'s model.lora_rank',
        'train.lr_schedule = "cosine" leaves out the file\'s train.lr_cycles',
    ]
    assert Config.load(path, ["model.train=lora"]).model.lora_rank == 4
    with pytest.raises(ConfigError, match=r'^model\.lora_rank has a meaning with model\.train = "lora" alone, got 8'):
        Config.load(path, ["model.train=full", "model.lora_rank=8"])


def test_one_pass_is_refused_where_it_cannot_be():
    ahead = ["train.update=one_pass", "selector.mask_source=previous"]
    assert _one(*ahead, "algorithm.attribution=similarity") == (
        'one_pass needs the weights before the rollout, got algorithm.attribution = "similarity"; '
        'set it to "uniform" or "discount", or train.update = "replay"'
    )
    assert _one(*ahead, "algorithm.name=dpok", "algorithm.kl_weight=0.0") == (
        'one_pass is for advantages that weigh a whole sample, and dpok has none; set train.update = "replay"'
    )
    assert _one(*ahead, "train.inner_epochs=2") == (
        "one_pass needs train.updates_per_iteration = 1, train.inner_epochs = 1 and algorithm.kl_weight = 0, "
        'got 1, 2 and 0; set them so, or train.update = "replay"'
    )
    assert Config.load(None, [*ahead, "algorithm.attribution=discount"])
    assert _one("algorithm.name=reinforce", "train.updates_per_iteration=2").startswith("reinforce is right for one")


def test_an_override_of_the_choice_leaves_out_what_the_file_said_of_the_old_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    path = _file(
        tmp_path,
        '[selector]\nname = "adascope"\nkappa = 0.9\n[sensing]\nkind = "semantic"\n[algorithm]\nmin_count = 8\n'
        "clip_range = 0.5\n",
    )
    config = Config.load(path, ["selector.name=every_step", "algorithm.name=grpo"])
    assert isinstance(config.selector, EveryStep)
    assert config.sensing is None
    assert isinstance(config.algorithm, Grpo)
    assert config.algorithm.clip_range == 0.5  # both have it
    assert [record.getMessage() for record in caplog.records] == [
        'selector.name = "every_step" leaves out the file\'s selector.kappa, sensing.kind',
        'algorithm.name = "grpo" leaves out the file\'s algorithm.min_count',
    ]
    assert _error(path, "selector.name=every_step", "selector.kappa=0.7").startswith("selector.kappa belongs to")
    caplog.clear()
    assert Config.load(path, ["selector.name=adascope"]).selector == Config.load(path).selector
    assert not caplog.records


def test_what_a_file_says_of_another_choice_is_refused(tmp_path: Path):
    path = _file(tmp_path, '[selector]\nname = "every_step"\nkappa = 0.7\n')
    assert _error(path) == (
        'selector.kappa belongs to selector.name = "adascope" or "complement", got selector.kappa = 0.7 with '
        '"every_step"; remove it, or change selector.name'
    )


def test_a_choice_of_ones_own_takes_any_key_and_survives_the_round_trip(tmp_path: Path):
    config = Config.load(None, ["selector.name=mine:Selector", "selector.depth=3", "reward.name=mine:reward"])
    assert isinstance(config.selector, Own)
    assert config.selector.keys() == {"depth": 3}
    assert Config.load(_file(tmp_path, config.to_toml())) == config
    assert _one("selector.name=:x") == (
        'selector.name must be module:object, got ":x"; write for example selector.name = "my_module:my_object"'
    )


def test_unknown_keys_come_first_and_the_rest_is_counted(tmp_path: Path):
    path = _file(tmp_path, "[train]\nmicrobatch = -1\niteratoins = 6\n[x]\ny = 1\n")
    assert _error(path) == "unknown key train.iteratoins = 6; did you mean train.iterations? (and 2 more)"


@pytest.mark.parametrize("overrides", [[], ["train.iterations=3"]])
def test_value_where_a_section_belongs(tmp_path: Path, overrides: list[str]):
    want = "train is a section, got train = 5; set one of its fields, such as train.iterations"
    assert _error(_file(tmp_path, "train = 5\n"), *overrides) == want


def test_values_are_shown_on_one_short_line(tmp_path: Path):
    message = _error(_file(tmp_path, f'[train]\niterations = """a\nb{"c" * 1000}"""\n'))
    assert 'got "a\\nbccc' in message
    assert len(message) < 200


def test_missing_file_names_the_similar_ones(tmp_path: Path):
    path = tmp_path / "quickstrat.toml"
    assert _error(path) == f"a configuration file must exist, got {path}; {tmp_path} holds no .toml file"
    (tmp_path / "quickstart.toml").write_text("")
    (tmp_path / "tiny.toml").write_text("")
    assert _error(path) == f"a configuration file must exist, got {path}; did you mean {tmp_path / 'quickstart.toml'}?"
    missing = tmp_path / "no" / "x.toml"
    assert _error(missing) == f"a configuration file must exist, got {missing}; there is no folder {missing.parent}"


def test_folder_in_place_of_a_file(tmp_path: Path):
    assert _error(tmp_path) == f"a configuration is a file, got the folder {tmp_path}; name the .toml file itself"
    inside = _file(tmp_path, "")
    assert _error(tmp_path) == f"a configuration is a file, got the folder {tmp_path}; did you mean {inside}?"


@pytest.mark.parametrize(
    ("text", "line", "rule", "content"),
    [
        ("[train]\niterations 5\n", 2, "Expected '=' after a key in a key/value pair", "iterations 5"),
        ("[train]\niterations = 5\niterations = 6\n", 3, "Cannot overwrite a value", "iterations = 6"),
        ("[run]\nseed = 1\n[train", 3, "Expected ']' at the end of a table declaration", "[train"),
    ],
)
def test_malformed_toml_names_the_line(tmp_path: Path, text: str, line: int, rule: str, content: str):
    path = _file(tmp_path, text)
    want = f'{path} line {line} is not TOML: {rule}, got "{content}"; put field = value lines below a [section] line'
    assert _error(path) == want


def test_file_that_is_not_text(tmp_path: Path):
    path = tmp_path / "config.toml"
    path.write_bytes(b"[train]\n\xff")
    assert _error(path) == f"{path} must be UTF-8 text, got a byte that is not at 8; save it as UTF-8"

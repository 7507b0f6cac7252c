"""Settings without the places of a machine."""

from pathlib import Path

import pytest

from adascope_fast.config import Config
from adascope_fast.training.hub.settings_shown import settings_shown, without_places


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("/data/me/prompts.txt", "prompts.txt"),
        ("~/prompts.txt", "prompts.txt"),
        ("../prompts/mine.txt", "mine.txt"),
        (r"C:\Users\me\mine.txt", "mine.txt"),
        ("--weights=/data/me/w --side 3", "--weights=w --side 3"),
        ("datasets:/data/me/set:train", "datasets:set:train"),
        ("datasets:owner/name:train", "datasets:owner/name:train"),
        ("owner/name", "owner/name"),
        ("https://host.example/a?token=b", "ADDRESS"),
        ("gpu7.example:8000", "ADDRESS"),
        ("10.0.0.1", "ADDRESS"),
        ("scenes:train", "scenes:train"),
        ("attn2.to_out.0", "attn2.to_out.0"),
        ("/", "PATH"),
    ],
)
def test_paths_and_addresses_are_replaced(text: str, want: str):
    assert without_places(text) == want


def test_a_relative_path_is_known_by_its_form_or_by_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights" / "clip").mkdir(parents=True)
    config = Config.load(
        None,
        ["prompts.train=data/mine.csv", "prompts.held_out=a/b/c", "evaluation.clip=weights/clip"],
    )
    shown, left_out = settings_shown(config, name="it", base="scenes", folder=tmp_path / "run")
    assert (shown.prompts.train, shown.prompts.held_out, shown.evaluation.clip) == ("mine.csv", "c", "clip")
    assert left_out == ["prompts.train", "prompts.held_out", "evaluation.clip"]
    again, left_out = settings_shown(
        Config.load(None, ["evaluation.clip=owner/clip"]), name="it", base="scenes", folder=tmp_path / "run"
    )
    assert (again.evaluation.clip, left_out) == ("owner/clip", [])


def test_the_keys_of_ones_own_parts_are_looked_through():
    own = '"mine:score" = {weight = 1.0, where = ["/data/me/a", "/data/you/a"], host = "gpu7"}'
    config = Config.load(None, ["reward.name=mixed", f"reward.parts={{{own}, jpeg_compressibility = 1.0}}"])
    shown, _ = settings_shown(config, name="it", base="scenes", folder=Path("run"))
    assert shown.reward.model_dump()["parts"]["mine:score"] == {"weight": 1.0, "where": ["a", "where-a"]}


def test_a_base_of_another_name_takes_what_belonged_to_the_old_place_with_it():
    config = Config.load(
        None, ["model.name=old/model", "model.revision=v1", "model.lora_rank=4", "prompts.train=animals:train"]
    )
    shown, _ = settings_shown(config, name="it", base="new/model", folder=Path("run"))
    assert (shown.model.name, shown.model.revision, shown.model.lora_rank) == ("new/model", None, 4)

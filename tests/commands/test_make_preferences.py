"""`make-preferences`: the set that it writes is one to train on, the same for the same seed, and never half written."""

import json
from pathlib import Path
from unittest import mock

import pytest
from command_line import TINY, call, refused
from preference_sets import write_pairs

from adascope_fast import prompts
from adascope_fast.config import Config
from adascope_fast.preferences import making
from adascope_fast.preferences.files import read_judged, read_pairs

QUICK = ["sampler.num_steps=4", "train.rollout_batch=8"]


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("model", ["scenes", "scenes-flow"])
def test_the_best_picture_of_a_prompt_is_preferred_to_its_worst(tmp_path: Path, model: str):
    out = tmp_path / "set"
    arguments = ["make-preferences", TINY, *QUICK, f"model.name={model}", "--pairs", "5", "--images-per-prompt", "3"]
    outcome = call(*arguments, "--out", out)
    assert outcome.code == 0, outcome
    first, advice, last = outcome.out.splitlines()
    assert first.startswith("5 pairs of ")
    assert "; chosen above rejected by 0." in first
    assert advice == (f'train on it with algorithm.name = "diffusion_dpo" and algorithm.preferences = "{out}"')
    assert last == str(out)
    found = read_pairs(out)
    lines = [json.loads(line) for line in found.text.splitlines()]
    assert len(lines) == len(set(found.prompts)) == 5
    assert all(line["chosen_score"] > line["rejected_score"] for line in lines)
    assert len(list((out / "pictures").iterdir())) == 10
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["model"], manifest["reward"]["name"], manifest["seed"]) == (model, "scene_attributes", 0)
    margins = [line["chosen_score"] - line["rejected_score"] for line in lines]
    assert manifest["made"]["margin"] == pytest.approx(sum(margins) / 5)
    again = tmp_path / "again"
    call(*arguments, "train.rollout_batch=8", "--out", again)
    assert _files(again) == _files(out), "the seed decides"
    call(*arguments, "--seed", "1", "--out", tmp_path / "other")
    assert read_pairs(tmp_path / "other").prompts != found.prompts


def test_a_written_picture_has_the_score_that_is_written(tmp_path: Path):
    """Of the 8 bits that are there, and not of what they were rounded from."""
    from torch import from_numpy

    from adascope_fast import rewards
    from adascope_fast.rewards.settings import JpegCompressibility

    judge = rewards.load(JpegCompressibility())

    out = tmp_path / "set"
    call("make-preferences", TINY, *QUICK, "reward.name=jpeg_compressibility", "--pairs", "2", "--out", out)
    pairs = read_pairs(out)
    for record, line in zip(pairs.records, map(json.loads, pairs.text.splitlines()), strict=True):
        for image, score in ((record.chosen, line["chosen_score"]), (record.rejected, line["rejected_score"])):
            pixels = from_numpy(image.pixels(image.width).copy()).permute(2, 0, 1)[None].float() / 255
            assert judge(pixels, [record.prompt]).item() == pytest.approx(score, rel=1e-6)


def test_labels_are_above_and_below_the_mean_of_the_prompts_pictures(tmp_path: Path):
    out = tmp_path / "set"
    outcome = call("make-preferences", TINY, *QUICK, "--labelled", "--pairs", "5", "--out", out)
    assert outcome.out.startswith("10 labelled pictures of "), outcome
    found = read_judged(out)
    lines = [json.loads(line) for line in found.text.splitlines()]
    assert len(lines) == len(list((out / "pictures").iterdir())) == 10, "and none that is not named"
    for prompt in found.prompts[:-1]:
        liked, disliked = (
            [line["score"] for line in lines if line["prompt"] == prompt and line["label"] == label]
            for label in (True, False)
        )
        if liked and disliked:  # the last prompt's pictures may have been cut off
            assert min(liked) > max(disliked)
    assert {one.is_liked for one in found.records} == {True, False}


def test_the_pictures_are_those_of_a_trained_run(run: Path, tmp_path: Path):
    arguments = ["make-preferences", TINY, *QUICK, "--pairs", "2", "--images-per-prompt", "2"]
    plain, trained = tmp_path / "plain", tmp_path / "trained"
    assert call(*arguments, "--out", plain).code == 0
    assert call(*arguments, "--adapter", run, "--out", trained).code == 0
    assert json.loads((trained / "manifest.json").read_text())["adapter"] == str(run)
    assert _files(trained) != _files(plain)
    assert "--adapter is a run of the configuration's model, got one of 'scenes' for 'scenes-flow'" in refused(
        *arguments, "model.name=scenes-flow", "--adapter", run, "--out", tmp_path / "x"
    )


def test_nothing_is_replaced_unasked_and_nothing_is_left_half_written(tmp_path: Path):
    out = tmp_path / "set"
    arguments = ["make-preferences", TINY, *QUICK, "--pairs", "2", "--images-per-prompt", "2", "--out", out]
    assert call(*arguments).code == 0
    before = _files(out)
    assert "never replaces what is there" in refused(*arguments)
    with mock.patch.object(making, "_paired", side_effect=OSError(28, "No space left on device")):
        outcome = call(*arguments, "--seed", "2", "--overwrite")
    assert outcome.code == 1
    assert _files(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    assert call(*arguments, "--seed", "2", "--overwrite").code == 0
    assert _files(out) != before
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    mine = write_pairs(tmp_path / "mine")
    line = refused(*arguments[:-1], mine, "--overwrite")
    assert "--overwrite replaces a set that was made here" in line
    assert (mine / "preferences.jsonl").is_file()


def test_a_reward_that_tells_nothing_apart_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "constant_reward.py").write_text("def constant(images, prompts):\n    return [1.0] * len(prompts)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(making, "MOST_TIES", 3)
    outcome = call("make-preferences", TINY, *QUICK, "reward.name=constant_reward:constant", "--out", tmp_path / "set")
    line = outcome.err.splitlines()[-1]  # after the bar
    assert outcome.code == 2
    assert "got 3 prompts in a row whose 4 pictures all have one reward, the last 1" in line
    assert not (tmp_path / "set").exists()


def test_what_is_missing_is_told_first(tmp_path: Path):
    assert "make-preferences needs --out" in refused("make-preferences", TINY)
    assert "needs a configuration file first" in refused("make-preferences")
    (tmp_path / "file").write_text("")
    assert "--out names a folder" in refused("make-preferences", TINY, "--out", tmp_path / "file")


def test_prompts_of_the_held_out_share_are_not_drawn(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    texts = [f"a small red circle on a grey background {number}" for number in range(6)]
    (tmp_path / "mine.txt").write_text("\n".join(texts))
    settings = [f"prompts.train={tmp_path / 'mine.txt'}", "prompts.held_out_share=0.5"]
    train, held_out = prompts.named(Config.load(None, settings).prompts)
    out = tmp_path / "set"
    arguments = ["make-preferences", TINY, *QUICK, *settings, "reward.name=jpeg_compressibility", "--pairs", "3"]
    outcome = call(*arguments, "--images-per-prompt", "2", "--out", out)
    assert outcome.code == 0, outcome
    assert "3 of the 6 different prompts of " in caplog.text
    assert set(read_pairs(out).prompts) == set(train) == set(texts) - set(held_out)

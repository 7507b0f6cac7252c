from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import CAPTIONS

from adascope_fast.comparison import drawing
from adascope_fast.comparison.arms import Arm, arms_of, load
from adascope_fast.comparison.drawing import Asked, folder_of
from adascope_fast.images import Folder
from adascope_fast.training.draw import draw

CPU = torch.device("cpu")
ASKED = Asked(tuple(CAPTIONS), images=2, seed=7, num_steps=3, guidance_scale=1.0)


@pytest.fixture
def base() -> Arm:
    return arms_of(["scenes"])[0]


def made(arm: Arm, folder: Path, asked: Asked = ASKED, **options: object) -> Folder:
    return folder_of(arm, asked, folder, device=CPU, batch=4, **options)  # type: ignore[arg-type]


def content(folder: Folder) -> dict[str, bytes]:
    return {image.path.name: image.path.read_bytes() for image in folder.images}


def test_every_image_has_its_prompt_and_a_seed_of_its_own(base: Arm, tmp_path: Path):
    folder = made(base, tmp_path / "x")
    assert [(image.prompt, image.seed) for image in folder.images] == [
        (CAPTIONS[0], 7),
        (CAPTIONS[0], 8),
        (CAPTIONS[1], 9),
        (CAPTIONS[1], 10),
    ]
    drawn = draw(load(base), CAPTIONS[1:], [9, 10], num_steps=3, guidance_scale=1.0)
    seen = np.stack([image.pixels() for image in folder.images[2:]])
    assert np.abs(seen / 255 - drawn.permute(0, 2, 3, 1).numpy().clip(0, 1)).max() <= 0.5 / 255 + 1e-4


def test_a_stopped_evaluation_draws_only_what_is_missing(base: Arm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    before = content(made(base, tmp_path / "x"))
    (tmp_path / "x" / "00001_1.png").unlink()
    (tmp_path / "x" / "metadata.jsonl").unlink()
    asked: list[str] = []
    whole = drawing.draw_each

    def watched(backbone, prompts, seeds, **options):
        asked.extend(prompts)
        return whole(backbone, prompts, seeds, **options)

    monkeypatch.setattr(drawing, "draw_each", watched)
    counts: list[int] = []
    assert content(made(base, tmp_path / "x", on_images=counts.append)) == before
    assert asked == [CAPTIONS[1]] * 2
    assert counts == [2, 2]
    made(base, tmp_path / "x")
    assert len(asked) == 2, "nothing is missing, and no model is loaded"


def test_images_of_other_settings_are_not_taken_for_these(base: Arm, tmp_path: Path):
    made(base, tmp_path / "x")
    other = Asked(ASKED.prompts, 2, 8, 3, 1.0)
    drawing.refuse_others(base, ASKED, tmp_path / "x")
    with pytest.raises(ValueError, match="add --overwrite"):
        drawing.refuse_others(base, other, tmp_path / "x")
    folder = made(base, tmp_path / "x", other, overwrite=True)
    assert [image.seed for image in folder.images] == [8, 9, 10, 11]


def test_a_run_that_was_trained_on_is_another(small_run: Path, tmp_path: Path):
    from adascope_fast.comparison.arms import identity

    (arm,) = arms_of([str(small_run)], with_base=False)
    before = identity(arm)
    assert identity(arm) == before
    newest = sorted((small_run / "checkpoints").glob("0*"))[-1]
    moved = tmp_path / newest.name
    newest.rename(moved)
    try:
        assert identity(arm) != before
    finally:
        moved.rename(newest)


def test_a_trained_arm_draws_other_images_from_the_same_noise(small_run: Path, tmp_path: Path):
    base, trained = arms_of([str(small_run)])
    one, other = made(base, tmp_path / "base"), made(trained, tmp_path / "trained")
    assert [image.seed for image in one.images] == [image.seed for image in other.images]
    assert content(one) != content(other)
    assert content(one) == content(made(arms_of(["scenes"])[0], tmp_path / "again"))

from pathlib import Path

import pytest
from image_folders import folder

from adascope_fast.backbones import folder_of
from adascope_fast.comparison.arms import arms_of, history_of, load, spread_of


def test_a_run_brings_its_base_along_once(small_run: Path):
    arms = arms_of([str(small_run), f"again={small_run}"])
    assert [(arm.name, arm.kind, arm.base) for arm in arms] == [
        ("base", "base", None),
        (small_run.name, "run", "base"),
        ("again", "run", "base"),
    ]
    assert [arm.name for arm in arms_of([str(small_run)], with_base=False)] == [small_run.name]
    assert arms_of([str(small_run)], with_base=False)[0].base is None


def test_a_model_a_lora_and_a_folder_of_images(small_run: Path, tmp_path: Path):
    folder(tmp_path / "shots", {"a": [0]})
    arms = arms_of([f"lora={small_run / 'adapter'}", str(tmp_path / "shots"), "scenes-flow"], model="scenes")
    assert [(arm.name, arm.kind, arm.base) for arm in arms] == [
        ("base", "base", None),
        ("lora", "adapter", "base"),
        ("shots", "images", None),
        ("scenes-flow", "model", None),
    ]


def test_a_lora_is_what_its_run_ended_with(small_run: Path):
    """The run's own weights, and its exported adapter added to the base model, predict alike."""
    import torch

    trained, added = (load(arm) for arm in arms_of([str(small_run), f"x={small_run / 'adapter'}"], model="scenes")[-2:])
    plain = load(arms_of(["scenes"])[0])
    sample = torch.randn(1, *trained.latent_shape, generator=torch.Generator().manual_seed(0))
    one, other, base = (
        backbone.predict(sample, torch.tensor([500.0]), backbone.encode(["a red circle"])).detach()
        for backbone in (trained, added, plain)
    )
    assert torch.allclose(one, other, atol=1e-5)
    assert not torch.allclose(one, base, atol=1e-4)


def test_a_lora_of_another_model_is_refused(small_run: Path):
    arm = arms_of([str(small_run / "adapter")], model="scenes-flow")[-1]
    with pytest.raises(ValueError, match=r"adapter .*must be one of this model|could not be read"):
        load(arm)


@pytest.mark.parametrize(
    ("sources", "said"),
    [
        (["a=scenes", "A=scenes-flow"], "a name of its own"),
        (["no/such/place"], "a source is a run, a model"),
        (["x/y=scenes"], "a source is a run, a model"),
        (["runs/none"], "got 'runs/none', where there is nothing; check the path"),
        (["../none"], "where there is nothing"),
    ],
)
def test_what_is_no_arm_is_refused(sources: list[str], said: str):
    with pytest.raises(ValueError, match=said):
        arms_of(sources)


def test_a_folder_of_nothing_known_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="none of these"):
        arms_of([str(tmp_path)])


def test_a_lora_needs_its_model(small_run: Path):
    with pytest.raises(ValueError, match="add --model"):
        arms_of([str(small_run / "adapter")])


def test_a_models_folder_is_a_model():
    assert arms_of([str(folder_of("scenes"))])[0].kind == "model"


def test_a_run_tells_its_course_and_the_bases_spread(small_run: Path):
    run = arms_of([str(small_run)])[-1]
    assert [point["iteration"] for point in history_of(run)] == [0, 1, 2]
    assert spread_of(run).keys() == {"contrast", "diversity"}
    assert history_of(arms_of(["scenes"])[0]) == []

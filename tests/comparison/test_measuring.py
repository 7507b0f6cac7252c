import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from image_folders import folder
from torch import Tensor

from adascope_fast.comparison.arms import Arm
from adascope_fast.comparison.measuring import Asking, Line, measure
from adascope_fast.comparison.reading import batches, pixels_of
from adascope_fast.metrics import MeanScore, Metric
from adascope_fast.metrics.sources import Sources
from adascope_fast.metrics.table import Row


class Brightness(MeanScore):
    name, title, higher_is_better = "brightness", "mean value", True

    def rows(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images.mean((1, 2, 3))


class FromReference(Brightness):
    """Mean value above that of the reference."""

    reference = 0.0

    def against(self, reference: Metric) -> None:
        self.reference = Brightness.value(self, torch.cat(reference._rows), [])

    def value(self, rows: Tensor, prompts: Sequence[str]) -> float:
        return super().value(rows, prompts) - self.reference


class Large(Brightness):
    def rows(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        if images.shape[-1] < 8:
            raise ValueError(f"large needs images of 8 px, got {images.shape[-1]}; draw larger ones")
        return super().rows(images, prompts)


def no_weights(sources: Sources) -> Metric:
    raise ValueError("no weights; get them")


def asking(key: str, make: Callable[[Sources], Metric], *, needs_reference: bool = False) -> Asking:
    row = Row(key, key, key, "quality", True, make, needs_reference)
    return Asking(row, "quality", counts=True)


def measured(tmp_path: Path, asked: Sequence[Asking], reference: str | None = None, batch: int = 3) -> list[Line]:
    greys = {"base": [51.0, 0.0], "trained": [102.0, 0.0], "other": [255.0, 255.0]}
    folders = {name: folder(tmp_path / name, {"a": [one, one], "b": [two, two]}) for name, (one, two) in greys.items()}
    arms = [Arm("trained", "run", "x", base="base"), Arm("base", "base", "y"), Arm("other", "images", "z")]
    return measure(
        arms, folders, asked, Sources(), reference=reference, batch=batch, device=torch.device("cpu"), seed=0
    )


def test_a_metric_of_every_arm_with_its_gain_over_the_base(tmp_path: Path):
    (line,) = measured(tmp_path, [asking("brightness", lambda _: Brightness())])
    assert {name: round(one.value, 6) for name, one in line.estimates.items()} == {
        "trained": 0.2,
        "base": 0.1,
        "other": 1.0,
    }
    assert list(line.estimates) == ["trained", "base", "other"], "in the order of the arms"
    gain = line.estimates["trained"].gain
    assert gain is not None
    assert gain[0] == pytest.approx(0.1)
    assert gain[1] < 0.1 < gain[2]
    assert line.estimates["base"].gain is None


def test_the_interval_of_the_gain_is_of_equal_draws(tmp_path: Path):
    """The trained arm is twice as bright in every prompt, so the gain varies as the base does, and no more."""
    (line,) = measured(tmp_path, [asking("brightness", lambda _: Brightness())])
    base, trained = line.estimates["base"], line.estimates["trained"]
    assert trained.gain is not None
    assert trained.gain[2] - trained.gain[0] == pytest.approx(base.high - base.value)


def test_the_spread_is_known_of_what_the_verdict_looks_at(tmp_path: Path):
    lines = measured(
        tmp_path, [asking("contrast", lambda _: Brightness()), asking("brightness", lambda _: Brightness())]
    )
    assert lines[0].estimates["base"].spread == pytest.approx(0.2 / math.sqrt(2))
    assert math.isnan(lines[1].estimates["base"].spread)


def test_batches_do_not_matter(tmp_path: Path):
    whole, one = (
        measured(tmp_path / str(batch), [asking("brightness", lambda _: Brightness())], batch=batch)[0]
        for batch in (100, 1)
    )
    assert [one.estimates[name].value for name in one.estimates] == [
        whole.estimates[name].value for name in whole.estimates
    ]


def test_what_cannot_be_measured_says_why(tmp_path: Path):
    asked = [
        asking("brightness", lambda _: Brightness()),
        asking("none", no_weights),
        asking("large", lambda _: Large()),
    ]
    folder(tmp_path / "wide", {"a": [1]}, size=(4, 4))
    lines = measured(tmp_path, asked)
    assert {one.why for one in lines[1].estimates.values()} == {"no weights; get them"}
    assert all(one.is_known for one in lines[2].estimates.values())


def test_images_too_small_for_one_metric_leave_the_others(tmp_path: Path):
    folders = {"small": folder(tmp_path / "small", {"a": [255]}, size=(4, 4))}
    lines = measure(
        [Arm("small", "images", "z")],
        folders,
        [asking("large", lambda _: Large()), asking("brightness", lambda _: Brightness())],
        Sources(),
        reference=None,
        batch=2,
        device=torch.device("cpu"),
        seed=0,
    )
    assert lines[0].estimates["small"].why == "large needs images of 8 px, got 4; draw larger ones"
    assert lines[1].estimates["small"].value == 1


def test_what_needs_a_reference_is_compared_with_it_and_not_told_of_it(tmp_path: Path):
    (line,) = measured(tmp_path, [asking("above", lambda _: FromReference(), needs_reference=True)], reference="base")
    assert line.estimates["trained"].value == pytest.approx(0.1)
    assert line.estimates["base"].why == "it is what the others are compared with"
    assert line.estimates["trained"].gain is None
    (line,) = measured(tmp_path / "none", [asking("above", lambda _: FromReference(), needs_reference=True)])
    assert {one.why for one in line.estimates.values()} == {"no arm or folder is the reference; add --reference"}


def test_batches_hold_images_of_one_size(tmp_path: Path):
    made = folder(tmp_path / "mixed", {"a": [0, 0, 0], "b": [0]})
    folder(tmp_path / "mixed2", {"a": [0]}, size=(5, 5))
    (tmp_path / "mixed2" / "0_0.png").replace(tmp_path / "mixed" / "0_1.png")
    sizes = [[image.size() for image in batch] for batch in batches(made, 2)]
    assert sizes == [[(8, 6)], [(5, 5)], [(8, 6), (8, 6)]]
    assert pixels_of(made.images[:1]).shape == (1, 3, 6, 8)

"""The automatic judge: it prefers what it says it prefers, through the command that people and models use."""

import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from command_line import call
from PIL import Image

from adascope_fast.pretraining.drawing import draw
from adascope_fast.prompts.scenes import parse

CHECKOUT = Path(__file__).parents[2]
PROMPTS = ("a large red circle in the centre on a white background", "two small blue squares on a black background")


@pytest.fixture(scope="module")
def judge() -> Any:
    sys.path.insert(0, str(CHECKOUT))
    yield importlib.import_module("experiments.paper.judge")
    sys.path.remove(str(CHECKOUT))


def _arm(folder: Path, drawn: Sequence[str]) -> None:
    """Images of what is `drawn`, said to be of PROMPTS."""
    folder.mkdir(parents=True)
    images = draw([parse(text) for text in drawn], seed=0)
    lines = []
    for number, (image, prompt) in enumerate(zip(images, PROMPTS, strict=True)):
        pixels = (image.permute(1, 2, 0) * 255).round().byte().numpy()
        Image.fromarray(pixels).save(folder / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "prompt": prompt, "seed": number}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def test_the_image_that_is_as_the_prompt_says_wins(judge: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    _arm(tmp_path / "seen" / "images" / "right", PROMPTS)
    _arm(tmp_path / "seen" / "images" / "wrong", PROMPTS[::-1])

    def inside(command: Sequence[str], log: Path, *, threads: int = 1) -> None:
        outcome = call(*command[3:])
        assert outcome.code == 0, outcome
        log.write_text(outcome.out)

    monkeypatch.setattr(judge.runs, "call", inside)
    judge.main(
        [
            "--images",
            str(tmp_path / "seen"),
            "--arms",
            "right",
            "wrong",
            "--num",
            "2",
            "--out",
            str(tmp_path / "out.json"),
        ]
    )
    votes = [json.loads(line) for line in (tmp_path / "seen-judged" / "votes.jsonl").read_text().splitlines()]
    pairs = json.loads((tmp_path / "seen-judged" / "pairs.json").read_text())["pairs"]
    assert len(votes) == 2 * 2, "pairs, questions"
    assert {vote["rater"] for vote in votes} == {"model:scenes-automatic"}
    for vote in votes:
        chosen = pairs[vote["pair"]][vote["choice"]]
        assert chosen["arm"] == "right"
    values = json.loads((tmp_path / "out.json").read_text())
    assert values["judge"].startswith("The judgment of images in pairs by a documented automatic judge")


def test_alike_images_are_equal_and_the_margin_holds(judge: Any):
    assert judge.preferred([0.5, 0.51], 0.02) == "equal"
    assert judge.preferred([0.5, 0.53], 0.02) == "second"
    assert judge.preferred([3, 2], 0) == "first"
    assert judge.preferred([3, 3], 0) == "equal"


def test_images_must_have_been_left(judge: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        judge.main(["--images", str(tmp_path)])
    assert stopped.value.code == 2
    assert "has no images of ddpo, ddpo_adascope; run experiments/paper/run.py tab3" in capsys.readouterr().err

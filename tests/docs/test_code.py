"""The Python of the pages runs as it stands, on the smallest settings that go through every part."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adascope_fast import AdaScope, Curves

CHECKOUT = Path(__file__).parents[2]
TINY = str(CHECKOUT / "configs" / "tiny.toml")
PAGES = ["README.md", "docs/configuration.md", "docs/extend.md"]
PAGES += sorted(page.relative_to(CHECKOUT).as_posix() for page in (CHECKOUT / "docs" / "extend").glob("*.md"))


def _sections() -> dict[str, list[str]]:
    """The blocks of Python of each section, by page and heading."""
    found = {}
    for page in PAGES:
        for section in re.split(r"^## ", (CHECKOUT / page).read_text(encoding="utf-8"), flags=re.MULTILINE):
            blocks = re.findall(r"^```python\n(.*?)^```", section, flags=re.DOTALL | re.MULTILINE)
            if blocks:
                found[f"{page}: {section.splitlines()[0].removeprefix('# ')}"] = blocks
    return found


SECTIONS = _sections()


def _run(blocks: list[str]) -> dict[str, Any]:
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block.replace("configs/quickstart.toml", TINY).replace("iterations=5", "iterations=1"), names)
    return names


@pytest.fixture(autouse=True)
def _somewhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("section", SECTIONS)
def test_a_section_runs(section: str):
    torch.manual_seed(0)
    assert _run(SECTIONS[section])


def test_every_page_of_extend_has_an_example():
    assert {section.partition(":")[0] for section in SECTIONS} == set(PAGES)


def test_the_loop_decides_what_its_curves_say(capsys: pytest.CaptureFixture[str]):
    loop, own_curves = SECTIONS["docs/extend.md: AdaScope in your own loop"]
    torch.manual_seed(0)
    names = _run([loop])
    keep, prompts = names["keep"], names["prompts"]
    assert keep.shape == (8, 20)
    states = torch.stack([*names["guesses"], names["latents"]], 1).flatten(2).double().numpy()
    pearson = np.stack([np.corrcoef(rows) for rows in states])
    volatility = 1 - np.stack([rows.diagonal(1) for rows in pearson])
    curves = Curves(torch.from_numpy(pearson[:, :, -1]), volatility=torch.from_numpy(volatility))
    adascope = AdaScope()
    assert torch.equal(keep, adascope.decide(curves, prompts))
    assert 0 < keep.sum() < keep.numel()
    assert str(adascope.telemetry()["intervals"]) in capsys.readouterr().out
    exec(own_curves, names)
    assert names["keep"].shape == (8, 20)
    assert (names["keep"] == names["keep"][0]).all(), "one interval for the batch"
    own = loop.split("adascope, guesses")[1]
    assert len([line for line in own.splitlines() if "guesses" in line or "adascope" in line]) < 10

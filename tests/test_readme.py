"""The README's code for loops that are not ours runs as it stands, and decides what the curves say."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from adascope_fast import AdaScope, Curves

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_loop_of_your_own(capsys):
    section = README.split("## In a loop of your own")[1].split("\n## ")[0]
    loop, own_curves = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    exec(loop, names)
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

"""What stays of a run when its folder is gone: its settings, points and scores in one file, without weights.

With such records a comparison that takes more hours than a sitting has is made in several, on the same kind of machine.
"""

import json
from pathlib import Path
from typing import Any

SETTING, MADE, FINISHED, POINTS, SCORES = "setting", "made", "finished", "points", "held_out-"


def keep(run: Path, file: Path) -> None:
    """Write the record of a run that is whole and measured."""
    whole = {name: json.loads((run / f"{name}.json").read_text()) for name in (SETTING, MADE, FINISHED)}
    lines = {path.stem: _lines(path) for path in sorted(run.glob("*.jsonl"))}
    text = json.dumps(whole | lines, separators=(",", ":")).replace('},{"', '},\n{"')
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(text + "\n")
    partial.rename(file)


def bring_back(run: Path, file: Path, setting: dict[str, Any]) -> bool:
    """Whether the run's folder was made of a record, which needs the same settings; a folder that is there stays."""
    if run.exists() or not file.is_file():
        return False
    found = json.loads(file.read_text())
    if found[SETTING] != setting:
        return False
    run.mkdir(parents=True)
    for name, value in found.items():
        if name == POINTS or name.startswith(SCORES):
            (run / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in value))
        elif name != FINISHED:
            (run / f"{name}.json").write_text(json.dumps(value))
    (run / f"{FINISHED}.json").write_text(json.dumps(found[FINISHED]))  # last: it says that all is there
    return True


def _lines(file: Path) -> list[Any]:
    return [json.loads(line) for line in file.read_text().splitlines()]

"""Rewards of one's own that raise, hang, exit, or return what is no score."""

import json
import math
import shutil
import signal
import struct
from pathlib import Path

from bench.faults.program import CHECKOUT, Outcome
from bench.faults.runs import (
    Row,
    Setting,
    differences,
    digest,
    go_on,
    has_traceback,
    held,
    is_bad,
    lines_of,
    refusal,
    reset,
    short,
    tensors_of,
    train,
)

HEAD = "import sys\n\nfrom good import score as good\n\n\ndef score(images, prompts):\n"
# What a reward does, and the outcomes that are right; its module, `probe`, or the cause must be in the line.
REWARDS = {
    "raises ValueError": ("    raise ValueError('no judge')", {"refused"}),
    "raises RuntimeError": ("    raise RuntimeError('no judge')", {"refused"}),
    "raises KeyError": ("    return {}['no judge']", {"refused"}),
    "raises MemoryError": ("    raise MemoryError('no judge')", {"refused"}),
    "raises an exception of its own": (
        "    class Odd(Exception):\n        pass\n\n    raise Odd('two\\nlines')",
        {"refused"},
    ),
    "returns NaN": ("    return good(images, prompts) * float('nan')", {"refused", "dropped"}),
    "returns NaN for one image": (
        "    found = good(images, prompts)\n    found[0] = float('nan')\n    return found",
        {"refused", "dropped"},
    ),
    "returns inf": ("    return good(images, prompts) + float('inf')", {"refused", "dropped"}),
    "returns None": ("    return None", {"refused"}),
    "returns text": ("    return ['good'] * len(prompts)", {"refused"}),
    "returns one number": ("    return good(images, prompts).mean()", {"refused"}),
    "returns a matrix": ("    return images.mean((2, 3))", {"refused"}),
    "returns too few": ("    return good(images, prompts)[:-1]", {"refused"}),
    "returns complex numbers": ("    return good(images, prompts) * 1j", {"refused"}),
    "exits with 0": ("    sys.exit(0)", {"refused"}),
    "exits with 3": ("    sys.exit(3)", {"refused"}),
    "exits with text": ("    sys.exit('enough')", {"refused"}),
    "changes its images": (
        "    found = good(images, prompts).clone()\n    images.zero_()\n    prompts.clear()\n    return found",
        {"recovered"},
    ),
    "returns a tensor that asks for gradients": ("    return good(images, prompts).requires_grad_()", {"recovered"}),
    "turns gradients off": (
        "    import torch\n\n    torch.set_grad_enabled(False)\n    return good(images, prompts)",
        {"recovered", "refused"},
    ),
    "draws random numbers": (
        "    import torch\n\n    torch.manual_seed(3)\n    torch.rand(5)\n    return good(images, prompts)",
        {"recovered"},
    ),
    "is constant": ("    return [0.5] * len(prompts)", {"hinted"}),
    "takes one argument": ("\n\ndef score(images):\n    return images.mean((1, 2, 3))", {"refused"}),
    "has no such name": ("    pass\n\n\ndel score", {"refused"}),
    "is no function": ("    pass\n\n\nscore = 3", {"refused"}),
    "does not parse": ("    return (", {"refused"}),
    "raises at import": ("    pass\n\n\nraise RuntimeError('no judge')", {"refused"}),
    "exits at import": ("    pass\n\n\nsys.exit(0)", {"refused"}),
}
CAUSES = ("probe", "reward", "no judge")


def run_case(setting: Setting, name: str) -> list[Row]:
    """One faulty reward: one line, or the result of the good one."""
    body, right = REWARDS[name]
    folder = setting.folder("rewards", name.replace(" ", "_").replace("'", ""))
    (folder / "probe.py").rename(folder / "good.py")
    (folder / "probe.py").write_text(HEAD + body + "\n")
    outcome = setting.program.run(train(), folder)
    label, detail = judge(setting, folder / "run", outcome, *CAUSES)
    if label == "silent" and "hinted" in right:
        told = [line for line in lines_of(outcome.err) + lines_of(outcome.out) if "reward" in line.lower()]
        told = [line for line in told if not line.startswith(("seconds:", "steps trained:", "held-out", "report:"))]
        label, detail = ("hinted", "") if told else ("silent", "no hint about the reward")
    if label in right:
        reset(folder)
        return [Row("reward", name, label)]
    failure = label if is_bad(label) else "silent"
    return [Row("reward", name, failure, f"a reward that {name}: {label}, {detail or short(outcome)}")]


def hang(setting: Setting, iteration: int) -> list[Row]:
    """A reward that never returns: killed, the run resumes to the same result."""
    folder = setting.folder("rewards", f"hang{iteration}")
    with held(setting, folder, iteration) as running:
        running.signal(signal.SIGKILL)
        running.wait()
    outcome, detail = go_on(setting, folder)
    return [Row("reward", "hangs and is killed", outcome, detail)]


def judge(setting: Setting, run: Path, outcome: Outcome, *causes: str) -> tuple[str, str]:
    """`recovered` (the result of the run left alone), `dropped`, `refused` with nothing exported, or a failure."""
    if has_traceback(outcome):
        return "traceback", short(outcome)
    if outcome.code != 0:
        label = refusal(outcome, *causes)
        exported = [path.name for path in run.glob("adapter/*.safetensors")]
        if label == "refused" and exported:
            return "silent", f"a run that failed exported {', '.join(exported)}"
        return label, "" if label == "refused" else short(outcome)
    changed = differences(digest(run), setting.digest)
    if not changed:
        return "recovered", ""
    bad = not_finite(run)
    if bad:
        return "silent", f"exit code 0 with values that are not finite in {bad}"
    records = stats(run)
    left_out = sum(int(record.get(key) or 0) for record in records for key in ("samples_dropped", "updates_skipped"))
    if left_out and all(record.get("updates_skipped") for record in records):
        return "silent", "exit code 0, and every update was skipped"
    return ("dropped", "") if left_out else ("silent", f"exit code 0, and nothing said of {', '.join(changed)}")


def not_finite(run: Path) -> str:
    """The first exported file with a float32 value that is not finite, empty if all are."""
    for path in sorted(run.glob("adapter/*.safetensors")):
        for value in tensors_of(path).values():
            kind, raw = value[: value.index(b"]") + 1], value[value.index(b"]") + 1 :]
            if kind.startswith(b"F32") and not all(map(math.isfinite, struct.unpack(f"<{len(raw) // 4}f", raw))):
                return path.name
    return ""


def stats(run: Path) -> list[dict]:
    """The statistics of a run, an iteration each."""
    path = run / "stats.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def copied_model(folder: Path) -> Path:
    """The embedded model in a folder of its own, to be damaged."""
    return Path(shutil.copytree(CHECKOUT / "adascope_fast" / "assets" / "scenes", folder / "model"))

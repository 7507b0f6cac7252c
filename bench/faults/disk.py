"""A disk that is full at different moments, and one that is read-only.

Where this process may mount, a small tmpfs; elsewhere a limit on the size of a file (RLIMIT_FSIZE, an OSError as well).
"""

import os
import subprocess
from pathlib import Path

from bench.faults.runs import Row, Setting, go_on, has_traceback, newest_whole, refusal, reset, short, train

TMPFS, LIMIT = "tmpfs", "RLIMIT_FSIZE"
NO_SPACE = ("space", "full", "large", "disk", "read-only", "Read-only", "writable", "Permission", "permission")


def means(folder: Path) -> str:
    """`tmpfs` if this process may mount one, else `RLIMIT_FSIZE`."""
    folder.mkdir(parents=True, exist_ok=True)
    if not _mount(folder, "size=64k"):
        return LIMIT
    _unmount(folder)
    return TMPFS


def cases(setting: Setting, run: Path, used: str, count: int) -> list[int]:
    """`count` sizes in bytes, from almost nothing to what the run needs (tmpfs) or its largest file (limit)."""
    sizes = [path.stat().st_size for path in run.rglob("*") if path.is_file()]
    most = int(sum(sizes) * 1.5) if used == TMPFS else max(sizes)
    return [4096 + int((most - 4096) * (index + 0.5) / count) for index in range(count)]


def run_case(setting: Setting, used: str, size: int) -> list[Row]:
    """Train until there is no space, then go on with enough: one line, whole checkpoints, the same result."""
    folder = setting.folder("disk", f"{used}{size}")
    disk = folder / "disk"
    disk.mkdir()
    place = ("run.folder=disk/run",)
    fault = f"full disk ({used})"
    name = f"{size} bytes"
    if used == TMPFS and not _mount(disk, f"size={size}"):
        return [Row("disk", fault, "not run", f"{name}: could not mount a tmpfs")]
    try:
        limit = None if used == TMPFS else size
        outcome = setting.program.run(train(*place), folder, largest_file=limit)
        if outcome.code == 0 and not has_traceback(outcome):
            label, detail = go_on(setting, folder, "disk/run", *place)
            return [Row("disk", "a disk that suffices", label, detail)]
        label = refusal(outcome, "disk/run")
        if label != "refused":
            return [Row("disk", fault, label, f"{name}: {short(outcome)}")]
        whole = newest_whole(disk / "run")
        if used == TMPFS:
            subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        label, detail = go_on(setting, folder, "disk/run", *place)
        if label == "recovered" and newest_whole(disk / "run") < whole:
            label, detail = "lost", f"checkpoint {whole} is gone"
        return [Row("disk", fault, label, detail and f"{name}: {detail}")]
    finally:
        if used == TMPFS:
            _unmount(disk)
        reset(folder)


def read_only(setting: Setting, command: str) -> list[Row]:
    """A command on a folder that cannot be written: exit code 2 and one line that names the folder."""
    folder = setting.folder("disk", f"read_only_{command}")
    disk = folder / "disk"
    disk.mkdir()
    place = ("run.folder=disk/run",)
    arguments = {
        "train": train(*place),
        "resume": ["train", "--resume", "disk/run", "train.iterations=5"],
        "report": ["report", "disk/run"],
        "merge": ["merge", "disk/run", "disk/merged"],
        "sample": ["sample", "disk/run", "--prompt", "a small red circle", "--num", "1"],
    }[command]
    mounts = os.geteuid() == 0
    if mounts and not _mount(disk, "size=64m"):
        return [Row("disk", "read-only folder", "not run", "root writes everywhere, and could not mount a tmpfs")]
    try:
        if command != "train":
            made = setting.program.run(train(*place), folder)
            if made.code != 0:
                return [Row("disk", "read-only folder", "not run", short(made))]
        _freeze(disk, mounts)
        outcome = setting.program.run(arguments, folder)
        label = refusal(outcome, "disk", *NO_SPACE)
        if label == "refused" and outcome.code != 2:
            label = "died"
        elif label == "died" and outcome.code == 0:
            label = "silent"
        return [Row("disk", f"read-only folder, {command}", label, "" if label == "refused" else short(outcome))]
    finally:
        if mounts:
            _unmount(disk)
        else:
            _thaw(disk)
        reset(folder)


def _freeze(disk: Path, mounts: bool) -> None:
    if mounts:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        return
    for path in [*disk.rglob("*"), disk]:
        if path.is_dir():
            path.chmod(0o500)


def _thaw(disk: Path) -> None:
    disk.chmod(0o700)
    for path in disk.rglob("*"):
        if path.is_dir():
            path.chmod(0o700)


def _mount(folder: Path, options: str) -> bool:
    if os.geteuid() != 0:
        return False
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def _unmount(folder: Path) -> None:
    subprocess.run(["umount", "--lazy", str(folder)], check=True)

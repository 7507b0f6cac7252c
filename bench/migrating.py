"""CPU time of an epoch of one script: TRL 0.23.1's DDPOTrainer, and the same with its import changed.

    python bench/migrating.py [--repeats 3] [--trl-python .venv-trl/bin/python] [--out bench/results/migrating_cpu.json]

The script below is the same for both but for the module it takes its names from. Each variant is a process, their
epochs take turns, and what is compared is CPU time (user + system) of an epoch, the median over the repeats after a
first one that does not count. The embedded model, T = 50, guidance 5, LoRA of rank 4, float32, one thread, how red an
image is as the reward, in two settings: batches of 8 images, and the defaults of `DDPOConfig`, batches of one.
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
SCENES = HERE.parent / "adascope_fast" / "assets" / "scenes"
OURS = "adascope_fast.compat.trl"
PACKAGES = ("trl", "torch", "diffusers", "transformers", "peft", "accelerate")
PROMPTS = ("a red circle on a grey background", "two blue squares", "a green triangle", "a small white cross")
SETTINGS: dict[str, dict[str, int]] = {
    "batches of 8": {"sample_batch_size": 8, "sample_num_batches_per_epoch": 1, "train_batch_size": 8},
    "TRL's defaults": {"sample_batch_size": 1, "sample_num_batches_per_epoch": 2, "train_batch_size": 1},
}
VARIANTS: dict[str, tuple[str, dict[str, str]]] = {
    "TRL 0.23.1": ("trl", {}),
    "ours, import changed": (OURS, {}),
    'ours, selector="adascope"': (OURS, {"selector": "adascope"}),
}


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="epochs that count, of each variant")
    parser.add_argument("--num-steps", type=int, default=50, help="denoising steps")
    parser.add_argument("--trl-python", default=str(HERE.parent / ".venv-trl" / "bin" / "python"))
    parser.add_argument("--out", type=Path, default=HERE / "results" / "migrating_cpu.json")
    chosen = parser.parse_args()
    before, rows, versions = list(os.getloadavg()), {}, {}
    for setting in SETTINGS:
        with ExitStack() as stack:
            running = {name: stack.enter_context(Epochs(name, setting, chosen)) for name in VARIANTS}
            versions |= {name: one.versions for name, one in running.items()}
            taken: dict[str, list[float]] = {name: [] for name in running}
            for number in range(chosen.repeats + 1):
                for name, one in running.items():
                    seconds = one.next()
                    if number:
                        taken[name].append(seconds)
        base = median(taken["TRL 0.23.1"])
        rows[setting] = {
            name: {"cpu_s": median(taken[name]), "of_trl": base / median(taken[name]), "repeats": taken[name]}
            for name in taken
        }
        for name, row in rows[setting].items():
            print(
                f"{setting:15} {name:27} {row['cpu_s']:7.2f} CPU s an epoch, {row['of_trl']:.2f} times TRL", flush=True
            )
    result = {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", "bench/migrating.py", f"--repeats {chosen.repeats}"]),
        "machine": {"processor": _processor(), "cores": os.cpu_count(), "python": platform.python_version()},
        "load": {"before": before, "after": list(os.getloadavg())},
        "versions": versions,
        "num_steps": chosen.num_steps,
        "settings": SETTINGS,
        "rows": rows,
    }
    chosen.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(chosen.out)


class Epochs:
    """The script in a process of its own, which makes an epoch whenever it is asked."""

    def __init__(self, variant: str, setting: str, chosen: argparse.Namespace) -> None:
        module, options = VARIANTS[variant]
        told = {"module": module, "options": options, "num_steps": chosen.num_steps, "settings": SETTINGS[setting]}
        python = chosen.trl_python if module == "trl" else sys.executable
        self._work = tempfile.TemporaryDirectory()
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
        self._process = subprocess.Popen(
            [python, "-W", "ignore", str(HERE / "migrating.py"), "--script", json.dumps(told)], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=self._work.name, env=environment,
        )  # fmt: skip
        self.versions = self._read()["versions"]

    def next(self) -> float:
        """CPU seconds of one more epoch."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._read()["cpu_s"]

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("a variant ended early; what it said is above")
        return json.loads(line)

    def __enter__(self) -> "Epochs":
        return self

    def __exit__(self, *error: object) -> None:
        self._process.communicate()
        self._work.cleanup()


def script(told: dict[str, Any]) -> None:
    """What somebody who trains with TRL has written, more or less; an epoch for each line of the standard input."""
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not get between the answers
    import torch
    from accelerate import PartialState

    PartialState(cpu=True)  # TRL's logger needs one before the pipeline is loaded
    torch.set_num_threads(1)
    trl = import_module(told["module"])
    prompts = cycle(PROMPTS)
    config = trl.DDPOConfig(
        mixed_precision="no",
        accelerator_kwargs={"cpu": True},
        sample_num_steps=told["num_steps"],
        save_freq=10**6,
        **told["settings"],
    )
    trainer = trl.DDPOTrainer(
        config,
        lambda images, prompts, metadata: (images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3)), {}),
        lambda: (next(prompts), {}),
        trl.DefaultDDPOStableDiffusionPipeline(str(_folder())),
        **told["options"],
    )
    trainer.sd_pipeline.set_progress_bar_config(disable=True)
    channel.write(json.dumps({"versions": dict(_versions())}) + "\n")
    step = 0
    for epoch, _ in enumerate(sys.stdin):
        start = time.process_time()
        step = trainer.step(epoch, step)
        channel.write(json.dumps({"cpu_s": time.process_time() - start}) + "\n")


def _folder() -> Path:
    """The embedded model, in a copy where transformers 4 knows the names of its text encoder's weights."""
    if int(version("transformers").partition(".")[0]) >= 5:
        return SCENES
    sys.path.insert(0, str(HERE.parent / "tests" / "data"))
    return import_module("make_trl_epochs").for_transformers_4(Path("scenes").absolute())


def _versions() -> Iterator[tuple[str, str]]:
    for name in PACKAGES:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            continue


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    if sys.argv[1:2] == ["--script"]:
        script(json.loads(sys.argv[2]))
    else:
        main()

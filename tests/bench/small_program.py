"""A stand-in for `adascope-fast` that trains a few numbers, with a flaw that its first argument names.

`python small_program.py none train CONFIG.toml section.key=value ...` and so on. Without a flaw it withstands what
`bench/faults` does to it; each flaw is one that has to be found.
"""

# ruff: noqa: E402  (a signal is answered before anything that takes long to import)
import os
import signal
import sys
from typing import Any

FLAW = sys.argv[1]
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def early(*_: Any) -> None:
    os.write(2, b"interrupted\n")
    os._exit(130)


def interrupt(*_: Any) -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


if FLAW != "signals":
    for one in SIGNALS:
        signal.signal(one, early)

import fcntl
import hashlib
import importlib
import json
import math
import shutil
import socket
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file


class RefusedError(Exception):
    """A mistake of the user's or an unusable file."""


def settings(arguments: list[str], stored: dict[str, Any]) -> dict[str, Any]:
    given: dict[str, Any] = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    iterations = int(given.get("train.iterations", stored.get("iterations", 4)))
    reward = given.get("reward.name", stored.get("reward", "probe:score"))
    return {"folder": given.get("run.folder", "run"), "iterations": iterations, "reward": reward}


def config_of(run: Path) -> dict[str, Any]:
    path = run / "config.toml"
    try:
        found = tomllib.loads(path.read_text())
        return {"folder": str(run), "iterations": found["iterations"] + 0, "reward": found["reward"] + ""}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RefusedError(f"{path} must be the configuration of a run, got {error}") from None


@contextmanager
def naming(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise RefusedError(f"{path} cannot be written: {error}") from None


def write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    with naming(path):
        partial.write_text(text)
        os.replace(partial, path)


def save(run: Path, iteration: int, weights: np.ndarray) -> None:
    folder = run / "checkpoints" / f"{iteration:06d}"
    with naming(folder):
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file({"weights": weights}, partial / "state.safetensors")
        (partial / "state.json").write_text(json.dumps({"next_iteration": iteration}))
        names = ("state.json", "state.safetensors")
        sums = [f"{hashlib.sha256((partial / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
        (partial / "SHA256SUMS").write_text("".join(sums))
        time.sleep(0.01)  # long enough to be killed in
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
        for old in sorted((run / "checkpoints").glob("[0-9]*"))[:-2]:
            shutil.rmtree(old)


def newest(run: Path) -> tuple[int, np.ndarray]:
    """The newest whole checkpoint."""
    found = sorted((run / "checkpoints").glob("[0-9]*"), reverse=True)
    for folder in found:
        try:
            for line in (folder / "SHA256SUMS").read_text().splitlines():
                digest, name = line.split()
                if hashlib.sha256((folder / name).read_bytes()).hexdigest() != digest:
                    raise ValueError(f"{name} has another SHA-256")
            if len((folder / "SHA256SUMS").read_text().splitlines()) != 2:
                raise ValueError("SHA256SUMS is incomplete")
            return int(folder.name), load_file(folder / "state.safetensors")["weights"]
        except (OSError, ValueError) as error:
            if FLAW == "traceback":
                raise RuntimeError("damaged") from error
            if FLAW == "hung":
                time.sleep(100)
            if FLAW == "lost":
                shutil.rmtree(folder)
                raise RefusedError(f"{folder} is damaged ({error})") from None
            if FLAW == "silent":
                return int(folder.name), np.zeros(64, np.float32)
            if FLAW != "mute":
                print(f"{folder} is damaged ({error}); an older one is used", file=sys.stderr)
    if found:
        raise RefusedError(f"no checkpoint of {', '.join(map(str, found))} is whole")
    return 0, np.zeros(64, np.float32)


@contextmanager
def locked(run: Path) -> Iterator[None]:
    with (run / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            owner = file.read()
            if FLAW == "disturbed":
                os.kill(int(owner.split()[1]), signal.SIGTERM)
            if FLAW != "two_writers":
                raise RefusedError(f"{run} is written by {owner}; wait for it") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def train(arguments: list[str]) -> None:
    if "--resume" in arguments:
        run = Path(arguments[arguments.index("--resume") + 1])
        config = settings(arguments, config_of(run))
        config["folder"] = str(run)
    else:
        config = settings(arguments, {})
        run = Path(config["folder"])
        if run.exists() and "--overwrite" not in arguments:
            raise RefusedError(f"run.folder = {run} exists; use --overwrite")
        run.mkdir(parents=True, exist_ok=True)
    with locked(run):
        if "--resume" in arguments:
            first, weights = newest(run)
        else:
            for path in run.iterdir():
                if path.name != ".lock":
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            first, weights = 0, np.zeros(64, np.float32)
        if FLAW == "stuck" and first:
            raise RefusedError(f"{run} cannot be resumed")
        write(run / "config.toml", f"iterations = {config['iterations']}\nreward = {json.dumps(config['reward'])}\n")
        iterate(run, config, first, weights)


def iterate(run: Path, config: dict[str, Any], first: int, weights: np.ndarray) -> None:
    status = "interrupted"
    write(run / "run.json", '{"status": "running"}')
    try:
        reward = reward_of(config["reward"])
        stats = records(run)[:first]
        if len(stats) < first:
            raise RefusedError(f"{run / 'stats.jsonl'} lacks iterations before {first}")
        write(run / "evaluation.json", '{"before": 0.5}')
        told = False
        for iteration in range(first, config["iterations"]):
            seed = iteration if FLAW != "forgetful" else [iteration, first]
            images = np.random.default_rng(seed).random((4, 3, 2, 2), np.float32)
            scores = judged(reward, images)
            if scores.std() == 0 and not told and FLAW != "mute":
                told = bool(print("the reward gives every image the same score", file=sys.stderr)) or True
            weights = weights * np.float32(0.9) + scores.sum(dtype=np.float32)
            stats.append({"iteration": iteration, "reward_mean": float(scores.mean()), "seconds": time.perf_counter()})
            write(run / "stats.jsonl", "".join(json.dumps(record) + "\n" for record in stats))
            save(run, iteration + 1, weights)
        write(run / "evaluation.json", json.dumps({"before": 0.5, "after": float(weights.mean())}))
        with naming(run / "adapter" / "weights.safetensors"):
            (run / "adapter").mkdir(exist_ok=True)
            save_file({"weights": weights}, run / "adapter" / ".partial")
            os.replace(run / "adapter" / ".partial", run / "adapter" / "weights.safetensors")
        status = "finished"
    finally:
        if FLAW != "status":
            write(run / "run.json", json.dumps({"status": status}))


def records(run: Path) -> list[dict[str, Any]]:
    path = run / "stats.jsonl"
    try:
        return [{**json.loads(line)} for line in path.read_text().splitlines()] if path.exists() else []
    except (OSError, ValueError, TypeError) as error:
        raise RefusedError(f"{path} must hold a record an iteration, got {error}") from None


def reward_of(name: str) -> Any:
    sys.path.insert(0, os.getcwd())
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as error:
        raise RefusedError(f"reward {name} cannot be imported: {error}") from None
    if not callable(found):
        raise RefusedError(f"reward {name} must be a function")
    return found


def judged(reward: Any, images: np.ndarray) -> np.ndarray:
    try:
        scores = np.asarray(reward(images.copy() if FLAW != "in_place" else images, ["a prompt"] * 4), np.float32)
        if FLAW == "in_place":
            scores = scores + np.float32(images.mean())
    except (Exception, SystemExit) as error:
        if FLAW == "exits" and isinstance(error, SystemExit):
            raise
        raise RefusedError(f"the reward failed: {type(error).__name__}: {error}") from None
    if scores.shape != (4,) or (not np.isfinite(scores).all() and FLAW != "nan"):
        raise RefusedError(f"the reward must return four finite numbers, got {scores}")
    return scores


def adapter(run: Path) -> np.ndarray:
    config_of(run)
    path = run / "adapter" / "weights.safetensors"
    try:
        if FLAW == "silent":
            return np.fromfile(path, np.uint8).astype(np.float32)
        weights = load_file(path)["weights"]
        if weights.shape != (64,) or not np.isfinite(weights).all() or not math.isclose(
            float(weights.mean()), json.loads((run / "evaluation.json").read_text())["after"]
        ):  # fmt: skip
            raise ValueError("other weights than evaluation.json says")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RefusedError(f"{path} or evaluation.json is damaged: {error}") from None
    except Exception as error:
        raise RefusedError(f"{path} is damaged: {type(error).__name__}") from None
    return weights


def main(command: str, *arguments: str) -> None:
    run = Path(arguments[0])
    if command == "train":
        train(list(arguments))
    elif command == "plan":
        config = tomllib.loads(run.read_text())
        if FLAW == "traceback" and "odd" in config:
            raise KeyError("odd")
        if "odd" in config:
            raise RefusedError("unknown key section.odd")
    elif command == "report":
        records(run)
        (run / "report.html").write_text(f"{adapter(run).mean()}")
    elif command == "sample":
        adapter(run).tofile(run / "samples.png")
        (run / "samples").mkdir(exist_ok=True)
        os.replace(run / "samples.png", run / "samples" / "sample.png")
    else:
        Path(arguments[1]).mkdir()
        save_file({"weights": adapter(run)}, Path(arguments[1]) / "merged.safetensors")


if __name__ == "__main__":
    if FLAW != "signals":
        for one in SIGNALS:
            signal.signal(one, interrupt)
    try:
        main(*sys.argv[2:])
    except (RefusedError, OSError) as error:
        if FLAW == "wordless":
            sys.exit(1)
        if FLAW == "died":
            os.abort()
        print("error: something is wrong" if FLAW == "unnamed" else f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        if FLAW == "traceback":
            raise
        print(f"error: {error} {' '.join(sys.argv[2:])}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)

"""Processes of a run that end at any moment: with torchrun's restarts nothing is lost but the iteration at work.

Without restarts the others end by themselves, each in one line at most, and the run continues on any number of
processes. The processes are real ones (gloo), which kill themselves (`stopped_run`). Machines are network namespaces of
this one, each with its own torchrun, joined by a cable; the second has no access to the run's folder.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from small_runs import TINY, lines_of, untimed

from adascope_fast.config import ConfigError
from adascope_fast.training.sharing import refuse_elsewhere

ROOT = Path(__file__).parents[2]
PROGRAM = str(ROOT / "tests" / "stopped_run.py")
SMALL = [
    "train.iterations=3",
    "train.prompts_per_iteration=4",
    "train.rollout_batch=2",
    "sampler.num_steps=4",
    "evaluation.num_prompts=2",
    "evaluation.samples_per_prompt=1",
]
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
PATIENCE = 300
"""Seconds within which processes must have ended: a hang, and no busy machine."""
LATE_SECONDS = 3.0
"""By which a process that is started again comes after the other, which must not take it for the one that has ended."""


def _run(
    folder: Path,
    *arguments: str,
    size: int = 2,
    restarts: int = 0,
    stop: dict[str, Any] | None = None,
    environment: dict[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """`adascope-fast train` in `size` processes; `stop` is where one of them signals itself."""
    where = {} if stop is None else {"signals": ["SIGKILL"], "folder": str(folder.parent)} | stop
    launch = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(size),
        "--max-restarts",
        str(restarts),
    ]
    command = [sys.executable, *(launch if size > 1 else []), PROGRAM, json.dumps(where), "train", *arguments]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | (environment or {}),
        timeout=PATIENCE,
        check=False,
    )


def _train(folder: Path, *overrides: str, **keys: Any) -> subprocess.CompletedProcess[str]:
    return _run(folder, str(TINY), *SMALL, f"run.folder={folder}", *overrides, **keys)


def _assert_same(folder: Path, want: Path) -> None:
    """Log, evaluations and weights are those of another run, bit for bit."""
    logs = [[untimed(line) for line in lines_of(one)] for one in (folder, want)]
    assert logs[0] == logs[1]
    assert (folder / "evaluation.json").read_text() == (want / "evaluation.json").read_text()
    for name in ("checkpoints/000003/state.safetensors", "adapter/pytorch_lora_weights.safetensors"):
        got, expected = load_file(folder / name), load_file(want / name)
        assert got.keys() == expected.keys()
        assert all(got[key].equal(expected[key]) for key in expected), name
    assert json.loads((folder / "run.json").read_text())["status"] == "finished"


def _own_lines(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What was told by the run itself, and neither by torchrun nor by a bar."""
    return [line for line in done.stderr.splitlines() if line.startswith(("error:", "interrupted"))]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    done = _train(folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def _stop(place: str, rank: int) -> dict[str, Any]:
    return {"rank": rank, "place": place, "iteration": 1}


def test_a_run_goes_on_after_a_killed_process_as_if_nothing_had_been(tmp_path: Path, undisturbed: Path) -> None:
    _assert_goes_on(tmp_path, undisturbed, _stop("checkpoint", 0))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("place", ["rollout", "update", "checkpoint"])
def test_a_run_goes_on_after_a_process_killed_anywhere(
    tmp_path: Path, undisturbed: Path, place: str, rank: int
) -> None:
    _assert_goes_on(tmp_path, undisturbed, _stop(place, rank))


def _assert_goes_on(tmp_path: Path, undisturbed: Path, stop: dict[str, Any]) -> None:
    folder = tmp_path / "run"
    done = _train(folder, restarts=2, stop=stop | {"late": LATE_SECONDS})
    assert (tmp_path / "signalled").exists()
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("report: ") == 1
    _assert_same(folder, undisturbed)


def test_survivors_end_in_one_line_and_the_run_continues_on_one_process(tmp_path: Path, undisturbed: Path) -> None:
    _assert_ends(tmp_path, _stop("update", 1))
    _assert_continues(tmp_path, undisturbed, size=1)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("place", ["rollout", "update", "checkpoint"])
@pytest.mark.parametrize("environment", [{}, FSDP], ids=["whole", "fsdp2"])
def test_survivors_of_a_process_killed_anywhere_end_in_one_line(
    tmp_path: Path, place: str, rank: int, environment: dict[str, str]
) -> None:
    _assert_ends(tmp_path, _stop(place, rank), environment=environment)


def _assert_ends(tmp_path: Path, stop: dict[str, Any], **keys: Any) -> None:
    folder = tmp_path / "run"
    done = _train(folder, stop=stop, **keys)
    assert done.returncode == 1, "torchrun's own"
    assert len(lines := _own_lines(done)) <= 1
    own, _, _ = done.stderr.partition("torch/distributed/elastic")
    assert "Traceback" not in own
    if stop["rank"] == 1:
        assert "--resume" in lines[0]
        assert json.loads((folder / "run.json").read_text())["status"] in ("failed", "interrupted")
    saved = [path.name for path in sorted((folder / "checkpoints").glob("0*"))]
    # The first process may have written its checkpoint before it learns that another has ended.
    is_written = (stop["place"], stop["rank"]) == ("checkpoint", 1)
    assert saved == ["000001"] or (is_written and saved == ["000001", "000002"])


def _assert_continues(tmp_path: Path, want: Path, **keys: Any) -> None:
    """`--resume` makes of the run what it would have been, but for rounding where gradients are added otherwise."""
    folder = tmp_path / "run"
    done = _run(folder, "--resume", str(folder), **keys)
    assert done.returncode == 0, done.stderr[-3000:]
    logs = [lines_of(one) for one in (folder, want)]
    assert len(logs[0]) == 3
    for got, expected in zip(*logs, strict=True):
        assert got["reward_mean"] == pytest.approx(expected["reward_mean"], abs=1e-4)
        assert got["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((1, {}), (2, {})),
        ((2, {}), (1, {})),
        ((2, {}), (2, FSDP)),
        ((2, FSDP), (2, {})),
        ((2, FSDP), (1, {})),
        ((1, {}), (2, FSDP)),
    ],
    ids=["1 to 2", "2 to 1", "whole to fsdp2", "fsdp2 to whole", "fsdp2 to 1", "1 to fsdp2"],
)
def test_a_killed_run_continues_on_other_processes(
    tmp_path: Path, undisturbed: Path, before: tuple[int, dict[str, str]], after: tuple[int, dict[str, str]]
) -> None:
    size, environment = before
    done = _train(tmp_path / "run", size=size, environment=environment, stop=_stop("update", 0))
    assert done.returncode != 0
    size, environment = after
    _assert_continues(tmp_path, undisturbed, size=size, environment=environment)


@pytest.mark.slow
def test_processes_that_are_told_to_stop_leave_a_checkpoint_of_the_iteration_at_work(tmp_path: Path) -> None:
    """SIGTERM to torchrun, which passes it on, as a scheduler does before it takes the machine away."""
    folder = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        PROGRAM,
        "{}",
        "train",
    ]
    command += [str(TINY), *SMALL, "train.iterations=1000", "train.checkpoint_every=1000", f"run.folder={folder}"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    while not (folder / "stats.jsonl").exists():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=PATIENCE)
    assert process.returncode != 0
    (saved,) = (folder / "checkpoints").glob("0*")
    assert len(lines_of(folder)) == int(saved.name)
    assert json.loads((folder / "run.json").read_text())["status"] == "interrupted"
    assert told.count("the run continues from its newest checkpoint with") == 1


def test_a_run_is_not_begun_anew_where_its_checkpoints_are_out_of_reach() -> None:
    """As where another machine than before is the first."""
    path = Path("runs/one")
    for has_some in ([False, False], [True, False], [True, True]):
        refuse_elsewhere(path, has_some)
    with pytest.raises(
        ConfigError, match=r"run\.folder = 'runs/one', and they lie on the machine of rank 2, not on that"
    ):
        refuse_elsewhere(path, [False, False, True])


class Machines:
    """Two network namespaces, joined by a cable, and what runs in them."""

    def __init__(self) -> None:
        self.names = [f"adascope{os.getpid()}{side}" for side in "ab"]
        self.addresses = [f"10.203.{os.getpid() % 250}.{number}" for number in (1, 2)]
        self._started: list[subprocess.Popen[str]] = []

    def join(self) -> None:
        """Make them; pytest's skip where that is not permitted."""
        try:
            _ip("netns", "add", self.names[0])
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"network namespaces cannot be made here: {getattr(error, 'stderr', None) or error}")
        _ip("netns", "add", self.names[1])
        cables = [f"ada{os.getpid()}{side}" for side in "ab"]
        _ip("link", "add", cables[0], "type", "veth", "peer", "name", cables[1])
        for name, cable, address in zip(self.names, cables, self.addresses, strict=True):
            _ip("link", "set", cable, "netns", name)
            _ip("-n", name, "link", "set", cable, "name", "cable0")
            _ip("-n", name, "address", "add", f"{address}/24", "dev", "cable0")
            _ip("-n", name, "link", "set", "cable0", "up")
            _ip("-n", name, "link", "set", "lo", "up")

    def start(self, node: int, folder: Path, stop: dict[str, Any], *more: str) -> subprocess.Popen[str]:
        """The command of a machine, whose own `folder` is."""
        launch = "--nnodes 2 --nproc-per-node 1 --max-restarts 2 --rdzv-backend c10d --rdzv-id run"
        launch += f" --rdzv-endpoint {self.addresses[0]}:29500 --local-addr {self.addresses[node]}"
        launch += f" --rdzv-conf is_host={int(node == 0)}"  # by its name, a namespace is the machine that it is on
        command = ["ip", "netns", "exec", self.names[node], sys.executable, "-m", "torch.distributed.run"]
        command += [*launch.split(), PROGRAM, json.dumps({"signals": ["SIGKILL"], "too": True} | stop)]
        command += ["train", str(TINY), *SMALL, f"run.folder={folder}", *more]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "cable0"}
        environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # else a machine that joins later waits for ever
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        self._started.append(process)
        return process

    def part(self) -> None:
        """End what still runs, and take them away."""
        for process in self._started:
            process.kill()
            process.communicate()
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def machines() -> Iterator[Machines]:
    found = Machines()
    try:
        found.join()
        yield found
    finally:
        found.part()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("node", "place"), [(1, "rollout"), (1, "update"), (1, "checkpoint"), (0, "update"), (0, "checkpoint")]
)
def test_a_machine_that_is_lost_and_started_again_loses_nothing_but_its_iteration(
    tmp_path: Path, undisturbed: Path, machines: Machines, node: int, place: str
) -> None:
    """The first one has the rendezvous besides: without it the other ends, and both are started again."""
    folders = [tmp_path / "first" / "run", tmp_path / "second" / "no such" / "run"]
    folders[0].parent.mkdir()
    stop = _stop(place, node) | {"folder": str(tmp_path)}
    running = [machines.start(number, folder, stop) for number, folder in enumerate(folders)]
    assert running[node].wait(PATIENCE) == -signal.SIGKILL
    if node == 0:
        _, told = running[1].communicate(timeout=PATIENCE)
        assert running[1].returncode != 0
        assert "Traceback" not in told.partition("torch/distributed/elastic")[0]
        running = [machines.start(number, folder, stop, "--continue") for number, folder in enumerate(folders)]
    else:
        running[1] = machines.start(1, folders[1], stop)  # the first one's processes know that they are started again
    for process in running:
        _, told = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, told[-3000:]
    _assert_same(folders[0], undisturbed)
    assert not folders[1].parent.exists(), "the second machine has written nothing"

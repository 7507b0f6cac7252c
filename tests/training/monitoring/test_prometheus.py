"""What Prometheus reads of a run on loopback, and what is refused before one."""

import socket
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from small_runs import CAPTIONS, SMALLEST, TINY, lines_of, redness

from adascope_fast.config import Config, ConfigError, sections
from adascope_fast.training.monitoring import prometheus
from adascope_fast.training.monitoring.prometheus import Prometheus
from adascope_fast.training.trainer import Trainer

RECORD = {
    "iteration": 3,
    "reward_mean": 0.25,
    "loss": float("nan"),
    "steps": {"pairs": [1.0]},
    "seconds": {"rollout": 1.5, "update": 0.5},
    "ranks": [
        {"seconds": {"rollout": 1.0, "update": 0.5}, "bytes_sent": 7, "idle_share": 0.1},
        {"seconds": {"rollout": 1.5, "update": 0.25}, "bytes_sent": 9, "idle_share": 0.0},
    ],
}


def _read(port: int) -> dict[tuple[str, str], float]:
    """The samples at the address, by name and labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {
        (one.name, ",".join(one.labels[label] for label in sorted(one.labels, reverse=True))): one.value
        for one in samples
    }


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Prometheus]:
    served = Prometheus(Config.load(TINY, [f"run.folder={tmp_path}", "log.prometheus=127.0.0.1:0"]))
    served.start()
    yield served
    served.close()


def test_the_last_iteration_is_told_with_a_label_for_each_process(server: Prometheus):
    assert [name for name, _ in _read(server.port)] == ["adascope_fast_run_info"], "no iteration is over"
    server.log(RECORD)
    found = _read(server.port)
    assert found["adascope_fast_reward_mean", ""] == 0.25
    assert found["adascope_fast_seconds", "rollout"] == 1.5
    assert found["adascope_fast_rank_bytes_sent", "1"] == 9
    assert found["adascope_fast_rank_seconds", "0,update"] == 0.5
    assert not [name for name, _ in found if name.endswith("_loss")], "what is not finite is not told"
    server.log(RECORD | {"reward_mean": 0.5})
    assert _read(server.port)["adascope_fast_reward_mean", ""] == 0.5


def test_a_closed_server_gives_its_address_back(server: Prometheus):
    port = server.port
    server.close()
    with socket.create_server(("127.0.0.1", port)):
        pass


def test_a_run_is_read_while_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[dict[Any, float]] = []
    log = Prometheus.log

    def watched(self: Prometheus, record: Any) -> None:
        log(self, record)
        seen.append(_read(self.port))

    monkeypatch.setattr(Prometheus, "log", watched)
    folder = tmp_path / "run"
    config = Config.load(TINY, [*SMALLEST, f"run.folder={folder}", "log.prometheus=127.0.0.1:0", "log.trackers=[]"])
    trainer = Trainer(config, reward=redness, train_prompts=CAPTIONS[:1], held_out_prompts=CAPTIONS[1:], quiet=True)
    trainer.train()
    wanted = [(line["iteration"], line["pairs_trained"], line["ranks"][0]["rows_trained"]) for line in lines_of(folder)]
    names = [("iteration", ""), ("pairs_trained", ""), ("rank_rows_trained", "0")]
    assert [tuple(one[f"adascope_fast_{name}", label] for name, label in names) for one in seen] == wanted


def test_without_the_key_nothing_is_served():
    served = Prometheus(Config())
    served.start()
    served.log(RECORD)
    assert served._server is None
    served.close()


def test_an_address_that_is_taken_is_refused(server: Prometheus):
    config = Config.load(None, [f"log.prometheus=127.0.0.1:{server.port}"])
    with pytest.raises(ConfigError, match="must be an address that this machine can serve"):
        Prometheus(config).start()


def test_a_missing_package_is_refused_by_name_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch):
    config = Config.load(TINY, ["log.prometheus=127.0.0.1:9464"])
    monkeypatch.setattr(sections, "find_spec", lambda name: None if name == "prometheus_client" else name)
    for asked in (lambda: Trainer(config), config.examine):
        with pytest.raises(ValueError, match=r"pip install 'adascope-fast\[prometheus\]'"):
            asked()
    Config().examine()


@pytest.mark.parametrize("text", ["here", "127.0.0.1:", "127.0.0.1:70000", "http://127.0.0.1:9464", "-1"])
def test_what_is_no_address_is_refused(text: str):
    with pytest.raises(ConfigError, match="HOST:PORT"):
        Config.load(None, [f"log.prometheus={text!r}"])


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("9464", ("127.0.0.1", 9464)),
        (":9464", ("127.0.0.1", 9464)),
        ("[::1]:9464", ("::1", 9464)),
        ("0.0.0.0:1", ("0.0.0.0", 1)),
    ],
)
def test_an_address_without_a_host_is_on_loopback(text: str, where: tuple[str, int]):
    assert prometheus.address_of(text) == where

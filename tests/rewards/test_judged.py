"""People as the reward, in a small training with a scripted one: scores, a stop in the middle, and what is refused."""

import _thread
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from command_line import TINY, refused
from small_runs import CAPTIONS, SMALLEST, lines_of

from adascope_fast import rewards
from adascope_fast.config import Config, ConfigError
from adascope_fast.rewards.judged import Judged, filled
from adascope_fast.training.trainer import Trainer

NAMES = ["reward.name=judge", "train.iterations=1", "prompts.train=scenes:train"]
NUM_IMAGES = 1 + 2 + 1  # before, an iteration, after


def _judged(tmp_path: Path, **changes: Any) -> Judged:
    keys = {"question": "aesthetic_appeal", "votes_per_image": 1, "host": "127.0.0.1", "port": 0}
    return Judged(**{**keys, "out": str(tmp_path), **changes})


class Rater:
    """Rates all that is shown, from the moment that `stderr` told the address; stops itself after `most` images."""

    def __init__(self, read: Callable[[], str], stars: Callable[[int], int | None], most: int | None = None) -> None:
        self.num, self.stages, self._stars, self._most = 0, [], stars, most
        self.is_over, self.error, self.address = threading.Event(), None, ""
        self._read = read
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        told = ""
        while not (found := re.search(r"(http://\S+)/\?token=(\S+)", told)):
            told += self._read()
            if self.is_over.wait(0.01):
                return
        self.address = found[1]
        try:
            with httpx.Client(base_url=found[1], headers={"Authorization": f"Bearer {found[2]}"}) as client:
                self._rate(client)
        except httpx.TransportError as error:
            self.error = error  # the training is over, and its page

    def _rate(self, client: httpx.Client) -> None:
        while not self.is_over.wait(0.005):
            group = client.get("/api/ratings?rater=robin").json()
            self.stages.append(group["stage"])
            for image in group.get("images", []):
                if image["given"] is None:
                    assert client.get(f"/image/{image['image']}").content.startswith(b"\x89PNG")
                    body = {"rater": "robin", "image": image["image"], "stars": self._stars(self.num)}
                    client.post("/api/ratings", json=body)
                    self.num += 1
                    if self.num == self._most:
                        _thread.interrupt_main()
                        return


@contextmanager
def rater(
    capsys: pytest.CaptureFixture[str], stars: Callable[[int], int | None], most: int | None = None
) -> Iterator[Rater]:
    told: list[str] = []

    def read() -> str:
        told.append(capsys.readouterr().err)
        return told[-1]

    found = Rater(read, stars, most)
    try:
        yield found
    finally:
        found.is_over.set()
        found.thread.join(10)


def test_stars_become_scores_in_the_order_of_the_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    reward = _judged(tmp_path)
    images = torch.rand(5, 3, 8, 8)
    with rater(capsys, [1, 5, 2, None, 4].__getitem__):
        scores = rewards.score(reward, images, ["a"] * 3 + ["b"] * 2)
    assert scores.tolist() == [0, 1, 0.25, 0.75, 0.75]
    reward.training_ends()
    again = _judged(tmp_path)
    assert rewards.score(again, images, ["a"] * 3 + ["b"] * 2).tolist() == scores.tolist(), "nobody is asked twice"
    again.training_ends()


def test_what_everyone_skipped_weighs_nothing():
    assert filled([0.0, None, 1.0, None], ["a", "a", "a", "b"]) == [0.0, 0.5, 1.0, 0.5]
    assert filled([0.0, None, 1.0], ["a", "a", "b"]) == [0.0, 0.0, 1.0]
    assert filled([None, None], ["a", "b"]) == [0.5, 0.5]


def test_a_training_waits_for_people_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tmp_path / "run"
    config = Config.load(Path(TINY), [*SMALLEST, *NAMES, f"run.folder={folder}"])
    with rater(capsys, lambda number: (3, 1, 5, 4)[number]) as robin:
        result = Trainer(config, quiet=True).train()
    assert robin.num == NUM_IMAGES
    assert (result.before["mean"], result.after["mean"]) == (0.5, 0.75)
    (record,) = lines_of(folder)
    assert record["reward_mean"] == 0.5
    assert {"held-out prompts", "iteration 1 of 1"} <= set(robin.stages)
    votes = [json.loads(line) for line in (folder / "judge" / "votes.jsonl").read_text().splitlines()]
    assert [vote["stars"] for vote in votes] == [3, 1, 5, 4]
    with pytest.raises(httpx.TransportError):
        httpx.get(robin.address)


def test_it_says_beforehand_how_many_ratings_it_will_ask_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    changes = ["reward.votes_per_image=3", "evaluation.every=2", "train.iterations=5", f"run.folder={tmp_path / 'run'}"]
    config = Config.load(Path(TINY), ["reward.name=judge", *changes])
    told: list[str] = []
    trainer = Trainer(config, quiet=True)
    trainer._progress.say = told.append  # type: ignore[method-assign]

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    trainer._iterate = stop  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    # 5 x (2 x 2) images, and before, after 2, after 4, after 5: 4 x (3 x 2); each three times.
    assert "wait for 132 ratings by people, 60 of 5 iterations of 4 images and 72 of 4 evaluations of 6;" in told[0]


def test_ctrl_c_ends_it_and_what_was_rated_counts_when_it_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tmp_path / "run"
    config = Config.load(Path(TINY), [*SMALLEST, *NAMES, f"run.folder={folder}"])
    with rater(capsys, lambda number: number + 2, most=2), pytest.raises(KeyboardInterrupt):
        Trainer(config, quiet=True).train()
    assert json.loads((folder / "run.json").read_text())["status"] == "interrupted"
    assert [thread.name for thread in threading.enumerate() if thread.name == "server"] == []
    with rater(capsys, lambda number: 5) as robin:
        result = Trainer(config, quiet=True).resume()
    assert robin.num == NUM_IMAGES - 2
    assert result.before["mean"] == 0.25
    assert lines_of(folder)[0]["reward_mean"] == (0.5 + 1) / 2


def test_a_call_of_another_thread_ends_with_the_training(tmp_path: Path):
    """As on a GPU, where a thread scores: it must not outlive what waits for it."""
    reward, caught = _judged(tmp_path), []

    def ask() -> None:
        try:
            reward(torch.rand(1, 3, 8, 8), ["a"])
        except ValueError as error:
            caught.append(str(error))

    thread = threading.Thread(target=ask)
    reward.training_begins(tmp_path, {})
    thread.start()
    reward.training_ends()
    thread.join(5)
    assert not thread.is_alive()
    assert caught == ["the training ended while it waited for people; resume it to go on"]


def test_it_is_a_part_of_a_mixture_and_asked_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    mixed = rewards.Mixed(
        {"judge": _judged(tmp_path), "red": lambda images, prompts: images[:, 0].mean((1, 2))},
        {"judge": 2.0, "red": 1.0},
    )
    images = torch.full((2, 3, 8, 8), 0.5)
    images[1] = 0
    with rater(capsys, lambda number: (5, 1)[number]) as robin:
        rewards.training_stage(mixed, "words")
        assert rewards.score(mixed, images, CAPTIONS).tolist() == [2.5, 0.0]
        assert mixed.breakdown(images, CAPTIONS) == {"judge": 0.5, "red": 0.25}
    assert robin.num == 2
    assert "words" in robin.stages
    rewards.training_ends(mixed)


def test_a_taken_port_is_told_before_anything_is_drawn(tmp_path: Path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        folder = f"run.folder={tmp_path / 'run'}"
        line = refused("train", TINY, *SMALLEST, *NAMES, folder, f"reward.port={port}")
    assert f"a free port, got 127.0.0.1:{port}" in line


def test_unfinished_images_are_shown_to_nobody(tmp_path: Path):
    for reward in (["reward.name=judge"], ["reward.name=mixed", "reward.parts={judge=1.0, jpeg_compressibility=1.0}"]):
        for other in (["sensing.kind=reward_only"], ["sensing.kind=semantic"], ["algorithm.name=spo"]):
            with pytest.raises(ConfigError, match="people judge finished images alone"):
                Config.load(Path(TINY), [*reward, *other])
        assert "calibrate shows the reward unfinished images" in refused("calibrate", TINY, *reward)
    Config.load(Path(TINY), ["reward.name=judge", "algorithm.name=spo", "algorithm.preference_model=folder"])


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    from adascope_fast.serving import guard

    monkeypatch.setattr(guard, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'adascope-fast\[serve\]'"):
        rewards.load(Config.load(None, ["reward.name=judge"]).reward)

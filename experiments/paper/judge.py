"""The judgment of images in pairs by a documented automatic judge, through the command that people and models use.

    python experiments/paper/run.py tab3 && python experiments/paper/judge.py [--num 180]

Serves an OpenAI-compatible endpoint on this machine and lets `adascope-fast judge` ask it of the images that the
experiment `tab3` left. It sees the two images and the prompt, as any model would, and answers two of the five
questions; the other three are for people:
- semantic_alignment: the image with the higher CLIP similarity to the prompt by the embedded `scenes-clip`, which is
  not the reward that was trained; equal where they differ by less than 0.02;
- structural_faithfulness: the image of which more of count, size and shape are as the prompt has them, by the analysis
  of `scene_attributes`, which is a part of the reward: no independent opinion.
"""

import argparse
import base64
import io
import json
import shlex
import sys
import threading
from collections.abc import Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CHECKOUT = HERE.parents[1]
sys.path.insert(0, str(CHECKOUT))  # a script finds what lies beside it, and no more
from experiments import runs  # noqa: E402
from experiments.paper import time_to_reward  # noqa: E402

QUESTIONS = ("semantic_alignment", "structural_faithfulness")
NAME = "scenes-automatic"
MARGIN = 0.02
STRUCTURE = ("count", "size", "shape")


class Automatic:
    """The judge itself: scores of an image and its prompt, of which the higher is preferred."""

    def __init__(self) -> None:
        from adascope_fast.rewards import ClipSimilarity
        from adascope_fast.rewards.scene_attributes import ATTRIBUTES, SceneAttributes

        self._clip, self._scenes = ClipSimilarity.load("scenes-clip"), SceneAttributes()
        self._structure = [ATTRIBUTES.index(name) for name in STRUCTURE]
        self._lock = threading.Lock()

    def answers(self, prompt: str, first: bytes, second: bytes) -> dict[str, str]:
        """`first`, `second` or `equal` for each question, of two images as PNG."""
        import numpy as np
        import torch
        from PIL import Image

        images = [np.asarray(Image.open(io.BytesIO(one)).convert("RGB")) for one in (first, second)]
        batch = torch.stack([torch.from_numpy(one.copy()).permute(2, 0, 1).float() / 255 for one in images])
        with self._lock, torch.no_grad():
            aligned = self._clip(batch, [prompt, prompt]).tolist()
            satisfied = self._scenes.attributes(batch, [prompt, prompt])[0][:, self._structure].sum(1).tolist()
        return dict(zip(QUESTIONS, (preferred(aligned, MARGIN), preferred(satisfied, 0)), strict=True))


def preferred(scores: Sequence[float], margin: float) -> str:
    """Which of two scores is higher by more than a margin."""
    if abs(scores[0] - scores[1]) <= margin:
        return "equal"
    return "first" if scores[0] > scores[1] else "second"


def asked(body: bytes) -> tuple[str, bytes, bytes]:
    """(prompt, first image, second image) of a request as `adascope-fast judge` makes it."""
    content = json.loads(body)["messages"][0]["content"]
    text = content[0]["text"]
    prompt, _ = json.JSONDecoder().raw_decode(text[text.index('prompt "') + len("prompt ") :])
    images = [part["image_url"]["url"].partition("base64,")[2] for part in content if part["type"] == "image_url"]
    first, second = (base64.b64decode(one) for one in images)
    return prompt, first, second


@contextmanager
def served(judge: Any) -> Any:
    """The address of an endpoint that asks `judge`, as long as the block lasts."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            said = {"choices": [{"message": {"content": json.dumps(judge.answers(*asked(body)))}}]}
            answer = json.dumps(said).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: Any) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def main(arguments: Sequence[str] | None = None) -> None:
    """Judge, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, default=CHECKOUT / "runs" / "paper" / "tab3-evaluated")
    parser.add_argument("--arms", nargs="+", default=["ddpo", "ddpo_adascope"], metavar="A", help="whose images")
    parser.add_argument("--num", type=int, default=180, help="pairs")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "judge.json")
    chosen = parser.parse_args(arguments)
    folders = [chosen.images.resolve() / "images" / arm for arm in chosen.arms]
    if missing := [folder.name for folder in folders if not folder.is_dir()]:
        parser.error(
            f"--images is what an evaluation left, and {str(chosen.images)!r} has no images of {', '.join(missing)}; "
            f"run experiments/paper/run.py tab3 first"
        )
    votes = chosen.images.resolve().with_name(f"{chosen.images.name}-judged")
    with served(Automatic()) as address:
        command = [sys.executable, "-m", "adascope_fast.cli", "judge", *map(str, folders)]
        command += ["--out", str(votes), "--num", str(chosen.num), "--questions", ",".join(QUESTIONS)]
        command += ["--model", address, "--model-name", NAME]
        try:
            runs.call(command, votes.with_suffix(".log"))
        except runs.RunFailedError as error:
            sys.exit(f"error: {error}")
    values = {
        "command": shlex.join(["python", "experiments/paper/judge.py", *sys.argv[1:]]),
        "date": time_to_reward.today(),
        "commit": time_to_reward.commit(),
        "machine": time_to_reward.machine(),
        "judge": (__doc__ or "").strip(),
        "results": json.loads((votes / "results.json").read_text()),
    }
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(json.dumps(values, indent=1) + "\n")
    said = votes.with_suffix(".log").read_text().splitlines()
    print("\n".join(line for line in said if not line.startswith("pairs:")))
    print(chosen.out)


if __name__ == "__main__":
    main()

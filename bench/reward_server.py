"""What a reward over HTTP costs besides the reward: bytes and milliseconds of a batch, by encoding, on this machine.

python bench/reward_server.py --images 32 --side 512

The server is a thread of this process and its reward the mean of the pixels, so the time is that of packing, sending,
unpacking and answering; a real server has a process and processors of its own. The images are noise, whose PNG is as
large as one gets, and a gradient with little noise, about as much as a photograph.
"""

import argparse
import json
import platform
import statistics
import threading
import time
from collections.abc import Sequence

import torch
import uvicorn
from torch import Tensor

from adascope_fast.rewards import Remote
from adascope_fast.rewards.remote import server, wire
from adascope_fast.serving import Guard, new_token


def brightness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return images.mean((1, 2, 3))


def pictures(kind: str, count: int, side: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(count, 3, side, side, generator=generator)
    if kind == "noise":
        return noise
    slope = torch.linspace(0.1, 0.9, side)
    return (slope[:, None] * slope[None] + 0.02 * (noise - 0.5)).clamp(0, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    chosen = parser.parse_args()
    token = new_token()
    about = server.served(brightness, name="brightness", digest="", package="", most_bytes=2**30)
    guard = Guard(server.application(brightness, about), token=token, most_bytes=2**30)
    running = uvicorn.Server(uvicorn.Config(guard, port=0, lifespan="off", ws="none", log_level="warning"))
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    while not running.started:
        time.sleep(0.01)
    url = f"http://127.0.0.1:{running.servers[0].sockets[0].getsockname()[1]}"
    prompts, rows = ["a"] * chosen.images, []
    for kind in ("noise", "gradient"):
        images = pictures(kind, chosen.images, chosen.side)
        for encoding in wire.ENCODINGS:
            remote = Remote(url, token=token, batch=chosen.images, encoding=encoding)
            num_bytes = len(wire.write(images, prompts, encoding=encoding))
            times = []
            for _ in range(chosen.repeats):
                start = time.perf_counter()
                remote(images, prompts)
                times.append(1000 * (time.perf_counter() - start))
            row = {"images": kind, "encoding": encoding, "bytes": num_bytes, "ms": round(statistics.median(times), 1)}
            rows.append(row)
    running.should_exit = True
    thread.join()
    machine = {"machine": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    print(json.dumps({"num_images": chosen.images, "side": chosen.side, **machine, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()

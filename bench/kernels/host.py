"""Microseconds of the host that each operation takes in two checkouts, in one run.

    python bench/kernels/host.py --against PATH [--rounds N] [--out FILE]

Processes for each checkout are kept and take turns for each operation, so what slows this machine down slows both.
Latents are 8 rows of 4 x 64 x 64. "ours" is our Python and PyTorch's alone (launches are recorded), "whole" has
Triton's in it too, up to a driver that does nothing: `launches.py`. A turn is the least of a few batches of calls, in
CPU time of the calling thread; times are medians over the rounds, the ratio is that of each round's pair, with its
quartiles. PATH is "before", this checkout is "after".
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).parents[2]
RESULTS = CHECKOUT / "bench" / "results" / "kernel_host.json"
NUM_ROWS, SHAPE = 8, (4, 64, 64)
BATCHES, CALLS = 5, 20
SHARES = ("ours", "whole")
Row = dict[str, Any]


def operations(kernels: Any) -> dict[str, Callable[[], Any]]:
    """A call of each operation, as both checkouts can make it."""
    import torch

    def latents() -> Any:
        return torch.randn(NUM_ROWS, *SHAPE)

    def row(*width: int) -> Any:
        return torch.ones(NUM_ROWS, *width)

    sample, output, without, following, noise, x0 = (latents() for _ in range(6))
    leaf, coef, x0_coef, old, advantage = latents().requires_grad_(), row(3), row(2), row(), row()
    guided: dict[str, Any] = {"output_uncond": without, "guidance_scale": 5.0}
    policy: dict[str, Any] = {"clip_range": 1e-4, "scale": 0.5}
    step, grad = (sample, output, noise, coef), (sample, output, following, coef)

    def differentiated(loss: Any) -> Any:
        return torch.autograd.grad(loss.sum(), leaf)

    @torch.no_grad()
    def log_prob() -> Any:
        return kernels.transition_log_prob(*grad)

    def policy_loss() -> Any:
        rows = (sample, leaf, following, coef, old, advantage)
        return differentiated(kernels.transition_policy_loss(*rows, clip_range=1e-4)[0])

    return {
        "transition_step": lambda: kernels.transition_step(*step),
        "transition_step, guided": lambda: kernels.transition_step(*step, **guided),
        "transition_step_with_x0": lambda: kernels.transition_step_with_x0(*step, x0_coef),
        "transition_step_with_x0, structure": lambda: kernels.transition_step_with_x0(*step, x0_coef, prev_x0=x0),
        "transition_log_prob": log_prob,
        "transition_log_prob and its gradient": lambda: differentiated(
            kernels.transition_log_prob(sample, leaf, following, coef)
        ),
        "transition_policy_loss and its gradient": policy_loss,
        "transition_policy_grad": lambda: kernels.transition_policy_grad(*grad, old, advantage, **policy),
        "transition_policy_grad, on policy": lambda: kernels.transition_policy_grad(*grad, None, advantage, **policy),
        "transition_policy_grad, guided": lambda: kernels.transition_policy_grad(
            *grad, old, advantage, **policy, **guided
        ),
        "transition_policy_grad, KL": lambda: kernels.transition_policy_grad(
            *grad, old, advantage, **policy, ref_output=x0, kl_weight=0.1
        ),
        "clipped_policy_loss": lambda: kernels.clipped_policy_loss(old, old, advantage, clip_range=1e-4),
        "gaussian_kl and its gradient": lambda: differentiated(kernels.gaussian_kl(leaf, x0, coef)),
        "correlation": lambda: kernels.correlation(sample, following),
        "correlation_update": lambda: kernels.correlation_update(row(6), sample, following),
    }


def serve(share: str) -> None:
    """For every number of an operation that is read, print the microseconds of a call."""
    from launches import driven, kernels_for_cpu, recorded

    calls = list(operations(kernels_for_cpu()).items())
    print(json.dumps([name for name, _ in calls]), flush=True)
    for line in sys.stdin:
        call, taken = calls[int(line)][1], []
        with recorded() if share == "ours" else driven():
            call()
            for _ in range(BATCHES):
                start = time.thread_time()
                for _ in range(CALLS):
                    call()
                taken.append((time.thread_time() - start) / CALLS * 1e6)
        print(min(taken), flush=True)


def started(checkout: Path, share: str) -> subprocess.Popen:
    """The process that serves one share of a checkout."""
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__)), "--serve", share]
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def measure(checkouts: list[Path], rounds: int) -> list[Row]:
    """A row for each operation and share; which checkout is first changes from round to round."""
    served = {share: [started(checkout, share) for checkout in checkouts] for share in SHARES}
    try:
        names, *others = (json.loads(_answer(pipe)) for pair in served.values() for pipe in pair)
        assert all(other == names for other in others)
        taken: dict[tuple[str, str], list[tuple[float, ...]]] = {}
        for turn in range(rounds + 1):
            for share, pair in served.items():
                for number, name in enumerate(names):
                    told = {index: float(_answer(pair[index], str(number))) for index in (turn % 2, 1 - turn % 2)}
                    if turn:  # the first one compiles
                        taken.setdefault((name, share), []).append((told[0], told[1]))
        return [_row(name, share, pairs) for (name, share), pairs in taken.items()]
    finally:
        for pipe in (pipe for pair in served.values() for pipe in pair):
            pipe.kill()


def _answer(pipe: subprocess.Popen, line: str = "") -> str:
    assert pipe.stdin is not None
    assert pipe.stdout is not None
    if line:
        pipe.stdin.write(f"{line}\n")
        pipe.stdin.flush()
    return pipe.stdout.readline()


def _row(name: str, share: str, pairs: list[tuple[float, ...]]) -> Row:
    low, ratio, high = statistics.quantiles([after / before for before, after in pairs], n=4)
    before, after = (statistics.median(times) for times in zip(*pairs, strict=True))
    figures = {"before_us": before, "after_us": after, "ratio": ratio, "ratio_low": low, "ratio_high": high}
    return {"operation": name, "share": share} | {key: round(x, 3) for key, x in figures.items()}


def table(rows: list[Row]) -> str:
    """Markdown."""
    lines = ["| operation | share | before, us | after, us | ratio | quartiles |", "|---|---|---|---|---|---|"]
    for row in rows:
        times = f"{row['before_us']:.1f} | {row['after_us']:.1f} | {row['ratio']:.2f}"
        lines.append(
            f"| {row['operation']} | {row['share']} | {times} | {row['ratio_low']:.2f} to {row['ratio_high']:.2f} |"
        )
    return "\n".join(lines)


def comparison(rows: list[Row]) -> str:
    """Markdown of kernels/README.md: the whole of each call."""
    lines = ["| call | before, us | after, us | ratio, with its quartiles |", "|---|---|---|---|"]
    for row in rows:
        if row["share"] == "whole":
            spread = f"{row['ratio']:.2f} ({row['ratio_low']:.2f} to {row['ratio_high']:.2f})"
            lines.append(f"| {row['operation']} | {row['before_us']:.0f} | {row['after_us']:.0f} | {spread} |")
    return "\n".join(lines)


def _commit(checkout: Path) -> str:
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=checkout, capture_output=True, text=True, check=True).stdout.strip()

    is_changed = git("status", "--porcelain", "--", "adascope_fast", "kernels")
    return git("log", "-1", "--format=%H", "--", "adascope_fast", "kernels") + (" and changes" if is_changed else "")


def main() -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="the checkout that this one is compared with")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--serve", choices=SHARES, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.serve is not None:
        serve(chosen.serve)
        return 0
    if chosen.against is None:
        parser.error("--against names the checkout that this one is compared with")
    load = os.getloadavg()[0]
    rows = measure([chosen.against.resolve(), CHECKOUT], chosen.rounds)
    print(table(rows))
    result = {
        "command": f"python bench/kernels/host.py --against PATH --rounds {chosen.rounds}",
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, no GPU",
        "load_average": [load, os.getloadavg()[0]],
        "versions": {"torch": version("torch"), "triton": version("triton"), "python": platform.python_version()},
        "before": _commit(chosen.against),
        "after": _commit(CHECKOUT),
        "rows_of_latents": NUM_ROWS,
        "latents": SHAPE,
        "rounds": chosen.rounds,
        "rows": rows,
    }
    chosen.out.parent.mkdir(exist_ok=True)
    chosen.out.write_text(json.dumps(result).replace("}, {", "},\n{").replace('"rows": [', '"rows": [\n') + "\n")
    print(chosen.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""LoRA on Stable Diffusion 1.5: checked and planned by the tests, never trained. No weights and no GPU were at hand.

    python examples/sd15_lora.py [--model MODEL] [--train] [section.key=value ...]

Without --train it prints parameters, operations and memory from the model's JSON files; no weights are read. With it,
it trains: about 24 GB of GPU memory by that plan, which was never compared with a GPU. Run `adascope-fast calibrate`
first: AdaScope's default thresholds were chosen for another model.
"""

import argparse

from adascope_fast import Config, Trainer
from adascope_fast.planning.plan import plan

CONFIG = "sd15"
"""The preset, or the path of a file."""


def main() -> None:
    """The plan of the training; with --train, the training."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="stable-diffusion-v1-5/stable-diffusion-v1-5")
    parser.add_argument("--train", action="store_true")
    parser.add_argument("changes", nargs="*", metavar="section.key=value")
    chosen = parser.parse_args()
    changes = [
        f"model.name={chosen.model}",
        "model.train=lora",
        "model.lora_rank=16",
        "reward.name=jpeg_compressibility",
        "selector.name=adascope",
        "run.folder=runs/sd15_lora",
        *chosen.changes,
    ]
    config = Config.load(CONFIG, changes)
    if chosen.train:
        print(Trainer(config).train().report)
    else:
        print(plan(config).table())


if __name__ == "__main__":
    main()

"""Train on a reward of your own: any function of images and prompts.

    python examples/own_reward.py [CONFIG.toml] [section.key=value ...]

The command line takes the same function by name, from the folder that holds this file:
`adascope-fast train CONFIG.toml reward.name=own_reward:redness`.
"""

import sys
from pathlib import Path

import torch

from adascope_fast import Config, Trainer

CONFIG = str(Path(__file__).parents[1] / "configs" / "quickstart.toml")


def redness(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """How red each image is: images [b, 3, h, w] in [0, 1] and their prompts to scores [b]; higher is better."""
    red, green, blue = images.mean((2, 3)).unbind(1)
    return red - (green + blue) / 2


def main() -> None:
    """Train on `redness`; where the report lies."""
    path, *changes = sys.argv[1:] or [CONFIG]
    config = Config.load(path, ["run.folder=runs/own_reward", *changes])
    result = Trainer(config, reward=redness).train()
    print(f"redness {result.before['mean']:.3f} -> {result.after['mean']:.3f}; {result.report}")


if __name__ == "__main__":
    main()

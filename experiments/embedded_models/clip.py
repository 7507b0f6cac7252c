"""How well the embedded CLIP judges: held-out captions of drawings, of what the autoencoder gives back, of rollouts.

    python experiments/embedded_models/clip.py     # about two minutes on one core; writes results/scenes_clip.json

Accuracy is the share of pictures whose own caption is nearest among all held-out captions. "Given back" passes the
drawings through the autoencoder of the embedded models, with noise of 0.15 standard deviations on the latents. On
pictures of the base models there is no right caption: there it is compared with `scene_attributes`, the reward that
analyses the picture, by rank correlation; and right captions with those of the next prompt.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from scipy.stats import spearmanr

from adascope_fast import backbones
from adascope_fast.pretraining import clip as pretraining
from adascope_fast.pretraining.drawing import draw
from adascope_fast.rewards.clip import ClipSimilarity
from adascope_fast.rewards.scene_attributes import SceneAttributes
from adascope_fast.training.draw import draw as sample

RESULTS = Path(__file__).parent / "results" / "scenes_clip.json"


@torch.no_grad()
def accuracy(clip: ClipSimilarity, *, num_images: int, noise: float | None = None) -> float:
    """Share of drawn pictures, `num_pictures` a caption, whose own caption is nearest among the held-out ones."""
    captions = [scene.caption for scene in pretraining.HELD_OUT]
    said, own = clip.embed_prompts(captions, torch.device("cpu")), torch.arange(len(captions))
    vae = None if noise is None else pretraining.embedded_vae()
    right = 0
    for number in range(num_images):
        images = draw(pretraining.HELD_OUT, pretraining.LATE_DRAW + number)
        if vae is not None and noise is not None:
            images = pretraining.given_back(vae, images, noise, number)
        right += int(((clip.embed_images(images) @ said.T).argmax(1) == own).sum())
    return right / (num_images * len(captions))


def on_rollouts(clip: ClipSimilarity, name: str, *, num_prompts: int, num_steps: int) -> dict[str, float]:
    """Of pictures of a base model: agreement with `scene_attributes`, and similarity to right and wrong captions."""
    captions = [scene.caption for scene in pretraining.HELD_OUT][:: max(1, len(pretraining.HELD_OUT) // num_prompts)]
    backbone = backbones.load(name)
    images = sample(backbone, captions, [0, 1], num_steps=num_steps, guidance_scale=1.0)
    said = [caption for caption in captions for _ in range(2)]
    right, wrong = clip(images, said), clip(images, [*said[2:], *said[:2]])
    found: Any = spearmanr(right, SceneAttributes()(images, said))
    return {
        "num_pictures": len(images),
        "similarity": right.mean().item(),
        "similarity_to_the_next_caption": wrong.mean().item(),
        "rank_correlation_with_scene_attributes": float(found.statistic),
    }


def main() -> None:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clip", default="scenes-clip", help="folder of another CLIP of the scenes")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    clip = ClipSimilarity.load(arguments.clip)
    values = {
        "command": "python experiments/embedded_models/clip.py",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "parameters": sum(parameter.numel() for parameter in clip.model.parameters()),
        "num_captions": len(pretraining.HELD_OUT),
        "num_pictures": 4 * len(pretraining.HELD_OUT),
        "accuracy_drawings": accuracy(clip, num_images=4),
        "accuracy_given_back": accuracy(clip, num_images=4, noise=0.15),
        "rollouts": {name: on_rollouts(clip, name, num_prompts=43, num_steps=20) for name in ("scenes", "scenes-flow")},
    }
    arguments.out.write_text(json.dumps(values, indent=1) + "\n")
    print(json.dumps(values, indent=1))


if __name__ == "__main__":
    main()

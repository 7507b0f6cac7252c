"""What the embedded models draw of held-out captions: the share of every attribute that is right, and the ceiling.

    python experiments/embedded_models/pictures.py     # about three minutes on one core; writes results/pictures.json

and `results/scenes.png` and `results/scenes_flow.png`, pictures of held-out captions, each on a seed of its own.

The ceiling is what the autoencoder gives back of drawings that have every attribute, without and with noise on their
latents: no denoiser in front of that decoder can do better. The denoisers draw by their own deterministic sampler, each
picture on a seed of its own: what they make of a seed is much alike for most captions.
"""

import argparse
import datetime
import json
import os
from collections.abc import Sequence
from pathlib import Path

import diffusers
import torch
from torch import Tensor

from adascope_fast import backbones
from adascope_fast.pretraining import clip as pretraining
from adascope_fast.pretraining.drawing import draw
from adascope_fast.prompts.scenes import captions as captions_of
from adascope_fast.reporting.images import contact_sheet
from adascope_fast.rewards.scene_attributes import ATTRIBUTES, SceneAttributes, describe
from adascope_fast.training.draw import draw_each

RESULTS = Path(__file__).parent / "results" / "pictures.json"
SHOWN = 16
NUM_STEPS = 20  # as configs/quickstart.toml and configs/quickstart_flow.toml
GUIDANCE = (1.0, 2.0)
LATENT_NOISE = (0.0, 0.05, 0.15, 0.3)  # of the latents' standard deviation


def judged(images: Tensor, captions: Sequence[str]) -> dict[str, float]:
    """The mean reward; the share of the pictures with each attribute, of those whose caption names it; and of outlines.

    An outline is right where every object of a picture has one of the four shapes, whichever the caption asks for.
    """
    reward = SceneAttributes()
    seen, present = describe(images)
    outlines = ((seen[..., ATTRIBUTES.index("shape")] >= 0) | ~present).all(1) & present.any(1)
    shares = {name: round(share, 4) for name, share in reward.breakdown(images, captions).items()}
    mean = round(reward(images, captions).mean().item(), 4)
    return {"mean": mean, **shares, "outlines": round(outlines.float().mean().item(), 4)}


def ceiling(noise: float, num_images: int) -> dict[str, float]:
    """Of drawings of held-out captions, `num_images` each, as the autoencoder gives them back."""
    vae = pretraining.embedded_vae()
    drawn = [draw(pretraining.HELD_OUT, pretraining.LATE_DRAW + number) for number in range(num_images)]
    given = [pretraining.given_back(vae, images, noise, number) for number, images in enumerate(drawn)]
    return judged(torch.cat(given), [scene.caption for scene in pretraining.HELD_OUT] * num_images)


def of_model(name: str, guidance_scale: float, num_images: int) -> dict[str, float]:
    """Of what a model draws of held-out captions, `num_images` each, every picture on a seed of its own."""
    captions = [scene.caption for scene in pretraining.HELD_OUT for _ in range(num_images)]
    images = draw_each(
        backbones.load(name),
        captions,
        range(len(captions)),
        num_steps=NUM_STEPS,
        guidance_scale=guidance_scale,
        batch=86,
    )
    return judged(images, captions)


def show(name: str, path: Path) -> None:
    """Write pictures of held-out captions with the captions below, as the model is used in its quickstart."""
    captions, seeds = captions_of("held_out")[:SHOWN], range(SHOWN)
    images = draw_each(backbones.load(name), captions, seeds, num_steps=NUM_STEPS, guidance_scale=GUIDANCE[0])
    contact_sheet(images, captions, SHOWN // 2, path)


def main() -> None:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(backbones.EMBEDDED), help="or folders of such models")
    parser.add_argument("--images", type=int, default=2, help="of each caption")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    values = {
        "command": "python experiments/embedded_models/pictures.py",
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
        "machine": f"{os.cpu_count()} x86-64 cores, one thread",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "num_captions": len(pretraining.HELD_OUT),
        "num_pictures": arguments.images * len(pretraining.HELD_OUT),
        "num_steps": NUM_STEPS,
        "autoencoder": {f"noise {noise}": ceiling(noise, arguments.images) for noise in LATENT_NOISE},
        "models": {
            name: {f"guidance {scale:g}": of_model(name, scale, arguments.images) for scale in GUIDANCE}
            for name in arguments.models
        },
    }
    for name in arguments.models:
        show(name, arguments.out.parent / f"{Path(name).name.replace('-', '_')}.png")
    arguments.out.write_text(json.dumps(values, indent=1) + "\n")
    print(json.dumps(values, indent=1))


if __name__ == "__main__":
    main()

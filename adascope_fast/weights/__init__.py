"""Publishers' weights made into folders that rewards and metrics read: safetensors, config, tokenizer, processor.

A run reads safetensors alone. What was published otherwise is converted here, once: pickles are opened with torch's
`weights_only`, which runs no code, every weight is accounted for by name, and what is left over or missing is refused.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from adascope_fast.settings import imported

# name: (what converts (files, folder), what it is, where it is published).
KINDS: dict[str, tuple[str, str, str]] = {
    "hpsv2": (
        "adascope_fast.weights.open_clip:hpsv2",
        "HPSv2: HPS_v2_compressed.pt, and a CLIP tokenizer: bpe_simple_vocab_16e6.txt.gz, merges.txt or tokenizer.json",
        "huggingface.co/xswu/HPSv2; the tokenizer: github.com/openai/CLIP, or any CLIP's on huggingface.co",
    ),
    "hpsv2.1": (
        "adascope_fast.weights.open_clip:hpsv21",
        "HPSv2.1: HPS_v2.1_compressed.pt, and a CLIP tokenizer, as for hpsv2",
        "huggingface.co/xswu/HPSv2; the tokenizer: as for hpsv2",
    ),
    "image_reward": (
        "adascope_fast.weights.image_reward:image_reward",
        "ImageReward: ImageReward.pt, and vocab.txt or tokenizer.json of bert-base-uncased",
        "huggingface.co/THUDM/ImageReward and huggingface.co/google-bert/bert-base-uncased",
    ),
    "aesthetic": (
        "adascope_fast.weights.aesthetic:aesthetic",
        "LAION's aesthetic predictor V2: sac+logos+ava1-l14-linearMSE.pth",
        "github.com/christophschuhmann/improved-aesthetic-predictor",
    ),
    "inception": (
        "adascope_fast.weights.inception:inception",
        "FID's Inception-v3: pt_inception-2015-12-05-6726825d.pth",
        "github.com/mseitzer/pytorch-fid/releases",
    ),
    "vgg16": (
        "adascope_fast.weights.vgg16:vgg16",
        "VGG-16 for improved precision and recall: vgg16-397923af.pth",
        "download.pytorch.org/models",
    ),
}
WEIGHTS = "model.safetensors"


def convert(kind: str, files: Sequence[Path], out: Path, *, overwrite: bool = False) -> Path:
    """Write `out` from published files, and return it.

    Args:
        kind: a name of `KINDS`.
        overwrite: replace a folder that was written before.

    Raises:
        ValueError: there is no such kind or file, a file is something else or damaged, or `out` is not to be replaced.
    """
    if kind not in KINDS:
        raise ValueError(f"import-weights knows {', '.join(KINDS)}, got {kind!r:.80}; choose one of them")
    maker, what, published = KINDS[kind]
    missing = [str(file) for file in files if not file.is_file()]
    if missing or not files:
        got = f"{missing[0]!r}, which is no file" if missing else "none"
        raise ValueError(f"import-weights {kind} takes {what}, got {got}; download it from {published}")
    _refuse_filled(out, overwrite=overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as work:
        made = Path(work) / "made"
        made.mkdir()
        imported(maker)(list(files), made)
        from adascope_fast.loading import follow_umask

        follow_umask(made)
        _refuse_filled(out, overwrite=overwrite)  # somebody else may have written there meanwhile
        if out.exists():
            out.rename(Path(work) / "before")
        made.rename(out)
    return out


def _refuse_filled(out: Path, *, overwrite: bool) -> None:
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise ValueError(f"--out names a folder, and {str(out)!r} is none; choose another place")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not overwrite:
        raise ValueError(
            f"import-weights never replaces what is there, and {str(out)!r} has something in it; give --overwrite, or "
            f"another --out"
        )
    if not (out / WEIGHTS).is_file():
        raise ValueError(
            f"--overwrite replaces a folder of weights, and {str(out)!r} has no {WEIGHTS}; choose another --out"
        )

"""A pipeline's folder as transformers 4, which TRL 0.23.1 needs, reads it.

transformers 5 writes a CLIP text encoder's weights without the prefix "text_model.", under which transformers 4 looks
for them; it finds none and draws them anew, without an error, and what is trained then has random text. Imports
safetensors alone, so that it runs in TRL's environment.
"""

from pathlib import Path

from safetensors.torch import load_file, save_file

PREFIX = "text_model."


def for_transformers_4(source: Path, folder: Path) -> Path:
    """`folder`, of links to what is in `source`; the text encoder's weights are written with the prefix."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in source.iterdir():
        if part.name != "text_encoder":
            _link(part, folder / part.name)
    (folder / "text_encoder").mkdir(exist_ok=True)
    for file in (source / "text_encoder").iterdir():
        copy = folder / "text_encoder" / file.name
        if file.suffix == ".safetensors":
            save_file({named(name): value for name, value in load_file(file).items()}, copy, metadata={"format": "pt"})
        else:
            _link(file, copy)
    return folder


def named(weight: str) -> str:
    """The name of a text encoder's weight in transformers 4; that of another layer stays."""
    return weight if weight.startswith((PREFIX, "text_projection.")) else PREFIX + weight


def _link(source: Path, link: Path) -> None:
    link.unlink(missing_ok=True)
    link.symlink_to(source.resolve())

"""Whether the folder of a set, or of a preference model, is there or may be written. Nothing here imports torch."""

from pathlib import Path

MANIFEST = "manifest.json"
"""What tells that a set was made here."""
WEIGHTS, DESCRIPTION = "model.safetensors", "config.json"
"""The files of a preference model."""
MAKE = "make one with: adascope-fast make-preferences CONFIG.toml --out FOLDER --pairs 400"
NAME_ONE = 'name a folder that adascope-fast train-preference-model has made, or "reward"'


def folder_of(folder: str | Path | None) -> Path:
    """The folder of a set; ValueError where it is not there."""
    if not folder:
        raise ValueError(f"algorithm.preferences must name the folder of a set, got none; {MAKE}")
    place = Path(folder)
    if not place.is_dir():
        what = "which is a file" if place.exists() else "which is not there"
        raise ValueError(f"algorithm.preferences is a folder, got {str(folder)!r}, {what}; {MAKE}")
    return place


def refuse_no_model(folder: Path) -> None:
    """ValueError where a folder holds no preference model."""
    if not (folder / DESCRIPTION).is_file():
        raise ValueError(
            f"algorithm.preference_model is a folder with {DESCRIPTION} and {WEIGHTS}, got {str(folder)!r}; {NAME_ONE}"
        )


def refuse_filled(folder: Path, *, overwrite: bool) -> None:
    """ValueError where a set may not be written to `folder`."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ValueError(f"--out names a folder, and {str(folder)!r} is none; choose another place")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise ValueError(
            f"a set never replaces what is there, and {str(folder)!r} has something in it; give --overwrite, or "
            f"another --out"
        )
    if not (folder / MANIFEST).is_file():
        raise ValueError(
            f"--overwrite replaces a set that was made here, and {str(folder)!r} has no {MANIFEST}; choose another"
        )

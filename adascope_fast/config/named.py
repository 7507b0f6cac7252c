"""Where a name becomes a configuration: a TOML file, a preset, or a model with the defaults of everything else."""

from collections.abc import Sequence
from pathlib import Path

from adascope_fast.backbones.settings import EMBEDDED_NAMES
from adascope_fast.config.presets import names
from adascope_fast.config.sources import Override
from adascope_fast.config.tree import Config


def named(name: str | Path, overrides: Sequence[Override] = ()) -> Config:
    """The configuration that `name` stands for, with `overrides` on top.

    Args:
        name: a .toml file, a preset, or what `model.name` takes: an embedded model, a pipeline's folder, a .safetensors
            file, or a repository.
    """
    is_word = len(Path(name).parts) == 1 and not Path(name).suffix and not Path(name).exists()
    is_slip = is_word and str(name) not in EMBEDDED_NAMES  # neither the name of a model nor of a repository
    if Path(name).suffix == ".toml" or str(name) in names() or is_slip:
        return Config.load(name, overrides)
    return Config.load(None, [("model.name", str(name)), *overrides])

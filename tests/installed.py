"""Check an installed copy of the package, run by `make wheel` from outside the checkout: installed.py VENV_FOLDER."""

import sys
from importlib.util import find_spec
from pathlib import Path


def main(environment: Path) -> None:
    import adascope_fast

    package = Path(adascope_fast.__file__).parent
    assert package.is_relative_to(environment), f"imported {package}, which is not the installed copy in {environment}"
    for pattern in (
        "kernels/*.py",
        "reporting/*.j2",
        "assets/*/model_index.json",
        "assets/*/*/*.safetensors",
        "assets/scenes-clip/*.safetensors",
        "py.typed",
    ):
        assert list(package.glob(pattern)), (
            f"the wheel holds no adascope_fast/{pattern}; see package-data in pyproject.toml"
        )
    assert not (package / "kernels").is_symlink(), "the wheel must hold the kernels themselves"
    assert find_spec("adascope_fast.kernels") is not None
    print(f"adascope_fast {adascope_fast.__version__} from the wheel: package data complete")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())

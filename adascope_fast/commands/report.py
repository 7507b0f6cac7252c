"""`adascope-fast report`: the page of a run, written again from its folder."""

from adascope_fast.commands.configuration import RunFolder
from adascope_fast.config import ConfigError


def report(run: RunFolder) -> None:
    """Write a run's report.html again."""
    if not (run / "config.toml").is_file():
        raise ConfigError(f"a run's folder holds a config.toml, {str(run)!r} does not; check the path")
    from adascope_fast.reporting import write_report

    print(write_report(run))

"""The configuration of a run: a tree of sections, each declared by the component that it configures."""

from adascope_fast.config.sources import ConfigError as ConfigError
from adascope_fast.config.tree import Config as Config

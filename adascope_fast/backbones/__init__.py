"""Text-to-image models: the embedded ones by name, any other by its diffusers folder, file or repository."""

from typing import TYPE_CHECKING

from adascope_fast.lazy import lazy

if TYPE_CHECKING:
    from adascope_fast.backbones.base import PipelineBackbone as PipelineBackbone
    from adascope_fast.backbones.loading import ASSETS as ASSETS
    from adascope_fast.backbones.loading import EMBEDDED as EMBEDDED
    from adascope_fast.backbones.loading import FAMILIES as FAMILIES
    from adascope_fast.backbones.loading import PUBLISHED as PUBLISHED
    from adascope_fast.backbones.loading import check as check
    from adascope_fast.backbones.loading import family_of as family_of
    from adascope_fast.backbones.loading import folder_of as folder_of
    from adascope_fast.backbones.loading import is_described as is_described
    from adascope_fast.backbones.loading import load as load
    from adascope_fast.backbones.loading import outline as outline

__getattr__ = lazy(
    __name__,
    {
        "ASSETS": "loading",
        "EMBEDDED": "loading",
        "FAMILIES": "loading",
        "PUBLISHED": "loading",
        "PipelineBackbone": "base",
        "check": "loading",
        "family_of": "loading",
        "folder_of": "loading",
        "is_described": "loading",
        "load": "loading",
        "outline": "loading",
    },
)

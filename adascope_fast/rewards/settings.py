"""Sections of the rewards: the keys of `[reward]`, by `reward.name`. Nothing here imports torch."""

from typing import ClassVar, Literal

from adascope_fast.settings import Own, Section, Text, imported


class SceneAttributes(Section):
    """Share of a scene caption's attributes that the image satisfies, in [0, 1], by classical image analysis."""

    implementation: ClassVar[str] = "adascope_fast.rewards.scene_attributes:SceneAttributes"

    name: Literal["scene_attributes"] = "scene_attributes"


class JpegCompressibility(Section):
    """Minus the kilobytes of the image as a JPEG of quality 95."""

    name: Literal["jpeg_compressibility"] = "jpeg_compressibility"

    def build(self, **context: object) -> object:
        """The function itself."""
        return imported("adascope_fast.rewards.jpeg:jpeg_compressibility")


class JpegIncompressibility(Section):
    """The kilobytes of the image as a JPEG of quality 95."""

    name: Literal["jpeg_incompressibility"] = "jpeg_incompressibility"

    def build(self, **context: object) -> object:
        """The function itself."""
        return imported("adascope_fast.rewards.jpeg:jpeg_incompressibility")


class ClipSimilarity(Section):
    """Cosine of image and prompt by a CLIP, in [-1, 1]."""

    name: Literal["clip_similarity"] = "clip_similarity"
    clip: Text = "scenes-clip"
    """`scenes-clip` (embedded), the folder of a CLIPModel, or a Hugging Face repository."""

    def build(self, **context: object) -> object:
        """The CLIP, loaded."""
        return imported("adascope_fast.rewards.clip:ClipSimilarity").load(self.clip)


class OwnReward(Own):
    """One of your own: `name` is `module:object`, other keys are its arguments."""

    named_by: ClassVar[str] = "reward.name"

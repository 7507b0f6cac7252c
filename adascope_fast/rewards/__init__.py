"""Rewards by name, or `module:function` of the user's own. Higher is better, always."""

from typing import TYPE_CHECKING

from adascope_fast.lazy import lazy

if TYPE_CHECKING:
    from adascope_fast.rewards.clip import ClipSimilarity as ClipSimilarity
    from adascope_fast.rewards.jpeg import jpeg_compressibility as jpeg_compressibility
    from adascope_fast.rewards.jpeg import jpeg_incompressibility as jpeg_incompressibility
    from adascope_fast.rewards.judged import Judged as Judged
    from adascope_fast.rewards.mixed import Mixed as Mixed
    from adascope_fast.rewards.remote.client import Remote as Remote
    from adascope_fast.rewards.reward import Reward as Reward
    from adascope_fast.rewards.reward import Scorer as Scorer
    from adascope_fast.rewards.reward import breakdown as breakdown
    from adascope_fast.rewards.reward import check_prompts as check_prompts
    from adascope_fast.rewards.reward import constant_hint as constant_hint
    from adascope_fast.rewards.reward import given as given
    from adascope_fast.rewards.reward import hand_metadata as hand_metadata
    from adascope_fast.rewards.reward import has_parts as has_parts
    from adascope_fast.rewards.reward import load as load
    from adascope_fast.rewards.reward import refuses_several as refuses_several
    from adascope_fast.rewards.reward import score as score
    from adascope_fast.rewards.reward import score_guesses as score_guesses
    from adascope_fast.rewards.reward import takes_metadata as takes_metadata
    from adascope_fast.rewards.reward import training_begins as training_begins
    from adascope_fast.rewards.reward import training_ends as training_ends
    from adascope_fast.rewards.reward import training_stage as training_stage
    from adascope_fast.rewards.scene_attributes import SceneAttributes as SceneAttributes

__getattr__ = lazy(
    __name__,
    {
        "ClipSimilarity": "clip",
        "Judged": "judged",
        "Mixed": "mixed",
        "Remote": "remote.client",
        "Reward": "reward",
        "SceneAttributes": "scene_attributes",
        "Scorer": "reward",
        "breakdown": "reward",
        "check_prompts": "reward",
        "constant_hint": "reward",
        "given": "reward",
        "hand_metadata": "reward",
        "has_parts": "reward",
        "jpeg_compressibility": "jpeg",
        "jpeg_incompressibility": "jpeg",
        "load": "reward",
        "refuses_several": "reward",
        "score": "reward",
        "score_guesses": "reward",
        "training_begins": "reward",
        "training_ends": "reward",
        "training_stage": "reward",
        "takes_metadata": "reward",
    },
)

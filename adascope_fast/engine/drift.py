"""Whether what rounding does between rollout and update is beyond the range that ratios are clipped to."""

from adascope_fast.algorithms.algorithm import Algorithm
from adascope_fast.algorithms.objectives import Clipped
from adascope_fast.engine.settings import Updates


def drift_hint(algorithm: Algorithm, settings: Updates, drift: float) -> str | None:
    """What to say, in one line, of an iteration whose `rollout_drift_max` is clipped; None where it is not.

    The first update compares with itself, so only those after it meet ratios to what the rollout recorded.
    """
    objective = getattr(algorithm, "objective", None)
    if not isinstance(objective, Clipped) or settings.num_updates < 2:
        return None
    clip_range = min(objective.clip_range, objective.clip_range_high or objective.clip_range)
    if not drift > clip_range:
        return None
    return (
        f"log-probabilities differ by up to {drift:.1e} between rollout and update before any weight has moved, more "
        f"than the clip range of {clip_range:.1e}, so rounding alone is clipped; raise algorithm.clip_range, or let "
        'both round alike: acceleration.fold_adapter = "off", train.microbatch = train.rollout_batch, model.dtype = '
        '"float32"'
    )

"""Step-aware preference models: which of two states of a rollout leads to the better image, noisy as they are.

`model` has the network and its folder, `fitting` how it is trained on pairs of images.
"""

from typing import TYPE_CHECKING

from adascope_fast.lazy import lazy

if TYPE_CHECKING:
    from adascope_fast.preferences.fitting import Judged as Judged
    from adascope_fast.preferences.fitting import fit as fit
    from adascope_fast.preferences.fitting import held_out_accuracy as held_out_accuracy
    from adascope_fast.preferences.model import StepAwareModel as StepAwareModel

__getattr__ = lazy(
    __name__,
    {
        "Judged": "fitting",
        "StepAwareModel": "model",
        "fit": "fitting",
        "held_out_accuracy": "fitting",
    },
)

"""What was judged: sets of preferences between images, and models that tell the better of two noisy states.

`files` reads a set and `making` makes one from a model and a reward; `model` has the network of a step-aware preference
model and its folder, `fitting` how it is trained on pairs of images.
"""

from typing import TYPE_CHECKING

from adascope_fast.lazy import lazy

if TYPE_CHECKING:
    from adascope_fast.preferences.fitting import RatedImages as RatedImages
    from adascope_fast.preferences.fitting import fit as fit
    from adascope_fast.preferences.fitting import held_out_accuracy as held_out_accuracy
    from adascope_fast.preferences.model import StepAwareModel as StepAwareModel

__getattr__ = lazy(
    __name__,
    {
        "RatedImages": "fitting",
        "StepAwareModel": "model",
        "fit": "fitting",
        "held_out_accuracy": "fitting",
    },
)

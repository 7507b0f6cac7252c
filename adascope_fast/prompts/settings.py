"""The section `[prompts]`. Nothing here imports torch."""

from adascope_fast.settings import Section, Text


class Prompts(Section):
    """Which captions to train on and which to judge by: `scenes:<split>` or a text file with one prompt a line."""

    train: Text = "scenes:train"
    """Captions of the rollouts."""
    held_out: Text = "scenes:held_out"
    """Captions of the evaluation, never trained on."""

"""The algorithms that are compared: a line each. What is not said here is the base's, below, or the default.

`settings` hold for both arms. The learning rate is tuned, the steps of the arm `original` are those of the algorithm's
paper or code, scaled to the steps of these small models.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Base:
    """What the algorithms of a family have in common."""

    config: str
    """File within this folder."""
    adascope: tuple[str, ...] = ()
    """Thresholds of AdaScope."""


@dataclass(frozen=True)
class Entry:
    """An algorithm, on which model, with which steps of its own."""

    name: str
    base: Base
    original: tuple[str, ...] = ("selector.name=every_step",)
    """The selector of its paper or code."""
    settings: tuple[str, ...] = ()
    """Of the algorithm and its sampler, in both arms."""
    preferences: tuple[str, ...] | None = None
    """Arguments of `adascope-fast make-preferences`, for what is trained on a set of preferences; None: it is not."""
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2)
    """Learning rates to choose from."""


DIFFUSION = Base("scenes.toml", ("selector.kappa=0.9", "selector.phi_end=0.046"))  # the quickstart's thresholds
FLOW = Base("scenes_flow.toml")
BALANCED = "algorithm.step_weight=balanced"

ALGORITHMS = {
    entry.name: entry
    for entry in (
        Entry("ddpo", DIFFUSION, settings=(BALANCED, "algorithm.clip_range=5e-3", "algorithm.min_count=8")),
        Entry("reinforce", DIFFUSION, settings=(BALANCED, "algorithm.min_count=8")),
        Entry("dpok", DIFFUSION, settings=(BALANCED, "algorithm.clip_range=5e-3")),
        Entry("d3po", DIFFUSION, settings=(BALANCED,)),
        Entry("grpo", FLOW, settings=(BALANCED, "algorithm.clip_range=5e-3")),
        Entry("awm", FLOW, settings=("sampler.kind=flow_ode",)),
    )
}

"""The algorithms that are compared: a line each. What is not said here is the base's, below, or the default.

`settings` hold for both arms. The learning rate is tuned, the steps of the arm `original` are those of the algorithm's
paper or code, scaled to the steps of these small models.
"""

from dataclasses import dataclass

from experiments.runs import thresholds


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
    rates: tuple[float, ...] = (3e-3, 1e-2)
    """Learning rates to choose from."""


DIFFUSION = Base("scenes.toml", thresholds("quickstart.toml"))
ON_A_SET = Base(DIFFUSION.config, (*DIFFUSION.adascope, "sensing.every=10"))  # what is sensed has to be sampled first
OF_A_SET = ("train.prompts_per_iteration=64", "train.iterations=40", "algorithm.prompt_dropout=0")
"""Records, and no guidance to train for. Errors are means over 512 latent elements, not 16,384: beta is smaller."""
FLOW = Base("scenes_flow.toml")
BALANCED = "algorithm.step_weight=balanced"

ALGORITHMS = {
    entry.name: entry
    for entry in (
        Entry("ddpo", DIFFUSION, settings=(BALANCED, "algorithm.clip_range=5e-3", "algorithm.min_count=8")),
        Entry("dpok", DIFFUSION, settings=(BALANCED, "algorithm.clip_range=5e-3")),
        Entry("d3po", DIFFUSION, settings=(BALANCED,)),
        Entry("grpo", FLOW, settings=(BALANCED, "algorithm.clip_range=5e-3")),
        Entry("flow_grpo_fast", FLOW, ("selector.name=fast_window", "selector.start=0", "selector.end=5"), (BALANCED,)),
        Entry(
            "dance_grpo",
            FLOW,
            ("selector.name=random_fraction", "selector.fraction=0.6"),
            (BALANCED, "sampler.kind=dance_sde"),
        ),
        Entry(
            "mix_grpo", FLOW, ("selector.name=window", "selector.window_size=2", "selector.shift_every=1"), (BALANCED,)
        ),
        Entry("grpo_guard", FLOW),
        Entry("tdpo", DIFFUSION, settings=(BALANCED, "algorithm.min_count=8")),
        Entry(
            "spo",
            DIFFUSION,
            ("selector.name=late_start",),
            (BALANCED, "train.prompts_per_iteration=4", "train.samples_per_prompt=4"),  # a pair costs five forwards
        ),
        Entry("diffusion_dpo", ON_A_SET, settings=(*OF_A_SET, "algorithm.beta=300"), preferences=()),
        Entry("diffusion_kto", ON_A_SET, settings=(*OF_A_SET, "algorithm.beta=100"), preferences=("--labelled",)),
        Entry("diffusion_nft", FLOW, settings=("sampler.kind=dpm_solver",)),
        Entry("awm", FLOW, settings=("sampler.kind=dpm_solver",)),
        Entry("reinforce", DIFFUSION, settings=(BALANCED, "algorithm.min_count=8")),
    )
}

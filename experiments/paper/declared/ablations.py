"""Tab. 2 and Fig. 7: fixed intervals V1 to V3, AdaScope's parts one at a time, and controls of equal length.

V1 to V3 are the paper's, of 50 steps, scaled to 10: [5, 32); a start of 0 or 10 with the end at 35; a start of 5 with
the end at 40. With the end at 30 it is V1 again.
"""

from dataclasses import replace

from experiments.paper.arms import ADASCOPE
from experiments.paper.declaring import BALANCED, DDPO, EVERY_STEP, Arm, Experiment

OF_50 = {"v1": (5, 32), "v2_early": (0, 35), "v2_late": (10, 35), "v3_long": (5, 40)}


def _fixed(start: int, end: int) -> Arm:
    first, last = (int(step * 10 / 50 + 0.5) for step in (start, end))
    return Arm(("selector.name=static_range", f"selector.start={first}", f"selector.end={last}"), against="adascope")


def _other(*changes: str) -> Arm:
    return Arm((*ADASCOPE, *changes), against="adascope")


def _of_scenes(*changes: str) -> Arm:
    return replace(_other(*changes), is_of_scenes=True)


def _rule(name: str) -> Arm:
    """Another rule, which has none of the knee's thresholds; the fallback is the paper's interval."""
    return Arm(("selector.name=adascope", f"selector.rule={name}"), against="adascope")


EXPERIMENT = Experiment(
    "Which parts of AdaScope matter, and is it more than a shorter interval?",
    "Tab. 2, Fig. 7",
    {
        "adascope": Arm(ADASCOPE),
        "every_step": Arm(EVERY_STEP, against="adascope"),
        "from_the_knee": _of_scenes("selector.kappa=0.9"),
        "to_the_papers_end": _of_scenes("selector.phi_end=0.034"),
        "the_papers_mean": _of_scenes("selector.kappa=0.9", "selector.phi_end=0.034"),
        **{name: _fixed(*interval) for name, interval in OF_50.items()},
        "rule_literal": _rule("literal"),
        "rule_fraction": _rule("fraction"),
        "pooled_by_sample": _other("selector.pooling=sample"),
        "pooled_by_batch": _other("selector.pooling=batch"),
        "mask_of_before": _other("selector.mask_source=previous"),
        "sensed_reward_only": _other("sensing.kind=reward_only"),
        "sensed_semantic": _other("sensing.kind=semantic"),
        "control_same_mean": Arm(
            ("selector.name=static_range", "selector.start={start}", "selector.end={end}"),
            against="adascope", like="adascope",
        ),
        "control_random_place": Arm(
            (
                "selector.name=window", "selector.window_order=random", "selector.shift_every=1",
                "selector.ode_outside=false", "selector.window_size={length}",
            ),
            against="adascope", like="adascope",
        ),
        "control_random_steps": Arm(
            ("selector.name=random_fraction", "selector.fraction={fraction}"), against="adascope", like="adascope"
        ),
        "control_complement": Arm(
            ("selector.name=complement", *(change for change in ADASCOPE if "selector.name" not in change)),
            against="adascope",
        ),
    },
    common=(*DDPO, *BALANCED),
)  # fmt: skip

"""What the updates of a run did, by iteration: a chart of what varies, a sentence of what does not."""

from collections.abc import Mapping, Sequence
from typing import Any

from adascope_fast.reporting import figures
from adascope_fast.reporting.files import mapping, number_of

Record = Mapping[str, Any]
# Title, quantity with its unit, and what it is multiplied by to be in that unit.
DIAGNOSTICS = {
    "loss": ("loss", "loss, mean over the pairs", 1),
    "accuracy": ("records told right", "records of the set, %", 100),
    "margin": ("margin of the set's records", "margin", 1),
    "approx_kl": ("approximate KL from the rollout's policy", "approx. KL, nats", 1),
    "clipfrac": ("clipped pairs", "clipped, % of the pairs", 100),
    "grad_norm": ("gradient norm", "gradient norm before clipping", 1),
    "ratio_max_deviation": ("largest |ratio - 1|", "largest |ratio - 1| of a pair", 1),
    "learning_rate": ("learning rate", "learning rate of AdamW", 1),
    "sensing_share": ("sensing's share of the time", "sensing, % of the time", 100),
}
OF_RATIOS = ("approximate KL from the rollout's policy", "clipped pairs", "largest |ratio - 1|", "mean |ratio - 1|")
ROUNDING = 1e-6
NO_LOSS = "loss but for rounding"
"""With ratios of 1 the loss is the mean advantage, and advantages are centred."""
BY_CONSTRUCTION = (
    "as it must be with one update an iteration: the weights have not moved since the rollout, so every ratio is 1"
)
CENTRED = "the loss is then the mean advantage, and advantages are centred"


def charts(stats: Sequence[Record], config: Record) -> tuple[list[tuple[str, str]], dict[str, float]]:
    """(title, SVG) of each quantity that varies over the iterations; title and value of each that does not."""
    drawn, constant = [], {}
    for key, (title, quantity, factor) in DIAGNOSTICS.items():
        points = [(x, factor * y) for x, y in curve(stats, key)]
        if key == "loss" and makes_one_update(config) and 0 < max((abs(y) for _, y in points), default=0) < ROUNDING:
            constant[NO_LOSS] = 0.0
            continue
        if (value := one_value(y for _, y in points)) is not None:
            constant[title] = value
        elif chart := figures.line_chart(points, quantity, css="d"):
            drawn.append((title, chart))
    return drawn, constant


def curve(stats: Sequence[Record], key: str) -> list[figures.Point]:
    """A quantity by iteration, NaN where it was not recorded."""
    return [(float(record["iteration"]), number_of(record, key)) for record in stats]


def one_value(values: Any) -> float | None:
    """The value that all finite ones are; None where they differ, or there is none."""
    found = {value for value in values if value == value and abs(value) != float("inf")}
    return found.pop() if len(found) == 1 else None


def sentences(constant: Mapping[str, float], config: Record, where: str) -> list[str]:
    """What has one value throughout, in words: first what one update an iteration holds at 0.

    Args:
        where: "in every iteration", "at every step".
    """
    zero = [name for name in (*OF_RATIOS, NO_LOSS) if constant.get(name) == 0] if makes_one_update(config) else []
    rest = [f"{name} {figures.number(value)}" for name, value in constant.items() if name not in zero]
    why = f"{BY_CONSTRUCTION}; {CENTRED}" if NO_LOSS in zero else BY_CONSTRUCTION
    said = [f"{_capital(_joined(zero))}: 0 {where}, {why}."] if zero else []
    return said + ([f"The same {where}: {', '.join(rest)}."] if rest else [])


def makes_one_update(config: Record) -> bool:
    """Whether the configuration makes one update of each rollout."""
    train = mapping(config.get("train"))
    return train.get("updates_per_iteration", 1) == 1 == train.get("inner_epochs", 1)


def _joined(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]

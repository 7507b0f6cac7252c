"""Arms beside each other: images, metrics, verdicts and a view of their variety, written as a folder.

`images/ARM/` holds the images, `evaluation.json` and `table.csv` the numbers, `report.html` all of it on a page.
"""

import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from adascope_fast import images, rewards
from adascope_fast.comparison.arms import Arm, history_of, spread_of
from adascope_fast.comparison.drawing import Asked, folder_of, refuse_others
from adascope_fast.comparison.guards import Contrast, DistanceToBase, PixelDiversity, Verdict, verdict
from adascope_fast.comparison.measuring import Asking, Estimate, Line, measure
from adascope_fast.comparison.page import write_page
from adascope_fast.comparison.table import as_csv, counted, top2
from adascope_fast.comparison.view import View, view
from adascope_fast.images import Folder
from adascope_fast.metrics.scores import ScoreOf
from adascope_fast.metrics.sources import Sources
from adascope_fast.metrics.table import BESIDES, ROWS, Row
from adascope_fast.rewards.settings import Mixed, asks_people
from adascope_fast.settings import Section
from adascope_fast.training.run_folder import plain, versions, write_whole

PACKAGES = ("adascope-fast", "torch", "diffusers", "transformers", "torchmetrics", "scikit-learn")
NUM_SHOWN = 8  # prompts on the page
READ_AT_ONCE = 16  # images that are in memory while they are measured


@dataclass(frozen=True)
class Options:
    """What is measured, and with what."""

    out: Path
    weights: Path | None = None
    """Folder of the metrics' weights, one a metric."""
    clip: str | None = None
    """CLIP of the CLIP score and the entropy."""
    rewards: tuple[Section, ...] = ()
    """Further rewards to judge by, besides those of the runs."""
    metadata: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """What rewards that ask for it are told of a prompt."""
    only: tuple[str, ...] = ()
    """Keys of the metrics; empty: all, and those that cannot be measured say why."""
    reference: str | None = None
    """Arm that FID and the like compare with; None: the first base model."""
    reference_folder: Path | None = None
    """Folder of images in its place."""
    features: str = "clip"
    batch: int = 16
    """Images drawn at once."""
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    overwrite: bool = False


@dataclass(frozen=True)
class Comparison:
    """What came of it."""

    arms: tuple[Arm, ...]
    folders: Mapping[str, Folder]
    lines: tuple[Line, ...]
    verdicts: Mapping[str, Verdict]
    view: View | str
    """Or why there is none."""
    reference: str | None
    notes: tuple[str, ...]
    facts: Mapping[str, Any]


def compare(
    arms: Sequence[Arm],
    asked: Asked | None,
    options: Options,
    *,
    progress: Callable[[str, int], Callable[[int], None]] = lambda what, total: lambda count: None,
) -> Comparison:
    """Draw, measure and write.

    Args:
        asked: what is drawn; None where every arm is a folder of images.
        progress: made for a stage and its number of images, told how many more are done.

    Raises:
        FloatingPointError: an image is not finite.
        ValueError: images of the arms cannot be compared; a metric that `options.only` names cannot be measured.
    """
    started = time.perf_counter()
    folders, seconds = {}, {}
    for arm in arms:
        if arm.kind != "images" and asked is None:
            raise ValueError(f"{arm.name!r} draws images, and nothing says of what; add --prompts")
        if arm.kind != "images" and asked is not None and not options.overwrite:
            refuse_others(arm, asked, options.out / "images" / arm.name)
    for arm in arms:
        begun = time.perf_counter()
        if arm.kind == "images":
            folders[arm.name] = images.read(Path(arm.place), arm.name)
            continue
        assert asked is not None
        folders[arm.name] = folder_of(
            arm,
            asked,
            options.out / "images" / arm.name,
            device=options.device,
            batch=options.batch,
            overwrite=options.overwrite,
            on_images=progress(f"drawing {arm.name}", len(asked.prompts) * asked.images),
        )
        seconds[f"drawing {arm.name}"] = time.perf_counter() - begun
    notes = _differences(arms, folders)
    reference, all_folders = _with_reference(arms, folders, options)
    sources = Sources(options.weights, options.clip, options.device, batch=READ_AT_ONCE)
    told_by, reward_of, more = _rewards(arms, options)
    notes += more
    asking = _asking(options, told_by)
    distance = None
    if any(arm.is_trained for arm in arms) and not options.only:
        try:
            distance = DistanceToBase(sources.distance(needs="LPIPS to the base's images"))
        except ValueError as error:
            notes.append(f"LPIPS to the base's images was not measured: {' '.join(str(error).split())}")
    begun = time.perf_counter()
    lines = measure(
        arms,
        all_folders,
        asking,
        sources,
        reference=reference,
        batch=READ_AT_ONCE,
        device=options.device,
        seed=options.seed,
        distance=distance,
        on_images=progress("measuring", sum(len(folder.images) for folder in all_folders.values())),
    )
    _refuse_missing(lines, options.only)
    seconds["measuring"] = time.perf_counter() - begun
    estimates = {line.key: line.estimates for line in lines}
    verdicts = {
        arm.name: verdict(
            arm.name,
            str(arm.base),
            estimates,
            reward_of.get(arm.name),
            distance,
            history_of(arm),
            spread_of(arm),
        )
        for arm in arms
        if arm.is_trained and not options.only
    }
    begun = time.perf_counter()
    found = "only some metrics were asked for" if options.only else _view(arms, folders, sources, options)
    seconds["the view"] = time.perf_counter() - begun
    seconds["all"] = time.perf_counter() - started
    facts = _facts(arms, asked, options, seconds)
    comparison = Comparison(tuple(arms), folders, tuple(lines), verdicts, found, reference, tuple(notes), facts)
    _write(comparison, options.out)
    return comparison


def _rewards(arms: Sequence[Arm], options: Options) -> tuple[dict[str, Section], dict[str, str], list[str]]:
    """The rewards to judge by, each by its key; which is an arm's own; and what is to be said of those left out."""
    found: dict[str, Section] = {}
    own: dict[str, str] = {}
    notes: list[str] = []
    for section in options.rewards:
        found[_key(section, found)] = section
    for arm in arms:
        if arm.kind != "run" or arm.config is None:
            continue
        section = arm.config.reward
        if asks_people(section):
            notes.append(f"{arm.name} was trained on people's votes, who are not asked again; see adascope-fast judge")
            continue
        known = next((key for key, one in found.items() if one == section), None)
        if known is None and (why := _not_unasked(section)):
            notes.append(f"{arm.name} was trained on {why}; add --reward to judge by it, or by another")
            continue
        key = known or _key(section, found)
        found[key] = section
        own[arm.name] = key
    if options.rewards:
        first = next(iter(found))
        own = {arm.name: first for arm in arms if arm.is_trained} | own
    return found, own, notes


def _not_unasked(section: Section) -> str:
    """Why a run's reward is not asked because the run's folder says so; empty where it may be."""
    names = list(section.parts) if isinstance(section, Mixed) else [getattr(section, "name", "")]
    if own := [name for name in names if ":" in name]:
        return f"{', '.join(own)}, code of its own, which is not run unasked"
    if "remote" in names:
        return "a reward of a server, to which nothing is sent unasked"
    return ""


def _key(section: Any, taken: Mapping[str, Section]) -> str:
    name = f"reward:{section.name}"
    number = 2
    while name in taken:
        name, number = f"reward:{section.name}:{number}", number + 1
    return name


OWN = (
    Row("pixel_diversity", "RMSD", PixelDiversity.title, "diversity", True, lambda sources: PixelDiversity()),
    Row("contrast", "contrast", Contrast.title, "quality", True, lambda sources: Contrast()),
)
"""What a verdict looks at besides the registry's metrics; neither needs weights."""


def _asking(options: Options, told_by: Mapping[str, Section]) -> list[Asking]:
    """Every metric in the order of the page."""
    rows = [_reward_row(key, section, options.metadata) for key, section in told_by.items()]
    asked = [Asking(row, "reward", counts=False) for row in rows]
    asked += [Asking(row, row.group, counts=True) for row in ROWS]
    asked += [Asking(row, "besides", counts=False) for row in (*OWN, *BESIDES)]
    if not options.only:
        return asked
    known = {one.row.key for one in asked}
    for key in options.only:
        if key not in known:
            raise ValueError(f"--metric must be one of {', '.join(sorted(known))}, got {key!r}; choose one of them")
    return [one for one in asked if one.row.key in options.only]


def _reward_row(key: str, section: Section, metadata: Mapping[str, Mapping[str, Any]]) -> Row:
    name = key.removeprefix("reward:")

    def make(sources: Sources) -> ScoreOf:
        reward = rewards.load(section)
        rewards.hand_metadata(reward, metadata)
        return ScoreOf(reward, name)

    return Row(key, name, f"the reward {name}", "preference", True, make)


def _refuse_missing(lines: Sequence[Line], only: Sequence[str]) -> None:
    for line in lines:
        missing = [one for one in line.estimates.values() if not one.is_known]
        if only and len(missing) == len(line.estimates):
            raise ValueError(f"--metric {line.key} must be measured, and was not: {missing[-1].why}")


def _differences(arms: Sequence[Arm], folders: Mapping[str, Folder]) -> list[str]:
    """What differs between the arms, in words; ValueError where two have no prompt in common."""
    notes = []
    first = folders[arms[0].name]
    for arm in arms[1:]:
        folder = folders[arm.name]
        one, other = set(first.prompts), set(folder.prompts)
        if one and other and not one & other:
            raise ValueError(
                f"arms must have prompts in common, {first.name!r} and {arm.name!r} have none; draw both from one list"
            )
        if one != other:
            notes.append(
                f"{first.name} and {arm.name} have {len(one & other)} prompts in common, and {len(one ^ other)} not"
            )
        sizes = {folders[name].images[0].size() for name in (first.name, arm.name)}
        if len(sizes) > 1:
            notes.append(f"images of {first.name} and {arm.name} differ in size, which most metrics see")
    return notes


def _with_reference(
    arms: Sequence[Arm], folders: Mapping[str, Folder], options: Options
) -> tuple[str | None, dict[str, Folder]]:
    if options.reference_folder is not None:
        folder = images.read(options.reference_folder, "reference")
        return "reference ", {"reference ": folder, **folders}  # no arm can be called so
    if options.reference is not None:
        if options.reference not in folders:
            raise ValueError(
                f"--reference must be one of {', '.join(folders)} or a folder of images, got {options.reference!r}; "
                f"choose one"
            )
        return options.reference, dict(folders)
    base = next((arm.name for arm in arms if arm.kind == "base"), None)
    return base, dict(folders)


def _view(arms: Sequence[Arm], folders: Mapping[str, Folder], sources: Sources, options: Options) -> View | str:
    try:
        features = sources.features(options.features)
        bases = {arm.name: arm.base for arm in arms}
        return view(folders, bases, features, options.features, batch=READ_AT_ONCE, device=options.device)
    except ValueError as error:
        return " ".join(str(error).split())


def _facts(arms: Sequence[Arm], asked: Asked | None, options: Options, seconds: Mapping[str, float]) -> dict[str, Any]:
    drawn = {} if asked is None else {key: value for key, value in asdict(asked).items() if key != "prompts"}
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": torch.cuda.get_device_name() if options.device.type == "cuda" else f"{platform.machine()} CPU",
        "versions": {"python": platform.python_version(), **versions(PACKAGES)},
        "drawn": drawn | ({} if asked is None else {"num_prompts": len(asked.prompts)}),
        "weights": None if options.weights is None else str(options.weights),
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
    }


def _write(comparison: Comparison, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    names = [arm.name for arm in comparison.arms]
    values = {
        "arms": {
            arm.name: {
                "kind": arm.kind,
                "place": arm.place,
                "base": arm.base,
                "num_images": len(comparison.folders[arm.name].images),
                "top2": top2(comparison.lines, arm.name),
            }
            for arm in comparison.arms
        },
        "metrics_counted": counted(comparison.lines),
        "reference": comparison.reference,
        "metrics": {
            line.key: {
                "name": line.name,
                "title": line.title,
                "group": line.group,
                "higher_is_better": line.higher_is_better,
                "arms": {name: _told(line.estimates[name]) for name in names},
                "ranks": line.ranks(),
            }
            for line in comparison.lines
        },
        "hacked": {name: asdict(one) for name, one in comparison.verdicts.items()},
        "view": comparison.view if isinstance(comparison.view, str) else asdict(comparison.view),
        "notes": list(comparison.notes),
        **comparison.facts,
    }
    write_whole(out / "evaluation.json", json.dumps(plain(values), indent=1, allow_nan=False))
    write_whole(out / "table.csv", as_csv(comparison.lines, names))
    write_page(comparison, out / "report.html", num_shown=NUM_SHOWN)


def _told(estimate: Estimate) -> dict[str, Any]:
    if not estimate.is_known:
        return {"why": estimate.why}
    found = {"value": estimate.value, "low": estimate.low, "high": estimate.high, "spread": estimate.spread}
    found |= {"gain": list(estimate.gain)} if estimate.gain else {}
    return found | ({"facts": dict(estimate.facts)} if estimate.facts else {})

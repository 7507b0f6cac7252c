"""The model card of a run: what was trained and gained, how to use it, and how to have it again.

All of it is of the run's own files. The words of others (prompts, names of rewards) are shown as words.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from adascope_fast.backbones.settings import EMBEDDED_NAMES
from adascope_fast.reporting import head, outcome
from adascope_fast.reporting.files import mapping
from adascope_fast.training.hub.licence import Licence
from adascope_fast.training.hub.markdown import card, escaped, table

PAPER = "https://arxiv.org/abs/2605.15855"
MOST_PROMPTS = 16
"""Prompts that are shown beside the pictures."""
LEFT_TO_THE_HEAD = ("model", "reward")
"""Facts that stand elsewhere on the card."""

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Published:
    """What a card is written from.

    Args:
        repo_id: of the repository.
        base: repository or embedded model that was trained.
        config: the settings as they are published, as plain values.
        left_out: keys whose values name places on the machine.
        run, evaluation, parts: of the run's JSON files.
        prompts: those of the pictures, a row each.
        pictures: paths in the repository by "before" and "after".
        denoiser: class and folder of a whole denoiser; None: a LoRA adapter.
    """

    repo_id: str
    base: str
    config: Record
    left_out: Sequence[str]
    run: Record
    evaluation: Record
    parts: Record
    prompts: Sequence[str]
    pictures: Mapping[str, str]
    denoiser: tuple[str, str] | None
    licence: Licence

    @property
    def name(self) -> str:
        return self.repo_id.rpartition("/")[2]

    @property
    def reward(self) -> str:
        return str(self.evaluation.get("reward") or mapping(self.config.get("reward")).get("name", "reward"))

    @property
    def selector(self) -> str:
        passed = head.given(self.parts)
        return passed.get("selector") or str(mapping(self.config.get("selector")).get("name"))


def model_card(published: Published) -> str:
    """README.md."""
    return card(
        _metadata(published),
        [
            f"# {escaped(published.name)}",
            "",
            *_what(published),
            *_pictures(published),
            *_gain(published),
            *_use(published),
            *_training(published),
            *_again(published),
            *_licence(published),
        ],
    )


def _metadata(published: Published) -> ModelCardData:
    is_lora, on_hub = published.denoiser is None, published.base not in EMBEDDED_NAMES
    tags = ["text-to-image", "diffusers", "reinforcement-learning", "adascope-fast"]
    tags += ["lora"] if is_lora else []
    tags += ["adascope"] if published.selector == "adascope" else []
    more: dict[str, Any] = {"base_model_relation": "adapter" if is_lora else "finetune"} if on_hub else {}
    results = _results(published)
    return ModelCardData(
        base_model=published.base if on_hub else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=sorted(tags),
        model_name=published.name if results else None,
        eval_results=results or None,
        **published.licence.metadata(),
        **more,
    )


def _results(published: Published) -> list[EvalResult]:
    """The held-out reward at the end and its gain, with their intervals in words."""
    told = outcome.headline(published.evaluation, published.reward)
    count = told["num_prompts"]
    called = {"after": "held-out reward", "difference": "gain of the held-out reward"}
    return [
        EvalResult(
            task_type="text-to-image",
            task_name="Text to image",
            dataset_type="held-out-prompts",
            dataset_name=f"{count} held-out prompts" if count else "held-out prompts",
            metric_type="reward" if which == "after" else "reward_gain",
            metric_name=f"{called[which]} {published.reward}, 95 % interval {told[which]['interval']}",
            metric_value=float(told[which]["mean"]),
        )
        for which in called
        if told[which] is not None
    ]


def _what(published: Published) -> list[str]:
    if published.denoiser is None:
        what = "A LoRA adapter for"
    else:
        class_name, part = published.denoiser
        what = f"The trained denoiser (`{part}`, {class_name}) of"
    line = (
        f"{what} {_base(published.base)}, trained by reinforcement learning on the reward `{_code(published.reward)}`"
    )
    line += " with adascope-fast"
    if published.selector == "adascope":
        line += f" on the denoising steps that AdaScope ([paper]({PAPER})) chose"
    return [f"{line}.", ""]


def _base(base: str) -> str:
    if base in EMBEDDED_NAMES:
        return f"`{base}`, the small model inside adascope-fast that draws simple shapes"
    return f"[{escaped(base)}](https://huggingface.co/{base})"


def _code(text: str) -> str:
    """A name in a code span, which has no backticks and no line's end."""
    return " ".join(text.replace("`", "'").split()).replace("|", "\\|")


def _pictures(published: Published) -> list[str]:
    found = published.pictures
    if not found:
        return []
    shown = [f"![Pictures {when} the training]({path})" for when, path in found.items()]
    lines = [*table(list(found), [shown]), ""]
    if published.prompts:
        lines += ["Held-out prompts, a row of pictures each, on the same seeds before and after:", ""]
        shown = published.prompts[:MOST_PROMPTS]
        lines += [f"{number}. {escaped(prompt)}" for number, prompt in enumerate(shown, 1)]
        rest = len(published.prompts) - len(shown)
        lines += ["", f"And {rest} more.", ""] if rest else [""]
    return lines


def _gain(published: Published) -> list[str]:
    told = outcome.headline(published.evaluation, published.reward)
    rows = [(which, told[which]) for which in ("before", "after", "difference") if told[which] is not None]
    if not rows:
        return ["## Gain", "", "No evaluation was recorded.", ""]
    prompts = f"{told['num_prompts']} prompts" if told["num_prompts"] else "prompts"
    images = f", {told['num_images']} pictures each time" if told["num_images"] else ""
    lines = [
        "## Gain",
        "",
        f"The reward `{_code(published.reward)}` on {prompts} that were not trained on{images}:",
        "",
    ]
    lines += table(["", "mean", "95 % interval"], [(which, one["mean"], one["interval"]) for which, one in rows])
    last = max((row["iteration"] for row in outcome.history(published.evaluation)), default=0)
    lines += [
        "",
        " ".join(filter(None, [told["verdict"], f"After {last} iteration{'' if last == 1 else 's'}." if last else ""])),
        "",
    ]
    if rows := outcome.variety(published.evaluation):
        lines += [*table(["variety of the pictures", "before", "after", "change"], rows), ""]
    return lines


def _use(published: Published) -> list[str]:
    lines = head.use_published(published.repo_id, published.config, head.example(published.prompts), published.denoiser)
    return ["## Use", "", "```python", lines, "```", ""]


def _training(published: Published) -> list[str]:
    facts = head.facts(published.run, published.config, published.parts, published.reward)
    kept = [(name, escaped(value)) for name, value in facts if name not in LEFT_TO_THE_HEAD]
    lines = ["## Training", "", *table(["", ""], kept), "", *_prompts(published)]
    if changed := published.parts.get("changes"):
        lines += [f"Parts of it were changed while it went on, {len(changed)} times.", ""]
    if own := head.settings(published.config):
        rows = [(f"`{one.key}`", escaped(one.value), escaped(one.default)) for one in own]
        lines += ["Settings that are not the defaults:", "", *table(["setting", "value", "default"], rows), ""]
    return lines


def _prompts(published: Published) -> list[str]:
    """How many prompts there were, and the first: what the run itself noted."""
    known, named = mapping(published.parts.get("parts")), mapping(published.config.get("prompts"))
    lines = []
    for part, key, what in (("train_prompts", "train", "Trained on"), ("held_out_prompts", "held_out", "Judged by")):
        noted = mapping(known.get(part))
        if noted.get("name"):
            place = "" if noted.get("is_given") else named.get(key)
            lines.append(f"- {what} {escaped(noted['name'])}{f', of {escaped(place)}' if place else ''}")
    return [*lines, ""] if lines else []


def _again(published: Published) -> list[str]:
    told = head.command(Path(published.name), {}, published.parts)
    fetch = f"hf download {published.repo_id} config.toml --local-dir {published.name}"
    lines = ["## Train it again", "", "```", fetch]
    lines += ["```", "", "```python", told["repeat"]] if told["language"] == "Python" else [told["repeat"]]
    lines += ["```", ""]
    places = [f"`{key}`" for key in published.left_out if key != "run.folder"]
    if places:
        lines += [f"Places on the machine are left out of config.toml: put your own for {', '.join(places)}.", ""]
    return lines


def _licence(published: Published) -> list[str]:
    licence, base = published.licence, published.base
    lines = ["## Licence", ""]
    if base in EMBEDDED_NAMES:
        lines.append(f"`{base}` is part of adascope-fast, whose licence is Apache-2.0; so is that of these weights.")
    elif not licence.is_known:
        lines.append(
            f"These weights come under the licence of {_base(base)}, which was not found when this card was written: "
            f"check it before you use or pass them on, and put it in this card's `license`."
        )
    else:
        named = licence.identifier if licence.name is None else f"{licence.identifier}, {licence.name}"
        where = licence.metadata()["license_link"]
        text = f" ([text]({where.replace(' ', '%20').replace(')', '%29')}))" if where else ""
        lines.append(f"These weights come under the licence of {_base(base)}: {escaped(named)}{text}.")
        lines.append("adascope-fast is under Apache-2.0.")
    return lines

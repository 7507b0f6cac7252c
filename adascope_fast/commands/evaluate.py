"""`adascope-fast evaluate`: runs, models, adapters and folders of images beside each other, by the paper's metrics."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from adascope_fast.backbones.settings import EMBEDDED_NAMES
from adascope_fast.comparison.sources import refuse_nothing
from adascope_fast.config import Config, ConfigError
from adascope_fast.settings import LARGEST_SEED, MOST_GUIDANCE, MOST_IMAGES, MOST_STEPS, Section
from adascope_fast.training.monitoring.progress import bar, import_libraries

if TYPE_CHECKING:
    from adascope_fast.comparison.arms import Arm
    from adascope_fast.comparison.drawing import Asked
    from adascope_fast.comparison.evaluation import Comparison


def evaluate(
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME=]SOURCE...", help="Runs, models, LoRA folders or folders of images, each with a name."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write; one that was stopped goes on.")] = None,
    prompts: Annotated[
        str | None, typer.Option(help="Set or file of prompts; the first run's held-out ones if absent.")
    ] = None,
    num_prompts: Annotated[
        int | None, typer.Option(min=1, max=MOST_IMAGES, help="Prompts to draw; up to 200 if absent.")
    ] = None,
    num: Annotated[int, typer.Option(min=1, max=1024, help="Images of each prompt.")] = 4,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED - MOST_IMAGES, help="Seed of the first image.")] = 0,
    steps: Annotated[
        int | None, typer.Option(min=1, max=MOST_STEPS, help="Denoising steps; those of the first run if absent.")
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(min=0.0, max=MOST_GUIDANCE, help="Guidance scale; that of the first run if absent."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Model that LoRA folders belong to.")] = None,
    weights: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Weights of the metrics, a folder each (docs/metrics.md).")
    ] = None,
    clip: Annotated[
        str | None, typer.Option(help="CLIP of the CLIP score and the entropy; the embedded one for embedded models.")
    ] = None,
    reward: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Reward to judge by too, a name or module:object; may be repeated."),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY", help="Only this metric, which must be measured; may be repeated."),
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="Arm or folder of images that FID compares with; the base model if absent.")
    ] = None,
    features: Annotated[str, typer.Option(help="Features of the view of variety: clip, vgg16, dinov2.")] = "clip",
    no_base: Annotated[bool, typer.Option("--no-base", help="Leave the base models of runs out.")] = False,
    batch: Annotated[
        int | None, typer.Option(min=1, max=4096, help="Images drawn at once; as in the first run if absent.")
    ] = None,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where to draw and measure.")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace images of other arms or settings.")] = False,
) -> None:
    """Compare trained models with their base and each other: thirteen metrics, signs of hacking, images, variety."""
    if not sources:
        raise ConfigError(
            "evaluate needs what to compare, got nothing; for example: adascope-fast evaluate runs/quickstart --out "
            "evaluations/quickstart"
        )
    if out is None:
        raise ConfigError("evaluate needs --out, a folder to write, got none; for example --out evaluations/first")
    if weights is not None and not weights.is_dir():
        raise ConfigError(f"--weights must be a folder with one a metric, got {str(weights)!r}; check the path")
    for source in sources:
        refuse_nothing(source)
    rewards = tuple(_section(name) for name in reward or ())
    import_libraries()
    import torch

    from adascope_fast.comparison.arms import arms_of
    from adascope_fast.comparison.evaluation import Options, compare

    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError('--device cuda needs a CUDA GPU, and torch sees none; use "auto" or "cpu"')
    on_gpu = device != "cpu" and torch.cuda.is_available()
    arms = arms_of(sources, model=model, with_base=not no_base)
    asked, known = None, {}
    if all(arm.kind == "images" for arm in arms):
        if prompts is not None:
            raise ConfigError(f"--prompts is for what draws images, got {prompts!r} with folders alone; remove it")
    else:
        texts, told, known = _prompts(arms, prompts)
        asked = _asked(arms, texts, told, num_prompts, num, seed, steps, guidance)
    models = {arm.model or (arm.place if arm.config is None else arm.config.model.name) for arm in arms}
    if clip is None and models & set(EMBEDDED_NAMES):
        clip = "scenes-clip"
    folder = None if reference is None or not Path(reference).is_dir() else Path(reference)
    options = Options(
        out=out,
        weights=weights,
        clip=clip,
        rewards=rewards,
        metadata=known,
        only=tuple(metric or ()),
        reference=reference if folder is None else None,
        reference_folder=folder,
        features=features,
        batch=batch or next((arm.config.train.rollout_batch for arm in arms if arm.config is not None), 16),
        seed=seed,
        device=torch.device("cuda" if on_gpu else "cpu"),
        overwrite=overwrite,
    )
    _print(compare(arms, asked, options, progress=_progress), out)


def _section(name: str) -> Section:
    """The section of a reward by its name, as `reward.name` takes it."""
    return Config.of({"reward": {"name": name}}).reward


def _prompts(arms: "Sequence[Arm]", source: str | None) -> tuple[list[str], str, dict[str, dict[str, Any]]]:
    """What is drawn, where it comes from in words, and the metadata of prompts."""
    from adascope_fast import images
    from adascope_fast import prompts as prompt_sets
    from adascope_fast.prompts.settings import Prompts

    folder = next((arm for arm in arms if arm.kind == "images"), None)
    if source is None and folder is not None:
        texts, told = images.read(Path(folder.place)).prompts, f"the folder {folder.place!r}"
        if not texts:
            raise ConfigError(
                f"images must have prompts to be compared with what is drawn, got {told} without; add them"
            )
        return texts, told, {}
    config = next((arm.config for arm in arms if arm.config is not None), None)
    named = Prompts() if config is None else config.prompts
    source = source or named.held_out
    if source is None and named.train is None:
        raise ConfigError(
            "evaluate needs prompts where no run names any, got none; add --prompts FILE, a prompt a line"
        )
    if source is None:
        _, texts = prompt_sets.named(named)
        return texts, f"the held-out share of {named.train}", prompt_sets.metadata(named)
    known = prompt_sets.metadata(Prompts.model_construct(train=None, held_out=source, column=named.column))
    return list(dict.fromkeys(prompt_sets.load(source, named.column))), source, known


def _asked(
    arms: "Sequence[Arm]",
    texts: Sequence[str],
    told: str,
    num_prompts: int | None,
    num: int,
    seed: int,
    steps: int | None,
    guidance: float | None,
) -> "Asked":
    """What is drawn."""
    from adascope_fast.comparison.drawing import Asked

    if num_prompts is not None and len(texts) < num_prompts:
        print(f"{told} has {len(texts)} prompts, and all of them are used", file=sys.stderr)
    config = next((arm.config for arm in arms if arm.config is not None), None)
    sampler = Config().sampler if config is None else config.sampler
    return Asked(
        prompts=tuple(texts[: num_prompts or 200]),
        images=num,
        seed=seed,
        num_steps=steps or sampler.num_steps,
        guidance_scale=sampler.guidance_scale if guidance is None else guidance,
        shift=sampler.shift,
    )


def _progress(what: str, total: int) -> Callable[[int], None]:
    shown = bar(what, total, unit="image", stays=True)

    def more(count: int) -> None:
        shown.update(count)
        if shown.n >= total:
            shown.close()

    return more


def _print(comparison: "Comparison", out: Path) -> None:
    from adascope_fast.comparison.table import not_measured, terminal

    print(terminal(comparison.lines, [arm.name for arm in comparison.arms]))
    print("* best, + second best; ± 95 % over prompts")
    for names, why in not_measured(comparison.lines):
        print(f"not measured: {names}: {why}")
    for note in comparison.notes:
        print(f"note: {note}")
    for name, one in comparison.verdicts.items():
        print(f"{name}: {one.words} {one.parting}")
    view: Any = comparison.view
    if isinstance(view, str) and "asked for" not in view:
        print(f"not drawn: the view of variety: {view}")
    print(out / "report.html")

"""`adascope-fast sample`: what the training changed, picture by picture."""

from pathlib import Path
from typing import Annotated

import typer

from adascope_fast.commands.configuration import RunFolder, refuse_no_run
from adascope_fast.config import ConfigError
from adascope_fast.settings import LARGEST_SEED, MOST_GUIDANCE, MOST_STEPS
from adascope_fast.training.monitoring.progress import Progress, import_libraries


def sample(
    run: RunFolder,
    prompt: Annotated[list[str] | None, typer.Option(help="What to draw; may be repeated.")] = None,
    num: Annotated[int, typer.Option(min=1, max=64, help="Pictures for each prompt.")] = 4,
    seed: Annotated[
        int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of the first picture; the next ones count up.")
    ] = 0,
    steps: Annotated[
        int | None, typer.Option(min=1, max=MOST_STEPS, help="Denoising steps; those of the run if absent.")
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(min=0.0, max=MOST_GUIDANCE, help="Guidance scale; that of the run if absent."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="PNG to write; RUN/samples/sample.png if absent.")] = None,
) -> None:
    """Draw pictures with the trained weights next to the base model's, on the same seeds."""
    if not prompt:
        raise ConfigError("sample needs at least one --prompt, got none; for example --prompt 'a small red circle'")
    from adascope_fast import prompts as prompt_rules

    texts = [prompt_rules.checked(text, "--prompt") for text in prompt]
    refuse_no_run(run)
    import_libraries()
    import torch

    from adascope_fast.reporting.images import contact_sheet
    from adascope_fast.training.draw import draw, load_run

    progress = Progress()
    with progress.loading(str(run)) as told:
        config, backbone = load_run(run, keep_reference=True, told=told)
    seeds = range(seed, seed + num)
    num_steps = steps or config.sampler.num_steps
    scale = config.sampler.guidance_scale if guidance is None else guidance
    how = {"num_steps": num_steps, "guidance_scale": scale, "shift": config.sampler.shift}
    total = 2 * len(texts) * num * num_steps
    with progress.stage("drawing", total) as on_step:
        trained = draw(backbone, texts, seeds, **how, on_step=on_step)
        with backbone.reference_policy():
            base = draw(backbone, texts, seeds, **how, on_step=on_step)
    rows, captions = [], []
    for number, text in enumerate(texts):
        chosen = slice(number * num, (number + 1) * num)
        rows += [base[chosen], trained[chosen]]
        captions += [f"base, seed {one}: {text}" for one in seeds] + [f"trained, seed {one}: {text}" for one in seeds]
    path = out or run / "samples" / "sample.png"
    contact_sheet(torch.cat(rows), captions, num, path)
    print(path)

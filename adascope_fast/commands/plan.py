"""`adascope-fast plan`: what a training costs, and what GPU it fits into, before anything is loaded."""

from typing import Annotated

import typer

from adascope_fast.commands.configuration import ConfigArguments, configured
from adascope_fast.training.monitoring.progress import Progress, import_libraries


def plan(
    arguments: ConfigArguments = None,
    tflops: Annotated[
        float | None,
        typer.Option(min=0.001, max=1e9, help="TFLOP/s your GPU sustains, for seconds."),
    ] = None,
    measure: Annotated[bool, typer.Option(help="With a GPU: a step of random weights beside the plan.")] = True,
) -> None:
    """Say what a training would cost and which GPU it fits into. No weights are read."""
    config = configured(arguments, command="plan")
    import_libraries()
    from adascope_fast.planning import verdict
    from adascope_fast.planning.measured import measured_table
    from adascope_fast.planning.plan import Planner

    progress, planner = Progress(), Planner()
    with progress.stage(f"counting what {config.model.name} takes"):
        result = planner.plan(config)
    print(result.table(tflops))
    if measure:
        with progress.stage("measuring a step, where there is a GPU"):
            table = measured_table(config, result)
        print(table)
    with progress.stage("looking for what fits"):
        found = verdict.verdict(config, planner)
    print(verdict.text(found))

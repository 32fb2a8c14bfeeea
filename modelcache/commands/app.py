"""The commands and their options; each hands over to the module that does the work."""

import asyncio
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from modelcache import InvalidInputError, MissingDependencyError, __version__
from modelcache.commands import inspecting, listing, predicting
from modelcache.commands.terminal import make_console
from modelcache.sizing import parse_bytes

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_DEMO_PACKAGES = frozenset({"matplotlib", "xgboost"})
_SERVE_PACKAGES = frozenset({"httptools", "starlette", "uvicorn"})
_LARGEST_SEED = (1 << 31) - 1

Store = Annotated[str, typer.Argument(metavar="STORE", help="A folder of artifacts, or the URL of a store.")]


class OutputKind(StrEnum):
    """What to predict."""

    value = "value"
    margin = "margin"
    leaf = "leaf"
    contribs = "contribs"


class LogFormat(StrEnum):
    """How a line of the log is written."""

    text = "text"
    json = "json"


class LogLevel(StrEnum):
    """What to log: this, and what is worse."""

    debug = "debug"
    info = "info"
    warning = "warning"
    error = "error"


def _size(text: str) -> int:
    try:
        return parse_bytes(int(text) if text.isdecimal() else text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"modelcache {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def modelcache(
    context: typer.Context,
    _version: Annotated[
        bool,
        typer.Option("--version", help="Show the version and exit.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    """Serve very many small XGBoost models from one process, under a byte budget."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def demo(
    models: Annotated[int, typer.Option(min=1, max=10_000, help="Cities, each with a model of its own.")] = 10,
    calls: Annotated[int, typer.Option(min=1, help="Calls at random, once for each budget.")] = 30,
    seed: Annotated[int, typer.Option(min=0, max=_LARGEST_SEED, help="Same seed, same houses and prices.")] = 0,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the models and the chart go.")] = Path("demo"),
) -> None:
    """Train a model per city, and serve them all: cold and warm calls, a new city, evictions, a rush of callers."""
    try:
        from modelcache.demo import run  # noqa: PLC0415 - what it needs comes by an extra
    except ModuleNotFoundError as error:
        missing = str(error.name).partition(".")[0]
        if missing not in _DEMO_PACKAGES:
            raise
        raise MissingDependencyError(f"The demo needs {missing}: pip install 'modelcache[demo]'") from error
    run(make_console(), out=out, models=models, calls=calls, seed=seed)


@app.command()
def predict(
    store: Store,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The model, such as Chicago_IL.")],
    rows: Annotated[
        typer.FileText,
        typer.Argument(
            metavar="ROWS.CSV",
            encoding="utf-8-sig",
            help="A CSV file, one row a line; '-' is standard input. With a header, columns are matched by name. "
            "An empty cell is a missing value.",
        ),
    ],
    output: Annotated[OutputKind, typer.Option(help="What to predict.")] = OutputKind.value,
) -> None:
    """Print the predictions for the rows of a CSV file, one line each; several outputs are separated by commas."""
    try:
        table = predicting.read_table(rows)
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"{rows.name} is not UTF-8 text: {error}. Save it as CSV (UTF-8).") from error
    predictions = asyncio.run(predicting.predict(store, name, table, output.value))
    for line in predicting.lines(predictions, output.value):
        typer.echo(line)


@app.command()
def inspect(
    store: Store,
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="A model; without one, all are listed.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Models to list at most.")] = 50,
) -> None:
    """Show what is in a store or an artifact: format, size, features, trees, best iteration.

    Every model shown is loaded. The exit code is 1 if one of them cannot be.
    """
    console, path = make_console(), Path(store)
    if name is None and path.is_file():
        store, name = str(path.parent), path.name
    if name is not None:
        asyncio.run(inspecting.show_model(console, store, name))
    elif asyncio.run(inspecting.show_store(console, store, limit=limit)):
        raise typer.Exit(1)


@app.command()
def manifest(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder of artifacts, to be served or uploaded.")],
) -> None:
    """Write MANIFEST.json, the SHA-256 of every artifact, which stores enforce from then on.

    Run it again after each change, and upload it after the artifacts.
    """
    listing.write_manifest(make_console(), folder)


@app.command()
def serve(
    store: Store,
    *,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8080,
    memory_budget: Annotated[
        int | None,
        typer.Option(
            parser=_size, metavar="SIZE", help="For all models in memory, as '2 GiB'; by default half of what is free."
        ),
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Worker processes; by default one a core.")] = None,
    disk_cache: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep copies of remote artifacts here.")
    ] = None,
    refresh_after: Annotated[
        float | None,
        typer.Option(min=0, metavar="SECONDS", help="Ask the store for new versions of models older than this."),
    ] = None,
    preload: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Load this model before the first request; repeatable.")
    ] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Let in who sends a bearer token of this file: one a line, each followed by patterns of the models it "
            "is for, such as tenant_a/*, unless it is for all.",
        ),
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Let other hosts in without a token.")] = False,
    management: Annotated[bool, typer.Option(help="Let clients load and unload models.")] = True,
    management_port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Let them do so on this port alone.", show_default=False)
    ] = None,
    max_body: Annotated[
        int, typer.Option(parser=_size, metavar="SIZE", help="The largest body of a request, decompressed.")
    ] = "6 MiB",  # type: ignore[assignment]  # typer parses defaults as well, and shows them as they are written
    request_timeout: Annotated[
        float, typer.Option(min=0.001, metavar="SECONDS", help="A request has to be all here within this time.")
    ] = 30.0,
    drain: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="After SIGTERM, what was accepted may take this long.")
    ] = 30.0,
    access_log: Annotated[bool, typer.Option("--access-log", help="Log each request.")] = False,
    log_level: Annotated[LogLevel, typer.Option(help="What to log, to standard error.")] = LogLevel.warning,
    log_format: Annotated[LogFormat, typer.Option(help="As lines to read, or each as JSON.")] = LogFormat.text,
) -> None:
    """Serve the models of a store over HTTP, for clients of SageMaker and of the Open Inference Protocol.

    Ends at SIGTERM or Ctrl-C, when all that it has accepted is answered.
    """
    try:
        from modelcache.commands import serving  # noqa: PLC0415 - what it needs comes by an extra
    except ModuleNotFoundError as error:
        missing = str(error.name).partition(".")[0]
        if missing not in _SERVE_PACKAGES:
            raise
        raise MissingDependencyError(f"serve needs {missing}: pip install 'modelcache[serve]'") from error
    if management_port is not None and not management:
        raise typer.BadParameter("--management-port and --no-management exclude each other.")
    serving.log_to_stderr(log_level.value, access=access_log, as_json=log_format is LogFormat.json)
    serving.run(
        make_console(),
        store,
        host=host,
        port=port,
        insecure=insecure,
        registry_options={
            "memory_budget": memory_budget,
            "workers": workers,
            "disk_cache": disk_cache,
            "refresh_after": refresh_after,
        },
        options=serving.Options(
            tokens=None if token_file is None else serving.read_tokens(token_file),
            management=management,
            management_port=management_port,
            store_url=store,
            preload=tuple(preload or ()),
            max_body_bytes=max_body,
            log_access=access_log,
            drain_seconds=drain,
            limits=serving.Limits(request_seconds=request_timeout),
        ),
    )

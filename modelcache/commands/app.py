"""The commands and their options; each hands over to the module that does the work."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from modelcache import InvalidInputError, MissingDependencyError, __version__
from modelcache.commands import inspecting, listing, predicting
from modelcache.commands import serve_options as given
from modelcache.commands.terminal import make_console

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


@contextmanager
def _extra(name: str, packages: frozenset[str]) -> Iterator[None]:
    """Import within what needs ``packages``; says which is missing, and that it comes by the extra ``name``."""
    try:
        yield
    except ModuleNotFoundError as error:
        missing = str(error.name).partition(".")[0]
        if missing not in packages:
            raise
        raise MissingDependencyError(f"The command {name} needs {missing}: pip install 'modelcache[{name}]'") from error


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
    with _extra("demo", _DEMO_PACKAGES):
        from modelcache.demo import run  # noqa: PLC0415
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
    host: given.Host = "127.0.0.1",
    port: given.Port = 8080,
    memory_budget: given.MemoryBudget = None,
    workers: given.Workers = None,
    engine: given.Engine = given.EngineKind.xgboost,
    disk_cache: given.DiskCache = None,
    refresh_after: given.RefreshAfter = None,
    preload: given.Preload = None,
    token_file: given.TokenFile = None,
    insecure: given.Insecure = False,
    management: given.Management = True,
    management_port: given.ManagementPort = None,
    max_body: given.MaxBody = "6 MiB",  # type: ignore[assignment]  # typer parses it, and shows it as it is written
    max_rows: given.MaxRows = 1_000_000,
    request_timeout: given.RequestTimeout = 30.0,
    drain: given.Drain = 30.0,
    access_log: given.AccessLog = False,
    log_level: given.Level = given.LogLevel.warning,
    log_format: given.Format = given.LogFormat.text,
) -> None:
    """Serve the models of a store over HTTP, for clients of SageMaker and of the Open Inference Protocol.

    Ends at SIGTERM or Ctrl-C, when all that it has accepted is answered.
    """
    with _extra("serve", _SERVE_PACKAGES):
        from modelcache.commands import serving  # noqa: PLC0415
    if management_port is not None and not management:
        raise typer.BadParameter("--management-port and --no-management exclude each other.")
    serving.log_to_stderr(log_level.value, access=access_log, as_json=log_format is given.LogFormat.json)
    registry_options = {
        "memory_budget": memory_budget, "workers": workers, "engine": engine.value, "disk_cache": disk_cache,
        "refresh_after": refresh_after,
    }  # fmt: skip
    options = serving.Options(
        tokens=None if token_file is None else serving.read_tokens(token_file),
        management=management,
        management_port=management_port,
        store_url=store,
        preload=tuple(preload or ()),
        max_body_bytes=max_body,
        max_rows=max_rows,
        log_access=access_log,
        drain_seconds=drain,
        limits=serving.Limits(request_seconds=request_timeout),
    )
    serving.run(
        make_console(), store, host=host, port=port, insecure=insecure, registry_options=registry_options,
        options=options,
    )  # fmt: skip

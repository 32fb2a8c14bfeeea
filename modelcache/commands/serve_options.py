"""The options of ``modelcache serve``, as typer reads them from the types of its parameters."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from modelcache.sizing import parse_bytes


class EngineKind(StrEnum):
    """What predicts."""

    xgboost = "xgboost"
    auto = "auto"


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


def _bytes(text: str) -> Any:
    return typer.Option(parser=_size, metavar="SIZE", help=text)


def _seconds(text: str, *, least: float = 0) -> Any:
    return typer.Option(min=least, metavar="SECONDS", help=text)


Host = Annotated[str, typer.Option(help="The address to listen on.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")]
MemoryBudget = Annotated[int | None, _bytes("For all models in memory, as '2 GiB'; by default half of what is free.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Worker processes; by default one a core.")]
Engine = Annotated[
    EngineKind, typer.Option(help="auto: ONNX Runtime answers calls of few rows of models that are asked often.")
]
DiskCache = Annotated[Path | None, typer.Option(metavar="DIR", help="Keep copies of remote artifacts here.")]
RefreshAfter = Annotated[float | None, _seconds("Ask the store for new versions of models older than this.")]
Preload = Annotated[
    list[str] | None, typer.Option(metavar="NAME", help="Load this model before the first request; repeatable.")
]
TokenFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Let in who sends a bearer token of this file: one a line, each followed by patterns of the models it "
        "is for, such as tenant_a/*, unless it is for all.",
    ),
]
Insecure = Annotated[bool, typer.Option("--insecure", help="Let other hosts in without a token.")]
Management = Annotated[bool, typer.Option(help="Let clients load and unload models.")]
ManagementPort = Annotated[
    int | None, typer.Option(min=0, max=65535, help="Let them do so on this port alone.", show_default=False)
]
MaxBody = Annotated[int, _bytes("The largest body of a request, decompressed.")]
MaxRows = Annotated[int, typer.Option(min=1, help="The most rows of a request.")]
RequestTimeout = Annotated[float, _seconds("A request has to be all here within this time.", least=0.001)]
Drain = Annotated[float, _seconds("After SIGTERM, what was accepted may take this long.")]
AccessLog = Annotated[bool, typer.Option("--access-log", help="Log each request.")]
Level = Annotated[LogLevel, typer.Option(help="What to log, to standard error.")]
Format = Annotated[LogFormat, typer.Option(help="As lines to read, or each as JSON.")]

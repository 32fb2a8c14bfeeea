"""The ``modelcache`` command: errors become one line and an exit code, here and nowhere else.

0: done. 1: it could not be done, and the line on standard error says why. 2: the command line is wrong.
"""

from __future__ import annotations

import sys
from typing import NoReturn

from modelcache.errors import ModelCacheError

_COMMAND_PACKAGES = frozenset({"typer", "rich"})


def main() -> None:
    """Run the command."""
    try:
        from modelcache.commands.app import app  # noqa: PLC0415 - typer and rich come by an extra
    except ModuleNotFoundError as error:
        missing = str(error.name).partition(".")[0]
        if missing not in _COMMAND_PACKAGES:
            raise
        _fail(
            f"the command needs {missing}: pip install 'modelcache[demo]' (or 'modelcache[cli]' for all but the demo)"
        )
    try:
        app(prog_name="modelcache")
    except (ModelCacheError, OSError) as error:
        _fail(_in_one_line(error))


def _in_one_line(error: ModelCacheError | OSError) -> str:
    message = " ".join(str(error).split())
    model = getattr(error, "model", None)
    return message if not model or model in message else f"{model}: {message}"


def _fail(message: str) -> NoReturn:
    print(f"modelcache: {message}", file=sys.stderr)  # noqa: T201 - rich may not be there
    sys.exit(1)

"""Apps that ``modelcache serve`` is compared with, under the same server: ``http_servers.py NAME FOLDER --port 0``."""

from __future__ import annotations

import asyncio
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route

from rivals import load_booster

if TYPE_CHECKING:
    from starlette.requests import Request

_BOOSTERS: dict[str, Any] = {}
_FOLDER = Path(sys.argv[2])


async def echo(request: Request) -> Response:
    """Send back what has come."""
    return Response(await request.body(), media_type="text/csv")


async def by_hand(request: Request) -> Response:
    """Predict in a thread, with a booster that is loaded on the first call."""
    name = request.headers["x-amzn-sagemaker-target-model"]
    booster = _BOOSTERS.get(name)
    if booster is None:
        booster = _BOOSTERS[name] = await asyncio.to_thread(load_booster, _FOLDER, name)
    rows = np.array([line.split(b",") for line in (await request.body()).splitlines()], np.float32)
    values = await asyncio.to_thread(booster.inplace_predict, rows)
    return Response("\n".join(map(str, values)), media_type="text/csv")


def main(handler: str) -> None:
    """Listen, say where, and serve until SIGTERM."""
    app = Starlette(routes=[Route("/endpoints/{endpoint}/invocations", globals()[handler], methods=["POST"])])
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
        config = uvicorn.Config(
            app, http="httptools", lifespan="off", ws="none", log_config=None, access_log=False,
            timeout_keep_alive=75,  # others have their turn meanwhile
        )  # fmt: skip
        uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main(sys.argv[1])

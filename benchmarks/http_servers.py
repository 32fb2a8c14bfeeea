"""Apps that ``modelcache serve`` is compared with, under the same server: ``http_servers.py NAME FOLDER --port 0``.

Four of them are steps on the way from the echo to the command: what stands before its apps, one of the apps, the way to
another process, and XGBoost's own call there.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import uvicorn
import uvloop
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route

from modelcache.serving import sagemaker
from modelcache.serving.config import Limits
from modelcache.serving.guard import Guard
from modelcache.serving.server import configure
from rivals import Bare, Echo, load_booster

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from contextlib import AbstractAsyncContextManager

    from numpy.typing import NDArray
    from starlette.requests import Request

    from modelcache import ModelRegistry
    from rivals import Rival

    Matrix = NDArray[np.float32]

_BOOSTERS: dict[str, Any] = {}
_FOLDER = Path(sys.argv[2])
_OTHER_PROCESS = Echo(_FOLDER)
_BARE_WORKER = Bare(_FOLDER)


async def echo(request: Request) -> Response:
    """Send back what has come."""
    return Response(await request.body(), media_type="text/csv")


async def relayed_echo(request: Request) -> Response:
    """Send back what has come, by way of another process."""
    return Response(await _OTHER_PROCESS.predict("", await request.body()), media_type="text/csv")


async def by_bare_worker(request: Request) -> Response:
    """Predict in one other process, which does nothing else."""
    name, rows = request.headers["x-amzn-sagemaker-target-model"], _rows_in(await request.body())
    return _written(await _BARE_WORKER.predict(name, rows))


async def by_hand(request: Request) -> Response:
    """Predict in a thread, with a booster that is loaded on the first call."""
    name = request.headers["x-amzn-sagemaker-target-model"]
    booster = _BOOSTERS.get(name)
    if booster is None:
        booster = _BOOSTERS[name] = await asyncio.to_thread(load_booster, _FOLDER, name)
    return _written(await asyncio.to_thread(booster.inplace_predict, _rows_in(await request.body())))


def _rows_in(body: bytes) -> Matrix:
    return np.array([line.split(b",") for line in body.splitlines()], np.float32)


def _written(values: Matrix) -> Response:
    return Response("\n".join(map(str, values)), media_type="text/csv")


def _beside(rival: Rival) -> Callable[[Starlette], AbstractAsyncContextManager[None]]:
    """Return what runs a rival's process as long as the app."""

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        await rival.start()
        yield
        await rival.close()

    return lifespan


class Constant:
    """A registry that has the answer at once."""

    _ANSWER = np.array([1.5], np.float32)

    async def predict(self, name: str, rows: Any, *, timeout: float | None) -> Any:
        """Answer."""
        del name, rows, timeout
        return self._ANSWER


def _plain(app: Any) -> uvicorn.Config:
    """Return what uvicorn needs to know; idle connections stay open, since others have their turn meanwhile."""
    return uvicorn.Config(app, http="httptools", ws="none", log_config=None, access_log=False, timeout_keep_alive=75)


def _one_route(handler: Any, lifespan: Any = None) -> Starlette:
    return Starlette(routes=[Route("/endpoints/{endpoint}/invocations", handler, methods=["POST"])], lifespan=lifespan)


CONFIGS: dict[str, Callable[[], uvicorn.Config]] = {
    "echo": lambda: _plain(_one_route(echo)),
    "relayed_echo": lambda: _plain(_one_route(relayed_echo, _beside(_OTHER_PROCESS))),
    "by_bare_worker": lambda: _plain(_one_route(by_bare_worker, _beside(_BARE_WORKER))),
    "by_hand": lambda: _plain(_one_route(by_hand)),
    "guarded_echo": lambda: configure(Guard(_one_route(echo)), Limits()),
    "constant": lambda: configure(Guard(sagemaker(cast("ModelRegistry", Constant()))), Limits()),
}


async def main(name: str) -> None:
    """Listen, say where, and serve until SIGTERM."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:  # asyncio asks: is it TCP?
        listener.bind(("127.0.0.1", 0))
        listener.listen(128)
        print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
        await uvicorn.Server(CONFIGS[name]()).serve(sockets=[listener])


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1]))

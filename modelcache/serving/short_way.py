"""A short way to the few endpoints that a server is asked for all day.

What Starlette does for requests of any kind, with a router, requests, responses and three layers that wait for errors,
takes longer than to read a row of CSV and to write its prediction. Calls need none of it as long as they succeed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from starlette.applications import Starlette
from starlette.routing import Route

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Iterator

    from starlette.routing import BaseRoute, Router
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

_FAILURE = "modelcache.failure"


class Answer(NamedTuple):
    """What a call is answered."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes

    async def send(self, send: Send) -> None:
        """Send it."""
        await send({"type": "http.response.start", "status": self.status, "headers": self.headers})
        await send({"type": "http.response.body", "body": self.body})


class Call:
    """An endpoint that can be asked directly for its answer; and an ASGI app, as Starlette's routes take them."""

    def __init__(self, answer: Callable[[Scope, Receive], Awaitable[Answer]]) -> None:
        self.answer = answer
        self.__name__ = answer.__name__  # by which Starlette names the route, for url_path_for

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer; or fail as it failed on the short way."""
        failure = scope.pop(_FAILURE, None)
        if failure is not None:
            raise failure
        answer = await self.answer(scope, receive)
        await answer.send(send)


class ShortWayApp(Starlette):
    """Starlette; the routes of calls are taken past it if they come first, and no middleware was added.

    Parameters in their paths have to be text, ``{name}`` or ``{name:path}``: nothing converts them on the short way. A
    call that fails goes the long way, with its failure: handlers of errors answer it there, whoever added them.
    """

    def build_middleware_stack(self) -> ASGIApp:
        """Return the app without the short way, or with it."""
        whole = super().build_middleware_stack()
        return whole if self.user_middleware else _ShortWay(self.router, whole)


def _leading_calls(routes: Iterable[BaseRoute]) -> Iterator[tuple[Route, Call]]:
    for route in routes:
        if not (isinstance(route, Route) and isinstance(route.app, Call)):
            return
        yield route, route.app


class _ShortWay:
    def __init__(self, router: Router, whole: ASGIApp) -> None:
        self._router = router
        self._whole = whole
        self._routes: list[BaseRoute] = []
        """Those that were there when it was last looked which are calls."""
        self._calls: list[tuple[Route, Call]] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        call = self._call(scope)
        if call is None:
            await self._whole(scope, receive, send)
            return
        body = _Body(receive)
        try:
            answer = await call.answer(scope, body.receive)
        except Exception as failure:  # noqa: BLE001 - raised again, where handlers of errors are
            scope[_FAILURE] = failure
            await self._whole(scope, body.receive_rest, send)
        else:
            await answer.send(send)

    def _call(self, scope: Scope) -> Call | None:
        """Return the call that is asked, and tell others of its route as Starlette's router does."""
        if scope["type"] != "http":
            return None
        if self._routes != self._router.routes:
            self._routes = [*self._router.routes]
            self._calls = list(_leading_calls(self._routes))
        path, method = _path_below_mount(scope), scope["method"]
        for route, call in self._calls:
            found = route.path_regex.match(path)
            if found is not None and route.methods and method in route.methods:
                scope["route"], scope["endpoint"] = route, call
                scope["path_params"] = {**scope.get("path_params", {}), **found.groupdict()}
                return call
        return None


class _Body:
    """Knows whether the body was read, which is known by nobody else on the long way."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._is_read = False

    async def receive(self) -> Message:
        """Return the next of it."""
        message = await self._receive()
        self._is_read = not message.get("more_body", False)
        return message

    async def receive_rest(self) -> Message:
        """Return the next of what was not read; as Starlette does, refuse to wait for what will never come."""
        if self._is_read:
            raise RuntimeError("The body was read by the endpoint already.")
        return await self.receive()


def _path_below_mount(scope: Scope) -> str:
    """Return the path that Starlette's routes are matched with."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    if root and (path == root or path.startswith(f"{root}/")):
        return path[len(root) :]
    return path

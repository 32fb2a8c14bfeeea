"""The short way past Starlette: nobody can tell which way a call went."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import httpx
import pytest
from starlette.applications import Starlette
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Mount, Route

from modelcache.serving.bodies import fields_of, receive_body
from modelcache.serving.short_way import Answer, Call, ShortWayApp

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.types import ASGIApp, Receive, Scope


class FaultError(Exception):
    """What a call may fail with."""


async def say(scope: Scope, receive: Receive) -> Answer:
    """Answer with what Starlette tells an endpoint of its path."""
    del receive
    if scope["path_params"]["word"] == "fail":
        raise FaultError
    body = f"{scope['path_params']['word']} {scope['route'].path}".encode()
    return Answer(200, [(b"content-length", b"%d" % len(body))], body)


async def other(request: Request) -> Response:
    return PlainTextResponse(f"other {request.path_params['word']}")


def make_app() -> ShortWayApp:
    return ShortWayApp(routes=[Route("/say/{word}", Call(say), methods=["POST"]), Route("/other/{word}", other)])


async def ask(app: ASGIApp, path: str = "/say/hello", method: str = "POST", root_path: str = "") -> httpx.Response:
    transport = httpx.ASGITransport(app, root_path=root_path)
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        return await client.request(method, path)


async def test_both_ways_lead_to_the_same_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call is told what Starlette's router tells, and does not need it; other routes do."""
    short, long = make_app(), make_app()
    long.add_middleware(BaseHTTPMiddleware, dispatch=pass_on)
    assert (await ask(short)).content == (await ask(long)).content == b"hello /say/{word}"
    assert (await ask(short, "/other/x", "GET")).text == "other x"

    async def never(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(short.router, "middleware_stack", never)
    assert (await ask(short)).status_code == 200


async def pass_on(request: Request, call_next: Any) -> Any:
    return await call_next(request)


@pytest.mark.parametrize(
    ("root_path", "path", "status"),
    [
        ("/below", "/below/say/hello", 200),
        ("/below", "/say/hello", 200),
        ("/sa", "/say/hello", 200),
        ("/say", "/say/hello", 404),
        ("/say/hello", "/say/hello", 404),
        ("/below/", "/below/say/hello", 404),
        ("", "/say/hello/", 307),
        ("", "/say/hel\nlo", 200),
        ("", "/say/hello\n", 200),
    ],
)
async def test_both_ways_begin_where_the_app_is_mounted(root_path: str, path: str, status: int) -> None:
    """What a proxy, or another app, has taken off the path is none of the route's, and the rest is read alike."""
    short, long = make_app(), make_app()
    long.add_middleware(BaseHTTPMiddleware, dispatch=pass_on)
    answers = [await ask(app, quote(path), root_path=root_path) for app in (short, long)]
    assert answers[0].content == answers[1].content
    assert [answer.status_code for answer in answers] == [status, status]


async def test_a_call_is_told_what_the_mount_has_read() -> None:
    """Parameters in the path of a mount are beside those of the route."""
    seen: list[dict[str, str]] = []

    async def note(scope: Scope, receive: Receive) -> Answer:
        del receive
        seen.append(scope["path_params"])
        return Answer(204, [], b"")

    app = ShortWayApp(routes=[Route("/say/{word}", Call(note), methods=["POST"])])
    await ask(Starlette(routes=[Mount("/of/{tenant}", app)]), "/of/a/say/b")
    assert seen == [{"tenant": "a", "word": "b"}]


async def test_middleware_sees_calls() -> None:
    """Whoever adds some to the app relies on it: it may be what keeps others out."""
    app = make_app()

    async def refuse(request: Request, call_next: Any) -> Response:
        return Response(status_code=403)

    app.add_middleware(BaseHTTPMiddleware, dispatch=refuse)
    assert (await ask(app)).status_code == 403


async def test_a_route_that_was_put_before_goes_before() -> None:
    """As with Starlette, whose routes are tried in order."""
    app = make_app()
    app.routes.insert(0, Route("/say/{word}", other, methods=["POST"]))
    assert (await ask(app)).text == "other hello"


@pytest.mark.parametrize(("path", "method", "status"), [("/say/hello", "GET", 405), ("/say", "POST", 404)])
async def test_what_is_no_call_is_left_to_starlette(path: str, method: str, status: int) -> None:
    """Methods and paths that are none of a call's are refused as ever."""
    assert (await ask(make_app(), path, method)).status_code == status


def test_a_route_has_the_name_of_what_it_calls() -> None:
    """As with the functions that Starlette takes."""
    assert make_app().url_path_for("say", word="x") == "/say/x"


async def test_a_call_that_fails_is_answered_by_handlers_of_the_app() -> None:
    """Those that were added to it, too."""
    app = make_app()

    async def handle(request: Request, error: Exception) -> Response:
        return PlainTextResponse(f"{type(error).__name__} {request.path_params['word']}", 418)

    app.add_exception_handler(FaultError, handle)
    answer = await ask(app, "/say/fail")
    assert (answer.status_code, answer.text) == (418, "FaultError fail")


async def test_a_call_that_nobody_handles_is_told_to_the_server() -> None:
    """It is what the call failed with, and it fails once."""
    with pytest.raises(FaultError):
        await ask(make_app(), "/say/fail")


async def test_a_fault_of_the_connection_is_no_fault_of_the_call() -> None:
    """What fails when the answer is sent is not answered a second time."""
    started = []

    async def send(message: Any) -> None:
        started.append(message["type"])
        raise ConnectionResetError

    async def receive() -> Any:
        raise AssertionError

    scope: Scope = {"type": "http", "method": "POST", "path": "/say/hello", "headers": []}
    with pytest.raises(ConnectionResetError):
        await make_app()(scope, receive, send)
    assert started == ["http.response.start"]


async def test_a_handler_that_reads_what_was_read_is_not_kept_waiting() -> None:
    """As Starlette says it: the body has gone. What the call did not read is there."""
    app = make_app()

    async def read(request: Request, error: Exception) -> Response:
        del error
        return Response(await request.body())

    app.add_exception_handler(FaultError, read)
    assert (await ask(app, "/say/fail")).content == b""
    app = ShortWayApp(routes=[Route("/read", Call(read_and_fail), methods=["POST"])])
    app.add_exception_handler(FaultError, read)
    with pytest.raises(RuntimeError, match="read by the endpoint already"):
        await ask(app, "/read")


async def read_and_fail(scope: Scope, receive: Receive) -> Answer:
    await receive_body(receive, fields_of(scope), 100)
    raise FaultError


async def test_routes_may_come_later() -> None:
    """Those that come first are asked first, whenever they came."""
    app = make_app()
    assert (await ask(app)).text == "hello /say/{word}"
    app.router.routes.insert(0, Route("/say/{word}", other, methods=["POST"]))
    assert (await ask(app)).text == "other hello"

"""What every request has to pass, and what every answer carries: asked of the middleware itself."""

from __future__ import annotations

import json
import logging
import re
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

import zoo
from modelcache import MemoryStore, ModelRegistry
from modelcache.serving import access
from modelcache.serving.access import Grant
from modelcache.serving.access_log import AccessLog
from modelcache.serving.guard import Guard, request_id
from modelcache.serving.server import Options, make_app
from modelcache.serving.tokens import Tokens
from modelcache.telemetry import prometheus  # noqa: F401 - make_app would import it on the event loop

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from conftest import MakeRegistry

TOKENS = Tokens({"admin": Grant(), "team": Grant(("tenant_a/*",))})


class Answered:
    """What came back."""

    def __init__(self, messages: list[Message]) -> None:
        start, *rest = messages
        self.status: int = start["status"]
        self.headers = {name.decode(): value.decode() for name, value in start["headers"]}
        self.body = b"".join(message["body"] for message in rest)


async def ask(app: ASGIApp, path: str = "/echo", method: str = "GET", **headers: str) -> Answered:
    """Send a request; headers are written with _ for -."""
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    fields = [(name.replace("_", "-").encode(), value.encode("latin-1")) for name, value in headers.items()]
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "headers": fields,
        "query_string": b"",
        "client": ("::1", 1),
    }
    await app(scope, receive, send)
    return Answered(sent)


async def echo(request: Request) -> Response:
    return PlainTextResponse(f"{request_id.get()} {access.current.get().allows('tenant_b/m')}")


async def busy(request: Request) -> Response:
    after = request.query_params.get("after") or request.headers.get("x-after")
    return Response(status_code=503, headers={"Retry-After": after} if after else {})


async def broken(request: Request) -> Response:
    raise ZeroDivisionError


async def gone(request: Request) -> Response:
    raise ClientDisconnect


def app(**options: Any) -> Guard:
    places = {"/echo": echo, "/ping": echo, "/v2/health/ready": echo, "/v2/health/live": echo, "/busy": busy}
    return Guard(
        Starlette(routes=[Route(path, does) for path, does in {**places, "/broken": broken, "/gone": gone}.items()]),
        **options,
    )


# Request ids


async def test_a_request_id_is_taken_over() -> None:
    """The client's id is that of the answer, and of whatever is logged on the way."""
    answer = await ask(app(), x_request_id="abc-1.2:3")
    assert answer.headers["x-request-id"] == "abc-1.2:3"
    assert answer.body.startswith(b"abc-1.2:3 ")


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, "é", "a\tb", "<script>", 'a"b'])
async def test_an_id_that_would_spoil_a_log_is_not_taken_over(given: str) -> None:
    """What is empty, long, or more than letters, digits and a few signs is replaced."""
    answer = await ask(app(), x_request_id=given)
    assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"])


async def test_ids_that_are_made_differ() -> None:
    """Without one, each request gets an id of its own."""
    guard = app()
    assert len({(await ask(guard)).headers["x-request-id"] for _ in range(10)}) == 10


# Tokens


async def test_without_a_token_file_everybody_may_use_everything() -> None:
    """Nothing is asked of a client."""
    assert (await ask(app())).body.endswith(b" True")


async def test_a_token_opens_its_models() -> None:
    """The grant of the token is that of the request, and ends with it."""
    guard = app(tokens=TOKENS)
    assert (await ask(guard, authorization="Bearer admin")).body.endswith(b" True")
    assert (await ask(guard, authorization="bearer  team")).body.endswith(b" False")


async def test_clients_of_aws_send_it_as_their_session_token() -> None:
    """Authorization is a signature there, and cannot hold a token."""
    signed = "AWS4-HMAC-SHA256 Credential=a/b, SignedHeaders=host, Signature=c"
    guard = app(tokens=TOKENS)
    assert (await ask(guard, authorization=signed, x_amz_security_token="team")).status == 200
    assert (await ask(guard, authorization=signed)).status == 401
    assert (await ask(guard, authorization="Bearer nobody", x_amz_security_token="team")).status == 401


@pytest.mark.parametrize("given", [None, "", "Bearer", "Bearer ", "Basic admin", "admin", "Token admin"])
async def test_without_a_token_it_is_asked_for(given: str | None) -> None:
    """401, and how to do better, as header and in words."""
    answer = await ask(app(tokens=TOKENS), **({} if given is None else {"authorization": given}))
    assert answer.status == 401
    assert answer.headers["www-authenticate"] == 'Bearer realm="modelcache"'
    assert "Authorization: Bearer" in json.loads(answer.body)["error"]


@pytest.mark.parametrize("token", ["nobody", "Admin", "admin admin", "admin,", "ädmin"])
async def test_a_token_that_is_not_known_is_refused(token: str) -> None:
    """401 with the reason that RFC 6750 gives it, and the request's id."""
    answer = await ask(app(tokens=TOKENS), authorization=f"Bearer {token}", x_request_id="a-1")
    assert answer.status == 401
    assert 'error="invalid_token"' in answer.headers["www-authenticate"]
    assert answer.headers["x-request-id"] == "a-1"
    assert token not in answer.body.decode()


@pytest.mark.parametrize("path", ["/ping", "/v2/health/ready", "/v2/health/live"])
async def test_health_needs_no_token_and_opens_nothing(path: str) -> None:
    """Load balancers have no token; behind these paths no model can be used."""
    answer = await ask(app(tokens=TOKENS), path)
    assert answer.status == 200
    assert answer.body.endswith(b" False")


@pytest.mark.parametrize(
    "path", ["/ping/", "//ping", "/PING", "/v2/health/ready/", "/v2/health", "/metrics", "/models"]
)
async def test_what_only_looks_like_health_needs_a_token(path: str) -> None:
    """Open are three paths, letter by letter."""
    assert (await ask(app(tokens=TOKENS), path)).status == 401


async def test_nothing_but_http_is_let_through() -> None:
    """No route takes websockets: they end before an app sees them."""

    async def never(scope: Scope, receive: Receive, send: Send) -> None:
        raise AssertionError

    await Guard(never)({"type": "websocket", "path": "/", "headers": []}, never, never)  # type: ignore[arg-type]


# Answers


async def test_whoever_is_to_come_back_is_told_when() -> None:
    """503 has a Retry-After, the app's own if it has one."""
    assert (await ask(app(), "/busy")).headers["retry-after"] == "1"
    assert (await ask(app(), "/busy", x_after="7")).headers["retry-after"] == "7"
    assert "retry-after" not in (await ask(app())).headers


async def test_while_it_drains_load_balancers_are_told(caplog: pytest.LogCaptureFixture) -> None:
    """Readiness is 503, liveness and calls are answered."""
    guard = app(draining=lambda: True, tokens=TOKENS)
    for path in ("/ping", "/v2/health/ready"):
        assert (await ask(guard, path)).status == 503
    assert (await ask(guard, "/v2/health/live")).status == 200
    assert (await ask(guard, authorization="Bearer admin")).status == 200


async def test_a_fault_is_logged_under_its_id(caplog: pytest.LogCaptureFixture) -> None:
    """An app that fails is a 500, and its traceback is logged once, with the request's id."""
    answer = await ask(app(), "/broken", x_request_id="a-1")
    assert answer.status == 500
    [record] = caplog.records
    assert "a-1" in record.getMessage() and record.exc_info is not None


async def test_a_fault_without_an_answer_gets_one(caplog: pytest.LogCaptureFixture) -> None:
    """An app that sends nothing leaves it to the guard to say so."""

    async def fails(scope: Scope, receive: Receive, send: Send) -> None:
        raise ZeroDivisionError

    answer = await ask(Guard(fails), x_request_id="a-1")
    assert (answer.status, json.loads(answer.body)["error"][:17]) == (500, "The server failed")


async def test_a_fault_in_the_middle_of_an_answer_breaks_it_off(caplog: pytest.LogCaptureFixture) -> None:
    """Half an answer must not look like a whole one: the server closes the connection when it sees the exception."""

    async def fails(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await ask(Guard(fails))


async def test_a_client_that_has_gone_is_no_fault(caplog: pytest.LogCaptureFixture) -> None:
    """Nobody is there to be answered, and nothing is wrong."""

    async def reads(scope: Scope, receive: Receive, send: Send) -> None:
        raise ClientDisconnect

    with caplog.at_level(logging.INFO), pytest.raises(ValueError, match="not enough"):
        await ask(Guard(reads))
    assert caplog.records == []


async def test_each_request_is_logged_on_demand(caplog: pytest.LogCaptureFixture) -> None:
    """Who, what, how it ended, how long it took, and the id, in one line that a path cannot break; with all facts."""
    log = AccessLog(ModelRegistry(MemoryStore()))
    with caplog.at_level(logging.INFO, "modelcache.access"):
        await ask(app(), x_request_id="a-1")
        assert caplog.records == []
        await ask(app(access_log=log), "/no\nroute", x_request_id="a-2")
    [record] = caplog.records
    assert re.fullmatch(r"::1 GET '/no\\nroute' 404 \d+\.\d ms a-2", record.getMessage())
    facts = {name: vars(record)[name] for name in ("event", "client", "method", "path", "status", "request_id")}
    assert facts == {
        "event": "request", "client": "::1", "method": "GET", "path": "/no\nroute", "status": 404, "request_id": "a-2",
    }  # fmt: skip
    assert not hasattr(record, "model")


@pytest.mark.parametrize("path", ["/models/tenant_a%2Fm/invoke", "/v2/models/tenant_a/m/infer"])
async def test_the_log_says_which_model_answered_in_which_version(
    make_registry: MakeRegistry, caplog: pytest.LogCaptureFixture, path: str
) -> None:
    """In both protocols, by the name that was asked."""
    registry = await make_registry(MemoryStore({"tenant_a/m.ubj": zoo.model().ubj}))
    served = Guard(make_app(registry, Options()), access_log=AccessLog(registry))
    body = '{"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 6], "data": [1, 2, 3, 4, 5, 6]}]}'
    async with httpx.AsyncClient(transport=httpx.ASGITransport(served), base_url="http://server") as client:
        with caplog.at_level(logging.INFO, "modelcache.access"):
            answer = await client.post(path, content=body if "v2" in path else "1,2,3,4,5,6")
    assert answer.status_code == 200
    [record] = [record for record in caplog.records if record.name == "modelcache.access"]
    (info,) = registry.loaded()
    assert (vars(record)["model"], vars(record)["version"]) == ("tenant_a/m", info.version)

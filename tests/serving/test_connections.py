"""Clients that send too much, too slowly or nonsense, and those that are there when the server ends."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from typing import TYPE_CHECKING

import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from modelcache.serving.access import Grant
from modelcache.serving.config import Limits
from modelcache.serving.guard import Guard
from modelcache.serving.tokens import Tokens
from serving.own_server import running

if TYPE_CHECKING:
    from collections.abc import Iterator

    from starlette.requests import Request

    from modelcache.serving.connections import Connection
    from serving.own_server import Client, OwnServer

GET = b"GET /%d HTTP/1.1\r\nHost: x\r\n\r\n"
HELD = b"GET /held HTTP/1.1\r\nHost: x\r\n\r\n"
POST = b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
PROMPT = 1e-3
LARGE = 4 << 20


class App:
    """Answers with the number in the path, with the body, or when the test says so."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.held = asyncio.Event()
        self.cancelled = asyncio.Event()
        routes = [
            ("/echo", self._echo),
            ("/held", self._hold),
            ("/large", self._large),
            ("/{number:int}", self._number),
        ]
        self.asgi = Guard(Starlette(routes=[Route(path, does, methods=["GET", "POST"]) for path, does in routes]))

    async def _echo(self, request: Request) -> Response:
        self.held.set()
        return PlainTextResponse(await request.body())

    async def _hold(self, request: Request) -> Response:
        if "content-length" in request.headers:
            await request.body()
        self.held.set()
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return PlainTextResponse("held")

    async def _large(self, request: Request) -> Response:
        return Response(bytes(LARGE))

    async def _number(self, request: Request) -> Response:
        return PlainTextResponse(str(request.path_params["number"]))


@pytest.fixture
async def app() -> App:
    return App()


@pytest.fixture(autouse=True)
def nothing_is_wrong(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Whatever a client does is no error of the server's."""
    yield
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


# Too much


@pytest.mark.parametrize(
    "headers",
    [
        b"".join(b"X-%d: 1\r\n" % number for number in range(101)) + b"\r\n",
        b"".join(b"X-%d: 1\r\n" % number for number in range(101)),
        b"X: " + b"x" * (32 << 10) + b"\r\n\r\n",
        b"X: " + b"x" * (33 << 10),
        b"".join(b"X-%d: %s\r\n" % (number, b"x" * 1000) for number in range(40)),
    ],
    ids=["many", "many without end", "long", "a long one without end", "large ones without end"],
)
async def test_headers_have_limits(app: App, headers: bytes) -> None:
    """More headers, or bytes of them, than the limit: 431 and the end, whether or not they ever end."""
    async with running(app.asgi) as server:
        client = await server.connect()
        await client.send(b"GET /1 HTTP/1.1\r\nHost: x\r\n" + headers)
        status, fields, body = await client.answer()
        assert (status, fields["connection"]) == (431, "close")
        assert b"100 headers of 32,768 bytes" in body
        assert await client.rest() == b""


async def test_a_long_path_counts_as_header(app: App) -> None:
    """The first line is bounded with the headers."""
    async with running(app.asgi) as server:
        client = await server.connect()
        await client.send(b"GET /" + b"x" * (33 << 10))
        assert (await client.answer())[0] == 431


async def test_headers_up_to_the_limit_are_taken(app: App) -> None:
    """100 headers pass, again and again on one connection, and so does a body larger than all headers may be."""
    async with running(app.asgi) as server:
        client = await server.connect()
        for number in range(3):
            headers = b"".join(b"X-%d: %s\r\n" % (index, b"x" * 200) for index in range(99))
            await client.send((GET % number).replace(b"\r\n\r\n", b"\r\n" + headers + b"\r\n"))
            assert (await client.answer())[2] == b"%d" % number
        await client.send(POST % (100 << 10) + b"x" * (100 << 10))
        assert len((await client.answer())[2]) == 100 << 10


CHUNKED = b"POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n"


@pytest.mark.parametrize(
    "trailers",
    [b"0\r\n" + b"X: 1\r\n" * 20_000, b"0\r\nX: " + b"x" * (33 << 10), b"2;" + b"x" * (33 << 10)],
    ids=["many", "a long one", "an extension of a chunk"],
)
async def test_trailers_have_the_limit_of_headers(app: App, trailers: bytes) -> None:
    """What comes behind a body, or between its parts, is bounded in bytes as headers are, whether or not it ends."""
    async with running(app.asgi) as server:
        client = await server.connect()
        await client.send(CHUNKED)
        await app.held.wait()
        await client.send(trailers)
        assert (await client.answer())[0] == 431
        assert await client.rest() == b""


async def test_a_trailer_is_no_header(app: App) -> None:
    """Nobody gets in by a token behind the body, and no trailer is kept."""
    async with running(Guard(app.asgi, tokens=Tokens({"admin": Grant()}))) as server:
        client = await server.connect()
        await client.send(CHUNKED + b"0\r\nAuthorization: Bearer admin\r\nX-Request-Id: a-1\r\n\r\n")
        status, fields, _ = await client.answer()
        assert (status, fields["x-request-id"] == "a-1") == (401, False)


# Too slowly


@pytest.mark.parametrize(
    "part", [b"G", b"GET /1 HTTP/1.1\r\nHos", POST % 10, POST % 10 + b"12345"], ids=["begun", "headers", "body", "half"]
)
async def test_a_request_has_to_be_there_in_time(app: App, part: bytes) -> None:
    """A request that is not all here in time is told so, 408, and its connection ended."""
    async with running(app.asgi, Limits(request_seconds=30)) as server:
        client = await server.connect()
        await client.send(part)
        [connection] = await server.connections(1)
        while not connection._partial:
            await asyncio.sleep(0)
        server.later(29)
        assert not connection._over
        server.later(31)
        status, fields, _ = await client.answer()
        assert (status, fields["connection"]) == (408, "close")
        assert await client.rest() == b""


async def test_a_byte_now_and_then_does_not_help(app: App) -> None:
    """The time is that of the whole request, not from one byte to the next."""
    async with running(app.asgi, Limits(request_seconds=30)) as server:
        client = await server.connect()
        await client.send(b"GET /")
        [connection] = await server.connections(1)
        while not connection._partial:
            await asyncio.sleep(0)
        began = connection._since
        await client.send(b"1 HTTP/1.1\r\nX: 1\r\n")
        while connection._size < 20:
            await asyncio.sleep(0)
        assert connection._since == began


async def test_a_client_that_says_nothing_is_let_go(app: App) -> None:
    """A connection on which no request comes is closed without a word, the first time and after an answer."""
    async with running(app.asgi, Limits(idle_seconds=75)) as server:
        silent, done = await server.connect(), await server.connect()
        await done.send(GET % 1)
        assert (await done.answer())[0] == 200
        server.later(74)
        await server.connections(2)
        server.later(76)
        assert await silent.rest() == await done.rest() == b""


async def test_a_refused_client_that_stays_is_shown_out(app: App) -> None:
    """Who is refused may read why; who then stays, sending or not, has two seconds."""
    async with running(app.asgi) as server:
        client = await server.connect()
        await client.send(b"nonsense\r\n\r\n")
        assert (await client.answer())[0] == 400
        await client.send(b"more")
        server.later(1)
        await server.connections(1)
        server.later(3)
        await server.connections(0)


async def test_a_client_is_not_to_blame_for_our_own_slowness(app: App) -> None:
    """While a request waits for the one before it nothing more is read, and the client's time does not run."""
    async with running(app.asgi, Limits(request_seconds=30)) as server:
        client = await server.connect()
        await client.send(HELD + POST % 4 + b"12")
        await app.held.wait()
        server.later(100)
        app.gate.set()
        await client.send(b"34")
        assert (await client.answer())[2] == b"held"
        assert (await client.answer())[2] == b"1234"


async def ask_for_much(server: OwnServer, ahead: bytes = b"") -> tuple[Client, Connection]:
    """Return a client whose answer waits for it, a quarter being more than all buffers on its way, and its server."""
    client = await server.connect()
    [connection] = await server.connections(1)
    client.buffer(1 << 16)
    connection.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
    await client.send(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n" + ahead)
    while not connection.transport.get_write_buffer_size():
        await asyncio.sleep(0)
    return client, connection


async def test_a_client_may_take_its_time_to_read(app: App) -> None:
    """As long as it reads at all it is waited for; and its next request may come long after the answer was ready."""
    async with running(app.asgi, Limits(idle_seconds=75)) as server:
        client, connection = await ask_for_much(server)
        status, fields = await client.head()
        assert (status, fields["content-length"]) == (200, str(LARGE))
        for seconds in (70, 140, 210, 280):
            server.later(seconds - 70)
            assert len(await client.part(LARGE // 4)) == LARGE // 4
            server.later(seconds)
        assert connection.transport.get_write_buffer_size() == 0
        await client.send(GET % 1)
        assert (await client.answer())[2] == b"1"


@pytest.mark.parametrize("ahead", [b"", GET % 1, GET % 1 + b"GET"], ids=["no other", "another", "half another"])
async def test_a_client_that_does_not_read_is_let_go(app: App, ahead: bytes) -> None:
    """Who reads nothing of its answer is ended, whatever else it has asked for."""
    async with running(app.asgi, Limits(idle_seconds=75, request_seconds=100)) as server:
        _, connection = await ask_for_much(server, ahead)
        server.later(0)
        server.later(74)
        assert not connection.transport.is_closing()
        server.later(76)
        await server.connections(0)


async def test_a_client_that_does_not_read_does_not_hold_up_the_end(app: App) -> None:
    """When the server ends, its patience is shorter."""
    async with running(app.asgi, Limits(idle_seconds=75)) as server:
        _, connection = await ask_for_much(server, GET % 1)
        server.later(0)
        server.later(11)
        assert not connection.transport.is_closing()
        ending = server.end()
        server.later(0)
        server.later(11)
        await ending
        server.registry.close.assert_not_called()


# Nonsense, and much at once


async def test_pipelined_requests_are_answered_in_order(app: App) -> None:
    """Requests that are sent without waiting for answers get them, one after the other."""
    async with running(app.asgi) as server:
        client = await server.connect()
        await client.send(b"".join(GET % number for number in range(50)))
        assert [(await client.answer())[2] for _ in range(50)] == [b"%d" % number for number in range(50)]


async def test_an_address_that_is_none_is_refused(app: App, caplog: pytest.LogCaptureFixture) -> None:
    """As the first request of a connection and as a later one; our log has no traceback of it."""
    nowhere = b"GET http://h:99999999/ HTTP/1.1\r\nHost: h\r\n\r\n"
    async with running(app.asgi) as server:
        first, later = await server.connect(), await server.connect()
        await first.send(nowhere)
        assert (await first.answer())[0] == 400
        await later.send(GET % 1)
        assert (await later.answer())[0] == 200
        await later.send(nowhere)
        assert (await later.answer())[0] == 400
    assert not caplog.records


async def test_half_a_request_behind_another_and_the_end_of_the_client(app: App) -> None:
    """The one that is whole is answered."""
    async with running(app.asgi) as server:
        client = await server.connect()
        await client.send(HELD + b"GET / HT")
        await app.held.wait()
        await client.end()
        assert (await client.head())[0] == 100, "it has been seen"
        app.gate.set()
        assert (await client.answer())[2] == b"held"


async def test_nonsense_behind_a_request_does_not_harm_it(app: App) -> None:
    """What came before is answered as ever; an error in its place would be taken for its answer."""
    async with running(app.asgi) as server:
        client = await server.connect()
        await client.send(HELD + b"nonsense\r\n\r\n")
        await app.held.wait()
        app.gate.set()
        assert (await client.answer())[2] == b"held"
        assert await client.rest() == b""


async def test_half_a_request_that_turns_to_nonsense_behind_another(app: App) -> None:
    """What came before is answered as ever, and that is the end."""
    async with running(app.asgi) as server:
        client = await server.connect()
        await client.send(HELD + GET % 1 + CHUNKED + b"zz\r\n")
        await app.held.wait()
        app.gate.set()
        assert [(await client.answer())[2] for _ in range(2)] == [b"held", b"1"]
        assert await client.rest() == b""


async def test_what_is_answered_already_is_not_answered_twice(app: App) -> None:
    """A body that turns to nonsense behind its answer ends the connection without a word."""
    async with running(Guard(app.asgi, tokens=Tokens({"admin": Grant()}))) as server:
        client = await server.connect()
        await client.send(CHUNKED)
        assert (await client.answer())[0] == 401
        await client.send(b"zz\r\n")
        assert await client.rest() == b""


@pytest.mark.parametrize("chunk", [b"zz\r\n", b"5\r\n1234567"])
async def test_a_body_that_turns_to_nonsense(app: App, chunk: bytes) -> None:
    """A body that cannot be read on is refused, and whoever read it is told that there is no more."""
    async with running(app.asgi) as server:
        client = await server.connect()
        await client.send(b"POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk)
        assert (await client.answer())[0] == 400
        assert await client.rest() == b""


async def test_an_upgrade_that_is_not_offered_is_ignored(app: App) -> None:
    """Java's client asks for HTTP/2 with its first request, and goes on without."""
    async with running(app.asgi) as server:
        client = await server.connect()
        upgrade = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAA\r\n\r\n"
        await client.send((POST % 2).replace(b"\r\n\r\n", b"\r\n" + upgrade) + b"h")
        await app.held.wait()
        await client.send(b"i" + GET % 1)
        assert [(await client.answer())[2] for _ in range(2)] == [b"hi", b"1"]


async def test_upgrades_that_are_not_offered_are_ignored_in_a_row(app: App) -> None:
    """Requests that are sent ahead may each ask for it, with and without a body; all are answered."""
    upgrade = b"\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n\r\n"
    async with running(app.asgi) as server:
        client = await server.connect()
        requests = [(GET % 1, b""), (GET % 2, b""), (POST % 2, b"hi"), (GET % 3, b"")]
        await client.send(b"".join(head.replace(b"\r\n\r\n", upgrade) + body for head, body in requests))
        assert [(await client.answer())[2] for _ in requests] == [b"1", b"2", b"hi", b"3"]


async def test_other_versions_are_not_spoken(app: App) -> None:
    """HTTP/2.0 in the first line is not answered as if it were 1.1; 1.0 is answered, and that is the end."""
    async with running(app.asgi) as server:
        newer, older = await server.connect(), await server.connect()
        await newer.send((GET % 1).replace(b"1.1", b"2.0"))
        assert (await newer.answer())[0] == 505
        await older.send((GET % 1).replace(b"1.1", b"1.0"))
        assert (await older.answer())[2] == b"1"
        assert await newer.rest() == await older.rest() == b""


async def test_it_is_no_proxy(app: App) -> None:
    """CONNECT is refused."""
    async with running(app.asgi) as server:
        client = await server.connect()
        await client.send(b"CONNECT example.com:80 HTTP/1.1\r\nHost: example.com\r\n\r\n")
        assert (await client.answer())[0] == 400


# Clients that go


@pytest.mark.parametrize("how", ["closes", "resets"])
@pytest.mark.parametrize("size", [0, 100 << 10])
async def test_a_client_that_goes_cancels_its_request(app: App, size: int, how: str) -> None:
    """P3: nobody works for a client that has gone, and nothing is logged as an error."""
    async with running(app.asgi) as server:
        client = await server.connect()
        await client.send((POST % size).replace(b"/echo", b"/held") + b"x" * size)
        await app.held.wait()
        await client.close(reset=how == "resets")
        while not app.cancelled.is_set():
            server.later(0)
            await asyncio.sleep(0)
        await server.connections(0)


async def test_a_request_is_not_begun_for_a_client_that_has_gone(app: App) -> None:
    """Its task may come to run when the connection is lost already."""
    async with running(app.asgi) as server:
        client = await server.connect()
        [connection] = await server.connections(1)
        connection.data_received(HELD)
        connection.connection_lost(None)
        assert await client.rest() == b""
        assert not app.held.is_set()


@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
async def test_a_client_may_end_its_side_and_read_on(app: App, version: bytes) -> None:
    """What it has sent is answered; meanwhile it is told to go on, in HTTP/1.1, which tells whether it is there."""
    async with running(app.asgi) as server:
        client = await server.connect()
        await client.send(HELD.replace(b"1.1", version))
        await app.held.wait()
        await client.end()
        [connection] = await server.connections(1)
        while not connection._ended:
            await asyncio.sleep(0)
        server.later(1)
        app.gate.set()
        assert version == b"1.0" or (await client.head())[0] == 100
        status, fields, body = await client.answer()
        assert (status, fields["connection"], body) == (200, "close", b"held")
        assert await client.rest() == b""


async def test_requests_sent_ahead_of_its_end_are_answered(app: App) -> None:
    """All of them; the one that is not whole is none."""
    async with running(app.asgi) as server:
        client = await server.connect()
        await client.send(b"".join(GET % number for number in range(9)))
        await client.end()
        assert [(await client.answer())[2] for _ in range(9)] == [b"%d" % number for number in range(9)]
        assert await client.rest() == b""


# The end


async def test_the_end_waits_for_what_was_accepted(app: App) -> None:
    """A request under way is answered, and its answer says that it is the last."""
    async with running(app.asgi) as server:
        client = await server.connect()
        await client.send(HELD)
        await app.held.wait()
        ending = server.end()
        app.gate.set()
        status, fields, body = await client.answer()
        assert (status, fields["connection"], body) == (200, "close", b"held")
        assert await client.rest() == b""
        await ending
        server.registry.close.assert_not_called()


async def test_a_request_that_has_come_unseen_is_answered(app: App) -> None:
    """Bytes that wait in the kernel when the server begins to end are a request like any other."""
    async with running(app.asgi) as server:
        known, fresh = await server.connect(), await server.connect()
        await known.send(GET % 1)
        await known.answer()
        known._writer.write(GET % 2)
        fresh._writer.write(GET % 3)
        server.end()
        for client, number in ((known, b"2"), (fresh, b"3")):
            status, fields, body = await client.answer()
            assert (status, fields["connection"], body) == (200, "close", number)


async def test_whoever_has_connected_is_answered(app: App) -> None:
    """A client that the kernel has let in, and nobody has accepted yet, is not lost with the listener."""
    async with running(app.asgi) as server:
        place = server._listeners[0].getsockname()
        clients = [socket.create_connection(place) for _ in range(100)]  # the loop does not turn meanwhile
        for client in clients:
            client.sendall(GET % 7)
            client.setblocking(False)
        server.end()
        loop = asyncio.get_running_loop()
        for client in clients:
            with client:
                assert (await loop.sock_recv(client, 1000)).endswith(b"\r\n\r\n7")
        await server.end()
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(place)


async def test_pipelined_requests_are_all_answered_at_the_end(app: App) -> None:
    """Only the last of them closes the connection, whether it came before the end began or after."""
    async with running(app.asgi) as server:
        client = await server.connect()
        await client.send(HELD + GET % 1)
        await app.held.wait()
        server.end()
        await client.send(GET % 2)
        app.gate.set()
        answers = [await client.answer() for _ in range(3)]
        assert [body for _, _, body in answers] == [b"held", b"1", b"2"]
        assert ["connection" in fields for _, fields, _ in answers] == [False, False, True]


async def test_idle_connections_do_not_hold_up_the_end(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are closed when nothing has come for a while."""
    monkeypatch.setattr("modelcache.serving.server._LINGER", PROMPT)
    async with running(app.asgi) as server:
        clients = [await server.connect() for _ in range(20)]
        await asyncio.wait_for(server.end(), 10)
        assert [await client.rest() for client in clients] == [b""] * 20


async def test_who_takes_too_long_is_refused_in_the_end(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the time to drain is over the registry is closed, so that calls that wait are told, and all is ended."""
    monkeypatch.setattr("modelcache.serving.server._LINGER", PROMPT)
    async with running(app.asgi, drain_seconds=PROMPT) as server:
        client = await server.connect()
        await client.send(HELD)
        await app.held.wait()

        async def refuse(*, drain: float) -> None:
            assert drain == 0
            app.gate.set()

        server.registry.close = refuse
        await server.end()
        assert (await client.answer())[0] == 200


async def test_impatience_ends_it_at_once(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second Ctrl-C waits for nobody."""
    monkeypatch.setattr("modelcache.serving.server._LAST_WORDS", PROMPT)
    async with running(app.asgi) as server:
        client = await server.connect()
        await client.send(HELD)
        await app.held.wait()
        for _ in range(2):
            server.server.handle_exit(signal.SIGINT, None)
        await server.end()
        assert await client.rest() == b""
        app.gate.set()

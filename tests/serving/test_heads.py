"""The head of an answer and its body: one packet where they come together, and none is kept where they do not."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from starlette.responses import PlainTextResponse

from conftest import settle
from lanes import FakeTransport
from modelcache.serving.heads import HeadHolder
from serving.own_server import running

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


class Closing(FakeTransport):
    """Takes down when it is closed."""

    def close(self) -> None:
        self.writes.append(b"closed")


@pytest.fixture
async def transport() -> AsyncIterator[Closing]:
    fake = Closing()
    yield fake
    super(Closing, fake).close()


@pytest.fixture
async def answer(transport: Closing) -> HeadHolder:
    return HeadHolder(transport, asyncio.get_running_loop())


async def test_head_and_body_leave_together(answer: HeadHolder, transport: Closing) -> None:
    """And what follows the body leaves as it comes."""
    answer.write(b"head ")
    answer.write(b"body")
    assert transport.writes == [b"head body"]
    answer.write(b"more")
    await settle()
    assert transport.writes == [b"head body", b"more"]


async def test_a_head_does_not_wait_for_a_body_that_takes_its_time(answer: HeadHolder, transport: Closing) -> None:
    """A client may want to know that its answer has begun."""
    answer.write(b"head")
    assert transport.writes == []
    await settle(2)
    assert transport.writes == [b"head"]
    answer.write(b"body")
    assert transport.writes == [b"head", b"body"]


async def test_a_head_without_a_body_leaves_before_the_end(answer: HeadHolder, transport: Closing) -> None:
    """HEAD has none."""
    answer.write(b"head")
    answer.close()
    await settle()
    assert transport.writes == [b"head", b"closed"]


async def test_to_be_told_to_go_on_is_no_head(answer: HeadHolder, transport: Closing) -> None:
    """The client sends its body when it has read that, not before."""
    answer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    answer.write(b"head ")
    answer.write(b"body")
    assert transport.writes == [b"HTTP/1.1 100 Continue\r\n\r\n", b"head body"]


async def test_a_large_body_is_not_copied(answer: HeadHolder, transport: Closing) -> None:
    """To put 60 MB behind a head would keep all others waiting for 40 ms."""
    answer.write(b"head")
    answer.write(bytes(100_000))
    assert [len(data) for data in transport.writes] == [4, 100_000]


async def test_the_answer_to_head_is_not_lost_when_the_client_ends_its_side() -> None:
    """Wherever the end of its side falls: the answer is complete with its head."""
    async with running(PlainTextResponse("body")) as server:
        for _ in range(50):
            client = await server.connect()
            await client.send(b"HEAD / HTTP/1.1\r\nHost: x\r\n\r\n")
            await client.end()
            assert (await client.rest()).startswith(b"HTTP/1.1 200 OK")


async def test_the_answer_to_head_comes_before_what_is_said_of_nonsense() -> None:
    """What is refused is the next request."""
    async with running(PlainTextResponse("body")) as server:
        for _ in range(50):
            client = await server.connect()
            await client.send(b"HEAD / HTTP/1.1\r\nHost: x\r\n\r\n")
            await client.send(b"nonsense\r\n\r\n")
            assert (await client.rest()).startswith(b"HTTP/1.1 200 OK")


async def test_all_else_is_the_transports(answer: HeadHolder) -> None:
    """Whoever asks for it cannot tell them apart."""
    assert answer.is_closing() is False

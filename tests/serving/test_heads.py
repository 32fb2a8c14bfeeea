"""The head of an answer and its body: one packet where they come together, and none is kept where they do not."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from conftest import settle
from lanes import FakeTransport
from modelcache.serving.heads import HeadHolder

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


async def test_all_else_is_the_transports(answer: HeadHolder) -> None:
    """Whoever asks for it cannot tell them apart."""
    assert answer.is_closing() is False

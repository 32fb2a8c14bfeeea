"""The artifact lane, parent side: what a worker asks for is answered, in whatever order its reports come in."""

from __future__ import annotations

import asyncio
import json
import os
from typing import TYPE_CHECKING

import pytest

from lanes import FakeTransport, deliver
from modelcache.pool import wire
from modelcache.pool.artifacts import ArtifactChannel
from modelcache.pool.blackbox import BlackBox
from modelcache.pool.shared import map_memory, shared_memory

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@pytest.fixture
async def transport() -> AsyncIterator[FakeTransport]:
    transport = FakeTransport()
    yield transport
    transport.close()


@pytest.fixture
async def channel(transport: FakeTransport) -> AsyncIterator[ArtifactChannel]:
    """A lane whose worker is played by the test."""
    memory = shared_memory()
    box = BlackBox(map_memory(memory))
    os.close(memory)
    channel = ArtifactChannel(lambda: None, box, hello=lambda _: None, unloaded=lambda _: None)
    channel.connection_made(transport)
    yield channel
    box.close()


def sent(transport: FakeTransport) -> list[list[int]]:
    """Return the kinds of the frames of each write."""
    found: list[list[int]] = []
    for data in transport.writes:
        start, kinds = 0, []
        while start < len(data):
            length, kind, *_ = wire.ARTIFACT.unpack_from(data, start)
            kinds.append(kind)
            start += wire.ARTIFACT.size + length
        found.append(kinds)
    return found


def report(kind: int, model: int, number: int) -> bytes:
    payload = json.dumps({"asked": number}).encode()
    return wire.ARTIFACT.pack(len(payload), kind, 0, 0, model, number) + payload


async def test_a_need_that_has_grown_is_not_met_by_a_smaller_grant(channel: ArtifactChannel) -> None:
    """L6: a second NEED that comes while the first one waits for its bytes is still open when those are granted."""
    loading = channel.begin(7, 10)
    deliver(channel, report(wire.NEED, 7, 20))
    await loading.news()
    deliver(channel, report(wire.NEED, 7, 40))
    loading.grant(20)
    assert loading.needed == 40
    async with asyncio.timeout(1):
        await loading.news()
    loading.grant(40)
    assert loading.needed == 0


async def test_an_artifact_in_one_piece_is_one_write(channel: ArtifactChannel, transport: FakeTransport) -> None:
    """The worker is woken up once, when there is something to do, and not for the announcement before."""
    loading = channel.begin(7, 10)
    await asyncio.sleep(0)
    assert sent(transport) == []
    loading.finish(b"model")
    assert sent(transport) == [[wire.BEGIN, wire.CHUNK, wire.END]]


async def test_each_piece_of_a_longer_one_leaves_at_once(channel: ArtifactChannel, transport: FakeTransport) -> None:
    """The worker unpacks while the rest is on its way, and the last piece takes the end along."""
    loading = channel.begin(7, 10)
    await loading.feed(b"mo")
    assert sent(transport) == [[wire.BEGIN, wire.CHUNK]]
    loading.finish(b"del")
    assert sent(transport)[1:] == [[wire.CHUNK, wire.END]]

"""The artifact lane, parent side: what a worker asks for is answered, in whatever order its reports come in."""

from __future__ import annotations

import asyncio
import json
import os
from typing import TYPE_CHECKING

import pytest

from lanes import FakeTransport
from modelcache.pool import wire
from modelcache.pool.artifacts import ArtifactChannel
from modelcache.pool.blackbox import BlackBox, shared_memory

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@pytest.fixture
async def channel() -> AsyncIterator[ArtifactChannel]:
    """A lane whose worker is played by the test."""
    transport, memory = FakeTransport(), shared_memory()
    box = BlackBox(memory)
    os.close(memory)
    channel = ArtifactChannel(lambda: None, box, hello=lambda _: None, unloaded=lambda _: None)
    channel.connection_made(transport)
    yield channel
    transport.close()
    box.close()


def report(kind: int, model: int, number: int) -> bytes:
    payload = json.dumps({"asked": number}).encode()
    return wire.ARTIFACT.pack(len(payload), kind, 0, 0, model, number) + payload


async def test_a_need_that_has_grown_is_not_met_by_a_smaller_grant(channel: ArtifactChannel) -> None:
    """L6: a second NEED that comes while the first one waits for its bytes is still open when those are granted."""
    loading = channel.begin(7, 10)
    channel.data_received(report(wire.NEED, 7, 20))
    await loading.news()
    channel.data_received(report(wire.NEED, 7, 40))
    loading.grant(20)
    assert loading.needed == 40
    async with asyncio.timeout(1):
        await loading.news()
    loading.grant(40)
    assert loading.needed == 0

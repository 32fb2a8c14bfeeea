"""Ctrl-C cancels the main task inside its signal handler: between any two steps, those of a lane included."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from lanes import FakeTransport, Line, both_ends, deliver
from modelcache.pool import wire
from modelcache.pool.requests import RequestChannel

if TYPE_CHECKING:
    import asyncio


async def test_a_call_cancelled_by_a_signal_while_it_is_answered() -> None:
    """F3: a caller that goes while its answer is being taken apart touches no other call, nor the lane."""
    calls: list[asyncio.Future[Any]] = []

    class Interrupted(list[float]):
        def append(self, value: float) -> None:
            calls[0].cancel()
            super().append(value)

    transport = FakeTransport()
    channel = RequestChannel(lambda: None, lambda _: None, both_ends()[0])
    channel._latencies = Interrupted()
    channel.connection_made(transport)
    rows = np.zeros((1, 1), np.float32)
    answers = b""
    for _ in range(2):
        number, future = channel.predict(Line(3), rows, 0, 0.0)
        calls.append(future)
        answers += wire.REPLY.pack(4, wire.RESULT, 1, 0, number, 1, 0, 0, 0.1) + np.float32(7).tobytes()
    deliver(channel, answers)
    assert calls[0].cancelled()
    assert (await calls[1])[0].tolist() == [7.0]
    transport.close()

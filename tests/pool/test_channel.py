"""A lane as the parent sees it: frames in any pieces, one write per tick, and patience with a busy worker."""

from __future__ import annotations

import asyncio
import os
import socket
from itertools import pairwise
from struct import Struct
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import settle
from lanes import FakeTransport, deliver
from modelcache.pool import wire
from modelcache.pool.channel import _HIGH_WATER, _OUTBOX_LIMIT, Channel

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

HEADER = Struct("<IB")


class Recorder(Channel):
    """Keeps what arrives."""

    def __init__(self, header: Struct = HEADER) -> None:
        self.received: list[tuple[int, bytes]] = []
        self.ends = 0
        super().__init__(header, self._on_lost)

    def frame_received(self, header: tuple[Any, ...], data: memoryview, start: int, end: int) -> None:
        self.received.append((header[1], bytes(data[start:end])))

    def _on_lost(self) -> None:
        self.ends += 1


@pytest.fixture
async def transport() -> AsyncIterator[FakeTransport]:
    fake = FakeTransport()
    yield fake
    fake.close()


class Pair:
    """A channel whose other end is a blocking socket in the hands of the test."""

    def __init__(self, channel: Recorder, peer: socket.socket) -> None:
        self.channel = channel
        self.peer = peer

    def read_all(self) -> int:
        """Read what is there; return how much it was."""
        size = 0
        self.peer.setblocking(False)
        while True:
            try:
                data = self.peer.recv(1 << 20)
            except BlockingIOError:
                return size
            size += len(data)


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    _, channel = await asyncio.get_running_loop().create_unix_connection(Recorder, sock=ours)
    yield Pair(channel, theirs)
    channel.close()
    theirs.close()
    await settle()


# What arrives


@settings(deadline=None, max_examples=150)
@given(payloads=st.lists(st.binary(max_size=70), max_size=12), cuts=st.lists(st.integers(0, 1000), max_size=30))
async def test_frames_survive_any_cutting_of_the_stream(payloads: list[bytes], cuts: list[int]) -> None:
    """However the stream is cut, each frame is handled once, whole and in order."""
    channel = Recorder()
    stream = b"".join(HEADER.pack(len(payload), number) + payload for number, payload in enumerate(payloads))
    for start, end in pairwise(sorted({0, len(stream), *(cut for cut in cuts if cut < len(stream))})):
        deliver(channel, stream[start:end])
    assert channel.received == list(enumerate(payloads))


async def test_a_frame_that_comes_byte_by_byte_is_handled_when_it_is_complete() -> None:
    """Nothing is handled before its last byte is there, nor left lying after it."""
    channel = Recorder()
    frame = HEADER.pack(3, 7) + b"abc"
    for position in range(len(frame)):
        assert channel.received == []
        deliver(channel, frame[position : position + 1])
    assert channel.received == [(7, b"abc")]
    deliver(channel, HEADER.pack(0, 8))
    assert channel.received == [(7, b"abc"), (8, b"")]


@pytest.mark.parametrize("header", [wire.REPLY, wire.ARTIFACT], ids=["replies", "artifacts"])
async def test_large_frames_are_put_together_from_socket_sized_pieces(header: Struct) -> None:
    """A payload of many reads arrives intact, with the next frame right behind it."""
    channel = Recorder(header)
    payload = os.urandom(3 << 20)
    tail = (0,) * (7 if header is wire.REPLY else 4)
    stream = header.pack(len(payload), 5, *tail) + payload + header.pack(0, 6, *tail)
    for start in range(0, len(stream), 65_536):
        deliver(channel, stream[start : start + 65_536])
    assert channel.received == [(5, payload), (6, b"")]


# What is sent


async def test_the_first_frame_of_a_tick_leaves_at_once_and_the_rest_in_one_write(transport: FakeTransport) -> None:
    """A lone caller waits for no tick, and many callers cost two writes, not one each."""
    channel = Recorder()
    channel.connection_made(transport)
    for number in range(5):
        channel.send(b"%d" % number)
    assert transport.writes == [b"0"]
    await settle(1)
    assert transport.writes == [b"0", b"1234"]


async def test_after_a_tick_of_several_frames_the_first_waits_for_the_others(transport: FakeTransport) -> None:
    """Where calls come in crowds, the worker is woken up once for all of a tick; a lone one is sent at once again."""
    channel = Recorder()
    channel.connection_made(transport)
    for sent, expected in [(b"ab", [b"a", b"b"]), (b"cde", [b"cde"]), (b"f", [b"f"]), (b"g", [b"g"])]:
        transport.writes.clear()
        for frame in sent:
            channel.send(bytes([frame]))
        at_once = transport.writes[:]
        await settle(2)
        assert transport.writes == expected
        assert at_once == ([] if sent in (b"cde", b"f") else expected[:1])


async def test_one_answer_to_many_is_no_crowd(transport: FakeTransport) -> None:
    """A tick is crowded by what is sent in it, not by what was expected."""
    channel = Recorder()
    channel.connection_made(transport)
    channel.cork()
    channel.send(b"a")
    await settle(2)
    channel.send(b"b")
    assert transport.writes == [b"a", b"b"]


async def test_a_corked_lane_writes_once(transport: FakeTransport) -> None:
    """When several callers are about to send, their frames leave together."""
    channel = Recorder()
    channel.connection_made(transport)
    channel.cork()
    channel.cork()
    channel.send(b"a")
    channel.send(b"b")
    assert transport.writes == []
    await settle(1)
    assert transport.writes == [b"ab"]


async def test_an_empty_cork_writes_nothing(transport: FakeTransport) -> None:
    """Callers who had nothing more to send cost no write."""
    channel = Recorder()
    channel.connection_made(transport)
    channel.cork()
    await settle(2)
    assert transport.writes == []


@pytest.mark.parametrize("size", [100, 1000, _OUTBOX_LIMIT // 4, _OUTBOX_LIMIT, 3 * _OUTBOX_LIMIT])
async def test_what_waits_for_the_end_of_the_tick_is_never_much(transport: FakeTransport, size: int) -> None:
    """Beyond the mark it leaves at once, in order and in few writes."""
    channel = Recorder()
    channel.connection_made(transport)
    frames = [bytes([number % 256]) * size for number in range(2 * _OUTBOX_LIMIT // size + 3)]
    for number, frame in enumerate(frames, 1):
        channel.send(frame)
        assert number * size - sum(map(len, transport.writes)) <= _OUTBOX_LIMIT
    await settle(1)
    assert b"".join(transport.writes) == b"".join(frames)
    assert len(transport.writes) <= min(len(frames), 4), "the first, two beyond the mark, and the rest"
    channel.send(b"lone")
    await settle(2)
    channel.send(frames[0])
    channel.send(frames[0][:1])
    assert transport.writes[-1] == frames[0], "what has left counts no more"


# Back-pressure


async def test_a_lane_that_is_filled_within_one_tick_is_congested_at_once(pair: Pair) -> None:
    """The sender need not let go of the loop to be told to wait."""
    sent = 0
    while not pair.channel.congested:
        pair.channel.send(bytes(1 << 16))
        sent += 1 << 16
        assert sent < 8 * _HIGH_WATER
    assert pair.channel._transport.get_write_buffer_size() <= _HIGH_WATER + 2 * _OUTBOX_LIMIT


async def test_a_full_lane_makes_senders_wait_until_the_worker_reads(pair: Pair) -> None:
    """``writable`` waits while more than a mebibyte is unsent, and goes on when the worker has taken it."""
    sent = 0
    while not pair.channel.congested:
        pair.channel.send(bytes(1 << 18))
        sent += 1 << 18
        await settle(2)
    waiters = [asyncio.create_task(pair.channel.writable()) for _ in range(3)]
    await settle()
    assert not any(waiter.done() for waiter in waiters)
    taken = 0
    while taken < sent:
        taken += pair.read_all()
        await asyncio.sleep(0)
    await asyncio.gather(*waiters)
    assert not pair.channel.congested


async def test_one_sender_that_gives_up_leaves_the_others_waiting(transport: FakeTransport) -> None:
    """Cancelling one who waits for room disturbs nobody else."""
    channel = Recorder()
    channel.connection_made(transport)
    channel.pause_writing()
    patient, impatient = (asyncio.create_task(channel.writable()) for _ in range(2))
    await settle()
    impatient.cancel()
    await settle()
    assert not patient.done()
    channel.resume_writing()
    await patient
    assert impatient.cancelled()


async def test_a_lane_that_fills_up_again_keeps_senders_waiting(transport: FakeTransport) -> None:
    """Room that is gone before the sender wakes up is no room."""
    channel = Recorder()
    channel.connection_made(transport)
    channel.pause_writing()
    waiter = asyncio.create_task(channel.writable())
    await settle()
    channel.resume_writing()
    channel.pause_writing()
    await settle()
    assert not waiter.done()
    channel.resume_writing()
    await waiter


# The end


async def test_the_end_of_the_worker_is_reported_once_and_wakes_senders(pair: Pair) -> None:
    """A lane that ends says so once, and nobody goes on waiting for room in it."""
    while not pair.channel.congested:
        pair.channel.send(bytes(1 << 18))
        await settle(2)
    waiter = asyncio.create_task(pair.channel.writable())
    await settle()
    pair.peer.close()
    await waiter
    pair.channel.close()
    await settle()
    assert pair.channel.ends == 1
    assert pair.channel.closed

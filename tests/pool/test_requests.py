"""The request lane, parent side: each call has a future of its own, whatever order the answers come in."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from conftest import settle
from lanes import FakeTransport, Line, both_ends, deliver
from modelcache import InvalidInputError
from modelcache.pool import wire
from modelcache.pool.lost import Epitaph, WorkerLostError
from modelcache.pool.requests import SHARED_FROM, RequestChannel
from modelcache.pool.shared import SLOT_BYTES, SLOTS
from modelcache.testing import FakeClock

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

ROWS = np.arange(12, dtype=np.float32).reshape(2, 6)
EPITAPH = Epitaph(4711, -9, "")


class Lane:
    """A request lane whose worker is played by the test."""

    def __init__(self) -> None:
        self.observed: list[float] = []
        self.queue = Line(3)
        self.transport = FakeTransport()
        self.slots, self.arena = both_ends()
        self.channel = RequestChannel(lambda: None, self.observed.extend, self.slots)
        self.channel.connection_made(self.transport)

    def predict(self, rows: np.ndarray[Any, Any] = ROWS) -> tuple[int, asyncio.Future[Any]]:
        return self.channel.predict(self.queue, rows, 0, 0.0)

    def answer(self, number: int, values: np.ndarray[Any, Any], seconds: float = 0.25) -> bytes:
        data = values.astype(np.float32).tobytes()
        shape = (*values.shape, 0, 0)[:3]
        return wire.REPLY.pack(len(data), wire.RESULT, values.ndim, 0, number, *shape, seconds) + data

    def refusal(self, number: int, message: str) -> bytes:
        data = message.encode()
        return wire.REPLY.pack(len(data), wire.ERROR, 0, 0, number, 0, 0, 0, 0.0) + data

    def kinds(self) -> list[tuple[int, int]]:
        """Return (kind, call) of each frame sent."""
        stream, found = b"".join(self.transport.writes), []
        while stream:
            size, kind, _, _, number, *_ = wire.REQUEST.unpack_from(stream)
            found.append((kind, number))
            stream = stream[wire.REQUEST.size + size :]
        return found


@pytest.fixture
async def lane() -> AsyncIterator[Lane]:
    made = Lane()
    yield made
    made.transport.close()


async def test_a_call_is_one_frame_of_header_and_rows(lane: Lane) -> None:
    """The worker reads from the header all it needs, and the rows as they are in memory."""
    number, _ = lane.channel.predict(lane.queue, ROWS, 2, 123.5)
    (frame,) = lane.transport.writes
    header = wire.REQUEST.unpack_from(frame)
    assert header == (ROWS.nbytes, wire.PREDICT, 2, 0, number, 3, 2, 6, 123.5)
    assert frame[wire.REQUEST.size :] == ROWS.tobytes()


async def test_rows_that_are_a_column_of_something_larger_travel_row_by_row(lane: Lane) -> None:
    """A view with strides is sent in the order of its rows."""
    view = np.arange(24, dtype=np.float32).reshape(2, 12)[:, ::2]
    lane.predict(view)
    assert lane.transport.writes[0][wire.REQUEST.size :] == np.ascontiguousarray(view).tobytes()


async def test_answers_reach_their_callers_in_any_order(lane: Lane) -> None:
    """Calls are told apart by number, not by their place in the line."""
    calls = [lane.predict() for _ in range(3)]
    for number, _ in reversed(calls):
        deliver(lane.channel, lane.answer(number, np.full(2, number)))
    for number, future in calls:
        values, seconds = await future
        assert values.tolist() == [number, number]
        assert seconds == 0.25


@pytest.mark.parametrize("shape", [(2,), (2, 3), (2, 3, 7), (2, 0)], ids=str)
async def test_answers_keep_their_shape(lane: Lane, shape: tuple[int, ...]) -> None:
    """Values, classes and contributions of many classes come back as the model gave them."""
    expected = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    number, future = lane.predict()
    deliver(lane.channel, lane.answer(number, expected))
    values, _ = await future
    assert values.shape == shape
    assert np.array_equal(values, expected)


async def test_answers_of_one_read_share_no_memory(lane: Lane) -> None:
    """A caller may write into its answer, and holds nobody else's."""
    calls = [lane.predict() for _ in range(2)]
    deliver(lane.channel, b"".join(lane.answer(number, np.zeros(2)) for number, _ in calls))
    first, second = [(await future)[0] for _, future in calls]
    first += 1
    assert second.tolist() == [0, 0]
    assert len(first.base) == first.nbytes


SINGLE, PAIR, REFUSAL, CANCELLED = "single", "pair", "refusal", "cancelled"


@given(
    kinds=st.lists(st.sampled_from([SINGLE] * 9 + [PAIR, REFUSAL, CANCELLED]), max_size=200),
    cuts=st.lists(st.integers(0, 9000), max_size=3),
)
@example(kinds=[SINGLE] * 150, cuts=[])
@example(kinds=[*[SINGLE] * 70, CANCELLED, *[SINGLE] * 70, PAIR, *[SINGLE] * 70], cuts=[4801])
async def test_many_answers_in_one_read(kinds: list[str], cuts: list[int]) -> None:
    """However many come at once, between whatever others, and wherever reads end: each caller gets its own."""
    lane = Lane()
    calls = [lane.predict() for _ in kinds]
    stream = b""
    for kind, (number, _) in zip(kinds, calls, strict=True):
        values = np.array([number, -number][: 1 + (kind == PAIR)])
        stream += lane.refusal(number, f"no {number}") if kind == REFUSAL else lane.answer(number, values)
        if kind == CANCELLED:
            lane.channel.cancel(number)
    for start, end in pairwise([0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]):
        deliver(lane.channel, stream[start:end])
    for kind, (number, future) in zip(kinds, calls, strict=True):
        if kind == CANCELLED:
            assert not future.done()
        elif kind == REFUSAL:
            assert str(future.exception()).endswith(f": no {number}")
        else:
            values, seconds = future.result()
            assert values.tolist() == [number, -number][: 1 + (kind == PAIR)]
            assert (values.dtype, seconds) == (np.float32, 0.25)
            values[:] = 0  # it is the caller's own
    assert len(lane.observed) == kinds.count(SINGLE) + kinds.count(PAIR)
    assert not lane.channel.pending
    lane.transport.close()


async def test_an_answer_of_many_keeps_few_alive(lane: Lane) -> None:
    """Whoever keeps one of a thousand answers keeps 256 bytes with it."""
    calls = [lane.predict() for _ in range(1000)]
    deliver(lane.channel, b"".join(lane.answer(number, np.zeros(1)) for number, _ in calls))
    assert max([(await future)[0].base.nbytes for _, future in calls]) == 256


async def test_a_refusal_is_raised_with_the_models_own_words(lane: Lane) -> None:
    """What the predictor said is what the caller reads."""
    number, future = lane.predict()
    deliver(lane.channel, lane.refusal(number, "gblinear has no leaves"))
    with pytest.raises(InvalidInputError, match="gblinear has no leaves"):
        await future


async def test_a_cancelled_call_is_cancelled_at_the_worker_and_its_late_answer_dropped(lane: Lane) -> None:
    """Rule P3: the worker is told, once; an answer that was on its way is nobody's."""
    number, future = lane.predict()
    lane.channel.cancel(number)
    lane.channel.cancel(number)
    deliver(lane.channel, lane.answer(number, np.zeros(2)))
    await settle(2)
    assert lane.kinds() == [(wire.PREDICT, number), (wire.CANCEL, number)]
    assert not future.done()
    assert not lane.channel.pending
    assert lane.observed == []


async def test_an_answer_to_a_future_that_was_cancelled_in_the_same_tick_is_dropped(lane: Lane) -> None:
    """The answer overtakes the cancellation that has not reached the lane yet."""
    number, future = lane.predict()
    future.cancel()
    deliver(lane.channel, lane.answer(number, np.zeros(2)))
    assert not lane.channel.pending


async def test_an_answer_that_nobody_asked_for_is_ignored(lane: Lane) -> None:
    """A stray number breaks nothing for the calls in flight."""
    number, future = lane.predict()
    deliver(lane.channel, lane.answer(99, np.zeros(2)) + lane.answer(number, np.ones(2)))
    assert (await future)[0].tolist() == [1, 1]


async def test_each_answer_is_observed(lane: Lane) -> None:
    """The latency of answered calls, and only of those, is counted."""
    calls = [lane.predict() for _ in range(3)]
    deliver(lane.channel, lane.answer(calls[0][0], np.zeros(2)) + lane.refusal(calls[1][0], "no"))
    assert len(lane.observed) == 1
    assert lane.channel.last_latency == lane.observed[0] >= 0
    with pytest.raises(InvalidInputError):
        await calls[1][1]


async def test_callers_woken_by_one_read_send_their_next_calls_in_one_write(lane: Lane) -> None:
    """With many callers, a write carries as many calls as a read carried answers."""
    calls = [lane.predict() for _ in range(4)]
    await settle(2)
    writes = len(lane.transport.writes)

    async def call_again(future: asyncio.Future[Any]) -> None:
        await future
        lane.predict()

    tasks = [asyncio.create_task(call_again(future)) for _, future in calls]
    await settle(2)
    deliver(lane.channel, b"".join(lane.answer(number, np.zeros(2)) for number, _ in calls))
    await asyncio.gather(*tasks)
    await settle(2)
    assert len(lane.transport.writes) == writes + 1


async def test_a_lone_callers_next_call_is_written_at_once(lane: Lane) -> None:
    """One caller at a time never waits for the end of a tick."""
    number, future = lane.predict()
    await settle(2)
    deliver(lane.channel, lane.answer(number, np.zeros(2)))
    await future
    lane.predict()
    assert len(lane.transport.writes) == 2


async def test_the_oldest_call_tells_how_long_the_worker_has_been_silent(lane: Lane) -> None:
    """Rule P2 rests on it: the oldest unanswered call, not the newest."""
    assert lane.channel.oldest() is None
    calls = [lane.predict() for _ in range(3)]
    ages = [lane.channel.pending[number].sent for number, _ in calls]
    assert lane.channel.oldest() == ages[0]
    deliver(lane.channel, lane.answer(calls[0][0], np.zeros(2)))
    assert lane.channel.oldest() == ages[1]
    lane.channel.cancel(calls[1][0])
    assert lane.channel.oldest() == ages[2]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    made = FakeClock()
    monkeypatch.setattr("modelcache.pool.requests.monotonic", made)
    return made


async def test_the_wait_to_expect_is_who_waits_by_the_rate_of_answers(lane: Lane, clock: FakeClock) -> None:
    """P6, Little's law: 100 calls wait, 50 were answered in 0.2 s: a call sent now has its answer in 101 / 250 s."""
    calls = [lane.predict() for _ in range(150)]
    clock.advance(0.2)
    deliver(lane.channel, b"".join(lane.answer(number, np.zeros(2)) for number, _ in calls[:50]))
    assert lane.channel.expected_wait() == pytest.approx(101 / 250)


async def test_time_without_work_does_not_count(lane: Lane, clock: FakeClock) -> None:
    """P6: the rate is that since the worker had nothing to do, however long that was."""
    number, _ = lane.predict()
    deliver(lane.channel, lane.answer(number, np.zeros(2)))
    clock.advance(1000)
    calls = [lane.predict() for _ in range(20)]
    clock.advance(0.1)
    deliver(lane.channel, b"".join(lane.answer(number, np.zeros(2)) for number, _ in calls[:10]))
    assert lane.channel.expected_wait() == pytest.approx(11 * 0.1 / 10)


async def test_the_rate_of_answers_is_a_recent_one(lane: Lane, clock: FakeClock) -> None:
    """P6: a worker that has become ten times slower is known to be after a few seconds of refusing."""
    calls = [lane.predict() for _ in range(2000)]
    numbers = iter([number for number, _ in calls])
    for count in [100] * 10 + [10] * 50:  # in steps of 0.1 s
        clock.advance(0.1)
        deliver(lane.channel, b"".join(lane.answer(next(numbers), np.zeros(2)) for _ in range(count)))
        lane.channel.expected_wait()
    for number in tuple(lane.channel.pending):  # so that the age of the oldest is not what counts
        lane.channel.cancel(number)
        lane.predict()
    waiting = lane.channel.waiting
    assert lane.channel.expected_wait() == pytest.approx((waiting + 1) / 100, rel=0.2)


async def test_before_the_first_answer_the_oldest_calls_age_is_what_there_is(lane: Lane, clock: FakeClock) -> None:
    """P6: nothing tells of a rate then; and it never takes less, since the worker may be at something long."""
    assert lane.channel.expected_wait() == 0
    calls = [lane.predict() for _ in range(3)]
    clock.advance(3)
    assert lane.channel.expected_wait() == 3
    deliver(lane.channel, lane.answer(calls[2][0], np.zeros(2)))
    clock.advance(4)
    lane.channel.cancel(calls[1][0])
    assert lane.channel.expected_wait() == 14
    clock.advance(100)
    for number, _ in calls:
        lane.channel.cancel(number)
    assert lane.channel.expected_wait() == 3


async def test_a_lane_is_asked_until_a_moment_after_the_last_answer(lane: Lane, clock: FakeClock) -> None:
    """Between two calls of the same client there is none, and yet loads are to take turns."""
    clock.advance(1)
    assert not lane.channel.is_asked
    number, _ = lane.predict()
    clock.advance(1)
    assert lane.channel.is_asked
    deliver(lane.channel, lane.answer(number, np.zeros(2)))
    assert lane.channel.is_asked
    clock.advance(1)
    assert not lane.channel.is_asked


async def test_a_ping_is_answered_like_a_call(lane: Lane) -> None:
    """Rule P2: a PONG is the sign of life of the worker's main thread."""
    ping = lane.channel.ping()
    ((kind, number),) = lane.kinds()
    assert kind == wire.PING
    deliver(lane.channel, wire.REPLY.pack(0, wire.PONG, 0, 0, number, 0, 0, 0, 0.0))
    await ping
    assert lane.observed == []


async def test_a_ping_takes_nobodys_place_in_the_queue(lane: Lane) -> None:
    """P6: a worker that loads is asked for signs of life, and ``queue_limit`` calls may wait for it all the same."""
    lane.predict()
    ping = lane.channel.ping()
    assert lane.channel.waiting == 1
    await settle(2)
    _, number = lane.kinds()[-1]
    deliver(lane.channel, wire.REPLY.pack(0, wire.PONG, 0, 0, number, 0, 0, 0, 0.0))
    await ping
    assert lane.channel.waiting == 1


async def test_numbers_start_again_after_the_last(lane: Lane) -> None:
    """A lane does not wear out: call numbers fit the frame for ever."""
    lane.channel._number = (1 << 32) - 2
    assert [lane.predict()[0] for _ in range(3)] == [(1 << 32) - 1, 0, 1]


async def test_everyone_in_flight_learns_of_the_workers_end(lane: Lane) -> None:
    """Rule P1: no call is left hanging; those that were cancelled are left alone."""
    calls = [lane.predict() for _ in range(3)]
    calls[2][1].cancel()
    assert lane.channel.models_waiting() == {3}
    lane.channel.fail_all(EPITAPH)
    for _, future in calls[:2]:
        with pytest.raises(WorkerLostError) as caught:
            await future
        assert caught.value.epitaph is EPITAPH
    assert not lane.channel.pending


async def test_an_end_that_nobody_awaits_is_not_logged(lane: Lane) -> None:
    """Of two slices in flight only the first is awaited: the other's failure is no "exception never retrieved"."""
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    lane.predict()
    lane.channel.fail_all(EPITAPH)
    await settle(2)
    assert complaints == []


# Rows in shared memory

MANY = np.arange(6 * 4000, dtype=np.float32).reshape(-1, 6)


def report(kind: int, number: int, slot: int, *shape: int, payload: bytes = b"") -> bytes:
    """Return what the worker says of a call whose rows are in ``slot``."""
    whole = (*shape, 0, 0, 0)[:3]
    return wire.REPLY.pack(len(payload), kind, len(shape), slot, number, *whole, 0.5) + payload


def slots_of(lane: Lane) -> list[int]:
    """Return the slots that the frames sent so far name, cancellations left out."""
    return [wire.REQUEST.unpack_from(frame)[3] for frame in lane.transport.writes if frame[4] == wire.PREDICT]


async def test_many_rows_travel_in_a_slot_and_their_answer_too(lane: Lane) -> None:
    """The frame is a header that names the slot; who reads the answer has a copy, and the slot is free again."""
    number, future = lane.predict(MANY)
    (frame,) = lane.transport.writes
    assert len(frame) == wire.REQUEST.size
    (slot,) = slots_of(lane)
    assert np.array_equal(lane.arena.at(slot, MANY.shape), MANY)
    assert len(lane.slots.free) == SLOTS - 1
    lane.arena.at(slot, (4000,))[:] = np.arange(4000)
    deliver(lane.channel, report(wire.SHARED, number, slot, 4000))
    assert len(lane.slots.free) == SLOTS
    lane.arena.at(slot, (4000,))[:] = 0
    values, seconds = await future
    assert np.array_equal(values, np.arange(4000))
    assert seconds == 0.5
    assert values.flags.writeable
    assert lane.observed == [lane.channel.last_latency]


@pytest.mark.parametrize("count", [SHARED_FROM // 24 - 1, SHARED_FROM // 24 + 1])
async def test_few_rows_travel_in_the_frame(lane: Lane, count: int) -> None:
    """Below the threshold the socket is cheaper."""
    lane.predict(MANY[:count])
    assert (slots_of(lane) != [0]) is (count * 24 >= SHARED_FROM)


async def test_rows_for_which_no_slot_is_free_travel_in_the_frame(lane: Lane) -> None:
    """More large calls than slots wait for nothing, and for a row that is larger than a slot there is none."""
    for _ in range(SLOTS + 1):
        lane.predict(MANY)
    await settle(2)
    lane.predict(np.zeros((1, SLOT_BYTES // 4 + 1), np.float32))
    await settle(2)
    stream, slots = b"".join(lane.transport.writes), []
    while stream:
        size, _, _, slot, *_ = wire.REQUEST.unpack_from(stream)
        slots.append(slot)
        assert size == 0 or slot == 0
        stream = stream[wire.REQUEST.size + size :]
    assert sorted(slots) == [0, 0, *range(1, SLOTS + 1)]


async def test_a_slot_of_a_cancelled_call_is_the_workers_until_it_says_so(lane: Lane) -> None:
    """Its worker may be reading it: what comes next must not be written over it."""
    for kind in (wire.SKIPPED, wire.SHARED):
        number, _ = lane.predict(MANY)
        await settle(2)
        slot = wire.REQUEST.unpack_from(lane.transport.writes[-1])[3]
        lane.channel.cancel(number)
        await settle(2)
        assert slot not in lane.slots.free
        deliver(lane.channel, report(kind, number, slot, 4000))
        assert len(lane.slots.free) == SLOTS


async def test_a_slot_of_an_expired_call_leaves_it_to_its_timer(lane: Lane) -> None:
    """The worker's clock may be ahead of the caller's timer, which alone says that the call has timed out."""
    number, future = lane.predict(MANY)
    deliver(lane.channel, report(wire.SKIPPED, number, slots_of(lane)[0]))
    assert len(lane.slots.free) == SLOTS
    assert not future.done()
    assert number in lane.channel.pending


async def test_a_slot_comes_back_with_an_answer_that_did_not_fit_and_with_a_refusal(lane: Lane) -> None:
    """Whatever answers the call carries the slot back."""
    (first, wide), (second, refused) = lane.predict(MANY), lane.predict(MANY)
    await settle(2)
    one, two = (slot for slot in range(1, SLOTS + 1) if slot not in lane.slots.free)
    values = np.ones((4000, 7), np.float32)
    deliver(lane.channel, report(wire.RESULT, first, one, 4000, 7, payload=values.tobytes()))
    deliver(lane.channel, report(wire.ERROR, second, two, payload=b"no"))
    assert np.array_equal((await wide)[0], values)
    with pytest.raises(InvalidInputError, match="no"):
        await refused
    assert len(lane.slots.free) == SLOTS


async def test_rows_that_cannot_be_written_take_no_slot(lane: Lane) -> None:
    """Nothing was sent, so nothing will be reported."""

    def fail(_: object) -> None:
        raise MemoryError

    with pytest.raises(MemoryError):
        lane.channel.predict_written(lane.queue, (4000, 6), fail, 0, 0.0)
    assert len(lane.slots.free) == SLOTS
    assert not lane.channel.pending
    assert lane.transport.writes == []


async def test_slices_in_a_row_are_counted(lane: Lane) -> None:
    """Anything else that is sent between two of them ends the row."""
    for _ in range(3):
        lane.predict(MANY)
    assert lane.channel.slices_in_a_row == 3
    lane.predict()
    lane.predict(MANY)
    assert lane.channel.slices_in_a_row == 0
    lane.predict(MANY)
    assert lane.channel.slices_in_a_row == 1


def test_slots_are_lent_no_more_when_the_memory_has_gone() -> None:
    """What is sent to a worker that has ended is lost, but nobody writes where nothing is."""
    slots, _ = both_ends()
    kept = slots.at(slots.take((1, 6)), (1, 6))
    slots.close()
    slots.close()
    kept[:] = 1  # unmapped only when this goes
    assert slots.take((1, 6)) == 0

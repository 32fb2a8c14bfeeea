"""One timer for all deadlines of a lane: each is kept, and none is kept that was forgotten."""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import TYPE_CHECKING, Any

import pytest

from modelcache.pool.deadlines import Deadlines

if TYPE_CHECKING:
    from collections.abc import Callable


class Clock:
    """A loop's ``call_later`` and the time, both moved by the test alone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self.timers: list[Timer] = []
        monkeypatch.setattr("modelcache.pool.deadlines.monotonic", lambda: self.now)
        monkeypatch.setattr(asyncio.get_running_loop(), "call_later", self._call_later)

    def _call_later(self, delay: float, callback: Callable[[], None]) -> Any:
        timer = Timer(self.now + delay, callback)
        self.timers.append(timer)
        return timer

    @property
    def running(self) -> list[Timer]:
        return [timer for timer in self.timers if not timer.over]

    def advance_to(self, now: float) -> None:
        self.now = now
        while due := [timer for timer in self.running if timer.due <= now]:
            due[0].over = True
            due[0].callback()


class Timer:
    def __init__(self, due: float, callback: Callable[[], None]) -> None:
        self.due = due
        self.callback = callback
        self.over = False

    def cancel(self) -> None:
        self.over = True


@pytest.fixture
async def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


async def test_each_deadline_is_kept_by_one_timer(clock: Clock) -> None:
    """Whatever their order, each expires when its time comes, and no more than one timer runs."""
    deadlines, expired = Deadlines(), list[int]()
    for number, due in enumerate([1060.0, 1003.0, 1001.0, 1002.0, 1001.0]):
        deadlines.note(number, due, lambda number=number: expired.append(number))  # type: ignore[misc]
        assert len(clock.running) == 1
    for now, so_far in [(1000.9, []), (1001.0, [2, 4]), (1002.5, [2, 4, 3]), (1059.0, [2, 4, 3, 1])]:
        clock.advance_to(now)
        assert expired == so_far
    clock.advance_to(1060.0)
    assert expired == [2, 4, 3, 1, 0]
    assert not clock.running


async def test_calls_that_are_answered_in_time_set_one_timer(clock: Clock) -> None:
    """A thousand of them, each with the same patience, set as many as there are stretches of that length."""
    deadlines, expired = Deadlines(), list[int]()
    for number in range(1000):
        deadlines.note(number, clock.now + 60, lambda: expired.append(0))
        deadlines.forget(number)
        clock.advance_to(clock.now + 0.1)
    assert not expired
    assert len(clock.timers) == 2


async def test_a_call_made_by_one_that_expires_has_its_own_deadline(clock: Clock) -> None:
    """Also if that passes before those that were noted already."""
    deadlines, expired = Deadlines(), list[str]()

    def try_again() -> None:
        expired.append("first")
        deadlines.note(3, clock.now + 1, lambda: expired.append("again"))

    deadlines.note(1, 1001.0, try_again)
    deadlines.note(2, 1005.0, lambda: expired.append("second"))
    clock.advance_to(1001.0)
    clock.advance_to(1002.0)
    assert expired == ["first", "again"]
    clock.advance_to(1005.0)
    assert expired == ["first", "again", "second"]


async def test_one_that_fails_to_expire_takes_no_other_with_it(clock: Clock) -> None:
    """Those that are due with it expire at once, and those that are due later have their timer."""
    deadlines, expired = Deadlines(), list[int]()

    def fail() -> None:
        raise ZeroDivisionError

    deadlines.note(1, 1001.0, fail)
    deadlines.note(2, 1001.0, lambda: expired.append(2))
    deadlines.note(3, 1005.0, lambda: expired.append(3))
    with pytest.raises(ZeroDivisionError):
        clock.advance_to(1001.0)
    clock.advance_to(1001.0)
    assert expired == [2]
    clock.advance_to(1005.0)
    assert expired == [2, 3]


async def test_one_that_expires_may_end_the_others(clock: Clock) -> None:
    """What is forgotten in the same moment does not expire, and a lane that has ended keeps no timer."""
    deadlines, expired = Deadlines(), list[int]()
    deadlines.note(1, 1001.0, lambda: deadlines.forget(2))
    deadlines.note(2, 1001.0, lambda: expired.append(2))
    deadlines.note(3, 1002.0, deadlines.clear)
    deadlines.note(4, 1002.0, lambda: expired.append(4))
    clock.advance_to(1002.0)
    assert not expired
    assert not clock.running


async def test_a_lane_that_has_ended_keeps_no_timer(clock: Clock) -> None:
    """Nothing refers to it any more; it may be used again."""
    deadlines, expired = Deadlines(), list[int]()
    deadlines.note(1, 1001.0, lambda: expired.append(1))
    deadlines.clear()
    assert not clock.running
    clock.advance_to(1010.0)
    deadlines.note(2, 1011.0, lambda: expired.append(2))
    clock.advance_to(1011.0)
    assert expired == [2]


async def test_by_the_loops_own_clock() -> None:
    """What has passed already expires in the next turn but one."""
    deadlines, expired = Deadlines(), asyncio.Event()
    deadlines.note(1, monotonic() - 1, expired.set)
    await asyncio.wait_for(expired.wait(), 5)

"""A worker between two calls: asleep, or awake for a moment if the next is likely to come at once."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import pytest

from modelcache.testing import FakeClock
from modelcache.worker import waiting
from modelcache.worker.waiting import Arrival

if TYPE_CHECKING:
    from collections.abc import Iterator

SHORT, LONG = waiting._AWAKE / 2, 2 * waiting._AWAKE


class Worker:
    """A worker that waits, by a clock of its own; requests come so many seconds later, or have come already."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ours, self.theirs = socket.socketpair()
        self.clock = FakeClock()
        self.arrival = Arrival(self.theirs)
        self.slept = 0
        self.was_to_sleep = False
        """At the last system call, whether there was something already or not."""
        self.look = waiting._AWAKE / 10
        """Seconds that pass with each look."""
        self._due: float | None = None
        self._poll = self.arrival._poll.poll
        self.arrival._poll = self  # type: ignore[assignment]
        monkeypatch.setattr(waiting, "monotonic", self.clock)
        monkeypatch.setattr(waiting, "_give_way", lambda: self._let_pass(self.look))

    def _let_pass(self, seconds: float) -> None:
        self.clock.advance(seconds)
        if self._due is not None and self.clock() >= self._due:
            self._due = None
            self.ours.send(b"x")

    def poll(self, timeout: int | None = None) -> list[tuple[int, int]]:
        """Stand in for the system call: sleep takes until the request is there."""
        self.was_to_sleep = timeout is None
        if timeout is None and self._due is not None:
            self.slept += 1
            self._let_pass(self._due - self.clock())
        return self._poll(0)

    def wait(self, seconds: float, *, awake: bool = True) -> int:
        """Wait for a request that comes after ``seconds``, and return how often the worker slept."""
        self._due, self.slept = self.clock() + seconds, 0
        self.arrival.wait(awake=awake)
        assert self.theirs.recv(9) == b"x"
        return self.slept


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[Worker]:
    found = Worker(monkeypatch)
    with found.ours, found.theirs:
        yield found


def test_it_stays_awake_after_a_short_wait(worker: Worker) -> None:
    """A lone caller asks again at once: nobody has to be woken up."""
    assert worker.wait(SHORT) == 1
    assert worker.wait(SHORT) == worker.wait(SHORT) == 0


def test_it_sleeps_after_a_long_wait(worker: Worker) -> None:
    """Where calls are rare no time is spent on looking for them."""
    worker.wait(LONG)
    assert worker.wait(SHORT) == 1


def test_it_does_not_stay_awake_for_long(worker: Worker) -> None:
    """A caller who does not come back is waited for asleep, and what comes after him, too."""
    worker.wait(SHORT)
    assert worker.wait(LONG) == 1
    assert worker.wait(SHORT) == 1
    assert worker.wait(SHORT) == 0


def test_it_sleeps_unless_it_is_asked_not_to(worker: Worker) -> None:
    """Where several call, or the processors' time is limited, others are to have it."""
    worker.wait(SHORT)
    assert worker.wait(SHORT, awake=False) == 1


@pytest.mark.parametrize("lost", [waiting._LOST * 1.01, waiting._LOST * 0.99])
def test_it_sleeps_for_a_second_where_others_compute(worker: Worker, lost: float) -> None:
    """A processor that it offers to them is gone for a slice of the scheduler; who sleeps is woken up in time."""
    worker.wait(SHORT)
    worker.look = lost
    assert worker.wait(SHORT) == 0  # it has come meanwhile
    worker.look = waiting._AWAKE / 10
    assert worker.wait(SHORT) == 1  # which was no short wait
    assert worker.wait(SHORT) == (lost > waiting._LOST)
    worker.clock.advance(waiting._ASLEEP)
    assert worker.wait(SHORT) == 0


def test_a_closed_socket_is_an_arrival(worker: Worker) -> None:
    """The parent has gone: the worker finds out awake as it does asleep."""
    worker.wait(SHORT)
    worker.ours.close()
    worker.arrival.wait(awake=True)
    assert not worker.was_to_sleep
    assert worker.theirs.recv(9) == b""

"""Slices that take about as long as they should, and calls that take no multiple of their time for being cut."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from modelcache.pacing import Pace

TARGET = 0.0004
MOST = 20_000


class Model:
    """A prediction takes ``fixed`` seconds and ``row`` seconds for each of its rows, and now and then ``late`` more."""

    def __init__(self, fixed: float, row: float, *, late: float = 0.0) -> None:
        self.fixed, self.row, self.late = fixed, row, late
        self.random = Random(0)
        self.pace = Pace()

    def seconds(self, rows: int) -> float:
        return self.fixed + self.row * rows

    def call(self, rows: int) -> list[float]:
        """Return the seconds of each slice of a call."""
        taken = []
        while rows:
            size = min(rows, self.pace.rows_within(TARGET, MOST))
            late = self.late if self.random.random() < 0.05 else 0.0
            taken.append(self.seconds(size) + late)
            self.pace.note(size, taken[-1])
            rows -= size
        return taken


@settings(deadline=None)
@given(st.floats(0, 0.01), st.floats(1e-7, 0.01), st.integers(2, 3000))
@example(fixed=1.1e-3, row=9e-6, rows=3000)  # ten models of 500 trees, each asked after the others
@example(fixed=TARGET, row=1e-7, rows=3000)
@example(fixed=7.36e-4, row=1.5e-7, rows=2619)
@example(fixed=3.88e-4, row=3.2e-7, rows=1362)
@example(fixed=3.53e-4, row=8.4e-6, rows=166)
@example(fixed=9.84e-3, row=1.35e-7, rows=2900)
@example(fixed=0.0, row=5e-3, rows=200)  # contributions
def test_a_call_in_slices(fixed: float, row: float, rows: int) -> None:
    """Whatever a prediction costs beside its rows: it is paid no more often than the rows are worth."""
    model = Model(fixed, row)
    model.call(500)
    taken = model.call(rows)
    assert sum(taken) <= 5 * model.seconds(rows) + 12 * TARGET
    assert max(taken) <= 2 * TARGET + 8 * fixed + 2 * row


@pytest.mark.parametrize(("fixed", "row"), [(0.0, 2e-7), (5e-5, 2e-7), (2e-5, 1e-5)])
def test_slices_take_what_they_should(fixed: float, row: float) -> None:
    """Where rows are what costs, their number follows from the time there is for them, but for one try in sixteen."""
    model = Model(fixed, row)
    model.call(100_000)
    *settled, _ = model.call(100_000)
    as_they_should = [seconds for seconds in settled if abs(seconds / TARGET - 1) < 0.05]
    assert len(as_they_should) > 0.9 * len(settled)
    assert max(settled) < 2 * TARGET


def test_the_price_of_one_row_is_not_that_of_many() -> None:
    """Were it taken for that, slices would be of one row, and a call of 64 take 70 ms instead of 2."""
    model = Model(1.1e-3, 9e-6)
    for _ in range(20):
        model.pace.note(1, model.seconds(1))
    model.call(500)
    assert sum(model.call(64)) <= 2 * model.seconds(64)


def test_interruptions_pass() -> None:
    """One slice in twenty takes 4 ms longer, since somebody else had the processor: the others stay as they were."""
    model = Model(5e-5, 1e-6, late=0.004)
    taken = sorted(model.call(100_000))
    assert TARGET / 2 < taken[len(taken) // 2] < 1.5 * TARGET
    assert len(taken) < 3 * model.seconds(100_000) / TARGET


def test_one_that_was_interrupted_is_not_believed() -> None:
    """What has taken longer than expected is expected to take a little longer; what has taken less, so much less."""
    pace = Pace()
    pace.note(64, 1e-3)
    pace.note(64, 20e-3)
    assert pace.seconds_for(64) == pytest.approx(1.25e-3)
    pace.note(64, 0.5e-3)
    assert pace.seconds_for(64) == 0.5e-3


def test_rows_are_never_taken_to_cost_nothing() -> None:
    """Two measurements may be alike by accident: a call of a thousand times the rows is cut all the same."""
    pace = Pace()
    pace.note(1, 5e-3)
    pace.note(2, 5e-3)
    assert pace.seconds_for(2000) > 1
    assert pace.is_divisible(2000)


@pytest.mark.parametrize("factor", [20, 1 / 20])
def test_times_change(factor: float) -> None:
    """A machine that has become slower, or faster, is noticed within a few hundred slices."""
    model = Model(5e-5, 4e-6)
    model.call(20_000)
    model.fixed, model.row = factor * model.fixed, factor * model.row
    model.call(20_000)
    again = model.call(20_000)
    assert sum(again) <= 3 * model.seconds(20_000)
    assert max(again) <= 2 * TARGET + 8 * model.fixed


def test_a_call_that_is_not_worth_cutting() -> None:
    """Half of its rows would take nearly as long; it is sent whole, and predicted together with others."""
    pace = Pace()
    pace.note(32, 1.4e-3)
    pace.note(64, 1.7e-3)
    assert not pace.is_divisible(64)
    assert pace.is_divisible(6400)
    assert Pace().is_divisible(64)

"""The memory of failed loads, and the book of sizes."""

from __future__ import annotations

from statistics import mean, stdev

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelcache.cache.failures import FailureMemory
from modelcache.cache.sizes import SizeBook
from modelcache.errors import ModelCacheError, ModelNotFoundError, StoreError
from modelcache.history import History, Took
from modelcache.testing.fakes import FakeClock

LONGEST = 30.0
FIXED = 32 << 10
FEW = 8

# F8


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def refused_for(memory: FailureMemory, clock: FakeClock, key: str = "a") -> float:
    """Let the refusal of ``key`` pass, and return how long it took."""
    error = memory.recall(key)
    assert error is not None
    seconds = error.retry_after
    assert seconds is not None
    clock.advance(seconds)
    assert memory.recall(key) is None
    return seconds


def test_a_failure_is_remembered_for_a_while(clock: FakeClock) -> None:
    """F8: the same error until the time is over, with the seconds that are left of it; other names are not touched."""
    memory = FailureMemory(1.0, clock=clock, seed=1)
    failure = StoreError("down")
    memory.remember("a", failure)
    assert memory.recall("a") is failure
    before = failure.retry_after
    clock.advance(0.5)
    assert memory.recall("a") is failure
    assert before is not None
    assert failure.retry_after == pytest.approx(before - 0.5)
    clock.advance(0.5)
    assert memory.recall("a") is None
    assert memory.recall("b") is None


@pytest.mark.parametrize("seed", range(20))
def test_each_failure_in_a_row_is_remembered_twice_as_long(clock: FakeClock, seed: int) -> None:
    """F8: with a quarter of jitter downwards, and never longer than 30 seconds."""
    memory = FailureMemory(1.0, clock=clock, seed=seed)
    for expected in (1.0, 2.0, 4.0, 8.0, 16.0, LONGEST, LONGEST):
        memory.remember("a", StoreError("down"))
        assert 0.75 * expected <= refused_for(memory, clock) <= expected


def test_the_time_is_not_the_same_for_all(clock: FakeClock) -> None:
    """F8: jitter spreads the retries of names that failed together."""
    memory = FailureMemory(1.0, clock=clock)
    names = [f"m{number}" for number in range(20)]
    for name in names:
        memory.remember(name, StoreError("down"))
    waits = {error.retry_after for name in names if (error := memory.recall(name)) is not None}
    assert len(waits) == len(names)


def test_a_success_ends_the_row(clock: FakeClock) -> None:
    """F8: a name that was forgotten is tried at once, and its next failure is a first one."""
    memory = FailureMemory(1.0, clock=clock, seed=1)
    for _ in range(3):
        memory.remember("a", StoreError("down"))
    memory.forget("a")
    memory.forget("never heard of")
    assert memory.recall("a") is None
    memory.remember("a", StoreError("down"))
    assert refused_for(memory, clock) <= 1.0


def test_a_missing_model_is_looked_for_again_soon(clock: FakeClock) -> None:
    """F8: without doubling each failure is a first one, and ends the row of those before it."""
    memory = FailureMemory(1.0, clock=clock, seed=1)
    memory.remember("a", StoreError("down"))
    memory.remember("a", StoreError("down"))
    for _ in range(3):
        memory.remember("a", ModelNotFoundError("not there"), doubling=False)
        assert refused_for(memory, clock) <= 1.0


def test_zero_remembers_nothing(clock: FakeClock) -> None:
    """F8: ``failure_ttl=0`` turns it off."""
    memory = FailureMemory(0.0, clock=clock)
    memory.remember("a", StoreError("down"))
    assert memory.recall("a") is None


def test_a_model_may_fail_for_days(clock: FakeClock) -> None:
    """F8: two to the power of many failures is no float; the longest time stays the longest."""
    memory = FailureMemory(1.0, clock=clock, seed=1)
    for _ in range(5000):
        memory.remember("a", StoreError("down"))
    assert 0.75 * LONGEST <= refused_for(memory, clock) <= LONGEST


def test_the_memory_is_bounded(clock: FakeClock) -> None:
    """F8: names that callers invent do not fill the memory; the oldest failures are forgotten."""
    memory = FailureMemory(1.0, clock=clock)
    for number in range(1_001):
        memory.remember(str(number), StoreError("down"))
    assert memory.recall("0") is None
    assert memory.recall("1") is not None


# L2: an estimate is an upper bound


def learned(ratios: list[float], suffix: str = ".ubj", unpacked: int = 1_000_000) -> SizeBook:
    """A book that has seen loads which took ``ratios`` times their unpacked bytes, and the fixed bytes."""
    book = SizeBook()
    for ratio in ratios:
        book.learn(suffix, unpacked=unpacked, measured=int(unpacked * ratio) + FIXED)
    return book


def test_before_anything_is_learned_the_ratio_is_that_of_common_models() -> None:
    """L2: 1.7 times the unpacked bytes, and 32 KiB; a few loads are no reason to think otherwise."""
    assert SizeBook().bounds(1_000_000, ".ubj").most == 1_700_000 + FIXED
    assert learned([1.2] * (FEW - 1)).bounds(1_000_000, ".ubj").most == 1_700_000 + FIXED
    assert learned([1.2] * FEW).bounds(1_000_000, ".ubj").most < 1_700_000


@given(st.lists(st.floats(1.0, 4.0), min_size=FEW, max_size=50))
@settings(derandomize=True, deadline=None)
def test_the_ratio_is_the_mean_and_two_deviations(ratios: list[float]) -> None:
    """L2: as the statistics module has it, in one pass."""
    expected = max(1.0, mean(ratios) + 2 * stdev(ratios))
    assert learned(ratios).bounds(1_000_000, ".ubj").most == pytest.approx(expected * 1_000_000 + FIXED, abs=10)


def test_the_ratio_is_never_below_one() -> None:
    """L2: models that took next to nothing do not make the next reservation meaningless."""
    assert learned([0.1] * 20).bounds(1_000_000, ".ubj").most == 1_000_000 + FIXED


def test_a_model_smaller_than_the_fixed_bytes_counts_as_nothing() -> None:
    """L2: not as less than nothing, which would lower the ratio of others."""
    book = learned([1.5] * FEW)
    for number in range(FEW):
        book.learn(".ubj", unpacked=number, measured=50)
    ratios = [1.5] * FEW + [0.0] * FEW
    expected = (mean(ratios) + 2 * stdev(ratios)) * 1_000_000 + FIXED
    assert book.bounds(1_000_000, ".ubj").most == pytest.approx(expected, abs=1)


def test_formats_are_learned_apart() -> None:
    """L2: JSON takes another ratio than UBJSON."""
    book = learned([2.5] * FEW, ".json")
    assert book.bounds(1_000_000, ".json").most == pytest.approx(2_500_000 + FIXED, abs=1)
    assert book.bounds(1_000_000, ".ubj").most == 1_700_000 + FIXED


def test_what_a_version_took_is_known() -> None:
    """L2: of that name and that version, and of no other; the last load counts."""
    history = History()
    assert history.took("a", "1") is None
    history.measured("a", "1", Took(140, 100))
    history.measured("a", "1", Took(150, 100))
    assert history.took("a", "1") == Took(size=150, unpacked=100)
    assert history.took("a", "2") is None
    assert history.took("b", "1") is None


def test_the_past_of_a_resident_model_is_forgotten() -> None:
    """What is in its entry is not remembered a second time."""
    history = History()
    history.measured("a", "1", Took(140, 100))
    history.failed("a", ModelCacheError("in vain"), now=1.0)
    history.settled("a")
    assert history.of("a") is None


def test_names_that_have_long_been_cold_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory of names is bounded: who left or failed longest ago goes first."""
    monkeypatch.setattr("modelcache.history._NAMES_REMEMBERED", 2)
    history = History()
    for name in ("a", "b", "a", "c"):
        history.measured(name, "1", Took(140, 100))
    assert [name for name in "abc" if history.of(name)] == ["a", "c"]


@given(st.lists(st.floats(0.5, 4.0), max_size=20), st.integers(1, 10**12))
@settings(derandomize=True, deadline=None)
def test_bounds_contain_each_other(ratios: list[float], unpacked: int) -> None:
    """L2, L6: the lower bound is below the upper one, and a reservation is enough for what it was made for."""
    book = learned(ratios)
    upper = book.bounds(unpacked, ".ubj").most
    assert book.bounds(unpacked, ".ubj").least <= unpacked <= upper - FIXED
    within = book.unpacked_within(upper, ".ubj")
    assert within >= unpacked
    assert book.bounds(within, ".ubj").most <= upper + 1


def test_a_small_reservation_is_enough_for_something() -> None:
    """L6: an allowance of nothing would ask the worker to report, not to load."""
    assert SizeBook().unpacked_within(10, ".ubj") == 1

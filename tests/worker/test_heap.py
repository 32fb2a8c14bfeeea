"""Bytes of models: what one takes, whatever else goes on in its worker, that it is bounded, and that it goes back."""

from __future__ import annotations

import ctypes
import hashlib
import json
import resource
import subprocess
import sys
from operator import methodcaller
from os import sched_yield
from pathlib import Path
from statistics import median
from threading import Event, Thread
from time import monotonic
from typing import TYPE_CHECKING, Self, cast

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

import odd
import zoo
from lone_worker import PATIENCE, LoneWorker, ask
from modelcache.pool import wire
from modelcache.worker.bound import _PER_BYTE, growing_by
from modelcache.worker.heap import Heap, Scales, Slack

if TYPE_CHECKING:
    from collections.abc import Iterator

MODEL = zoo.model(trees=60)
LOADS = 25

linux = pytest.mark.skipif(sys.platform != "linux", reason="only glibc tells what its arenas hold")


@pytest.fixture
def worker() -> Iterator[LoneWorker]:
    made = LoneWorker()
    yield made
    made.close()


def in_use(worker: LoneWorker) -> int:
    worker.command(wire.MEASURE, 0)
    return worker.report().number


def resident(worker: LoneWorker) -> int:
    return int(psutil.Process(worker.process.pid).memory_info().rss)


def load_and_free(worker: LoneWorker, data: bytes, times: int) -> list[int]:
    """Return the sizes that one model is said to have, load by load."""
    sizes = []
    for number in range(100, 100 + times):
        sizes.append(worker.load(number, data).number)
        worker.command(wire.UNLOAD, number)
        assert worker.report().kind == wire.UNLOADED
    return sizes


class Traffic:
    """Keeps the worker's main thread predicting, with batches of all sizes."""

    def __init__(self, worker: LoneWorker, model: int) -> None:
        self._worker = worker
        self._model = model
        self._stopped = Event()
        self.answers = 0
        self._thread = Thread(target=self._flow)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _flow(self) -> None:
        rows, count = zoo.rows(3000), 1
        while not self._stopped.is_set():
            output = wire.OUTPUTS[self.answers % 4]
            self._worker.send(*(ask(call, self._model, rows[:count], output=output) for call in range(3)))
            self.answers += len(self._worker.replies(3))
            count = count * 5 % 2999


@linux
def test_a_model_measures_the_same_each_time(worker: LoneWorker) -> None:
    """Rule L1 counts measured bytes: they are those of the model, load after load."""
    sizes = load_and_free(worker, MODEL.ubj, LOADS)
    assert max(sizes) - min(sizes) < 0.1 * median(sizes)
    assert len(MODEL.ubj) < median(sizes) < 2 * len(MODEL.ubj)


@linux
def test_sizes_do_not_scatter_while_the_other_thread_predicts(worker: LoneWorker) -> None:
    """Rule L1: what predictions allocate meanwhile is not charged to the model that is being loaded."""
    quiet = median(load_and_free(worker, MODEL.ubj, 5))
    worker.load(1, zoo.model("multiclass", trees=30).ubj)
    with Traffic(worker, 1) as traffic:
        sizes = load_and_free(worker, MODEL.ubj, LOADS)
        assert traffic.answers > 0
    assert median(sizes) == pytest.approx(quiet, rel=0.05)
    near = [size for size in sizes if abs(size - quiet) < 0.15 * quiet]
    assert len(near) >= 0.9 * LOADS, sizes


@linux
def test_sizes_add_up(worker: LoneWorker) -> None:
    """Rule L1: the sum of what was measured is what the heap has grown by."""
    before = in_use(worker)
    sizes = [worker.load(number, zoo.model(trees=20 + number).ubj).number for number in range(12)]
    assert in_use(worker) - before == pytest.approx(sum(sizes), rel=0.05)


@linux
def test_small_models_are_measured_too(worker: LoneWorker) -> None:
    """A model of 3 kB is no rounding error when there are thousands: its sum is right."""
    before = in_use(worker)
    sizes = [worker.load(number, zoo.model(trees=1, seed=number % 7).ubj).number for number in range(200)]
    assert in_use(worker) - before == pytest.approx(sum(sizes), rel=0.1)


@linux
def test_loads_and_frees_stay_flat(worker: LoneWorker) -> None:
    """Nothing is left of a model that was freed, neither on the heap nor in the process."""
    load_and_free(worker, MODEL.ubj, 20)
    heap, process = in_use(worker), resident(worker)
    sizes = load_and_free(worker, MODEL.ubj, 150)
    assert in_use(worker) - heap < median(sizes)
    assert resident(worker) - process < 4 << 20


def niceness(worker: LoneWorker) -> list[int]:
    """Return that of each thread."""
    tasks = Path(f"/proc/{worker.process.pid}/task").iterdir()
    return [int((task / "stat").read_text().rpartition(")")[2].split()[16]) for task in tasks]


@linux
def test_names_of_columns_are_not_left_behind(worker: LoneWorker) -> None:
    """XGBoost keeps them for the thread that loads, whichever frees the model: 40 kB of each of these.

    So another thread goes on now and then, with artifacts that are on their way, and with the same patience.
    """
    data, other = zoo.wide(500), MODEL.ubj
    worker.command(wire.BEGIN, 1, 1 << 30)
    worker.command(wire.CHUNK, 1, 0, other[:1000])
    load_and_free(worker, data, 60)
    before = in_use(worker)
    load_and_free(worker, data, 240)
    assert in_use(worker) - before < 2 << 20
    assert sorted(niceness(worker))[-2:] == [0, 5]
    worker.command(wire.CHUNK, 1, 0, other[1000:])
    worker.command(wire.END, 1)
    report = worker.report()
    assert (report.kind, report.model) == (wire.LOADED, 1)
    assert report.number == pytest.approx(worker.load(2, other).number, rel=0.1)


@linux
def test_freed_bytes_go_back_to_the_system(worker: LoneWorker) -> None:
    """Freeing alone leaves a process as large as it was: the worker trims its heap."""
    load_and_free(worker, MODEL.ubj, 5)
    before = resident(worker)
    large = zoo.model(trees=400).ubj
    sizes = [worker.load(number, large).number for number in range(60)]
    grown = resident(worker) - before
    assert grown > 0.8 * sum(sizes)
    for number in range(60):
        worker.command(wire.UNLOAD, number)
        worker.report()
    until = monotonic() + PATIENCE  # what is not much is returned when no order has come for a while
    while resident(worker) - before >= 0.25 * grown and monotonic() < until:
        sched_yield()
    assert resident(worker) - before < 0.25 * grown


class Books:
    """A heap of which is known what it holds."""

    exact = True

    def __init__(self) -> None:
        self.held = 10_000
        self.trims = 0

    def in_use(self) -> int:
        return self.held

    def trim(self) -> None:
        self.trims += 1


@pytest.mark.parametrize(("count", "presses"), [(60, False), (80, True)])
def test_much_goes_back_at_once_and_little_when_nothing_is_to_be_done(count: int, presses: bool) -> None:
    """Of half a megabyte each, 60 models are less than what a worker may keep for those that come next."""
    heap = Books()
    slack = Slack(cast("Heap", heap))
    for _ in range(count):
        slack.loaded(1 << 19)
    assert not slack.is_due
    for _ in range(count):
        slack.unloaded(1 << 19)
    assert slack.is_due
    assert slack.is_pressing == presses
    slack.give_back()
    assert (heap.trims, slack.is_due, slack.is_pressing) == (1, False, False)


BOOSTER = 3000


class Weighing:
    """What a loader does around its scales, with a heap of which is known what it holds."""

    def __init__(self) -> None:
        self.heap = Books()
        self.scales = Scales(cast("Heap", self.heap))
        self.has_booster = False

    def idle(self) -> None:
        self.scales.come_to_rest()
        self.scales.set_aside(self._make)

    def free(self, size: int) -> None:
        self.heap.held -= min(size, self.heap.held - 5000)
        self.scales.disturb()

    def weigh(self, size: int, beside: int, *, alone: bool = True) -> None:
        self._begin(beside, alone=alone)
        self.heap.held += size
        assert self.scales.end() == size + BOOSTER
        self.heap.held -= beside
        self._end()

    def fail(self, beside: int) -> None:
        self._begin(beside, alone=True)
        self.heap.held -= BOOSTER + beside

    def pass_over(self, size: int) -> None:
        self.scales.pass_over()
        self._take_booster()
        self.heap.held += size
        self._end()

    def _begin(self, beside: int, *, alone: bool) -> None:
        self.heap.held += beside
        self.scales.begin(beside if alone else None)
        self._take_booster()

    def _take_booster(self) -> None:
        self.heap.held += 0 if self.has_booster else BOOSTER
        self.has_booster = False

    def _end(self) -> None:
        if self.scales.sets_aside:
            self.scales.set_aside(self._make)

    def _make(self) -> bool:
        if self.has_booster:
            return False
        self.has_booster = True
        self.heap.held += BOOSTER
        return True


SIZES, BESIDE = st.integers(1, 10_000), st.integers(0, 500)


@given(
    st.lists(
        st.one_of(
            st.builds(methodcaller, st.just("weigh"), SIZES, BESIDE, alone=st.booleans()),
            st.builds(methodcaller, st.sampled_from(["free", "pass_over"]), SIZES),
            st.builds(methodcaller, st.just("fail"), BESIDE),
            st.builds(methodcaller, st.just("idle")),
        )
    )
)
def test_each_model_is_charged_for_its_own_bytes(steps: list[methodcaller]) -> None:
    """L1: whatever was made ahead for it, freed, refused, or not weighed before."""
    weighing = Weighing()
    for step in steps:
        step(weighing)


def open_copy(worker: LoneWorker, number: int, path: Path, known: int) -> int:
    """Load a local copy, and return the bytes that it is said to take."""
    copy = wire.COPY.pack(hashlib.sha256(path.read_bytes()).digest(), known)
    worker.command(wire.OPEN, number, 1 << 30, copy + bytes(path))
    worker.command(wire.END, number)
    report = worker.report()
    assert (report.kind, report.model) == (wire.LOADED, number)
    return report.number


@linux
def test_a_copy_that_was_weighed_before_is_not_weighed_again(worker: LoneWorker, tmp_path: Path) -> None:
    """Its bytes are those of then, which its digest says; and models that come after it are weighed as ever."""
    path = tmp_path / "copy"
    path.write_bytes(MODEL.ubj)
    before = in_use(worker)
    weighed = open_copy(worker, 0, path, 0)
    for number in range(1, 40, 2):
        assert open_copy(worker, number, path, weighed + 7) == weighed + 7
        assert open_copy(worker, number + 1, path, 0) == pytest.approx(weighed, rel=0.05)
    assert in_use(worker) - before == pytest.approx(41 * weighed, rel=0.05)


@linux
@pytest.mark.parametrize(("output", "count", "limit"), [("value", 80_000, 10 << 20), ("leaf", 10_000, 20 << 20)])
def test_answers_take_no_memory_for_good(worker: LoneWorker, output: str, count: int, limit: int) -> None:
    """Rule L1: XGBoost keeps the largest answer of each model, outside the measured bytes, unloaded or not.

    If batches were not predicted in pieces, these 40 models would keep 12 MiB of values, and 76 MiB of leaves. What
    one call takes for a moment is a few MiB, which the worker may return meanwhile, and has to fetch again.
    """
    models, data, rows = range(40), zoo.model(trees=50).ubj, zoo.rows(count)
    for number in models:
        worker.load(number, data)
    worker.values(1, 0, rows, output=output)  # the buffers that all models share
    before = resident(worker)
    for number in models:
        worker.values(1, number, rows, output=output)
    assert resident(worker) - before < limit


ALLOCATOR = """
import ctypes, json, threading
from modelcache.worker.bound import _PER_BYTE, growing_by
from modelcache.worker.heap import Heap

heap, libc, found = Heap(), ctypes.CDLL(None), {}
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]

def take(what, size, count):
    before = heap.in_use()
    taken = [libc.malloc(size) for _ in range(count)]
    found[what] = heap.in_use() - before
    for pointer in taken:
        libc.free(pointer)
    found[what + " freed"] = heap.in_use() - before

def in_thread(*task):
    thread = threading.Thread(target=take, args=task)
    thread.start()
    thread.join()

in_thread("warm up", 1000, 10)
in_thread("thread", 100_000, 50)
take("main", 100_000, 50)
in_thread("mapped", 40 << 20, 1)
print(json.dumps(found))
"""


@linux
def test_only_allocations_of_other_threads_and_mapped_ones_count() -> None:
    """The main thread predicts; what it takes from its arena is none of a model's."""
    said = subprocess.run([sys.executable, "-c", ALLOCATOR], check=True, capture_output=True, text=True).stdout
    found = json.loads(said)
    assert found["thread"] == pytest.approx(5_000_000, rel=0.02)
    assert found["main"] == pytest.approx(0, abs=50_000)
    assert found["mapped"] == pytest.approx(40 << 20, rel=0.02)
    for what in ("thread", "main", "mapped"):
        assert found[f"{what} freed"] == pytest.approx(0, abs=50_000)


def test_other_platforms_have_no_exact_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    """On macOS sizes are estimated, and the worker says so."""
    monkeypatch.setattr(sys, "platform", "darwin")
    heap = Heap()
    heap.trim()
    assert (heap.exact, heap.in_use()) == (False, 0)


def test_other_c_libraries_have_no_exact_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does musl have what glibc has, although both are Linux."""
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    assert not Heap().exact


# The bound on what a load may take


def limits(worker: LoneWorker) -> tuple[int, int]:
    return resource.prlimit(worker.process.pid, resource.RLIMIT_DATA)


def with_parameter(name: str, value: str) -> bytes:
    """Return a model of which one parameter has been changed."""
    document = json.loads(zoo.model().json)
    document["learner"]["learner_model_param"][name] = value
    return json.dumps(document).encode()


def with_count(key: bytes, count: int) -> bytes:
    """Return a model of which one array announces another length."""
    data = zoo.model().ubj
    at = data.index(b"#L", data.index(key)) + 2
    return data[:at] + count.to_bytes(8, "big") + data[at + 8 :]


@linux
@pytest.mark.parametrize(
    "damaged",
    [
        with_parameter("num_class", "2147483647"),
        with_parameter("num_feature", "2147483647"),
        with_count(b"tree_info", 1 << 28),
        with_count(b"trees", 1 << 27),
    ],
    ids=["classes", "features", "numbers", "trees"],
)
def test_a_damaged_model_that_asks_for_gigabytes_is_refused(worker: LoneWorker, damaged: bytes) -> None:
    """It fails before the machine has paid, by a message that says so, and the worker lives on without the bound."""
    resource.prlimit(worker.process.pid, resource.RLIMIT_AS, (6 << 30, 6 << 30))  # the machine is spared in any case
    before, peak = limits(worker), peak_bytes(worker)
    report = worker.load(1, damaged)
    assert (report.kind, report.facts["kind"]) == (wire.FAILED, "corrupt")
    assert f"asked for more than {report.facts['facts']['limit']:,} bytes of memory" in report.facts["message"]
    assert peak_bytes(worker) - peak < 64 << 20
    assert limits(worker) == before
    assert worker.load(2, zoo.model().ubj).kind == wire.LOADED


def peak_bytes(worker: LoneWorker) -> int:
    status = Path(f"/proc/{worker.process.pid}/status").read_text()
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM"))


@linux
def test_no_sound_model_is_refused(worker: LoneWorker) -> None:
    """Nor does one come near the bound, which is for what nobody has measured yet."""
    for kind in ("regression", "multiclass", "softmax", "linear", "dart", "stopped"):
        model = zoo.model(kind)
        assert [worker.load(1, data).kind for data in (model.json, model.ubj)] == [wire.LOADED] * 2
    large, before = zoo.model(trees=400).json, peak_bytes(worker)
    assert worker.load(2, large).kind == wire.LOADED
    assert peak_bytes(worker) - before < _PER_BYTE * len(large) / 2


@linux
def test_a_model_of_very_many_features_is_not_refused(worker: LoneWorker) -> None:
    """Its bytes tell nothing of them, but XGBoost takes eight for each when it predicts."""
    assert worker.load(1, with_parameter("num_feature", str(1 << 24))).kind == wire.LOADED


@linux
def test_predictions_go_on_beside_a_bounded_load(worker: LoneWorker) -> None:
    """The bound is the process's, and leaves the main thread what answers take."""
    model, large = zoo.model("multiclass", trees=30), zoo.model(trees=400).json
    worker.load(1, model.ubj)
    with Traffic(worker, 1) as traffic:
        load_and_free(worker, large, 5)
    assert traffic.answers > 0


@linux
def test_other_libraries_are_not_bounded() -> None:
    """Nobody knows what a predictor of somebody else needs."""
    worker = LoneWorker(odd.ODD)
    assert worker.load(1, odd.artifact(tell="bound")).facts["feature_names"] == list(map(str, limits(worker)))
    worker.close()


@linux
def test_a_bound_ends_with_its_block() -> None:
    """It is lifted after what it has made fail, too."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with pytest.raises(MemoryError):
        take_two_gigabytes()
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


def take_two_gigabytes() -> None:
    with growing_by(1 << 30):
        bytearray(2 << 30)


@linux
def test_a_bound_that_is_tighter_stays() -> None:
    """A limit that the process was given is not loosened."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with growing_by(1 << 30):
        tight = resource.getrlimit(resource.RLIMIT_DATA)
        with growing_by(1 << 40):
            assert resource.getrlimit(resource.RLIMIT_DATA) == tight
        assert resource.getrlimit(resource.RLIMIT_DATA) == tight
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


@linux
def test_what_a_failed_load_took_goes_back(worker: LoneWorker) -> None:
    """The parser reads all of this before it misses the rest: tens of megabytes for two."""
    worker.load(1, zoo.model().ubj)
    before, peak = resident(worker), peak_bytes(worker)
    assert worker.load(2, b'{"learner":{"x":[' + b"0," * (1 << 20) + b'0]},"version":[3,0,0]}').kind == wire.FAILED
    in_use(worker)  # answered after all that the load leaves to be done
    assert peak_bytes(worker) - peak > 32 << 20
    assert resident(worker) - before < 8 << 20

"""A worker as its parent sees it: frames in, frames out, over two sockets that the test holds itself."""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import signal
import socket
import sys
from pathlib import Path
from threading import Thread
from time import monotonic
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pytest

import odd
import zoo
from lanes import workers_end
from lone_worker import PATIENCE, LoneWorker, ask, bare, read_reply
from modelcache.pool import wire
from modelcache.pool.pool import XGBOOST
from modelcache.testing import FakeClock
from modelcache.worker.arriving import read_copy
from modelcache.worker.models import LoadedModel
from modelcache.worker.predicting import RequestLane

if TYPE_CHECKING:
    from collections.abc import Iterator

HEAVY = {"asyncio", "aiofiles", "anyio", "cachetools", "multiprocessing", "pandas", "scipy", "ssl", "xgboost"}


class Scene:
    """A worker held at a gate by its first call: what is sent meanwhile waits in its socket."""

    def __init__(self, worker: LoneWorker, folder: Path) -> None:
        self.worker = worker
        self._log = folder / "log"
        self._gate = odd.Gate(folder / "gate")
        worker.load(1, odd.artifact(gate=self._gate.path, log=str(self._log)))
        worker.load(2, odd.artifact(log=str(self._log)))
        self.hold()

    def hold(self) -> None:
        """Make the worker wait; this is call 0."""
        self.worker.send(ask(0, 1, [odd.WAIT, 0]))
        self._gate.wait_for_worker()

    def release(self, *frames: bytes) -> None:
        """Send ``frames`` while the worker waits, and let it go on."""
        self.worker.send(*frames)
        self._gate.open()
        held = self.worker.reply()
        assert (held.kind, held.number) == (wire.RESULT, 0)

    def predictions(self) -> list[tuple[str, list[float]]]:
        """Return what was predicted after the gate, prediction by prediction."""
        lines = [json.loads(line) for line in self._log.read_text().splitlines()]
        return [(output, values) for output, values in lines[1:]]


@pytest.fixture(scope="module")
def xgboost_worker() -> Iterator[LoneWorker]:
    worker = LoneWorker()
    yield worker
    worker.close()


@pytest.fixture
def odd_worker() -> Iterator[LoneWorker]:
    worker = LoneWorker(odd.ODD)
    yield worker
    if worker.process.returncode is None:
        worker.close()


@pytest.fixture
def scene(odd_worker: LoneWorker, tmp_path: Path) -> Scene:
    return Scene(odd_worker, tmp_path)


# Batching


def test_calls_that_wait_are_predicted_together_and_answered_apart(scene: Scene) -> None:
    """Natural batching: what has arrived while the worker was busy is one prediction per model."""
    scene.release(*(ask(call, 2, [odd.PREDICT, call]) for call in range(1, 8)))
    replies = scene.worker.replies(7)
    assert {call: reply.values.tolist() for call, reply in replies.items()} == {n: [2.0 * n] for n in range(1, 8)}
    assert scene.predictions() == [("value", [1, 2, 3, 4, 5, 6, 7])]


def test_calls_of_many_rows_get_their_own_rows_back(scene: Scene) -> None:
    """A batch of calls of 1, 3 and 2 rows is cut where the calls end."""
    scene.release(ask(1, 2, [[0, 1]]), ask(2, 2, [[0, 2], [0, 3], [0, 4]]), ask(3, 2, [[0, 5], [0, 6]]))
    replies = scene.worker.replies(3)
    assert [replies[call].values.tolist() for call in (1, 2, 3)] == [[2], [4, 6, 8], [10, 12]]
    assert len(scene.predictions()) == 1


def test_models_and_outputs_never_mix(scene: Scene) -> None:
    """A batch holds calls for one model and one output."""
    scene.release(
        ask(1, 2, [0, 1]), ask(2, 1, [0, 2]), ask(3, 2, [0, 3], output="margin"), ask(4, 2, [0, 4])
    )  # fmt: skip
    scene.worker.replies(4)
    assert scene.predictions() == [("value", [1, 4]), ("value", [2]), ("margin", [3])]


def test_rows_of_different_width_are_not_stacked(scene: Scene) -> None:
    """A frame says how many columns it has, and only equals share a matrix."""
    scene.release(ask(1, 2, [0, 1]), ask(2, 2, [0, 2, 9]), ask(3, 2, [0, 3]))
    replies = scene.worker.replies(3)
    assert [replies[call].values.tolist() for call in (1, 2, 3)] == [[2], [4], [6]]
    assert scene.predictions() == [("value", [1, 3]), ("value", [2])]


class Stepping:
    """A predictor by a clock that only it moves: each row takes ``row_seconds``, each prediction ``seconds`` more."""

    n_features, n_outputs = 2, 1
    feature_names: tuple[str, ...] | None = None

    def __init__(self, clock: FakeClock, log: list[int], seconds: float = 0.0, row_seconds: float = 0.001) -> None:
        self._clock = clock
        self._log = log
        self._seconds = seconds
        self._row_seconds = row_seconds

    @classmethod
    def load(cls, data: memoryview, *, threads: int) -> Self:
        raise NotImplementedError("the test has made it already")

    def predict(self, rows: np.ndarray[Any, Any], output: str) -> np.ndarray[Any, Any]:
        del output
        self._log.append(len(rows))
        self._clock.advance(self._seconds + self._row_seconds * len(rows))
        return rows[:, 1]


class Served:
    """A request lane in a thread, by a clock of its own, with models 1 and 2."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[int] = []
        """How many rows each prediction of model 1 was of."""
        self.clock = FakeClock()
        monkeypatch.setattr("modelcache.worker.predicting.perf_counter", self.clock)
        self.models = {1: LoadedModel(Stepping(self.clock, self.log)), 2: LoadedModel(Stepping(self.clock, []))}

    def order(self, *frames: bytes) -> list[int]:
        """Return the calls in the order in which they are answered if all of them wait when the first is taken."""
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.settimeout(PATIENCE)
            ours.sendall(b"".join(frames))
            lane = Thread(target=RequestLane(theirs, self.models, *workers_end()).run)
            lane.start()
            order = [read_reply(ours).number for _ in frames]
            ours.shutdown(socket.SHUT_WR)
            lane.join()
        return order


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Served:
    return Served(monkeypatch)


def test_a_thousand_calls_delay_those_for_another_model_by_one_stretch(served: Served) -> None:
    """Rules P4, P6: after 5 ms of one model's calls it is another's turn; those of one model come in their order."""
    served.order(ask(0, 1, [0, 0]))  # now it is known that a row takes 1 ms
    noisy = [ask(call, 1, [0, call]) for call in range(1, 1001)]
    order = served.order(*noisy[:990], ask(2000, 2, [0, 0]), ask(2001, 2, [0, 1]), *noisy[990:])
    assert order.index(2000) == 5
    assert order.index(2001) == 6
    assert [call for call in order if call < 2000] == list(range(1, 1001))


def test_what_was_never_predicted_takes_one_block_to_be_known(served: Served) -> None:
    """64 rows are tried before it is known what a row takes, and as many as fit into a stretch from then on."""
    served.order(*(ask(call, 1, [0, call]) for call in range(100)))
    assert served.log[:3] == [64, 5, 5]


def test_a_prediction_with_a_price_of_its_own_grows_until_it_fills_a_stretch(served: Served) -> None:
    """A row that takes long alone does not keep all batches small: twice as much is tried as long as it fits."""
    served.models[1] = LoadedModel(Stepping(served.clock, served.log, 0.002, 0.0001))
    served.order(ask(0, 1, [0, 0]))
    served.order(*(ask(call, 1, [0, call]) for call in range(1, 40)))
    assert served.log == [1, 2, 4, 8, 8, 8, 8, 1]


def test_a_hiccup_is_forgotten(served: Served) -> None:
    """One prediction that took long makes batches small for a few more, and not for ever."""
    served.models[1].most_rows[0] = 1
    served.order(*(ask(call, 1, [0, call]) for call in range(40)))
    assert served.log[:6] == [1, 2, 4, 4, 4, 4]


def test_each_call_of_a_batch_is_told_its_share_of_the_time(served: Served) -> None:
    """P4: slices are cut by what a row takes: the time of the whole batch would make them as many times too small."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(PATIENCE)
        ours.sendall(ask(1, 1, [[0, 1]]) + ask(2, 1, [[0, 2], [0, 3], [0, 4]]))
        lane = Thread(target=RequestLane(theirs, served.models, *workers_end()).run)
        lane.start()
        seconds = {}
        for _ in range(2):
            size, _, _, _, number, *_, share = wire.REPLY.unpack(ours.recv(wire.REPLY.size, socket.MSG_WAITALL))
            ours.recv(size, socket.MSG_WAITALL)
            seconds[number] = share
        ours.shutdown(socket.SHUT_WR)
        lane.join()
    assert served.log == [4]
    assert seconds == {1: pytest.approx(0.001), 2: pytest.approx(0.003)}


def test_outputs_have_limits_of_their_own(served: Served) -> None:
    """Contributions take a thousand times what values do: what is known of one says nothing of the other."""
    served.order(ask(0, 1, [0, 0]))
    served.order(*(ask(call, 1, [0, call], output="contribs") for call in range(9)))
    assert served.log == [1, 9]


def test_a_call_larger_than_all_buffers_is_answered(xgboost_worker: LoneWorker) -> None:
    """Frames grow the worker's buffers as needed, and smaller ones still work afterwards."""
    model = zoo.model()
    xgboost_worker.load(10, model.ubj)
    rows = zoo.rows(200_000)
    assert rows.nbytes > 4 * wire.PAYLOAD_LIMIT
    assert np.array_equal(xgboost_worker.values(1, 10, rows), model.expected(rows))
    assert np.array_equal(xgboost_worker.values(2, 10, rows[:1]), model.expected(rows[:1]))


def test_frames_are_understood_however_they_are_cut(xgboost_worker: LoneWorker) -> None:
    """A frame that arrives in pieces is predicted when it is complete."""
    model, rows = zoo.model(), zoo.rows(3)
    xgboost_worker.load(11, model.ubj)
    stream = b"".join(ask(call, 11, rows[call - 1]) for call in (1, 2, 3))
    for start in range(0, len(stream), 7):
        xgboost_worker.send(stream[start : start + 7])
    replies = xgboost_worker.replies(3)
    assert [replies[call].values[0] for call in (1, 2, 3)] == model.expected(rows).tolist()


def test_a_row_predicts_bit_equal_alone_and_in_any_batch(xgboost_worker: LoneWorker) -> None:
    """Rule A5, through the worker: batching never changes an answer."""
    model, rows = zoo.model("multiclass"), zoo.rows(40)
    xgboost_worker.load(12, model.ubj)
    expected = model.expected(rows)
    xgboost_worker.send(*(ask(call, 12, row) for call, row in enumerate(rows)))
    replies = xgboost_worker.replies(len(rows))
    together = np.concatenate([replies[call].values for call in range(len(rows))])
    alone = np.concatenate([xgboost_worker.values(call, 12, row) for call, row in enumerate(rows)])
    assert np.array_equal(together, expected)
    assert np.array_equal(alone, expected)


@pytest.mark.parametrize("output", wire.OUTPUTS)
def test_every_output_keeps_its_shape_on_the_wire(xgboost_worker: LoneWorker, output: str) -> None:
    """Contributions of several classes have three dimensions; the frame carries them."""
    model, rows = zoo.model("multiclass"), zoo.rows(5)
    xgboost_worker.load(13, model.ubj)
    options: dict[str, Any] = {
        "value": {},
        "margin": {"output_margin": True},
        "leaf": {"pred_leaf": True},
        "contribs": {"pred_contribs": True},
    }
    expected = model.expected(rows, **options[output])
    assert np.array_equal(xgboost_worker.values(1, 13, rows, output=output), expected)


# What is not predicted


def test_cancelled_calls_are_skipped(scene: Scene) -> None:
    """Rule P3: a call cancelled while it waits costs no prediction, and its neighbours get theirs."""
    made = [ask(call, 2, [0, call]) for call in range(1, 6)]
    scene.release(*made, bare(wire.CANCEL, 2), bare(wire.CANCEL, 4))
    assert set(scene.worker.replies(3)) == {1, 3, 5}
    assert scene.predictions() == [("value", [1, 3, 5])]


def test_a_cancellation_is_seen_between_two_predictions(scene: Scene, tmp_path: Path) -> None:
    """Rule P3: it need not have arrived together with its call."""
    worker, gate = scene.worker, odd.Gate(tmp_path / "second")
    worker.load(3, odd.artifact(gate=gate.path))
    scene.release(ask(1, 3, [odd.WAIT, 0]), ask(2, 2, [0, 2]))
    gate.wait_for_worker()
    worker.send(bare(wire.CANCEL, 2), bare(wire.PING, 3))
    gate.open()
    assert {worker.reply().kind for _ in range(2)} == {wire.RESULT, wire.PONG}
    assert scene.predictions() == []


def test_a_cancellation_does_not_outlive_its_call(scene: Scene) -> None:
    """A number that is used again is a new call."""
    scene.release(ask(1, 2, [0, 1]), bare(wire.CANCEL, 1), bare(wire.PING, 9))
    assert scene.worker.reply().kind == wire.PONG
    assert scene.worker.values(1, 2, [0, 5]).tolist() == [10]


def test_work_past_its_deadline_is_not_started(scene: Scene) -> None:
    """Rule P3: its caller has gone, so no prediction is made for it, and no answer sent."""
    past, future = monotonic() - 1, monotonic() + PATIENCE
    scene.release(
        ask(1, 2, [0, 1], deadline=past), ask(2, 2, [0, 2], deadline=future), ask(3, 2, [0, 3]),
    )  # fmt: skip
    assert set(scene.worker.replies(2)) == {2, 3}
    assert scene.predictions() == [("value", [2, 3])]


# What goes wrong


def test_one_bad_member_does_not_spoil_the_others(scene: Scene) -> None:
    """A row that the model refuses is refused alone: its neighbours in the batch get their answers."""
    scene.release(ask(1, 2, [0, 1]), ask(2, 2, [odd.REFUSE, 2]), ask(3, 2, [0, 3]))
    replies = scene.worker.replies(3)
    assert [replies[call].kind for call in (1, 2, 3)] == [wire.RESULT, wire.ERROR, wire.RESULT]
    assert replies[2].message == "the model does not like this row"
    assert replies[3].values.tolist() == [6]


def test_a_predictor_that_loses_rows_is_refused(scene: Scene) -> None:
    """Answers are dealt out by position: with one missing, each caller would get its neighbour's."""
    scene.release(ask(1, 2, [[odd.MISCOUNT, 1], [0, 2]]), ask(2, 2, [0, 3]))
    replies = scene.worker.replies(2)
    assert replies[1].kind == wire.FAULT
    assert "the predictor returned shape (1,) for 2 rows" in replies[1].message
    assert replies[2].values.tolist() == [6]


def test_a_call_for_an_unknown_model_is_refused(xgboost_worker: LoneWorker) -> None:
    """The worker says so and goes on."""
    xgboost_worker.send(ask(1, 999, zoo.rows(1)))
    reply = xgboost_worker.reply()
    assert (reply.kind, reply.message) == (wire.FAULT, "the model is not loaded in this worker")


def test_an_unloaded_model_is_unknown(xgboost_worker: LoneWorker) -> None:
    """UNLOAD takes the model away for good."""
    xgboost_worker.load(14, zoo.model().ubj)
    xgboost_worker.command(wire.UNLOAD, 14)
    assert xgboost_worker.report()[:2] == (wire.UNLOADED, 14)
    xgboost_worker.send(ask(1, 14, zoo.rows(1)))
    assert xgboost_worker.reply().kind == wire.FAULT


def test_unloading_what_was_never_there_is_acknowledged(xgboost_worker: LoneWorker) -> None:
    """Rule L5: the parent waits for an acknowledgement, so there is always one."""
    xgboost_worker.command(wire.UNLOAD, 998)
    assert xgboost_worker.report()[:2] == (wire.UNLOADED, 998)


# Artifacts


def test_a_loaded_model_says_what_it_is(xgboost_worker: LoneWorker) -> None:
    """LOADED carries all that ModelInfo shows, and the measured size."""
    model = zoo.model("binary", trees=7, names=True)
    kind, number, size, facts = xgboost_worker.load(20, model.targz)
    assert (kind, number) == (wire.LOADED, 20)
    assert 0.5 * len(model.ubj) < size < 4 * len(model.ubj) + (256 << 10)
    assert facts.pop("seconds") > 0
    assert facts == {
        "unpacked_bytes": len(model.ubj),
        "format": "ubj",
        "container": "tar.gz",
        "n_features": 6,
        "feature_names": list(zoo.FEATURES),
        "n_outputs": 1,
        "objective": "binary:logistic",
        "booster": "gbtree",
        "n_trees": 7,
        "best_iteration": None,
    }


def test_the_black_box_tells_what_the_parser_is_at(odd_worker: LoneWorker, tmp_path: Path) -> None:
    """A crash in the parser has a culprit (A3), and one before or after it has none."""
    gate = odd.Gate(tmp_path / "gate")
    assert odd_worker.box.parsing == 0
    odd_worker.send_artifact(21, odd.artifact(on_load="wait", gate=gate.path))
    gate.wait_for_worker()
    assert odd_worker.box.parsing == 21
    gate.open()
    assert odd_worker.report().kind == wire.LOADED
    odd_worker.command(wire.MEASURE, 0)
    assert odd_worker.report().kind == wire.HEAP
    assert odd_worker.box.parsing == 0


def test_artifacts_that_arrive_interleaved_are_kept_apart(xgboost_worker: LoneWorker) -> None:
    """Several downloads go on at once; each model is put together from its own chunks."""
    one, two, rows = zoo.model(seed=1), zoo.model(seed=2), zoo.rows(4)
    for number in (22, 23):
        xgboost_worker.command(wire.BEGIN, number, 1 << 30)
    half = len(one.ubj) // 2
    for number, part in ((22, one.ubj[:half]), (23, two.ubj[:half]), (23, two.ubj[half:]), (22, one.ubj[half:])):
        xgboost_worker.command(wire.CHUNK, number, 0, part)
    for number in (23, 22):
        xgboost_worker.command(wire.END, number)
    reports = [xgboost_worker.report() for _ in range(2)]
    assert [(report.kind, report.model) for report in reports] == [(wire.LOADED, 23), (wire.LOADED, 22)]
    assert np.array_equal(xgboost_worker.values(1, 22, rows), one.expected(rows))
    assert np.array_equal(xgboost_worker.values(2, 23, rows), two.expected(rows))


@pytest.mark.parametrize(
    "broken",
    [b"", b"no model at all" * 50, zoo.pack({"xgboost-model": b""}), zoo.model().ubj[:-200], zoo.model().targz[:-100]],
    ids=["empty", "text", "empty member", "cut short", "cut archive"],
)
def test_a_broken_artifact_fails_with_a_reason_and_the_worker_goes_on(
    xgboost_worker: LoneWorker, broken: bytes
) -> None:
    """FAILED names what is wrong, and the next artifact loads."""
    kind, _, _, facts = xgboost_worker.load(24, broken)
    assert kind == wire.FAILED
    assert facts["kind"] in ("corrupt", "unsupported")
    assert facts["message"]
    assert xgboost_worker.load(25, zoo.model().ubj).kind == wire.LOADED


def test_what_the_parser_refuses_is_corrupt_with_the_parsers_reason(xgboost_worker: LoneWorker) -> None:
    """The message is XGBoost's, without its stack trace, clock or source line."""
    kind, _, _, facts = xgboost_worker.load(26, b'{"learner":{},"version":[3,0,0]}')
    assert kind == wire.FAILED
    assert facts["kind"] == "corrupt"
    assert facts["message"]
    for noise in ("Stack trace", ".cc:", "/workspace"):
        assert noise not in facts["message"]


def test_chunks_of_a_refused_artifact_are_ignored(xgboost_worker: LoneWorker) -> None:
    """What was on its way when the artifact was refused causes no second report."""
    xgboost_worker.command(wire.BEGIN, 27, 1 << 30)
    xgboost_worker.command(wire.CHUNK, 27, 0, b"\x80\x04" + bytes(600))
    xgboost_worker.command(wire.CHUNK, 27, 0, bytes(600))
    xgboost_worker.command(wire.END, 27)
    xgboost_worker.command(wire.MEASURE, 0)
    assert [xgboost_worker.report().kind for _ in range(2)] == [wire.FAILED, wire.HEAP]


def test_an_artifact_beyond_its_reservation_waits_for_a_grant(xgboost_worker: LoneWorker) -> None:
    """NEED asks for what the header announces, before the parser runs; GRANT lets it run."""
    model = zoo.model(trees=30)
    xgboost_worker.send_artifact(28, model.ubj, allowed=1000)
    assert xgboost_worker.report()[:3] == (wire.NEED, 28, len(model.ubj))
    xgboost_worker.command(wire.MEASURE, 0)
    assert xgboost_worker.report().kind == wire.HEAP, "nothing happens before the grant"
    xgboost_worker.command(wire.GRANT, 28, len(model.ubj))
    assert xgboost_worker.report().kind == wire.LOADED


def test_an_archive_announces_its_size_with_its_first_chunk(xgboost_worker: LoneWorker) -> None:
    """With nothing allowed, the parent is told what to reserve as soon as the tar's header is there."""
    model = zoo.model(trees=60)
    xgboost_worker.command(wire.BEGIN, 29, 0)
    xgboost_worker.command(wire.CHUNK, 29, 0, model.targz[:4096])
    assert xgboost_worker.report()[:3] == (wire.NEED, 29, len(model.ubj))
    xgboost_worker.command(wire.UNLOAD, 29)
    assert xgboost_worker.report()[:2] == (wire.UNLOADED, 29)


def test_a_grant_that_is_too_small_is_asked_for_again(xgboost_worker: LoneWorker) -> None:
    """No grant below what the model has makes the parser run; it may be all there is room for."""
    model = zoo.model(trees=30)
    xgboost_worker.send_artifact(30, model.json, allowed=len(model.json) // 4)
    needed = xgboost_worker.report()
    assert (needed.kind, needed.number) == (wire.NEED, len(model.json))
    xgboost_worker.command(wire.GRANT, 30, len(model.json) - 1)
    assert xgboost_worker.report()[:3] == (wire.NEED, 30, len(model.json))
    xgboost_worker.command(wire.MEASURE, 0)
    assert xgboost_worker.report().kind == wire.HEAP
    xgboost_worker.command(wire.GRANT, 30, len(model.json))
    assert xgboost_worker.report().kind == wire.LOADED


def test_an_artifact_that_may_go_on_growing_says_what_it_has_and_asks_for_more(xgboost_worker: LoneWorker) -> None:
    """L6: what it would like must not be taken for what it surely takes: there may be no room for so much."""
    data = zoo.model(trees=30).ubj
    xgboost_worker.command(wire.BEGIN, 34, 1000)
    xgboost_worker.command(wire.CHUNK, 34, 0, data[:1500])
    kind, _, needed, facts = xgboost_worker.report()
    assert (kind, needed, facts) == (wire.NEED, 1500, {"asked": 2000})
    xgboost_worker.command(wire.GRANT, 34, 1700)
    xgboost_worker.command(wire.CHUNK, 34, 0, data[1500:])
    assert xgboost_worker.report()[:3] == (wire.NEED, 34, len(data))
    xgboost_worker.command(wire.END, 34)
    xgboost_worker.command(wire.GRANT, 34, len(data))
    assert xgboost_worker.report().kind == wire.LOADED


@pytest.mark.parametrize("kind", ["regression", "multiclass", "stopped", "linear", "dart"])
@pytest.mark.parametrize("form", ["ubj", "json", "targz"])
def test_a_model_is_saved_in_the_form_that_loads_fastest(
    xgboost_worker: LoneWorker, tmp_path: Path, kind: str, form: str
) -> None:
    """Whatever it came in, the copy is bare UBJSON that gives the same answers, bit for bit, and says its digest."""
    model, path = zoo.model(kind), tmp_path / "copy"
    data = getattr(model, form)
    xgboost_worker.command(wire.BEGIN, 35, 1 << 30, json.dumps({"save": str(path)}).encode())
    xgboost_worker.command(wire.CHUNK, 35, 0, data)
    xgboost_worker.command(wire.END, 35)
    assert xgboost_worker.report().kind == wire.LOADED
    saved = xgboost_worker.report()
    copy = path.read_bytes()
    assert (saved.kind, saved.number) == (wire.SAVED, len(copy))
    digest = hashlib.sha256(copy).hexdigest()
    assert saved.facts == {"digest": digest}
    assert path.stat().st_mode & 0o777 == 0o600
    assert form == "json" or copy == model.ubj
    xgboost_worker.command(wire.OPEN, 36, 1 << 30, wire.COPY.pack(bytes.fromhex(digest), 0) + bytes(path))
    xgboost_worker.command(wire.END, 36)
    report = xgboost_worker.report()
    assert report.kind == wire.LOADED
    assert (report.facts["format"], report.facts["container"]) == ("ubj", "raw")
    rows = zoo.rows(5)
    first, second = (xgboost_worker.values(1, number, rows) for number in (35, 36))
    assert np.array_equal(first, second)
    for number in (35, 36):
        xgboost_worker.command(wire.UNLOAD, number)
        assert xgboost_worker.report()[:2] == (wire.UNLOADED, number)


def test_a_model_that_cannot_be_saved_serves_all_the_same(xgboost_worker: LoneWorker, tmp_path: Path) -> None:
    """A4: the copy is an aside: no folder, or a file that is there already, is reported after the load."""
    taken = tmp_path / "taken"
    taken.write_bytes(b"another's")
    for path in (tmp_path / "nowhere" / "copy", taken):
        xgboost_worker.command(wire.BEGIN, 37, 1 << 30, json.dumps({"save": str(path)}).encode())
        xgboost_worker.command(wire.CHUNK, 37, 0, zoo.model().ubj)
        xgboost_worker.command(wire.END, 37)
        reports = [xgboost_worker.report() for _ in range(2)]
        assert [report.kind for report in reports] == [wire.LOADED, wire.SAVED]
        assert str(path) in reports[1].facts["error"]
        xgboost_worker.command(wire.UNLOAD, 37)
        assert xgboost_worker.report().kind == wire.UNLOADED
    assert taken.read_bytes() == b"another's"


@pytest.mark.parametrize("kind", ["regression", "multiclass", "stopped", "linear", "dart"])
@pytest.mark.parametrize("count", [1, 7])
def test_rows_that_come_with_an_artifact_are_answered_with_it(
    xgboost_worker: LoneWorker, kind: str, count: int
) -> None:
    """A5: the first call's answer, of whatever shape, is bit-equal to that of any other, and comes before LOADED."""
    model, rows = zoo.model(kind), zoo.rows(count)
    xgboost_worker.command(wire.BEGIN, 50, 1 << 30)
    xgboost_worker.command(wire.CHUNK, 50, 0, model.ubj)
    xgboost_worker.command(wire.END, 50, count, rows.astype(np.float32).tobytes())
    answer = xgboost_worker.answer()
    assert xgboost_worker.report().kind == wire.LOADED
    later = xgboost_worker.values(1, 50, rows)
    assert answer.shape == later.shape
    assert np.array_equal(answer, later)
    xgboost_worker.command(wire.UNLOAD, 50)
    assert xgboost_worker.report().kind == wire.UNLOADED


@pytest.mark.parametrize("columns", [1, 5, 7])
def test_rows_that_do_not_fit_are_no_fault_of_the_artifact(xgboost_worker: LoneWorker, columns: int) -> None:
    """The model loads, and who asks it then is told what is wrong with the rows."""
    xgboost_worker.command(wire.BEGIN, 51, 1 << 30)
    xgboost_worker.command(wire.CHUNK, 51, 0, zoo.model().ubj)
    xgboost_worker.command(wire.END, 51, 2, np.zeros((2, columns), np.float32).tobytes())
    assert xgboost_worker.report().kind == wire.LOADED
    xgboost_worker.command(wire.UNLOAD, 51)
    assert xgboost_worker.report().kind == wire.UNLOADED


def test_another_predictor_is_not_asked_in_the_thread_that_loads(odd_worker: LoneWorker) -> None:
    """Predictors are promised that the main thread alone asks them."""
    odd_worker.command(wire.BEGIN, 52, 1 << 30)
    odd_worker.command(wire.CHUNK, 52, 0, odd.artifact())
    odd_worker.command(wire.END, 52, 1, np.zeros((1, 2), np.float32).tobytes())
    assert odd_worker.report().kind == wire.LOADED


def test_a_damaged_copy_is_refused_before_it_is_parsed(xgboost_worker: LoneWorker, tmp_path: Path) -> None:
    """A4: the digest of what is on the disk is checked at each load; a copy that has gone is no crash."""
    path, data = tmp_path / "copy", bytearray(zoo.model().ubj)
    digest = hashlib.sha256(data).hexdigest()
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    for number, found in enumerate((path, tmp_path / "gone"), 38):
        xgboost_worker.command(wire.OPEN, number, 1 << 30, wire.COPY.pack(bytes.fromhex(digest), 0) + bytes(found))
        xgboost_worker.command(wire.END, number)
        report = xgboost_worker.report()
        assert (report.kind, report.facts["kind"]) == (wire.FAILED, "corrupt")


def test_a_copy_may_come_in_pieces(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Linux reads 2 GiB at once at most; here it is 100 bytes."""
    path, data = tmp_path / "copy", bytes(range(256)) * 10
    path.write_bytes(data)
    monkeypatch.setattr(os, "read", lambda descriptor, size, read=os.read: read(descriptor, min(size, 100)))
    assert read_copy(bytes(path)) == data


def test_saving_leaves_no_bytes_in_the_worker(xgboost_worker: LoneWorker, tmp_path: Path) -> None:
    """L1: what XGBoost makes the copy in is not kept: it would lie outside the measured bytes."""
    data, sizes = zoo.model(trees=300).json, []
    for number in range(40, 48):
        facts = {"save": str(tmp_path / str(number))}
        xgboost_worker.command(wire.BEGIN, number, 1 << 30, json.dumps(facts).encode())
        xgboost_worker.command(wire.CHUNK, number, 0, data)
        xgboost_worker.command(wire.END, number)
        assert [xgboost_worker.report().kind for _ in range(2)] == [wire.LOADED, wire.SAVED]
        xgboost_worker.command(wire.UNLOAD, number)
        assert xgboost_worker.report().kind == wire.UNLOADED
        xgboost_worker.command(wire.MEASURE, 0)
        sizes.append(xgboost_worker.report().number)
    assert max(sizes[2:]) - min(sizes[2:]) < len(data) // 10


def test_an_arriving_artifact_can_be_given_up(xgboost_worker: LoneWorker) -> None:
    """UNLOAD forgets an artifact of which half is there; its rest is ignored."""
    data = zoo.model(trees=30).ubj
    xgboost_worker.command(wire.BEGIN, 31, 1 << 30)
    xgboost_worker.command(wire.CHUNK, 31, 0, data[:5000])
    xgboost_worker.command(wire.UNLOAD, 31)
    xgboost_worker.command(wire.CHUNK, 31, 0, data[5000:])
    xgboost_worker.command(wire.END, 31)
    xgboost_worker.command(wire.MEASURE, 0)
    assert [xgboost_worker.report().kind for _ in range(2)] == [wire.UNLOADED, wire.HEAP]


def test_measure_tells_the_bytes_in_use(xgboost_worker: LoneWorker) -> None:
    """HEAP grows by what a model takes, and shrinks when it is unloaded."""
    xgboost_worker.command(wire.MEASURE, 0)
    before = xgboost_worker.report().number
    size = xgboost_worker.load(32, zoo.model(trees=300).ubj).number
    xgboost_worker.command(wire.MEASURE, 0)
    assert xgboost_worker.report().number - before == pytest.approx(size, rel=0.1)
    xgboost_worker.command(wire.UNLOAD, 32)
    xgboost_worker.report()
    xgboost_worker.command(wire.MEASURE, 0)
    assert xgboost_worker.report().number == pytest.approx(before, abs=size // 10)


def test_warm_calls_are_answered_while_an_artifact_loads(odd_worker: LoneWorker, tmp_path: Path) -> None:
    """Two lanes: a load that takes as long as it likes holds up no prediction."""
    gate = odd.Gate(tmp_path / "gate")
    odd_worker.load(1, odd.artifact())
    odd_worker.send_artifact(2, odd.artifact(on_load="wait", gate=gate.path))
    gate.wait_for_worker()
    assert odd_worker.values(1, 1, [0, 21]).tolist() == [42]
    gate.open()
    assert odd_worker.report().kind == wire.LOADED


def test_a_model_in_use_is_freed_after_the_prediction(scene: Scene) -> None:
    """UNLOAD waits for the prediction that runs; later calls find the model gone."""
    worker = scene.worker
    worker.command(wire.UNLOAD, 1)
    scene.release()
    assert worker.report()[:2] == (wire.UNLOADED, 1)
    worker.send(ask(5, 1, [0, 1]))
    assert worker.reply()[:2] == (wire.FAULT, 5)


# A worker's life


def test_a_ping_is_answered_by_the_main_thread(scene: Scene) -> None:
    """Rule P2: not before the prediction that runs has ended."""
    scene.worker.send(bare(wire.PING, 77))
    scene.release()
    assert scene.worker.reply()[:2] == (wire.PONG, 77)


@pytest.mark.parametrize("lane", ["requests", "artifacts"])
def test_a_worker_ends_when_either_lane_does(lane: str) -> None:
    """Rule P5: the parent's end reaches both lanes, and one is enough."""
    worker = LoneWorker(odd.ODD)
    getattr(worker, lane).close()
    assert worker.process.wait(PATIENCE) == 0
    worker.close()


def test_a_worker_that_is_predicting_ends_with_its_parent(scene: Scene) -> None:
    """Rule P5: even if the prediction never ends."""
    scene.worker.close()
    assert scene.worker.process.returncode == 0


def test_a_worker_ignores_ctrl_c(odd_worker: LoneWorker) -> None:
    """Rule P5: what Ctrl-C means is the parent's to decide."""
    odd_worker.load(1, odd.artifact())
    odd_worker.process.send_signal(signal.SIGINT)
    assert odd_worker.values(1, 1, [0, 4]).tolist() == [8]


def test_a_fault_of_the_worker_itself_ends_it_with_a_traceback(odd_worker: LoneWorker) -> None:
    """A thread that died in silence would leave its callers waiting for ever."""
    odd_worker.artifacts.sendall(wire.ARTIFACT.pack(0, wire.GRANT, 0, 0, 1, 0))  # of no artifact: ignored
    odd_worker.requests.sendall(2 * wire.REQUEST.pack(0, wire.PREDICT, 250, 0, 1, 1, 0, 0, 0.0))  # columns: 0
    assert odd_worker.process.wait(PATIENCE) == 70
    assert "ZeroDivisionError" in odd_worker.close()


def test_the_last_words_of_a_crash_are_those_of_its_thread(scene: Scene) -> None:
    """Another thread may be running: to walk through its frames crashes once more, under another signal."""
    scene.release(ask(1, 2, [odd.ABORT, 0]))
    assert scene.worker.process.wait(PATIENCE) == -signal.SIGABRT
    said = scene.worker.close()
    assert "in _do" in said, "what the crashing thread was at"
    assert "loading.py" not in said, "what the loader thread was at"


def test_a_predictor_that_cannot_be_imported_is_reported_before_the_worker_leaves() -> None:
    """HELLO carries the reason, and the process ends by itself."""
    worker = LoneWorker("no.such:Thing")
    assert worker.hello.kind == wire.HELLO
    assert worker.hello.facts["kind"] == "missing"
    assert "'no.such:Thing' cannot be imported in a worker (No module named 'no')" in worker.hello.facts["message"]
    assert worker.process.wait(PATIENCE) == 0
    worker.close()


def test_hello_comes_from_the_process_that_serves(odd_worker: LoneWorker) -> None:
    """HELLO tells the pid, and whether sizes are measured here."""
    assert odd_worker.hello.kind == wire.HELLO
    assert odd_worker.hello.number == odd_worker.process.pid
    assert odd_worker.hello.facts == {"exact_heap": sys.platform == "linux"}


# What a worker has of its parent


def told(worker: LoneWorker, what: str) -> set[str]:
    """Ask the worker about itself."""
    facts = worker.load(90, odd.artifact(tell=what)).facts
    return set(facts["feature_names"])


def test_a_worker_imports_neither_asyncio_nor_the_stores(odd_worker: LoneWorker) -> None:
    """Rule S4: the child's code lives in an import-light home."""
    modules = told(odd_worker, "modules")
    assert "modelcache.worker.predictors" in modules
    ours = {name for name in modules if name.startswith("modelcache.") and not name.startswith("modelcache.worker")}
    assert ours == {"modelcache.pool"} | {f"modelcache.pool.{name}" for name in ("wire", "blackbox", "shared")}
    assert not modules & HEAVY


def test_what_a_worker_starts_with_is_not_collected_again(odd_worker: LoneWorker) -> None:
    """A collection holds up the predictions of all models: it walks through no module, only through what has come."""
    (frozen,) = told(odd_worker, "frozen")
    assert int(frozen) > 1000


def test_a_worker_of_an_app_with_thousands_of_descriptors() -> None:
    """Its lanes have the numbers that they have in the parent, which may be beyond what ``select`` takes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2000:
        pytest.skip("needs 2,000 descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2000), hard))
    others = [os.dup(0) for _ in range(1100)]
    try:
        worker = LoneWorker()
        sizes = [worker.load(number, zoo.model().ubj).number for number in range(2)]
        worker.command(wire.UNLOAD, 1)
        assert worker.report().kind == wire.UNLOADED
        assert worker.values(1, 0, zoo.rows(1)).shape == (1,)
        assert min(sizes) > 0
        assert worker.close() == ""
    finally:
        for descriptor in others:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_worker_predicts_without_xgboosts_python_layer() -> None:
    """The C library is all that a worker needs of XGBoost: it starts in half the time, and is 30 MB smaller."""
    worker = LoneWorker(XGBOOST, "-X", "importtime")
    worker.load(1, zoo.model().ubj)
    worker.values(1, 1, zoo.rows(1))
    imported = set(re.findall(r"\| +([\w.]+)$", worker.close(), re.MULTILINE))
    assert "numpy" in imported
    assert not imported & HEAVY


def test_a_worker_holds_no_descriptor_but_its_lanes(odd_worker: LoneWorker) -> None:
    """Rule S4: 0, 1 and 2, two sockets, and the memory that it shares with the parent."""
    descriptors = told(odd_worker, "descriptors")
    sockets = {name for name in descriptors if "socket:" in name}
    assert len(sockets) == 2
    box = {name for name in descriptors if "memfd:modelcache" in name}
    assert len(box) == 1
    assert {name.split()[0] for name in descriptors - sockets - box} == {"0", "1", "2"}


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere threads have no priority of their own")
def test_the_loader_gives_way_to_calls(xgboost_worker: LoneWorker) -> None:
    """The thread that answers calls keeps the priority of the app, the other has less."""
    pid, ours = xgboost_worker.process.pid, os.getpriority(os.PRIO_PROCESS, 0)
    loaders: set[int] = set()
    while not loaders:  # it may not have got so far
        threads = {int(entry.name) for entry in Path(f"/proc/{pid}/task").iterdir()}
        loaders = {thread for thread in threads if os.getpriority(os.PRIO_PROCESS, thread) > ours}
    assert pid not in loaders
    assert len(loaders) == 1

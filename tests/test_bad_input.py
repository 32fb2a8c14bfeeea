"""Rules A1 to A3: bad rows, bad names and bad artifacts each get their own error, and nothing else happens."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import pickle
import signal
import tarfile
import zipfile
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest

import zoo
from modelcache import (
    CorruptArtifactError,
    FeatureMismatchError,
    InvalidInputError,
    InvalidModelNameError,
    LocalStore,
    MemoryStore,
    ModelCacheError,
    ModelNotFoundError,
    StoreAccessDeniedError,
    StoreError,
    UnsafeArtifactError,
    UnsupportedArtifactError,
    WorkerCrashedError,
)
from modelcache.testing import FakeClock

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import MakeRegistry
    from modelcache import ModelRegistry

ROWS = zoo.rows(2)
MODEL = zoo.model()
NAMED = zoo.model(names=True)

CRASHER = b'{"learner":' + b'{"a":' * 100_000 + b"}" * 100_001
"""XGBoost's JSON parser recurses for each level, and runs out of stack."""


async def assert_still_serves(registry: ModelRegistry) -> None:
    """Nothing is left of what was refused, and a good model is answered."""
    assert np.array_equal(await registry.predict("good", ROWS), MODEL.expected(ROWS))
    stats = registry.stats()
    assert (stats.bytes_reserved, stats.bytes_unloading) == (0, 0)
    assert stats.bytes_resident == sum(info.size_bytes for info in registry.loaded())
    assert registry._state.ledger.leases == 0
    assert not registry._state.flights.airborne


# Rows

BAD_ROWS: dict[str, tuple[Any, str]] = {
    "ragged": ([[1, 2, 3, 4, 5, 6], [1, 2]], "Pass rows of equal length"),
    "text": ([["one", "two", "three", "four", "five", "six"]], "Pass numbers"),
    "one text": ([[1, 2, 3, 4, 5, "6"]], "Pass numbers"),
    "a text": ("1,2,3,4,5,6", "Pass rows of numbers"),
    "bytes": (b"123456", "Pass rows of numbers"),
    "none": (None, "Pass"),
    "empty": ([], "Pass at least one row"),
    "no columns": (np.empty((3, 0)), "Pass at least one row"),
    "no rows": (np.empty((0, 6)), "Pass at least one row"),
    "3-D": (np.zeros((2, 3, 1)), "Pass rows of numbers"),
    "dicts": ([{"a": 1}], "Pass"),
    "dates": (np.array([["2024-01-01"] * 6], "datetime64[D]"), "Pass numbers"),
    "complex": (np.zeros((1, 6), complex), "Pass numbers"),
    "categories": (pd.DataFrame({"a": pd.Categorical(["x", "y"])}), "Pass the codes"),
}


async def test_bad_rows_are_refused_before_anything_is_loaded(make_registry: MakeRegistry) -> None:
    """Rows that no model could take raise InvalidInputError with a remedy, and the store is not asked."""
    registry = await make_registry(MemoryStore({"good.ubj": MODEL.ubj}))
    for what, (rows, remedy) in BAD_ROWS.items():
        with pytest.raises(InvalidInputError, match=remedy):
            await registry.predict("good", rows)
        assert registry.loaded() == [], what
    with pytest.raises(InvalidInputError, match="has to be one of value, margin, leaf, contribs"):
        await registry.predict("good", ROWS, output="probabilities")  # type: ignore[arg-type]
    await assert_still_serves(registry)


@pytest.mark.parametrize("count", [1, 3, 5, 7, 12])
async def test_a_wrong_number_of_columns_is_refused(make_registry: MakeRegistry, count: int) -> None:
    """A5: XGBoost answers rows with too many columns wrongly and without an error; the error here has the figures."""
    registry = await make_registry(MemoryStore({"good.ubj": MODEL.ubj, "named.ubj": NAMED.ubj}))
    for name in ("good", "named"):
        with pytest.raises(FeatureMismatchError, match=f"takes 6 columns, the rows have {count}") as caught:
            await registry.predict(name, np.zeros((2, count), np.float32))
        assert (caught.value.model, caught.value.expected, caught.value.got) == (name, 6, count)
    await assert_still_serves(registry)


async def test_wrong_names_of_columns_are_refused(make_registry: MakeRegistry) -> None:
    """A5: a column that is misnamed or twice there is named in the error."""
    registry = await make_registry(MemoryStore({"good.ubj": MODEL.ubj, "named.ubj": NAMED.ubj}))
    frame = pd.DataFrame(zoo.rows(2), columns=[*zoo.FEATURES[:-1], "f_x"])
    with pytest.raises(FeatureMismatchError, match="Rename or select columns") as caught:
        await registry.predict("named", frame)
    assert (caught.value.missing, caught.value.unexpected) == (("f_f",), ("f_x",))
    await assert_still_serves(registry)


# Names


BAD_NAMES: list[Any] = [
    "", "/etc/passwd", "..", "../up", "a/../../up", "a/..", ".", "./a", "a/./b", "a//b", "a/", "\\\\host\\share",
    "a\\b", "nul\0", "line\nfeed", "x" * 1025, "\ud800", None, 7, b"good", ["good"], {"good"}, ("good",),
]  # fmt: skip


async def test_names_that_could_leave_the_store(make_registry: MakeRegistry) -> None:
    """Names that are none, or lead elsewhere, are refused by every method before any store sees them."""

    class Untouched(MemoryStore):
        async def fetch(self, name: str, *, if_version: str | None = None) -> Any:
            assert name == "good"
            return await super().fetch(name, if_version=if_version)

    registry = await make_registry(Untouched({"good.ubj": MODEL.ubj}))
    asynchronous = (
        lambda name: registry.predict(name, ROWS), lambda name: registry.invoke(name, ROWS),
        registry.load, registry.pin, registry.unload,
    )  # fmt: skip
    for name in BAD_NAMES:
        for method in asynchronous:
            with pytest.raises(InvalidModelNameError, match=r"Use names like 'Chicago_IL'|A model name is text"):
                await method(name)
        for look in (registry.explain, registry.unpin):
            with pytest.raises(InvalidModelNameError):
                look(name)
    await assert_still_serves(registry)


async def test_an_unknown_name(make_registry: MakeRegistry, tmp_path: Path) -> None:
    """A name that the store has not raises ModelNotFoundError, which says where was looked."""
    (tmp_path / "good.ubj").write_bytes(MODEL.ubj)
    registry = await make_registry(LocalStore(tmp_path))
    with pytest.raises(ModelNotFoundError, match=r"looked for nowhere\.tar\.gz, nowhere\.ubj, nowhere\.json") as caught:
        await registry.predict("nowhere", ROWS)
    assert caught.value.model == "nowhere"
    await assert_still_serves(registry)


async def test_a_directory_and_a_way_out_of_the_folder(make_registry: MakeRegistry, tmp_path: Path) -> None:
    """A directory with a model's name is no model, and a link that leads out of the folder is not followed."""
    folder = tmp_path / "models"
    (folder / "directory.ubj").mkdir(parents=True)
    (folder / "good.ubj").write_bytes(MODEL.ubj)
    (tmp_path / "secret.ubj").write_bytes(MODEL.ubj)
    (folder / "link.ubj").symlink_to(tmp_path / "secret.ubj")
    registry = await make_registry(LocalStore(folder))
    with pytest.raises(StoreError, match="is not a regular file; a model is one file"):
        await registry.predict("directory", ROWS)
    with pytest.raises(StoreAccessDeniedError, match=r"a link that leads out of .*: copy the file into the folder"):
        await registry.predict("link", ROWS)
    await assert_still_serves(registry)


# Artifacts


class Exploding:
    """Anything that unpickles this has run foreign code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('a pickle was executed')",))


def zipped(data: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("xgboost-model", data)
    return file.getvalue()


def tar_with(name: str, kind: bytes, target: str = "") -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as tar:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, target
        tar.addfile(info)
    return gzip.compress(raw.getvalue(), mtime=0)


BAD_ARTIFACTS: dict[str, tuple[bytes, type[ModelCacheError], str]] = {
    "truncated_gzip": (MODEL.targz[: len(MODEL.targz) // 2], CorruptArtifactError, "cut short.*upload it again"),
    "truncated_ubj": (MODEL.ubj[: len(MODEL.ubj) // 2], CorruptArtifactError, "cut short.*upload it again"),
    "truncated_tar": (gzip.compress(gzip.decompress(MODEL.targz)[:2000]), CorruptArtifactError, "tar is cut short"),
    "damaged_gzip": (MODEL.targz[:40] + b"\xff" * 40 + MODEL.targz[80:], CorruptArtifactError, "damaged|valid header"),
    "pickle": (pickle.dumps(Exploding()), UnsupportedArtifactError, r"pickle, which is never opened.*save_model"),
    "pickle_in_tar": (
        zoo.pack({"xgboost-model": pickle.dumps(Exploding())}), UnsupportedArtifactError, "pickle.*save_model",
    ),
    "legacy": (b"binf" + bytes(200), UnsupportedArtifactError, "legacy binary format.*xgboost>=1.6,<3.1 and save it"),
    "zip": (zipped(MODEL.ubj), UnsupportedArtifactError, "a zip archive; .* pack it with tar czf"),
    "bare_gzip": (gzip.compress(MODEL.ubj), UnsupportedArtifactError, "gzip of a bare file; .* tar czf"),
    "empty": (b"", CorruptArtifactError, "is empty; upload it again"),
    "html": (b"<html><body>404 Not Found</body></html>", CorruptArtifactError, "an HTML page.*see what the store"),
    "text": (b"what is this?", CorruptArtifactError, "neither an XGBoost model nor a tar"),
    "other_json": (b'{"hello": "world"}', CorruptArtifactError, "no 'learner', and so is no XGBoost model"),
    "almost_json": (json.dumps({"learner": {}, "version": [3, 2, 0]}).encode(), CorruptArtifactError, "."),
    "bomb": (zoo.pack({"xgboost-model": b"{" + bytes(64 << 20)}), UnsafeArtifactError, "decompression bombs do"),
    "symlink": (tar_with("xgboost-model", tarfile.SYMTYPE, "/etc/passwd"), UnsafeArtifactError, "a symbolic link"),
    "device": (tar_with("xgboost-model", tarfile.CHRTYPE), UnsafeArtifactError, "a character device"),
    "traversal": (zoo.pack({"../../xgboost-model": MODEL.ubj}), UnsafeArtifactError, "points outside of it"),
    "two_models": (
        zoo.pack({"a.ubj": MODEL.ubj, "b.ubj": MODEL.ubj}), UnsupportedArtifactError, "members are: 'a.ubj', 'b.ubj'",
    ),
    "no_model": (zoo.pack({"readme.txt": b"hi"}), UnsupportedArtifactError, "Name the model 'xgboost-model'"),
}  # fmt: skip


@pytest.mark.parametrize("timeout", ["1", float("nan"), [1]])
async def test_a_timeout_that_is_no_number(make_registry: MakeRegistry, timeout: Any) -> None:
    """Refused before anything is loaded; a time that is over already is a timeout like any other."""
    registry = await make_registry(MemoryStore({"m.ubj": MODEL.ubj}))
    with pytest.raises(InvalidInputError, match=r"timeout is .*: it has to be a number of seconds, or None"):
        await registry.predict("m", ROWS, timeout=timeout)
    assert registry.stats().requests == 0
    with pytest.raises(TimeoutError):
        await registry.predict("m", ROWS, timeout=-1)


@pytest.mark.parametrize("suffix", [".tar.gz", ".ubj", ".json"])
async def test_bad_artifacts(make_registry: MakeRegistry, suffix: str) -> None:
    """A1, A2: whatever the suffix promises, bytes that are no model get a typed error with the model's name."""
    store = MemoryStore({f"{what}{suffix}": data for what, (data, _, _) in BAD_ARTIFACTS.items()})
    store.put("good.ubj", MODEL.ubj)
    registry = await make_registry(store)
    workers = {worker.pid for worker in registry._pool.workers}
    report = await registry.preload(registry.names())
    assert [info.name for info in report.loaded] == ["good"]
    assert set(report.failed) == set(BAD_ARTIFACTS)
    for what, (_, kind, message) in BAD_ARTIFACTS.items():
        error = report.failed[what]
        assert type(error) is kind, what
        assert error.model == what
        with pytest.raises(kind, match=message):
            raise error
    assert {worker.pid for worker in registry._pool.workers} == workers, "none of it harmed the worker"
    await assert_still_serves(registry)


async def test_a_model_with_a_wrong_suffix_is_still_a_model(make_registry: MakeRegistry) -> None:
    """A1: what an artifact is, its bytes say, not its name."""
    store = MemoryStore({"a.tar.gz": MODEL.json, "b.ubj": MODEL.targz, "good.json": MODEL.ubj})
    registry = await make_registry(store)
    for name in ("a", "b", "good"):
        assert np.array_equal(await registry.predict(name, ROWS), MODEL.expected(ROWS))
    await assert_still_serves(registry)


@pytest.mark.parametrize(
    ("field", "value", "remedy"),
    [
        ("version", 7, "the version 7: it has to be text"),
        ("version", None, "the version None: it has to be text"),
        ("size", -1, "a size of -1: it has to be a number of bytes, or None"),
        ("size", "10", "a size of '10': it has to be a number of bytes, or None"),
        ("suffix", None, "the suffix None: it has to be text, '' if there is none"),
        ("chunks", b"{}", r"delivers b'\{\}': it has to be an async iterator of bytes"),
    ],
)
async def test_a_store_that_announces_nonsense(
    make_registry: MakeRegistry, field: str, value: Any, remedy: str
) -> None:
    """The error says which field of its Artifact is wrong, with the model's name; others are served on."""

    class Odd(MemoryStore):
        async def fetch(self, name: str, *, if_version: str | None = None) -> Any:
            artifact: Any = await super().fetch(name, if_version=if_version)
            return replace(artifact, **{field: value}) if name == "m" else artifact

    registry = await make_registry(Odd({"m.ubj": MODEL.ubj, "good.ubj": MODEL.ubj}))
    with pytest.raises(StoreError, match=remedy) as caught:
        await registry.predict("m", ROWS)
    assert caught.value.model == "m"
    assert np.array_equal(await registry.predict("good", ROWS), MODEL.expected(ROWS))


@pytest.mark.parametrize("suffix", [".json", ".tar.gz"])
async def test_an_artifact_that_crashes_the_parser(make_registry: MakeRegistry, suffix: str) -> None:
    """A3: bytes that crash two workers are in quarantine until they change; everyone else is served throughout."""
    data = CRASHER if suffix == ".json" else zoo.pack({"xgboost-model": CRASHER})
    clock, store = FakeClock(), MemoryStore({f"crasher{suffix}": data, "good.ubj": MODEL.ubj})
    registry = await make_registry(store, clock=clock)
    with pytest.raises(WorkerCrashedError, match=r"Two workers ended while crasher was loading: .*SIGSEGV") as crashed:
        await registry.predict("crasher", ROWS)
    assert (crashed.value.model, crashed.value.signal) == ("crasher", signal.SIGSEGV)
    await assert_still_serves(registry)
    clock.advance(2)
    pids = {worker.pid for worker in registry._pool.workers}
    with pytest.raises(CorruptArtifactError, match=r"has crashed two workers, .* is not loaded again until") as refused:
        await registry.predict("crasher", ROWS)
    assert refused.value.model == "crasher"
    assert {worker.pid for worker in registry._pool.workers} == pids, "it was not tried a third time"
    await assert_still_serves(registry)
    clock.advance(10)
    store.put(f"crasher{suffix}", MODEL.ubj)
    assert np.array_equal(await registry.predict("crasher", ROWS), MODEL.expected(ROWS))


async def test_a_delivery_of_another_size_than_announced(make_registry: MakeRegistry) -> None:
    """A4: a download is complete or it is nothing: what a store cuts short or adds to never becomes a model."""

    class Careless(MemoryStore):
        async def fetch(self, name: str, *, if_version: str | None = None) -> Any:
            artifact: Any = await super().fetch(name, if_version=if_version)
            if name == "good":
                return artifact
            wrong = {"short": artifact.size + 1, "long": artifact.size - 1}[name]
            return type(artifact)(version=artifact.version, size=wrong, suffix=artifact.suffix, chunks=artifact.chunks)

    store = Careless({f"{name}.ubj": MODEL.ubj for name in ("short", "long", "good")})
    registry = await make_registry(store)
    for name in ("short", "long"):
        with pytest.raises(StoreError, match=r"(of|than) the .* bytes it announced"):
            await registry.predict(name, ROWS)
    await assert_still_serves(registry)


async def test_bad_calls_in_a_crowd_harm_nobody(make_registry: MakeRegistry) -> None:
    """Of calls that arrive together the bad ones fail, each in its way, and the good ones are answered."""
    registry = await make_registry(MemoryStore({"good.ubj": MODEL.ubj, "broken.ubj": b"{broken}"}))
    calls: list[Any] = []
    for index in range(30):
        calls += [
            registry.predict("good", zoo.rows(1, seed=index)),
            registry.predict("good", [[1.0, 2.0]]),
            registry.predict("broken", ROWS),
            registry.predict("absent", ROWS),
        ]
    answers: list[Any] = await asyncio.gather(*calls, return_exceptions=True)
    for index in range(30):
        good, *bad = answers[4 * index : 4 * index + 4]
        assert np.array_equal(good, MODEL.expected(zoo.rows(1, seed=index)))
        assert [type(error) for error in bad] == [FeatureMismatchError, CorruptArtifactError, ModelNotFoundError]
    await assert_still_serves(registry)

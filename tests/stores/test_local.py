"""LocalStore: a folder of artifacts."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from anyio import to_thread

import oracle
from modelcache import (
    Artifact,
    ArtifactChangedError,
    ArtifactStore,
    LocalStore,
    ModelNotFoundError,
    NotModified,
    StoreAccessDeniedError,
    StoreError,
    StoreUnavailableError,
    open_store,
)
from modelcache.names import check_name
from modelcache.stores import local
from modelcache.testing import check_store

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping


async def read(artifact: Artifact | NotModified) -> bytes:
    assert isinstance(artifact, Artifact)
    return b"".join([chunk async for chunk in artifact.chunks])


async def test_it_keeps_the_contract(tmp_path: Path) -> None:
    """The suite that every store has to pass."""

    def write(artifacts: Mapping[str, bytes]) -> None:
        for name, data in artifacts.items():
            file = tmp_path / name
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(data)

    async def make(artifacts: Mapping[str, bytes]) -> ArtifactStore:
        await to_thread.run_sync(write, artifacts)
        return LocalStore(tmp_path)

    await check_store(make)


async def test_a_new_file_is_served_at_once(tmp_path: Path) -> None:
    """Nothing is listed beforehand: a file is there as soon as it is there, and gone when it is gone."""
    store = LocalStore(tmp_path)
    with pytest.raises(ModelNotFoundError, match=r"looked for a\.tar\.gz, a\.ubj, a\.json"):
        await store.fetch("a")
    (tmp_path / "a.json").write_bytes(b"one")
    assert await read(await store.fetch("a")) == b"one"
    (tmp_path / "a.tar.gz").write_bytes(b"two")
    (tmp_path / "a.json").unlink()
    assert await read(await store.fetch("a")) == b"two", "although .json answered last"


async def test_the_suffix_that_answered_is_remembered(tmp_path: Path) -> None:
    """It goes on answering while its file is there; when that is gone the others are looked for in their order."""
    store = LocalStore(tmp_path)
    (tmp_path / "a.ubj").write_bytes(b"binary")
    assert await read(await store.fetch("a")) == b"binary"
    (tmp_path / "a.json").write_bytes(b"text")
    (tmp_path / "a.tar.gz").write_bytes(b"packed")
    assert await read(await store.fetch("a")) == b"binary"
    assert await read(await LocalStore(tmp_path).fetch("a")) == b"packed", "the first that there is"
    (tmp_path / "a.ubj").unlink()
    assert await read(await store.fetch("a")) == b"packed"


async def test_a_replaced_file_is_another_version(tmp_path: Path) -> None:
    """A rename over it, and a write into it, change the version."""
    store = LocalStore(tmp_path)
    (tmp_path / "a.ubj").write_bytes(b"one")
    first = await store.fetch("a")
    assert isinstance(await store.fetch("a", if_version=first.version), NotModified)
    (tmp_path / "new").write_bytes(b"two")
    (tmp_path / "new").rename(tmp_path / "a.ubj")
    second = await store.fetch("a", if_version=first.version)
    assert await read(second) == b"two"
    (tmp_path / "a.ubj").write_bytes(b"three")
    third = await store.fetch("a", if_version=second.version)
    assert await read(third) == b"three"
    assert len({first.version, second.version, third.version}) == 3


@pytest.mark.parametrize("size", [5, 1 << 20])
async def test_a_file_that_is_replaced_or_removed_is_delivered_as_it_was(tmp_path: Path, size: int) -> None:
    """A4: a rename over a file, at whatever moment, leaves the reader the old version."""
    store, file = LocalStore(tmp_path), tmp_path / "a.ubj"
    file.write_bytes(b"1" * size)
    artifacts = [await store.fetch("a") for _ in range(2)]
    (tmp_path / "new").write_bytes(b"2" * size)
    (tmp_path / "new").rename(file)
    artifacts.append(await store.fetch("a"))
    assert isinstance(artifacts[0], Artifact)
    start = await anext(artifacts[0].chunks)
    file.unlink()
    assert [start + await read(artifacts[0]), await read(artifacts[1])] == [b"1" * size] * 2
    assert await read(artifacts[2]) == b"2" * size


@pytest.mark.parametrize("change", ["overwritten", "truncated", "appended to"])
async def test_a_file_that_is_written_to_under_the_reader_fails_the_read(tmp_path: Path, change: str) -> None:
    """A4: bytes of two versions are never mixed, nor is a part of one taken for all of it."""
    descriptors = oracle.open_descriptors()
    file = tmp_path / "a.ubj"
    file.write_bytes(bytes(1 << 20))
    artifact = await LocalStore(tmp_path).fetch("a")
    assert isinstance(artifact, Artifact)
    assert len(await anext(artifact.chunks)) < 1 << 20
    with file.open("a+b" if change == "appended to" else "r+b") as writer:
        writer.truncate(1 << 19 if change == "truncated" else None)
        writer.write(b"x" * 2000)
        writer.flush()
        os.utime(writer.fileno(), ns=(1, 1))
    with pytest.raises(ArtifactChangedError, match="Replace artifacts by rename, never in place") as caught:
        await read(artifact)
    assert caught.value.model == "a"
    assert oracle.open_descriptors() == descriptors


async def test_a_file_is_open_only_while_more_of_it_is_wanted(tmp_path: Path) -> None:
    """A store holds no file open beyond a read, finished, given up, not begun or forgotten; nor a small one at all."""
    descriptors = oracle.open_descriptors()
    for name, size in (("empty", 0), ("small", 70_000), ("large", 1 << 20)):
        (tmp_path / f"{name}.ubj").write_bytes(bytes(size))
    store = LocalStore(tmp_path)
    for name in ("empty", "small"):
        artifact = await store.fetch(name)
        assert oracle.open_descriptors() == descriptors
    chunks: list[Any] = []
    for _ in range(4):
        artifact = await store.fetch("large")
        assert isinstance(artifact, Artifact)
        assert isinstance(await store.fetch("large", if_version=artifact.version), NotModified)
        chunks.append(artifact.chunks)
        assert oracle.open_descriptors() == descriptors + len(chunks)
    finished, given_up, not_begun, _ = chunks
    del artifact, chunks, _
    assert oracle.open_descriptors() == descriptors + 3, "nobody has the fourth"
    assert sum([len(chunk) async for chunk in finished]) == 1 << 20
    assert oracle.open_descriptors() == descriptors + 2
    await anext(given_up)
    await anext(given_up)
    for artifact in (given_up, not_begun, not_begun):
        await artifact.aclose()
    assert oracle.open_descriptors() == descriptors
    assert [chunk async for chunk in not_begun] == []


@pytest.mark.parametrize("step", ["open", "read"])
async def test_a_call_that_is_cancelled_leaves_no_file_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """A thread that comes back with an open file, and finds that nobody waits for it any more, closes it."""
    descriptors = oracle.open_descriptors()
    (tmp_path / "a.ubj").write_bytes(bytes(1 << 20))
    store = LocalStore(tmp_path)
    if step == "read":
        artifact = await store.fetch("a")
        assert isinstance(artifact, Artifact)
        chunks: Any = artifact.chunks
        await anext(chunks)
    entered, leave, do_read = threading.Event(), threading.Event(), os.read

    def stuck(descriptor: int, count: int) -> bytes:
        entered.set()
        leave.wait()
        return do_read(descriptor, count)

    with monkeypatch.context() as patch:
        patch.setattr(os, "read", stuck)
        call = asyncio.create_task(anext(chunks) if step == "read" else store.fetch("a"))
        while not entered.is_set():
            await asyncio.sleep(0)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        if step == "read":
            await chunks.aclose()
        assert oracle.open_descriptors() == descriptors + 1, "the thread still reads from it"
        leave.set()
        while oracle.open_descriptors() > descriptors:
            await asyncio.sleep(0)


async def test_links_stay_inside_the_folder(tmp_path: Path) -> None:
    """A link inside the folder is followed, one that leads out is refused, one that leads nowhere is not found."""
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "a.ubj").write_bytes(b"inside")
    (tmp_path / "secret.ubj").write_bytes(b"outside")
    (folder / "inside.json").symlink_to("a.ubj")
    (folder / "outside.ubj").symlink_to("../secret.ubj")
    (folder / "up").symlink_to("..")
    (folder / "dangling.ubj").symlink_to("nowhere")
    (folder / "loop.ubj").symlink_to("loop.ubj")
    store = LocalStore(folder)
    inside = await store.fetch("inside")
    assert await read(inside) == b"inside"
    assert isinstance(inside, Artifact)
    assert inside.suffix == ".json", "the one that answered, not that of the link's target"
    for name in ("outside", "up/secret"):
        with pytest.raises(StoreAccessDeniedError, match=r"is a link that leads out of .*: copy the file"):
            await store.fetch(name)
    for name in ("dangling", "loop"):
        with pytest.raises(ModelNotFoundError):
            await store.fetch(name)


async def test_a_link_that_takes_the_place_of_a_folder_leads_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing outside of the folder is opened, at whatever moment of a fetch a folder is swapped for a link."""
    folder = tmp_path / "models"
    for tenant in (folder / "tenant", tmp_path / "outside"):
        tenant.mkdir(parents=True)
        (tenant / "a.ubj").write_bytes(tenant.name.encode())
    (folder / "link").symlink_to("tenant")
    do_open, moments = os.open, 0
    for name in ("tenant/a", "link/a"):
        for moment in range(1, 10):
            calls = 0

            def swap(path: Any, flags: int, *, moment: int = moment, **options: Any) -> int:
                nonlocal calls, moments
                calls += 1
                if calls == moment:
                    (folder / "tenant").rename(folder / "moved")
                    (folder / "tenant").symlink_to("../outside")
                    moments += 1
                return do_open(path, flags, **options)

            with monkeypatch.context() as patch:
                patch.setattr(os, "open", swap)
                try:
                    store = LocalStore(folder, manifest=None)
                    assert await read(await store.fetch(name + ".ubj")) == b"tenant"
                except StoreAccessDeniedError as error:
                    assert "is a link that leads out of" in str(error)
            if (folder / "tenant").is_symlink():
                (folder / "tenant").unlink()
                (folder / "moved").rename(folder / "tenant")
    assert moments == 3 + 4, "before each opening of a folder or file"


async def test_a_link_that_moves_on_is_followed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A release that is switched by a link, and the old one removed, in the middle of a fetch costs no call."""
    for number in range(10):
        (tmp_path / f"v{number}").mkdir()
        (tmp_path / f"v{number}" / "a.ubj").write_bytes(b"%d" % number)
    (tmp_path / "current").symlink_to("v0")
    resolve: Callable[[Any], str] = os.path.realpath
    switches = 0

    def switch(path: Any) -> str:
        nonlocal switches
        found = resolve(path)
        if Path(path) != tmp_path and switches < last:
            (tmp_path / f"v{switches}" / "a.ubj").unlink()
            switches += 1
            (tmp_path / "current").unlink()
            (tmp_path / "current").symlink_to(f"v{switches}")
        return found

    monkeypatch.setattr(os.path, "realpath", switch)
    last = 3
    assert await read(await LocalStore(tmp_path).fetch("current/a.ubj")) == b"3"
    last = 9
    with pytest.raises(ModelNotFoundError):
        await LocalStore(tmp_path).fetch("current/a.ubj")


async def test_a_name_may_be_as_deep_as_it_may_be_long(tmp_path: Path) -> None:
    """Hundreds of folders are opened one after the other, and none is left open."""
    name = "a/" * 500 + "b"
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / f"{name}.ubj").write_bytes(b"one")
    descriptors = oracle.open_descriptors()
    assert await read(await LocalStore(tmp_path).fetch(name)) == b"one"
    assert oracle.open_descriptors() == descriptors


async def test_the_folder_itself_may_be_a_link(tmp_path: Path) -> None:
    """What leads out is measured from where the folder really is."""
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.ubj").write_bytes(b"one")
    (tmp_path / "link").symlink_to("real")
    assert await read(await LocalStore(tmp_path / "link").fetch("a")) == b"one"


async def test_only_regular_files_are_artifacts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a directory nor a pipe or socket is read, however it is named."""
    (tmp_path / "folder.ubj").mkdir()
    os.mkfifo(tmp_path / "pipe.ubj")
    store = LocalStore(tmp_path)
    with socket.socket(socket.AF_UNIX) as listener:
        monkeypatch.chdir(tmp_path)
        listener.bind("socket.ubj")  # a full path may be too long for one
    for name in ("folder", "pipe", "socket"):
        with pytest.raises(StoreError, match="is not a regular file; a model is one file"):
            await store.fetch(name)


async def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    """A missing folder is named, for a fetch and for a listing, and may appear later."""
    store = LocalStore(tmp_path / "later")
    with pytest.raises(ModelNotFoundError, match=r"The folder .*later does not exist"):
        await store.fetch("a")
    with pytest.raises(StoreError, match=r"The folder .*later does not exist"):
        _ = [name async for name in store.names()]
    (tmp_path / "later").mkdir()
    (tmp_path / "later" / "a.ubj").write_bytes(b"one")
    assert await read(await store.fetch("a")) == b"one"


@pytest.mark.parametrize(
    ("number", "kind", "message"),
    [
        (errno.EACCES, StoreAccessDeniedError, "No permission to read .*: make it readable for this user"),
        (errno.EIO, StoreUnavailableError, "Reading a failed: .*Input/output error"),
    ],
)
async def test_errors_of_the_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[StoreError], message: str
) -> None:
    """S1: no permission is final, anything else may work later; both name the model."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    (tmp_path / "a.ubj").write_bytes(bytes(1 << 20))
    artifact = await LocalStore(tmp_path).fetch("a")
    assert isinstance(artifact, Artifact)
    await anext(artifact.chunks)
    calls: dict[str, Callable[[], Awaitable[object]]] = {
        "open": lambda: LocalStore(tmp_path).fetch("a"),
        "fstat": lambda: LocalStore(tmp_path).fetch("a"),
        "read": lambda: LocalStore(tmp_path).fetch("a"),
    }
    descriptors = oracle.open_descriptors()
    for function, call in (*calls.items(), ("read", lambda: read(artifact))):
        with monkeypatch.context() as patch:
            patch.setattr(os, function, fail)
            with pytest.raises(kind, match=message) as caught:
                await call()
        assert type(caught.value) is kind
        assert caught.value.model == "a"
    assert oracle.open_descriptors() == descriptors - 1, "what could not be read is closed"


async def test_names_are_relative_and_come_once(tmp_path: Path) -> None:
    """names() walks into folders, leaves out what has no suffix, and yields what fetch takes."""
    (tmp_path / "tenant_a" / "deep").mkdir(parents=True)
    for file in ("b.ubj", "a.json", "a.tar.gz", "readme.md", ".ubj", "tenant_a/c.ubj", "tenant_a/deep/d.json"):
        (tmp_path / file).write_bytes(b"")
    store = LocalStore(tmp_path)
    every = [name async for name in store.names()]
    assert every == ["a", "b", "tenant_a/c", "tenant_a/deep/d"]
    assert [name async for name in store.names("tenant_a/")] == every[2:]
    for name in every:
        await store.fetch(name)


async def test_names_are_those_that_fetch_serves(tmp_path: Path) -> None:
    """No name is listed that predict() or fetch() refuses: odd characters, pipes, sockets, links that lead nowhere."""
    folder = tmp_path / "models"
    (folder / "in\nner").mkdir(parents=True)
    (folder / "folder.ubj").mkdir()
    files = [
        "good.ubj", "good.json", "twice.ubj.json", "back\\slash.ubj", "new\nline.ubj", "in\nner/fine.ubj", "...ubj",
        "folder.ubj/below.ubj", "piped.ubj", "covered.ubj", "outside.ubj",
    ]  # fmt: skip
    for file in files:
        (folder / file).write_bytes(b"1")
    with suppress(OSError):  # macOS takes no such name
        (folder / os.fsdecode(b"\xff.ubj")).write_bytes(b"1")
    (tmp_path / "secret.ubj").write_bytes(b"1")
    links = {
        "linked.ubj": "good.ubj", "covered.tar.gz": "nowhere", "dangling.ubj": "nowhere", "loop.ubj": "loop.ubj",
        "outside.tar.gz": "../secret.ubj", "up": "..",
    }  # fmt: skip
    for link, target in links.items():
        (folder / link).symlink_to(target)
    os.mkfifo(folder / "pipe.ubj")
    os.mkfifo(folder / "piped.tar.gz")
    store = LocalStore(folder)
    every = [name async for name in store.names()]
    assert every == ["covered", "folder.ubj/below", "good", "linked", "twice.ubj.json"]
    for name in every:
        assert await read(await store.fetch(check_name(name))) == b"1"
    for name in ("piped", "outside"):  # the first suffix is there, and is refused
        with pytest.raises(StoreError):
            await store.fetch(name)


async def test_listing_opens_no_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder knows what its entries are: a file that nobody may read is listed, and none is even looked at."""
    for file in ("a.ubj", "b.json"):
        (tmp_path / file).touch(mode=0)
    monkeypatch.setattr(local, "open_below", None)
    assert [name async for name in LocalStore(tmp_path).names()] == ["a", "b"]


@pytest.mark.parametrize("becomes", ["nothing", "file"])
async def test_a_folder_that_vanishes_during_the_listing_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, becomes: str
) -> None:
    """A tenant that is removed meanwhile does not cost the names of the others."""
    for file in ("a.ubj", "tenant_a/b.ubj", "tenant_b/c.ubj", "tenant_c/d.ubj"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(b"one")
    scandir = os.scandir

    def replace_first(folder: Path) -> Any:
        if folder == tmp_path / "tenant_b":
            (folder / "c.ubj").unlink()
            folder.rmdir()
            if becomes == "file":
                folder.write_bytes(b"one")
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", replace_first)
    assert [name async for name in LocalStore(tmp_path).names()] == ["a", "tenant_a/b", "tenant_c/d"]


async def test_a_listing_fails_if_the_root_vanishes_or_a_folder_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty or partial listing would be a wrong answer then."""
    (tmp_path / "tenant").mkdir()
    scandir = os.scandir
    for broken, number in ((tmp_path, errno.ENOENT), (tmp_path / "tenant", errno.EIO)):

        def fail(folder: Path, broken: Path = broken, number: int = number) -> Any:
            if folder == broken:
                raise OSError(number, os.strerror(number), str(folder))
            return scandir(folder)

        monkeypatch.setattr(os, "scandir", fail)
        with pytest.raises(StoreUnavailableError, match=f"Reading {broken} failed"):
            _ = [name async for name in LocalStore(tmp_path).names()]


async def test_what_a_user_may_write_for_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path, a string, a file URL with escapes and a home directory all mean the same folder."""
    folder = tmp_path / "my models"
    folder.mkdir()
    (folder / "a.ubj").write_bytes(b"one")
    monkeypatch.setenv("HOME", str(tmp_path))
    url = folder.as_uri()
    assert "%20" in url
    for written in (folder, str(folder), url, url.replace("file://", "file://localhost"), "~/my models"):
        store = open_store(written)
        assert repr(store) == str(folder)
        assert await read(await store.fetch("a")) == b"one"

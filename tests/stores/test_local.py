"""LocalStore: a folder of artifacts."""

from __future__ import annotations

import errno
import os
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
from modelcache.testing import check_store

if TYPE_CHECKING:
    from collections.abc import Mapping


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


async def test_a_file_that_changes_under_the_reader_fails_the_read(tmp_path: Path) -> None:
    """A4: bytes of two versions are never mixed: replaced before the first byte, or written to before the last."""
    store, file = LocalStore(tmp_path), tmp_path / "a.ubj"
    file.write_bytes(bytes(1 << 20))
    replaced = await store.fetch("a")
    (tmp_path / "new").write_bytes(bytes(1 << 20))
    (tmp_path / "new").rename(file)
    with pytest.raises(ArtifactChangedError, match="Replace artifacts by rename, never in place"):
        await read(replaced)
    written = await store.fetch("a")
    assert isinstance(written, Artifact)
    assert len(await anext(written.chunks)) < 1 << 20
    with file.open("r+b") as writer:
        writer.write(b"x" * 2000)
        os.utime(writer.fileno(), ns=(1, 1))
    with pytest.raises(ArtifactChangedError, match="Replace artifacts by rename, never in place"):
        await read(written)


async def test_a_file_that_vanishes_fails_the_read(tmp_path: Path) -> None:
    """A file that is gone by the time it is read is a failure of the store, not of the model."""
    store, file = LocalStore(tmp_path), tmp_path / "a.ubj"
    file.write_bytes(b"one")
    artifact = await store.fetch("a")
    file.unlink()
    with pytest.raises(StoreUnavailableError, match="Reading a failed"):
        await read(artifact)


async def test_a_read_that_is_given_up_closes_its_file(tmp_path: Path) -> None:
    """A store holds no file open beyond a read, finished or not."""
    descriptors = oracle.open_descriptors()
    (tmp_path / "a.ubj").write_bytes(bytes(1 << 20))
    artifact = await LocalStore(tmp_path).fetch("a")
    assert oracle.open_descriptors() == descriptors, "nothing is open before the first chunk is asked for"
    assert isinstance(artifact, Artifact)
    chunks: Any = artifact.chunks
    await anext(chunks)
    assert oracle.open_descriptors() == descriptors + 1
    await chunks.aclose()
    assert oracle.open_descriptors() == descriptors


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


async def test_the_folder_itself_may_be_a_link(tmp_path: Path) -> None:
    """What leads out is measured from where the folder really is."""
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.ubj").write_bytes(b"one")
    (tmp_path / "link").symlink_to("real")
    assert await read(await LocalStore(tmp_path / "link").fetch("a")) == b"one"


async def test_only_regular_files_are_artifacts(tmp_path: Path) -> None:
    """Neither a directory nor a pipe is opened, however it is named."""
    (tmp_path / "folder.ubj").mkdir()
    os.mkfifo(tmp_path / "pipe.ubj")
    store = LocalStore(tmp_path)
    for name in ("folder", "pipe"):
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

    def fail(path: Path, **_: object) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(Path, "stat", fail)
    with pytest.raises(kind, match=message) as caught:
        await LocalStore(tmp_path).fetch("a")
    assert type(caught.value) is kind
    assert caught.value.model == "a"


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
    monkeypatch.setattr(LocalStore, "_look", None)
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
    for other in ("ftp://host/folder", "file://host/folder"):
        with pytest.raises(StoreError, match="There is no store for"):
            open_store(other)

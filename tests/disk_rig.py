"""What the tests of the disk tier share: a writer, an oracle, and real processes that can be killed at any step.

As a script it is the mother of these processes. It has imported everything once, and forks a child for each line of
JSON on its standard input; a child that imported for itself would take a third of a second.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing, contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import modelcache
from modelcache.stores.disk_tier import DiskCopy, DiskTier

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

STORE = "s3://bucket/models"
BUDGET = 10_000


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def content(name: str, version: str, size: int) -> bytes:
    """Bytes that tell what they are."""
    return (f"{name} {version} ".encode() * size)[:size]


async def put(tier: DiskTier, name: str, data: bytes, version: str = "1", **facts: Any) -> DiskCopy | None:
    """Write and publish, as a worker and the registry do."""
    incoming = tier.incoming()
    incoming.write_bytes(data)
    options: dict[str, Any] = {
        "store": STORE, "suffix": ".tar.gz", "size": len(data), "digest": sha256(data), "artifact_bytes": 7,
        "cost": 1.0, "validated_at": 1000.0,
    }  # fmt: skip
    return await tier.publish(incoming, name=name, version=version, **(options | facts))


async def read(tier: DiskTier, name: str) -> bytes | None:
    """Find and read, as a worker does: what is not what the digest says is dropped."""
    copy = await tier.find(STORE, name)
    if copy is None:
        return None
    try:
        data = copy.path.read_bytes()
    except FileNotFoundError:
        data = b""
    if sha256(data) != copy.digest:
        await tier.drop(copy)
        return None
    return data


def listed(root: Path) -> dict[str, int]:
    """Bytes by digest, as the index has them."""
    with closing(sqlite3.connect(root / "index.sqlite3")) as database:
        return dict(database.execute("SELECT digest, size FROM files"))


def check(root: Path, budget: int, *tiers: DiskTier, damaged: bool = False) -> None:
    """Files, index and figures say the same; all within the budget; every file has the bytes its name promises."""
    files = {file.name: file.stat().st_size for file in (root / "models").iterdir()}
    assert files == listed(root)
    assert sum(files.values()) <= budget
    with closing(sqlite3.connect(root / "index.sqlite3")) as database:
        counted = database.execute("SELECT bytes, files, copies FROM totals").fetchone()
        names = database.execute("SELECT count(*) FROM copies").fetchone()[0]
        named = set(database.execute("SELECT store, name, version, digest FROM copies"))
    assert counted == (sum(files.values()), len(files), names)
    assert {digest for *_, digest in named} == files.keys(), "each file has a name, each name a file"
    assert damaged or all(sha256((root / "models" / digest).read_bytes()) == digest for digest in files)
    for tier in tiers:
        assert (tier.bytes, tier.copies) == (sum(files.values()), names)
        assert {(copy.store, copy.name, copy.version, copy.digest) for copy in tier._catalogue.table.values()} <= named


class Mother:
    """The process that forks children for the tests."""

    def __init__(self) -> None:
        package = Path(modelcache.__file__).parent.parent
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(package)},
        )

    def run(self, *orders: dict[str, Any]) -> list[int]:
        """Run children side by side and return their exit codes, negative for signals."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(orders) + "\n")
        self.process.stdin.flush()
        codes: list[int] = json.loads(self.process.stdout.readline())
        return codes

    def end(self) -> None:
        self.process.communicate()
        assert self.process.returncode == 0


# In a child


@contextmanager
def killed_at(step: int) -> Iterator[None]:
    """Kill this process before its ``step``-th change of a file or statement of the database."""
    left = step

    def stepping(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **options)

        return call

    class Connection(sqlite3.Connection):
        execute = stepping(sqlite3.Connection.execute)
        executescript = stepping(sqlite3.Connection.executescript)
        close = stepping(sqlite3.Connection.close)

    connect: Any = sqlite3.connect
    sqlite3.connect = lambda *args, **options: connect(*args, factory=Connection, **options)
    for name in ("open", "mkdir", "replace", "unlink", "rmdir", "chmod", "fsync", "close"):
        setattr(os, name, stepping(getattr(os, name)))
    yield


async def publish_some(root: Path, step: int) -> None:
    """A process's life: a model for which another is evicted, a new version, one that is gone."""
    with killed_at(step):
        tier = DiskTier(root, budget=BUDGET, policy="lru")
        await tier.open()
        for name, version, size in (("d", "1", 4000), ("c", "2", 3000)):
            data = content(name, version, size)
            incoming = tier.incoming()
            writing = os.open(incoming, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            os.write(writing, data[:100])
            os.fsync(writing)  # a step in the middle of the write
            os.write(writing, data[100:])
            os.close(writing)
            copy = await tier.publish(
                incoming, store=STORE, name=name, version=version, suffix=".ubj", size=size, digest=sha256(data),
                artifact_bytes=7, cost=1.0, validated_at=time.time(),
            )  # fmt: skip
            assert copy is not None
        await tier.forget(STORE, "b")
        await tier.close()


async def share(root: Path, seed: int, rounds: int) -> None:
    """Publish, find, drop and evict in a folder where others do the same."""
    chance = random.Random(seed)
    tier = DiskTier(root, budget=BUDGET, policy=chance.choice(["gdsf", "lru", "s3fifo"]))
    await tier.open()
    for turn in range(rounds):
        name = chance.choice("abcdefgh")
        if chance.random() < 0.5:
            version = str(chance.randrange(3))
            data = content(name, version, chance.choice([500, 1500, 2500]))
            copy = await put(tier, name, data, version, validated_at=float(turn))
            assert tier.bytes <= BUDGET
            if copy is not None:
                assert sum(listed(root).values()) <= BUDGET
        else:
            found = await read(tier, name)
            assert found is None or found.startswith(f"{name} ".encode())
            if chance.random() < 0.1:
                await tier.forget(STORE, name)
    assert not tier._warned, tier._warned
    await tier.close()


def child(order: dict[str, Any]) -> None:
    root = Path(order["root"])
    if order["do"] == "publish_some":
        asyncio.run(publish_some(root, order["step"]))
    else:
        asyncio.run(share(root, order["seed"], order["rounds"]))


def mother() -> None:
    import_module("anyio._backends._asyncio")  # which anyio does when it is first used: in each child anew
    for line in sys.stdin:
        children = []
        for order in json.loads(line):
            if not (number := os.fork()):
                try:
                    child(order)
                except BaseException:  # noqa: BLE001 - a child must never go on as the mother
                    sys.excepthook(*sys.exc_info())
                    os._exit(1)
                os._exit(0)
            children.append(number)
        codes = [os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]) for number in children]
        print(json.dumps(codes), flush=True)  # noqa: T201


if __name__ == "__main__":
    mother()

"""A store of your own: models in a SQLite table, where each save is a new version.

To have it opened by URL, as in ``ModelRegistry("sqlite:///srv/models.db")``, register it in your pyproject.toml::

    [project.entry-points."modelcache.stores"]
    sqlite = "my_package:SQLiteStore.from_url"
"""

import asyncio
import hashlib
import sqlite3
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, Self

import numpy as np
import xgboost as xgb

from modelcache import Artifact, ModelNotFoundError, ModelRegistry, NotModified
from modelcache.testing import check_store

SUFFIXES = (".tar.gz", ".ubj", ".json")  # looked for in this order, if a name has none of them

NEWEST = "SELECT version, data FROM models WHERE file = ? ORDER BY version DESC LIMIT 1"


def split(name: str) -> tuple[str, str]:
    return next(((name.removesuffix(suffix), suffix) for suffix in SUFFIXES if name.endswith(suffix)), (name, ""))


class SQLiteStore:
    """Serves the newest version of each file in the table ``models``."""

    def __init__(self, database: Path) -> None:
        self._database = database

    @classmethod
    def from_url(cls, url: str) -> Self:
        return cls(Path(url.removeprefix("sqlite://")))

    async def fetch(self, name: str, *, if_version: str | None = None) -> Artifact | NotModified:
        stem, suffix = split(name)
        for known in [suffix] if suffix else SUFFIXES:
            # SQLite blocks, and what blocks belongs in a thread: on the event loop it would hold up everybody's calls.
            for number, data in await asyncio.to_thread(self._query, NEWEST, stem + known):
                version = str(number)
                return NotModified(version) if version == if_version else artifact(version, known, data)
        raise ModelNotFoundError(f"There is no model {name!r} in {self._database}.", model=name)

    async def names(self, prefix: str = "") -> AsyncIterator[str]:
        files = await asyncio.to_thread(self._query, "SELECT DISTINCT file FROM models")
        for name in sorted({split(file)[0] for (file,) in files}):
            if name.startswith(prefix):
                yield name

    async def close(self) -> None:
        """Nothing is open between two calls."""

    def save(self, file: str, data: bytes) -> None:
        self._query("INSERT INTO models (file, data) VALUES (?, ?)", file, data)

    def _query(self, sql: str, *values: object) -> list[tuple[Any, ...]]:
        with closing(sqlite3.connect(self._database)) as connection, connection:
            connection.execute("CREATE TABLE IF NOT EXISTS models (version INTEGER PRIMARY KEY, file TEXT, data BLOB)")
            return connection.execute(sql, values).fetchall()


def artifact(version: str, suffix: str, data: bytes) -> Artifact:
    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(data), 1 << 18):
            yield data[start : start + (1 << 18)]

    # The worker compares the digest before it parses anything.
    digest = hashlib.sha256(data).hexdigest()
    return Artifact(version=version, size=len(data), suffix=suffix, chunks=chunks(), digest=digest)


def train(factor: float) -> bytes:
    rows = np.random.default_rng(0).normal(size=(200, 3))
    booster = xgb.train({"max_depth": 3, "nthread": 1}, xgb.DMatrix(rows, factor * rows.sum(axis=1)), 20)
    return bytes(booster.save_raw("ubj"))


async def serve(folder: Path) -> None:
    async def filled(artifacts: Mapping[str, bytes]) -> SQLiteStore:
        store = SQLiteStore(folder / "contract.db")
        for file, data in artifacts.items():
            await asyncio.to_thread(store.save, file, data)
        return store

    await check_store(filled)
    print("SQLiteStore keeps the contract of a store")

    store = SQLiteStore.from_url(f"sqlite://{folder}/models.db")
    async with ModelRegistry(store, workers=1) as registry:
        for factor in (1.0, 2.0):
            await asyncio.to_thread(store.save, "Chicago_IL.ubj", train(factor))
            await registry.unload("Chicago_IL")
            invocation = await registry.invoke("Chicago_IL", [[1.0, 1.0, 1.0]])
            print(f"version {invocation.model.version}: {invocation.predictions[0]:.1f}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(serve(Path(folder)))

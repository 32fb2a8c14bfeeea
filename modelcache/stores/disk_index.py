"""The index of a disk tier: an SQLite database that all processes which share the folder read and write.

SQLite in WAL mode, since a look-up then never waits for a publisher, and what a killed process had begun is undone by
itself. It may lose the last publishes to a power failure, and stays consistent: it is synchronised once in some hundred
publishes, when the log is written back. Nothing here is worth more than a download.
"""

from __future__ import annotations

import os
import sqlite3
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from modelcache.stores.disk_folder import CacheFolder

_APPLICATION = 0x6D6F6463
"""Says in the file's header whose database it is ("modc")."""
_LAYOUT = 2
_BUSY_TIMEOUT = 5.0
"""Seconds to wait for another process to finish its transaction."""

_DAMAGE = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR, sqlite3.SQLITE_FORMAT})

# The checks are what PRAGMA quick_check tries each row against: a damaged byte must not become a field of another type.
_SCHEMA = f"""
BEGIN IMMEDIATE;
PRAGMA application_id = {_APPLICATION};
PRAGMA user_version = {_LAYOUT};
CREATE TABLE files (
    digest TEXT PRIMARY KEY CHECK (typeof(digest) = 'text'),
    size INTEGER NOT NULL CHECK (typeof(size) = 'integer' AND size >= 0),
    cost REAL NOT NULL CHECK (typeof(cost) = 'real'),
    serial INTEGER NOT NULL CHECK (typeof(serial) = 'integer'),
    used INTEGER NOT NULL CHECK (typeof(used) = 'integer'),
    uses INTEGER NOT NULL CHECK (typeof(uses) = 'integer')
) WITHOUT ROWID;
CREATE TABLE copies (
    store TEXT NOT NULL CHECK (typeof(store) = 'text'),
    name TEXT NOT NULL CHECK (typeof(name) = 'text'),
    version TEXT NOT NULL CHECK (typeof(version) = 'text'),
    suffix TEXT NOT NULL CHECK (typeof(suffix) = 'text'),
    digest TEXT NOT NULL CHECK (typeof(digest) = 'text'),
    artifact_bytes INTEGER NOT NULL CHECK (typeof(artifact_bytes) = 'integer'),
    validated_at REAL NOT NULL CHECK (typeof(validated_at) = 'real'),
    serial INTEGER NOT NULL CHECK (typeof(serial) = 'integer'),
    PRIMARY KEY (store, name)
) WITHOUT ROWID;
CREATE INDEX copies_by_digest ON copies (digest);
CREATE INDEX copies_by_serial ON copies (serial);
CREATE TABLE totals (
    serial INTEGER NOT NULL CHECK (typeof(serial) = 'integer'),
    bytes INTEGER NOT NULL CHECK (typeof(bytes) = 'integer'),
    files INTEGER NOT NULL CHECK (typeof(files) = 'integer'),
    copies INTEGER NOT NULL CHECK (typeof(copies) = 'integer')
);
INSERT INTO totals VALUES (0, 0, 0, 0);
COMMIT;
"""  # noqa: S608 - of two constants above

_FILES = "SELECT digest, size, cost, serial, uses FROM files "
_COPIES = """
SELECT store, name, version, suffix, size, digest, artifact_bytes, validated_at, files.serial, cost, uses
FROM copies JOIN files USING (digest)
"""


class ForeignIndexError(Exception):
    """The database, of that path, belongs to another program."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskCopy:
    """A published copy of an artifact, in the form that loads fastest."""

    store: str
    name: str
    version: str
    """The store's token for the artifact that this was made from."""
    suffix: str
    """Of that artifact, as the store has it."""
    size: int
    """Bytes of the file."""
    digest: str
    """SHA-256 of the file as 64 lower-case hexadecimal digits: whoever reads it checks it."""
    artifact_bytes: int
    """Bytes of the artifact in the store."""
    validated_at: float
    """When the store last said that this is its version: wall-clock seconds."""
    folder: Path
    """Where the files are; the same object for all copies, of which many are kept in memory."""
    serial: int
    """Tells this publication of these bytes from others."""

    @property
    def path(self) -> Path:
        """May be gone by the time it is opened, when another process has evicted it: then drop the copy."""
        return self.folder / self.digest

    @property
    def location(self) -> str:
        """The same as text: a Path takes ten times as long to make, and a first call waits for it."""
        return os.path.join(self.folder, self.digest)  # noqa: PTH118 - see above


class Totals(NamedTuple):
    """What is published, by all processes."""

    serial: int
    """Of the last publication or use; they are numbered together."""
    bytes: int
    """Of all files; copies of equal bytes share one."""
    files: int
    copies: int


class FileFacts(NamedTuple):
    """What is known of a file."""

    digest: str
    size: int
    cost: float
    serial: int
    uses: int


class Listed(NamedTuple):
    """A copy with what an eviction policy is to know of its file."""

    copy: DiskCopy
    cost: float
    uses: int


class Index:
    """The database. Everything here blocks, and raises sqlite3.Error; it is used by one thread at a time."""

    def __init__(self, folder: CacheFolder) -> None:
        self.totals = Totals(0, 0, 0, 0)
        """What all processes have published together, as of the last transaction of this one."""
        self._folder = folder
        # SQLite gives the files beside it the permissions of this one.
        os.close(os.open(folder.index, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
        self._db = sqlite3.connect(
            folder.index, timeout=_BUSY_TIMEOUT, isolation_level=None, check_same_thread=False, cached_statements=64
        )
        try:
            self._prepare()
        except BaseException:
            self._db.close()
            raise

    def _prepare(self) -> None:
        if self._pragma("application_id") != _APPLICATION:
            if self._one("SELECT count(*) FROM sqlite_master")[0]:
                raise ForeignIndexError(self._folder.index)
            self._db.executescript(_SCHEMA)
        if self._pragma("user_version") != _LAYOUT:
            raise sqlite3.DatabaseError("it was written by another version of modelcache")
        if self._pragma("quick_check(1)") != "ok" or self._one("SELECT count(*) FROM totals")[0] != 1:
            raise sqlite3.DatabaseError("its content is not consistent")
        self._pragma("journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = NORMAL")

    def close(self) -> None:
        """Close it; the last process to do so writes the log back."""
        self._db.close()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Make all changes or none; no other process can write meanwhile."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            before = self.totals = Totals(*self._one("SELECT serial, bytes, files, copies FROM totals"))
            yield
            if self.totals != before:
                self._db.execute("UPDATE totals SET serial = ?, bytes = ?, files = ?, copies = ?", self.totals)
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    # Reading

    def copy(self, store: str, name: str) -> DiskCopy | None:
        """Return the copy of that name."""
        row = self._one(_COPIES + "WHERE store = ? AND name = ?", store, name)
        return None if row is None else self._as_listed(row).copy

    def copies_after(self, serial: int) -> list[Listed]:
        """Return the copies that were published later than that, those of the least recently used files first."""
        return [*map(self._as_listed, self._db.execute(_COPIES + "WHERE copies.serial > ? ORDER BY used", (serial,)))]

    def sizes(self) -> dict[str, int]:
        """Return the bytes of each listed file by digest."""
        return dict(self._db.execute("SELECT digest, size FROM files"))

    def file(self, digest: str) -> FileFacts | None:
        """Return what is known of a file; None if it is not listed."""
        row = self._one(_FILES + "WHERE digest = ?", digest)
        return None if row is None else FileFacts(*row)

    def names(self, digest: str) -> list[tuple[str, str]]:
        """Return store and name of the copies that share a file."""
        return self._db.execute("SELECT store, name FROM copies WHERE digest = ?", (digest,)).fetchall()

    # Writing, within a transaction

    def put_file(self, digest: str, size: int, cost: float, known: FileFacts | None) -> int:
        """List a file, in the place of the ``known`` publication of the same bytes; return its serial number."""
        serial = self._next_serial()
        self._db.execute(
            "REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?)",
            (digest, size, float(cost), serial, serial, known.uses + 1 if known else 1),
        )
        self._count(size - (known.size if known else 0), known is None, 0)
        return serial

    def put_copy(self, copy: DiskCopy) -> None:
        """List a copy, whose file is listed; there must be none of its name."""
        self._db.execute(
            "INSERT INTO copies VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (
                copy.store, copy.name, copy.version, copy.suffix, copy.digest, copy.artifact_bytes,
                float(copy.validated_at), copy.serial,
            ),
        )  # fmt: skip
        self._count(0, 0, 1)

    def use(self, digest: str, times: int) -> None:
        """Count uses of a file."""
        self._db.execute(
            "UPDATE files SET uses = uses + ?, used = ? WHERE digest = ?", (times, self._next_serial(), digest)
        )

    def remove_copy(self, copy: DiskCopy) -> bool:
        """Take a listed copy off the list; True says that no other name needs its file any more."""
        self._db.execute("DELETE FROM copies WHERE store = ? AND name = ?", (copy.store, copy.name))
        self._count(0, 0, -1)
        return self._one("SELECT 1 FROM copies WHERE digest = ? LIMIT 1", copy.digest) is None

    def remove_file(self, digest: str) -> bool:
        """Take a file and all its copies off the list; False says that it was not there."""
        known = self.file(digest)
        copies = self._db.execute("DELETE FROM copies WHERE digest = ?", (digest,)).rowcount
        self._db.execute("DELETE FROM files WHERE digest = ?", (digest,))
        self._count(-known.size if known else 0, -1 if known else 0, -copies)
        return known is not None

    def recount(self) -> None:
        """Make the totals what the rows say, whatever has happened to either."""
        self._db.execute("DELETE FROM copies WHERE digest NOT IN (SELECT digest FROM files)")
        self._db.execute("DELETE FROM files WHERE digest NOT IN (SELECT digest FROM copies)")
        self.totals = Totals(
            *self._one(
                "SELECT max(ifnull(max(serial), 0), ifnull(max(used), 0), ?), ifnull(sum(size), 0), count(*), "
                "(SELECT count(*) FROM copies) FROM files",
                self.totals.serial,
            )
        )

    # Writing a single row, at once

    def validate(self, copy: DiskCopy, at: float) -> None:
        """Note when the store has confirmed a version; nothing happens if another one is listed."""
        self._db.execute(
            "UPDATE copies SET validated_at = ? WHERE store = ? AND name = ? AND version = ?",
            (float(at), copy.store, copy.name, copy.version),
        )

    # Helpers

    def _next_serial(self) -> int:
        self.totals = self.totals._replace(serial=self.totals.serial + 1)
        return self.totals.serial

    def _count(self, size: int, files: int, copies: int) -> None:
        serial, *known = self.totals
        self.totals = Totals(serial, known[0] + size, known[1] + files, known[2] + copies)

    def _one(self, query: str, *values: Any) -> Any:
        return self._db.execute(query, values).fetchone()

    def _pragma(self, text: str) -> Any:
        return self._one(f"PRAGMA {text}")[0]

    def _as_listed(self, row: tuple[Any, ...]) -> Listed:
        store, name, version, suffix, size, digest, artifact_bytes, validated_at, serial, cost, uses = row
        copy = DiskCopy(
            store=store, name=name, version=version, suffix=suffix, size=size, digest=digest,
            artifact_bytes=artifact_bytes, validated_at=validated_at, folder=self._folder.models_folder, serial=serial,
        )  # fmt: skip
        return Listed(copy, cost, uses)


def is_busy(error: Exception) -> bool:
    """Say whether another process has kept the database locked for too long."""
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_OK) & 0xFF == sqlite3.SQLITE_BUSY


def is_damage(error: Exception) -> bool:
    """Tell a database that cannot be read from one that cannot be reached just now."""
    if isinstance(error, UnicodeError):  # SQLite quotes what it finds in its error messages
        return True
    if not isinstance(error, sqlite3.DatabaseError):
        return False
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF in _DAMAGE

"""Sniff, unpack, bound: the only code that opens untrusted bytes.

::

    chunks -> ArtifactReader -+-> _Raw                   '{': a UBJSON or JSON model as it is
                              +-> Tar (archive.py)       a tar header: the one member that is the model
                              +-> Gunzip -> Tar          1f 8b

What an artifact is, is read from its bytes and never from a name (formats.py). Nothing is written, extracted or
executed. What comes out is what XGBoost's own parser is handed.
"""

from __future__ import annotations

from typing import Protocol

from modelcache.worker.archive import GZIP, Gunzip, Tar, checksum_holds, has_tar_magic
from modelcache.worker.formats import (
    BLOCK,
    ArtifactError,
    Format,
    Limits,
    Unpacked,
    model_format,
    refusal,
    too_many_bytes,
)

__all__ = ["ArtifactError", "ArtifactReader", "Limits", "Unpacked"]

_DEFAULT_LIMITS = Limits()


class ArtifactReader:
    """Takes an artifact chunk by chunk, and gives back the one model in it.

    With ``any_format`` what is not an archive is passed on as it is, and so is an archive's one file: another predictor
    than the one for XGBoost knows its own format.

    An error is raised as soon as the bytes so far allow it; after one the reader is of no further use. How
    the bytes are cut into chunks changes when an error is raised, never which one, nor the result.
    """

    def __init__(self, *, limits: Limits = _DEFAULT_LIMITS, any_format: bool = False) -> None:
        self._limits = limits
        self._any_format = any_format
        self._head = bytearray()
        self._stage: _Stage | None = None

    @property
    def declared(self) -> int:
        """Bytes the model has at least, as far as is known: in a tar 0 until its header has been seen."""
        return self._stage.declared if self._stage else 0

    def feed(self, chunk: bytes | bytearray | memoryview) -> None:
        """Take the next chunk."""
        data = memoryview(chunk)
        if self._stage is None:
            missing = BLOCK - len(self._head)
            self._head += data[:missing]
            data = data[missing:]
            if len(self._head) < BLOCK and not self._head.startswith(GZIP):
                return
        self._opened().feed(data)

    def adopt(self, data: bytes | bytearray) -> None:
        """Take all of a local copy, which is a model in the form that loads fastest, and do not make another."""
        if len(data) > self._limits.max_unpacked:
            raise too_many_bytes(self._limits)
        self._stage = _Copy(data, "other" if self._any_format else "ubj")

    def finish(self) -> Unpacked:
        """Say that there are no more chunks, and return the model."""
        return self._opened().end()

    def _opened(self) -> _Stage:
        if self._stage is None:
            self._stage = _stage_for(bytes(self._head), self._limits, any_format=self._any_format)
            self._stage.feed(memoryview(self._head))
        return self._stage


class _Stage(Protocol):
    """What the first block decides on."""

    @property
    def declared(self) -> int: ...
    def feed(self, piece: memoryview) -> None: ...
    def end(self) -> Unpacked: ...


def _stage_for(head: bytes, limits: Limits, *, any_format: bool) -> _Stage:
    if head.startswith(GZIP):
        return Gunzip(limits, any_format=any_format)
    # A checksum that holds is the stronger sign: a tar's first member may have a name that starts with '{'.
    if checksum_holds(head):
        return Tar(limits, "tar", any_format=any_format)
    if head.startswith(b"{") or (any_format and head):
        return _Raw(limits, any_format=any_format)
    if has_tar_magic(head):
        return Tar(limits, "tar")  # which will say what is wrong with it
    raise refusal(head, "the artifact")


class _Raw:
    """The artifact is the model."""

    def __init__(self, limits: Limits, *, any_format: bool) -> None:
        self._limits = limits
        self._any_format = any_format
        self._data = bytearray()

    @property
    def declared(self) -> int:
        return len(self._data)

    def feed(self, piece: memoryview) -> None:
        if len(self._data) + len(piece) > self._limits.max_unpacked:
            raise too_many_bytes(self._limits)
        self._data += piece

    def end(self) -> Unpacked:
        found = "other" if self._any_format else model_format(self._data, "the artifact")
        return Unpacked(self._data, found, "raw", None)


class _Copy:
    """A worker has written it: there is nothing to be found out."""

    def __init__(self, data: bytes | bytearray, form: Format) -> None:
        self._data = data
        self._form = form

    @property
    def declared(self) -> int:
        return len(self._data)

    def feed(self, piece: memoryview) -> None:
        assert not piece, "a copy comes whole"

    def end(self) -> Unpacked:
        return Unpacked(self._data, self._form, "raw", None)

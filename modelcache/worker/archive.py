"""Archives: gzip expanded a bounded piece at a time, and the one member of a tar that is the model.

Nothing is extracted. Links, devices, names that lead out, and more members or bytes than the limits are refused when
their header is seen, before anything of them is kept.
"""

from __future__ import annotations

import re
import zlib
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from modelcache.worker.formats import (
    BLOCK,
    ArtifactError,
    Container,
    Kind,
    Limits,
    Unpacked,
    model_format,
    refusal,
    too_many_bytes,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

MODEL_MEMBER = "xgboost-model"
MODEL_SUFFIXES = (".ubj", ".ubjson", ".json", ".model", ".xgb", ".bst", ".bin")

GZIP = b"\x1f\x8b"
_STEP = 1 << 14  # compressed bytes after which the ratio is looked at
_PIECE = 1 << 16  # bytes that zlib may return at once
_RATIO_FREE = 1 << 20  # below this no ratio is suspicious: the padding of a small tar shrinks to nothing
_MAX_EXTENSION = 1 << 18  # bytes of one pax header or GNU long name
_MAX_EXTENSIONS = 4  # of those in a row: no archiver writes more than g, x, K and L for one member
_SHOWN = 80  # characters of a member's name, and
_LISTED = 16  # members that fit a message


class Gunzip:
    """Expands gzip, a bounded piece at a time, into the tar that must be inside."""

    def __init__(self, limits: Limits, *, any_format: bool = False) -> None:
        self._max_ratio = limits.max_ratio
        self._tar = Tar(limits, "tar.gz", any_format=any_format)
        self._inflater = zlib.decompressobj(wbits=31)
        self._read = 0
        self._made = 0

    @property
    def declared(self) -> int:
        """Bytes of the model, once its header has been seen."""
        return self._tar.declared

    def feed(self, piece: memoryview) -> None:
        """Take the next bytes."""
        while piece:
            # What a prefix of the input expands to is certain; how much input some output took is not, for
            # zlib reads ahead. So the ratio is looked at after fixed amounts of input, wherever chunks end.
            part = piece[: _STEP - self._read % _STEP]
            piece = piece[len(part) :]
            self._expand(bytes(part))
            if self._read % _STEP == 0:
                self._check_ratio()

    def end(self) -> Unpacked:
        """Say that no more will come, and return the model."""
        self._check_ratio()
        if not self._inflater.eof:
            raise ArtifactError(
                "corrupt",
                f"the gzip data is cut short after {self._read} bytes, before its checksum; upload it again",
            )
        return self._tar.end()

    def _expand(self, data: bytes) -> None:
        self._read += len(data)
        more = True
        while more:
            if self._inflater.eof and not (data := self._next_gzip_member(data)):
                return
            piece = self._inflate(data)
            data = self._inflater.unconsumed_tail or self._inflater.unused_data
            self._deliver(piece)
            # A full piece may leave output inside zlib although all input is used up.
            more = bool(data) or len(piece) == _PIECE

    def _next_gzip_member(self, data: bytes) -> bytes:
        """Begin the gzip member that may follow one that has ended, past zero padding."""
        data = data.lstrip(b"\0")
        if data and not data.startswith(GZIP[:1]):
            raise ArtifactError("corrupt", "the gzip data is followed by bytes that belong to no gzip; upload it again")
        if data:
            self._inflater = zlib.decompressobj(wbits=31)
        return data

    def _inflate(self, data: bytes) -> bytes:
        before = self._inflater.copy()
        try:
            return self._inflater.decompress(data, _PIECE)
        except zlib.error as error:
            self._deliver_sound_part(before, data)
            message = f"the gzip data is damaged ({error}); upload the artifact again"
            raise ArtifactError("corrupt", message) from None

    def _deliver_sound_part(self, inflater: zlib._Decompress, data: bytes) -> None:
        """Deliver what comes before the damage, which zlib has dropped.

        There may be a link in it. With other chunks it would have been seen first.
        """
        with suppress(zlib.error):
            for at in range(len(data)):
                self._deliver(inflater.decompress(data[at : at + 1]))

    def _deliver(self, piece: bytes) -> None:
        self._made += len(piece)
        self._tar.feed(memoryview(piece))  # counts the bytes against max_unpacked, those of skipped members too

    def _check_ratio(self) -> None:
        if self._made > max(_RATIO_FREE, self._read * self._max_ratio):
            raise ArtifactError(
                "unsafe",
                f"the artifact unpacks to more than {self._max_ratio} times its size, as only "
                "decompression bombs do; store the model as it is if it really shrinks that far",
                limit=self._max_ratio,
            )


class _Candidate(NamedTuple):
    """The member that is the model, unless a better one turns up."""

    path: str
    size: int
    data: bytearray


class Tar:
    """Walks a tar, keeps the bytes of the model and skips those of the rest.

    A header is followed by its body and by padding up to the next block. The body of an extension header
    (pax, GNU long name) describes the member that comes next. After a block of zeros only zeros may come.
    """

    def __init__(self, limits: Limits, container: Container, *, any_format: bool = False) -> None:
        self._limits = limits
        self._any_format = any_format
        self._container = container
        self._total = 0
        self._ended = False
        self._header = bytearray()
        self._into: bytearray | None = None
        self._left = 0
        self._padding = 0
        self._extension: bytes | None = None
        self._extensions = 0
        self._overrides: dict[str, str] = {}
        self._paths: list[str] = []
        self._chosen: _Candidate | None = None
        self._found = False
        self._rivals = 0

    @property
    def declared(self) -> int:
        """Bytes of the model, once its header has been seen."""
        return self._chosen.size if self._chosen else 0

    def feed(self, piece: memoryview) -> None:
        """Take the next bytes."""
        while piece:
            if self._ended:
                used = self._take_rest(piece)
            elif self._left:
                used = self._take_body(piece)
            elif self._padding:
                used = self._take_padding(piece)
            else:
                used = self._take_header(piece)
            piece = piece[used:]

    def end(self) -> Unpacked:
        """Say that no more will come, and return the model."""
        if not self._total:
            raise self._no_header(bytes(self._header))
        if not self._ended:
            raise ArtifactError("corrupt", "the tar is cut short: its end marker is missing; upload it again")
        if self._chosen is None:
            raise self._no_choice()
        path, _, data = self._chosen
        found = "other" if self._any_format else model_format(data, _named_member(path))
        return Unpacked(data, found, self._container, path)

    # Taking bytes: each returns how many it used.

    def _take_header(self, piece: memoryview) -> int:
        part = piece[: BLOCK - len(self._header)]
        self._header += part
        if len(self._header) == BLOCK:
            block = bytes(self._header)
            self._header.clear()
            self._on_header(block)
        return len(part)

    def _take_body(self, piece: memoryview) -> int:
        part = piece[: self._left]
        self._left -= len(part)
        if self._into is not None:
            self._into += part
            self._look_at_model()
        if not self._left:
            self._on_body()
        return len(part)

    def _take_padding(self, piece: memoryview) -> int:
        used = min(self._padding, len(piece))
        self._padding -= used
        return used

    def _take_rest(self, piece: memoryview) -> int:
        part = bytes(piece[: self._limits.max_unpacked - self._total])
        if part != bytes(len(part)):
            raise ArtifactError("corrupt", "the end of the tar is followed by other bytes; pack it again")
        self._count_bytes(len(piece))
        return len(piece)

    def _count_bytes(self, size: int) -> None:
        self._total += size
        if self._total > self._limits.max_unpacked:
            raise too_many_bytes(self._limits)

    # Headers and bodies that are complete.

    def _on_header(self, block: bytes) -> None:
        if not any(block):
            self._ended = True
        elif not checksum_holds(block):
            raise self._no_header(block)
        elif (flag := block[156:157]) in _EXTENSIONS:
            self._on_extension_header(flag, _header_size(block))
        else:
            self._on_member_header(flag, block)
        self._count_bytes(BLOCK)

    def _on_extension_header(self, flag: bytes, size: int) -> None:
        self._extensions += 1
        if size > _MAX_EXTENSION or self._extensions > _MAX_EXTENSIONS:
            raise ArtifactError(
                "unsafe",
                f"the tar spends over {_MAX_EXTENSION} bytes or {_MAX_EXTENSIONS} headers on describing one "
                "member; pack the model again with a plain tar czf",
            )
        self._extension = flag
        self._begin_body(size, bytearray())

    def _on_member_header(self, flag: bytes, block: bytes) -> None:
        overrides, self._overrides, self._extensions = self._overrides, {}, 0
        name = overrides.get("path") or _header_name(block)
        size = _decimal(overrides["size"]) if overrides.get("size") else _header_size(block)
        path = _inner_path(name)
        self._count_member(path)
        if flag not in _REGULAR and flag != _DIRECTORY:
            raise _refused_type(flag, path)
        if flag == _DIRECTORY or name.endswith("/"):
            self._begin_body(_directory_size(path, size), None)
        else:
            self._begin_body(size, self._choose(path, size))

    def _count_member(self, path: str) -> None:
        self._paths.append(_clipped(path))
        if len(self._paths) > self._limits.max_members:
            raise ArtifactError(
                "unsafe",
                f"the tar has more than {self._limits.max_members} members; pack only the model",
                limit=self._limits.max_members,
            )

    def _begin_body(self, size: int, into: bytearray | None) -> None:
        self._left = size
        self._padding = -size % BLOCK
        self._into = into
        self._count_bytes(size + self._padding)
        if not size:
            self._on_body()

    def _on_body(self) -> None:
        flag, self._extension = self._extension, None
        if flag is not None and self._into is not None:
            self._on_extension(flag, bytes(self._into))
        self._into = None

    def _on_extension(self, flag: bytes, body: bytes) -> None:
        if flag == b"L":
            self._overrides["path"] = _text(body.split(b"\0")[0])
        if flag in (b"L", b"K"):
            return  # K is the target of a link, which is refused when it comes
        records = dict(_pax_records(body))
        if any(key.startswith("GNU.sparse") for key in records):
            raise _refused_type(b"S", records.get("GNU.sparse.name", "?"))
        if flag == b"x":
            self._overrides.update(records)
        elif records.keys() & {"path", "size"}:
            message = "the tar states one name or size for all its members; pack the model again"
            raise ArtifactError("unsupported", message)

    # Which member is the model.

    def _choose(self, path: str, size: int) -> bytearray | None:
        """Return the buffer that the member's bytes go to, or None to skip them."""
        exact = path == MODEL_MEMBER
        if exact and self._found:
            message = f"the tar has two members {MODEL_MEMBER!r}; pack only the one that is meant"
            raise ArtifactError("unsupported", message)
        if not exact and (self._found or not (self._any_format or _looks_like_model(path))):
            return None
        self._found = exact
        self._rivals += not exact
        # Of two rivals neither can win any more, so that their bytes need not be kept.
        self._chosen = _Candidate(path, size, bytearray()) if exact or self._rivals == 1 else None
        return self._chosen.data if self._chosen else None

    def _look_at_model(self) -> None:
        """Refuse what xgboost-model cannot be at its first block, not after the last."""
        if self._any_format or self._chosen is None or not self._found or self._into is not self._chosen.data:
            return
        start = bytes(self._into[:BLOCK])
        if len(start) == BLOCK and not start.startswith(b"{"):
            raise refusal(start, _named_member(MODEL_MEMBER))

    def _no_choice(self) -> ArtifactError:
        found = f"{self._rivals} members that could be the model" if self._rivals else "no model"
        listed = ", ".join(map(repr, self._paths[:_LISTED])) + ", ..." * (len(self._paths) > _LISTED)
        return ArtifactError(
            "unsupported",
            f"the tar has {found}, and no {MODEL_MEMBER!r}; its members are: {listed or 'none'}. Name the "
            f"model {MODEL_MEMBER!r}, or pack exactly one file that ends in {', '.join(MODEL_SUFFIXES)}",
            members=self._paths,
        )

    def _no_header(self, block: bytes) -> ArtifactError:
        if self._total or has_tar_magic(block):
            return ArtifactError(
                "corrupt",
                f"the tar is damaged: there is no valid header at byte {self._total}; upload it again",
            )
        if block.startswith(b"{"):
            return ArtifactError(
                "unsupported",
                "the artifact is gzip of a bare file; store the model as it is, or pack it with tar czf",
            )
        return refusal(block, "what the gzip contains")


# Fields of a tar header.

_DIRECTORY = b"5"
_REGULAR = (b"0", b"\0", b"7")
_EXTENSIONS = (b"x", b"g", b"L", b"K")
_REFUSED_TYPES: dict[bytes, tuple[Kind, str]] = {
    b"1": ("unsafe", "a hard link"),
    b"2": ("unsafe", "a symbolic link"),
    b"3": ("unsafe", "a character device"),
    b"4": ("unsafe", "a block device"),
    b"6": ("unsafe", "a fifo"),
    b"S": ("unsupported", "a sparse file"),
}
_OCTAL = re.compile(rb" *([0-7]*)[ \0]*")
_PAX_RECORD = re.compile(rb"(\d{1,8}) ([^=]+)=")


def has_tar_magic(block: bytes) -> bool:
    """Say whether this is, or was meant to be, a POSIX or GNU tar header."""
    return block[257:262] == b"ustar"


def checksum_holds(block: bytes) -> bool:
    """Say whether this is a tar header: a checksum is the one thing that tars of every age have."""
    if len(block) < BLOCK:
        return False
    field = block[148:156]
    return _number(field) == sum(block) - sum(field) + sum(b" " * len(field))


def _number(field: bytes) -> int | None:
    """Read octal digits, or GNU's base 256 for what does not fit them; None if it is neither."""
    if field.startswith(b"\x80"):
        return int.from_bytes(field[1:], "big")
    digits = _OCTAL.fullmatch(field)
    return int(digits[1] or b"0", 8) if digits else None


def _header_size(block: bytes) -> int:
    size = _number(block[124:136])
    if size is None:
        raise ArtifactError("corrupt", f"the tar states a size of {block[124:136]!r}; pack it again")
    return size


def _decimal(text: str) -> int:
    if not text.isdecimal() or len(text) > len(str(1 << 64)):
        raise ArtifactError("corrupt", f"the tar states a size of {_clipped(text)!r}; pack it again")
    return int(text)


def _directory_size(path: str, size: int) -> int:
    # Readers disagree on whether bytes follow such a header, which lets one file hide in another.
    if size:
        raise ArtifactError("corrupt", f"the tar's directory {_clipped(path)!r} has a size; pack it again")
    return 0


def _header_name(block: bytes) -> str:
    name = block[:100].split(b"\0")[0]
    # Only POSIX headers have the prefix; GNU keeps times in its place.
    prefix = block[345:500].split(b"\0")[0] if block[257:263] == b"ustar\0" else b""
    return _text(prefix + b"/" + name if prefix else name)


def _inner_path(name: str) -> str:
    """Return the name without './', or refuse one that points out of the tar."""
    segments = name.split("/")
    if name.startswith("/") or ".." in segments:
        shown = _clipped(name)
        message = f"the tar has a member {shown!r}, which points outside of it; pack it with relative names"
        raise ArtifactError("unsafe", message, member=shown)
    return "/".join(segment for segment in segments if segment not in ("", ".")) or "."


def _looks_like_model(path: str) -> bool:
    # '._model.ubj' is what macOS packs beside model.ubj: its attributes.
    return path.lower().endswith(MODEL_SUFFIXES) and not path.rpartition("/")[2].startswith("._")


def _refused_type(flag: bytes, path: str) -> ArtifactError:
    kind, what = _REFUSED_TYPES.get(flag, ("unsupported", f"an entry of type {_text(flag)!r}"))
    shown = _clipped(path)
    message = f"the tar has {what}, {shown!r}; pack the model as a plain file (tar --dereference, no --sparse)"
    return ArtifactError(kind, message, member=shown)


def _pax_records(body: bytes) -> Iterator[tuple[str, str]]:
    """Read records of '<length> <key>=<value>' and a line feed; the length is that of the whole record."""
    start = 0
    while start < len(body) and body[start]:  # some archivers fill up with zeros
        found = _PAX_RECORD.match(body, start)
        end = start + int(found[1]) if found else 0
        if found is None or end <= found.end() or body[end - 1 : end] != b"\n":
            raise ArtifactError("corrupt", "the tar has a damaged pax header; pack the artifact again")
        yield _text(found[2]), _text(body[found.end() : end - 1])
        start = end


def _text(raw: bytes) -> str:
    # Not surrogates: a name may travel in an error message, which has to be encodable.
    return raw.decode("utf-8", "backslashreplace")


def _clipped(text: str) -> str:
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


def _named_member(path: str) -> str:
    return f"member {_clipped(path)!r}"

"""Damaged artifacts: each a function of a seed and a number, so that a finding is named by two figures.

Bytes are flipped, cut, spliced and repeated anywhere. Nearly all of that stops at a checksum or at the first brace, so
the *structure* is changed too, with everything around it made to fit again: a count before a UBJSON array, one element
of it, a value or a branch of a JSON document, a field of a tar header under a right checksum, parts of a gzip header
over right contents.
"""

from __future__ import annotations

import copy
import functools
import gzip
import io
import json
import re
import struct
import tarfile
from random import Random
from typing import TYPE_CHECKING, Any, NamedTuple

import zoo

if TYPE_CHECKING:
    from collections.abc import Callable

KINDS = ("regression", "binary", "multiclass", "softmax", "linear", "dart", "stopped")

INTEGERS = (0, 1, -1, 2, 6, 127, 255, 32767, 65535, 2**31 - 1, -(2**31), 2**32, 2**53, 2**63 - 1, -(2**63))
TEXTS = ("", "0", "-1", "1", "3", "7", "2147483647", "2000000000", "9223372036854775807", "1e308", "nan", "gbtree", "x")
FLOATS = (0.0, -0.0, 1e-45, 1e38, 1e300, -1e300, float("nan"), float("inf"), 0.5)
LONGEST = 1 << 20
"""Bytes of an artifact, so that no mutation of a mutation grows without end."""


class Mutant(NamedTuple):
    """A damaged artifact, its suffix, and what was done to it."""

    suffix: str
    data: bytes
    done: str


def mutant(seed: int, number: int) -> Mutant:
    """Return the damaged artifact of this number."""
    random = Random(f"{seed}/{number}")
    suffix = random.choice((".ubj", ".json", ".tar.gz"))
    data, done = _FORMS[suffix](random)
    if random.random() < 0.15:  # damage on top of damage
        data, again = _damage(random, data)
        done += "+" + again
    return Mutant(suffix, data[:LONGEST], done)


def sound_answers(rows: Any) -> set[bytes]:
    """Return what the models predict that the damage is done to."""
    answers = {_model(kind).expected(rows).tobytes() for kind in KINDS}
    stopped = _model("stopped")
    best = stopped.booster.best_iteration + 1
    return answers | {stopped.expected(rows, iterations=(0, best)).tobytes()}


@functools.cache
def _model(kind: str) -> zoo.Model:
    return zoo.model(kind, trees=2)


@functools.cache
def _document(kind: str) -> Any:
    return json.loads(_model(kind).json)


# Any bytes


def _damage(random: Random, data: bytes) -> tuple[bytes, str]:
    how = random.choice((_flip, _poke, _truncate, _cut, _insert, _repeat, _splice, _swap))
    return how(random, data), how.__name__[1:]


def _flip(random: Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 8))):
        changed[random.randrange(len(data))] ^= 1 << random.randrange(8)
    return bytes(changed)


def _poke(random: Random, data: bytes) -> bytes:
    width, form = random.choice(((1, "B"), (2, ">H"), (4, ">I"), (8, ">Q"), (4, "<I")))
    at = random.randrange(max(1, len(data) - width))
    return data[:at] + struct.pack(form, random.choice(INTEGERS) % (1 << 8 * width)) + data[at + width :]


def _truncate(random: Random, data: bytes) -> bytes:
    return data[: random.randrange(1, len(data) + 1)]


def _cut(random: Random, data: bytes) -> bytes:
    start, end = _span(random, data)
    return data[:start] + data[end:] or b"{"


def _insert(random: Random, data: bytes) -> bytes:
    at = random.randrange(len(data))
    return data[:at] + random.randbytes(random.choice((1, 2, 4, 8, 100))) + data[at:]


def _repeat(random: Random, data: bytes) -> bytes:
    start, end = _span(random, data)
    return data[:end] + data[start:end] * random.choice((1, 2, 20)) + data[end:]


def _splice(random: Random, data: bytes) -> bytes:
    """Go on with another model's bytes."""
    other = random.choice((_model("multiclass").ubj, _model("linear").json, _model("dart").targz))
    return data[: random.randrange(1, len(data))] + other[random.randrange(len(other)) :]


def _swap(random: Random, data: bytes) -> bytes:
    size = random.choice((1, 4, 8, 64))
    first, second = sorted(random.randrange(max(1, len(data) - size)) for _ in range(2))
    second = max(second, first + size)
    return (
        data[:first] + data[second : second + size] + data[first + size : second] + data[first : first + size]
        + data[second + size :]
    )  # fmt: skip


def _span(random: Random, data: bytes) -> tuple[int, int]:
    start = random.randrange(len(data))
    return start, min(len(data), start + random.choice((1, 2, 8, 64, 512, 4096)))


# UBJSON


def _ubjson(random: Random) -> tuple[bytes, str]:
    data = _model(random.choice(KINDS)).ubj
    if random.random() < 0.3:
        return _damage(random, data)
    how = random.choice((_ubjson_count, _ubjson_element, _ubjson_type, _ubjson_text))
    return how(random, data), how.__name__[1:]


def _ubjson_count(random: Random, data: bytes) -> bytes:
    """Change a count or a length: the 8 bytes after '#L', 'SL' or a key's 'L'."""
    at = random.choice([found.end() for found in re.finditer(rb"L(?=\0{5})", data)])
    (count,) = struct.unpack_from(">q", data, at)
    new = random.choice((count + 1, count - 1, count * 2, count + 256, *INTEGERS)) % (1 << 64)
    return data[:at] + struct.pack(">Q", new) + data[at + 8 :]


_WIDTHS = {b"U": 1, b"i": 1, b"I": 2, b"l": 4, b"L": 8, b"d": 4, b"D": 8}


def _ubjson_element(random: Random, data: bytes) -> bytes:
    """Change one to three elements of typed arrays, such as children, features and thresholds of a tree's nodes."""
    changed = bytearray(data)
    arrays = [found for found in re.finditer(rb"\[\$([UiIlLdD])#L(.{8})", data, re.DOTALL) if any(found[2])]
    for _ in range(random.choice((1, 1, 3))):
        if arrays:
            array = random.choice(arrays)
            width, (count,) = _WIDTHS[array[1]], struct.unpack(">q", array[2])
            at = array.end() + random.randrange(count) * width
            new = random.choice((random.choice(INTEGERS), random.randrange(-2, count + 2))) % (1 << 8 * width)
            changed[at : at + width] = new.to_bytes(width, "big")
    return bytes(changed)


def _ubjson_type(random: Random, data: bytes) -> bytes:
    at = random.choice([found.start() for found in re.finditer(rb"[\[\]{}$#SLlIiUdDTFZ]", data)])
    return data[:at] + random.choice(b"[]{}$#SLlIiUdDTFZNCH").to_bytes() + data[at + 1 :]


def _ubjson_text(random: Random, data: bytes) -> bytes:
    """Change one of XGBoost's parameters, which are texts, with its length."""
    texts = list(re.finditer(rb"SL\0{7}([\x01-\x14])", data))
    found = random.choice(texts)
    end, new = found.end() + found[1][0], random.choice(TEXTS).encode()
    return data[: found.start()] + b"SL" + struct.pack(">Q", len(new)) + new + data[end:]


# JSON


def _json(random: Random) -> tuple[bytes, str]:
    kind = random.choice(KINDS)
    if random.random() < 0.2:
        return _damage(random, _model(kind).json)
    document = copy.deepcopy(_document(kind))
    done = [_edit(random, document) for _ in range(random.choice((1, 1, 1, 2, 4)))]
    return json.dumps(document).encode(), ",".join(done)


def _edit(random: Random, document: Any) -> str:
    """Change one place of a document, no deeper than where nothing is below it."""
    holder, key = document, next(iter(document))
    while isinstance(holder[key], dict | list) and holder[key] and random.random() < 0.93:
        holder = holder[key]
        key = random.choice(list(holder)) if isinstance(holder, dict) else random.randrange(len(holder))
    edit = random.choice((_replace, _replace, _drop, _lengthen, _shorten, _move))
    edit(random, holder, key)
    return edit.__name__[1:]


def _replace(random: Random, holder: Any, key: Any) -> None:
    old = holder[key]
    if isinstance(old, str):
        holder[key] = random.choice(TEXTS)
    elif isinstance(old, int | float):
        near = random.randrange(-2, len(holder) + 2)
        holder[key] = random.choice((near, near, random.choice(INTEGERS), random.choice(FLOATS)))
    else:
        holder[key] = random.choice((None, [], {}, 0, "x", [[[[]]]], [old], random.choice(INTEGERS)))


def _drop(random: Random, holder: Any, key: Any) -> None:
    if len(holder) > 1:
        del holder[key]


def _lengthen(random: Random, holder: Any, key: Any) -> None:
    if isinstance(holder, list):
        holder[key:key] = [holder[key]] * random.choice((1, 3, 1000))
    else:
        holder[random.choice(TEXTS)] = holder[key]


def _shorten(random: Random, holder: Any, key: Any) -> None:
    if isinstance(holder[key], list):
        del holder[key][random.randrange(len(holder[key]) + 1) :]
    else:
        _replace(random, holder, key)


def _move(random: Random, holder: Any, key: Any) -> None:
    """Swap two values of the same holder."""
    other = random.choice(list(holder)) if isinstance(holder, dict) else random.randrange(len(holder))
    holder[key], holder[other] = holder[other], holder[key]


# Archives


def _targz(random: Random) -> tuple[bytes, str]:
    how: Callable[[Random], tuple[bytes, str]] = random.choice((_packed, _members, _header, _gzip_header, _damaged))
    return how(random)


def _packed(random: Random) -> tuple[bytes, str]:
    """Pack a damaged model properly."""
    data, done = random.choice((_ubjson, _json))(random)
    return zoo.pack({"xgboost-model": data}), f"packed {done}"


def _damaged(random: Random) -> tuple[bytes, str]:
    return _damage(random, _model(random.choice(KINDS)).targz)


def _tar(random: Random) -> bytes:
    raw = io.BytesIO()
    layout = random.choice((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
    with tarfile.open(fileobj=raw, mode="w", format=layout) as tar:
        for _ in range(random.choice((1, 1, 2, 3))):
            info, data = _member(random)
            tar.addfile(info, io.BytesIO(data))
    return raw.getvalue()


_NAMES = (
    "xgboost-model", "m.ubj", "m.json", "../m.ubj", "/m.ubj", "a/../../m", "./xgboost-model",
    "n" * 90 + "/" + "n" * 90, "é.ubj",
)  # fmt: skip
_TYPES = (tarfile.REGTYPE,) * 6 + (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE)


def _member(random: Random) -> tuple[tarfile.TarInfo, bytes]:
    model = _model(random.choice(KINDS))
    data = random.choice((model.ubj, model.json, model.targz, b"", b"\0" * 3000))
    info = tarfile.TarInfo(random.choice(_NAMES))
    info.type = random.choice(_TYPES)
    info.linkname = random.choice(("", "xgboost-model", "/etc/passwd"))
    info.size = len(data) if info.isreg() else 0
    return info, data


def _members(random: Random) -> tuple[bytes, str]:
    return gzip.compress(_tar(random), 1), "members"


def _header(random: Random) -> tuple[bytes, str]:
    """Change one field of a header, mostly under a right checksum."""
    data = bytearray(_tar(random))
    base = random.choice([at for at in range(0, len(data) - 511, 512) if data[at + 257 : at + 262] == b"ustar"])
    start, size = random.choice(((0, 100), (100, 8), (124, 12), (136, 12), (156, 1), (157, 100), (257, 8), (345, 155)))
    new = random.choice((
        b"7" * size, b"\xff" * size, b"\x80" + bytes(size - 1), b"\0" * size, b"-1",
        b"%011o" % random.randrange(1 << 33), random.choice(b"0123456789xgLKSV").to_bytes(), random.randbytes(size),
    ))[:size]  # fmt: skip
    data[base + start : base + start + len(new)] = new
    if random.random() < 0.9:
        data[base + 148 : base + 156] = b" " * 8
        data[base + 148 : base + 156] = b"%06o\0 " % sum(data[base : base + 512])
    return gzip.compress(bytes(data), 1), "header"


def _gzip_header(random: Random) -> tuple[bytes, str]:
    """Change the flags, the optional fields or the trailer, or put several streams one after the other."""
    data = _model(random.choice(KINDS)).targz
    change = random.choice(("flags", "extra", "trailer", "streams", "method", "tail"))
    changed = {
        "flags": data[:3] + bytes([random.randrange(256)]) + data[4:],
        "extra": data[:3] + b"\x04" + data[4:10] + struct.pack("<H", random.randrange(65536)) + data[10:],
        "trailer": data[:-8] + random.randbytes(8),
        "streams": data * random.choice((2, 3)),
        "method": data[:2] + random.randbytes(1) + data[3:],
        "tail": data + random.choice((b"\0" * 512, b"\x1f\x8b", data[:20], random.randbytes(30))),
    }
    return changed[change], f"gzip {change}"


_FORMS: dict[str, Callable[[Random], tuple[bytes, str]]] = {".ubj": _ubjson, ".json": _json, ".tar.gz": _targz}

"""What the bytes are, said from their first block: a model in one of two formats, or something that is refused by name.

What could run code (pickles) is never opened, what is no longer read (the legacy binary format) is named with the
version that wrote it, and each refusal says what to do about it.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

Kind = Literal["corrupt", "unsupported", "unsafe"]
Format = Literal["ubj", "json", "other"]
Container = Literal["raw", "tar", "tar.gz"]

BLOCK = 512
"""Tar counts in these, and no format needs more to be told from the others."""

_TAIL = 1 << 12  # white space that may follow a JSON model


class Limits(NamedTuple):
    """What an artifact may cost before it is refused.

    ``max_unpacked`` counts the skipped members too. ``max_ratio`` is that of unpacked to compressed bytes,
    once more than 1 MiB has been unpacked.
    """

    max_members: int = 64
    max_unpacked: int = 4 << 30
    max_ratio: int = 200


class Unpacked(NamedTuple):
    """A model ready for XGBoost's parser, and where it was found."""

    data: bytes | bytearray
    format: Format
    container: Container
    member: str | None


class ArtifactError(Exception):
    """The bytes are refused; ``kind`` picks the error the caller sees, ``facts`` become its attributes."""

    def __init__(self, kind: Kind, message: str, **facts: str | int | list[str]) -> None:
        super().__init__(message)
        self.kind = kind
        self.facts = facts


_MODEL = re.compile(rb"\{\s*(?:(?P<json>\")|[A-Za-z])")  # as XGBoost's DispatchModelType tells them apart
_SNAPSHOT = re.compile(rb"\{(?:\s*\"Config\"|L\0{7}\x06Config)")
_LEGACY = rb"(?:CONFIG-offset:.{8})?(?:binf)?(?P<fields>.{136})[\x01-\x40]\0{7}[a-z]+:|binf|bs64|CONFIG-offset:"

_RESAVE = "load it where it was made and save it with booster.save_model('model.ubj')"
_NO_PICKLE = f"which is never opened because it can run code; {_RESAVE}"

# Start of the bytes -> what they are. Looked at, and compiled, only when something is refused.
_UNSUPPORTED: dict[bytes, str] = {
    # Protocols 2 to 5 say so; 0 and 1 name a class to call.
    rb"\x80[\x02-\x05]|(?=[(\]}c]).*?c[A-Za-z_][\w.]*\n[A-Za-z_]\w*\n": f"a Python pickle, {_NO_PICKLE}",
    rb"\x78[\x01\x5e\x9c\xda]": f"zlib data, as joblib puts around a Python pickle, {_NO_PICKLE}",
    rb"PK[\x01-\x08]": "a zip archive; store the model as it is, or pack it with tar czf",
    rb"\x1f\x8b": "gzip once more; compress it only once",
    rb"BZh[1-9]|\xfd7zXZ|\x28\xb5\x2f\xfd|7z\xbc\xaf": "compressed with bzip2, xz, zstd or 7z; use gzip",
    rb"tree\r?\nversion=": "a LightGBM model; only XGBoost models are read",
    rb"CBM1": "a CatBoost model; only XGBoost models are read",
    rb"\x08[\x01-\x20]\x12": "an ONNX model; store the XGBoost model that it was converted from",
}
_NO_MODEL: dict[bytes, str] = {
    rb"(?i)\s*<(?:!doctype )?html": "an HTML page, perhaps an error or a log-in; see what the store returns",
    rb"\s*<[?A-Za-z]": "XML, perhaps an error; see what the store returns",
    rb"(?:\xef\xbb\xbf|\s+)\{": "JSON, but XGBoost wants it to start with '{'; remove what comes before",
}


def model_format(data: bytes | bytearray, where: str) -> Format:
    """Tell UBJSON from JSON as XGBoost does, and refuse what its parser overlooks or cannot explain."""
    found = _MODEL.match(data)
    if found is None:
        raise refusal(bytes(data[:BLOCK]), where)
    tail = bytes(data[-_TAIL:])
    if not (tail.rstrip() if found["json"] else tail).endswith(b"}"):
        message = f"{where} does not end like a model: it is cut short or other bytes follow; upload it again"
        raise ArtifactError("corrupt", message)
    if _SNAPSHOT.match(data):
        # Beside the training configuration the model is one level deeper than XGBoost looks for it.
        raise ArtifactError("unsupported", f"{where} is a snapshot of a Booster, as pickles hold it; {_RESAVE}")
    if b"learner" not in data:
        message = f"{where} has no 'learner', and so is no XGBoost model; {_start(data)}"
        raise ArtifactError("corrupt", message)
    return "json" if found["json"] else "ubj"


def refusal(head: bytes, where: str) -> ArtifactError:
    """Name what starts like this, and say what to do about it."""
    if not head:
        return ArtifactError("corrupt", f"{where} is empty; upload it again")
    if legacy := re.match(_LEGACY, head, re.DOTALL):
        return _legacy_refusal(legacy["fields"], where)
    for pattern, what in _UNSUPPORTED.items():
        if re.match(pattern, head, re.DOTALL):
            return ArtifactError("unsupported", f"{where} is {what}")
    for pattern, what in _NO_MODEL.items():
        if re.match(pattern, head):
            return ArtifactError("corrupt", f"{where} is {what}")
    return ArtifactError("corrupt", f"{where} is neither an XGBoost model nor a tar; {_start(head)}")


def _legacy_refusal(fields: bytes | None, where: str) -> ArtifactError:
    writer = "XGBoost before 3.1"
    if fields:
        # Two of the words that were reserved before 1.0 hold the version since.
        major, minor = (int.from_bytes(fields[at : at + 4], "little") for at in (20, 24))
        writer = f"XGBoost {major}.{minor}" if major else "XGBoost before 1.0"
    return ArtifactError(
        "unsupported",
        f"{where} is in the legacy binary format, written by {writer}; "
        "load it with xgboost>=1.6,<3.1 and save it with booster.save_model('model.ubj')",
        writer=writer,
    )


def _start(data: bytes | bytearray) -> str:
    return f"it starts with {bytes(data[:24])!r}"


def too_many_bytes(limits: Limits) -> ArtifactError:
    """Refuse what has outgrown the limit."""
    return ArtifactError(
        "unsafe",
        f"the artifact unpacks to more than {limits.max_unpacked} bytes, the most that is accepted",
        limit=limits.max_unpacked,
    )

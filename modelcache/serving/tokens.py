"""The token file: who may come in, and to which models."""

from __future__ import annotations

import hmac
import logging
import re
import secrets
import stat
from typing import TYPE_CHECKING

from modelcache.errors import ModelCacheError
from modelcache.serving.access import Grant

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

logger = logging.getLogger("modelcache.serving")

_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")
"""What RFC 6750 lets a bearer token be made of."""


class TokenFileError(ModelCacheError):
    """The token file cannot be read, or a line of it is not understood."""


class Tokens:
    """The grants of tokens, found by keyed hashes of them.

    The key is made anew in each process. Nobody outside can choose or know a hash, so that the time it takes to look
    one up tells nothing of the tokens, which are not kept.
    """

    def __init__(self, grants: dict[str, Grant]) -> None:
        self._key = secrets.token_bytes(32)
        self._grants = {self._hash(token.encode()): grant for token, grant in grants.items()}

    def __len__(self) -> int:
        return len(self._grants)

    def grant_of(self, token: bytes) -> Grant | None:
        """Return what ``token`` opens; None for one that is not known."""
        return self._grants.get(self._hash(token))

    def _hash(self, token: bytes) -> bytes:
        return hmac.digest(self._key, token, "sha256")


def read_tokens(file: Path) -> Tokens:
    """Read a file of one token a line, each followed by the patterns of its models if it is not for all of them.

    Empty lines, and what follows a ``#``, are ignored. Warns if any user of the system can read the file.
    """
    try:
        text = file.read_text(encoding="utf-8")
        mode = file.stat().st_mode
    except (OSError, UnicodeDecodeError) as error:
        raise TokenFileError(f"The token file {file} cannot be read: {error}.") from error
    if mode & stat.S_IROTH:
        logger.warning("every user of this system can read the token file %s: chmod o-rwx %s", file, file)
    grants: dict[str, Grant] = {}
    for number, token, patterns in _lines(text):
        if not _TOKEN.fullmatch(token):
            raise TokenFileError(
                f"Line {number} of {file} does not begin with a token: that is letters, digits and -._~+/ alone."
            )
        if token in grants:
            raise TokenFileError(f"Line {number} of {file} has a token that was there before: put all patterns in one.")
        try:
            grants[token] = Grant(patterns or ("*",))
        except ValueError as error:
            raise TokenFileError(f"Line {number} of {file}: {error}") from error
    if not grants:
        raise TokenFileError(f"There is no token in {file}: nobody could use the server. Write one on a line.")
    return Tokens(grants)


def _lines(text: str) -> Iterator[tuple[int, str, tuple[str, ...]]]:
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if words:
            yield number, words[0], tuple(words[1:])

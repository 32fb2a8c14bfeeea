"""The token file: what a line may be, and what is said of one that is wrong."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest

from modelcache.serving.access import Grant
from modelcache.serving.tokens import TokenFileError, read_tokens

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "tokens"


def write(file: Path, text: str, mode: int = 0o600) -> Path:
    file.write_text(text)
    file.chmod(mode)
    return file


def test_a_line_is_a_token_and_the_models_it_is_for(file: Path) -> None:
    """One token a line, patterns after it; without patterns it is for all models; comments and empty lines are none."""
    tokens = read_tokens(write(file, "# ours\nadmin-1\n\nteam.a== tenant_a/* shared_*  # theirs\n"))
    assert len(tokens) == 2
    everything, some = tokens.grant_of(b"admin-1"), tokens.grant_of(b"team.a==")
    assert everything is not None and everything.everything
    assert some is not None and not some.everything
    assert some.allows("tenant_a/Chicago_IL") and some.allows("shared_1") and not some.allows("tenant_b/Chicago_IL")


@pytest.mark.parametrize(
    "token", [b"", b"admin", b"admin-12", b"ADMIN-1", b"admin-1 ", b"\xff\xfe", b"tenant_a/*", b"#"]
)
def test_only_the_token_itself_opens(file: Path, token: bytes) -> None:
    """What is nearly a token, or stands elsewhere in the file, is none."""
    assert read_tokens(write(file, "admin-1\nother tenant_a/* # admin\n")).grant_of(token) is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no token"),
        ("# nothing\n", "no token"),
        ("good\nbäd\n", "Line 2"),
        ("to,ken\n", "Line 1"),
        ("twice\nonce\ntwice tenant_a/*\n", "Line 3"),
        ("good *.json\n", r"Line 1 .* write \* if that is meant"),
        ("good tenant_a/v?.tar.gz\n", r"write tenant_a/v\? if that is meant"),
    ],
)
def test_a_file_that_is_not_understood_is_refused(file: Path, text: str, said: str) -> None:
    """The error names the line, and never the token."""
    with pytest.raises(TokenFileError, match=said) as refused:
        read_tokens(write(file, text))
    assert not any(word in str(refused.value) for word in ("bäd", "to,ken", "twice"))


def test_a_file_that_cannot_be_read_is_refused(file: Path) -> None:
    """No file, a folder, and bytes that are no text are one error each, which names the file."""
    with pytest.raises(TokenFileError, match="tokens cannot be read"):
        read_tokens(file)
    with pytest.raises(TokenFileError, match="cannot be read"):
        read_tokens(file.parent)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TokenFileError, match="tokens cannot be read"):
        read_tokens(file)


@pytest.mark.parametrize(("mode", "warned"), [(0o600, False), (0o640, False), (0o644, True)])
def test_a_file_that_all_can_read_is_warned_of(
    file: Path, mode: int, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Tokens that every user of the system can read are hardly secret; a group may be the server's own."""
    with caplog.at_level(logging.WARNING):
        read_tokens(write(file, "admin-1\n", mode))
    assert ("chmod" in caplog.text) == warned


@pytest.mark.parametrize(
    ("pattern", "name", "allowed"),
    [
        ("tenant_a/*", "tenant_a/Chicago_IL", True),
        ("tenant_a/*", "tenant_a/2026/Chicago_IL.tar.gz", True),
        ("tenant_a/*", "tenant_ab/Chicago_IL", False),
        ("tenant_a/*", "tenant_a", False),
        ("tenant_a/*", "Tenant_a/Chicago_IL", False),
        ("tenant_a/*", "x/tenant_a/Chicago_IL", False),
        ("tenant_a/*", "\ntenant_a/Chicago_IL", False),
        ("Chicago_IL", "Chicago_IL", True),
        ("Chicago_IL", "Chicago_IL.tar.gz", True),
        ("Chicago_IL.tar.gz", "Chicago_IL", True),
        ("Chicago_IL.ubj", "Chicago_IL.json", True),
        ("Chicago_IL", "Chicago_IL.tar.gz.json", False),
        ("Chicago_IL", "Chicago_IL\n", False),
        ("Chicago_??", "Chicago_TX", True),
        ("v[12]/*", "v2/m", True),
        ("*", "anything/at all", True),
        ("*.js*", "a.json", False),
        ("a|b", "a", False),
    ],
)
def test_patterns(pattern: str, name: str, allowed: bool) -> None:
    """A pattern covers a whole name, in its case; ``*`` covers slashes too; a suffix makes no other model of it."""
    assert Grant((pattern,)).allows(name) is allowed


def test_no_pattern_is_no_model() -> None:
    """A grant of nothing allows nothing."""
    assert not Grant(()).allows("Chicago_IL")

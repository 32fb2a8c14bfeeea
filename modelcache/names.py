"""Names of models, as callers write them: checked before any store sees them."""

from __future__ import annotations

from unicodedata import category

from modelcache.errors import InvalidModelNameError

SUFFIXES = (".tar.gz", ".ubj", ".json")
"""Tried in this order for a name without one of them."""

_LONGEST = 1024
_CONTROL = ("Cc", "Cs")
"""Control characters, and surrogates, which no file system or protocol takes."""


def check_name(name: str) -> str:
    """Return ``name``; InvalidModelNameError if it could leave the store or is no name."""
    if not isinstance(name, str):
        raise InvalidModelNameError(f"A model name is text, not {type(name).__name__}.", model=None)
    problem = _problem(name)
    if problem:
        shown = name if len(name) <= _LONGEST else name[:40] + "..."
        raise InvalidModelNameError(
            f"{shown!r} is no model name: {problem}. Use names like 'Chicago_IL' or 'tenant_a/Chicago_IL'.",
            model=name,
        )
    return name


def is_name(name: str) -> bool:
    """Say whether :func:`check_name` lets ``name`` pass."""
    return not _problem(name)


def split_suffix(name: str) -> tuple[str, str]:
    """Return the name without its suffix, and the suffix or ""."""
    for suffix in SUFFIXES:
        if name.endswith(suffix) and len(name) > len(suffix) and name[-len(suffix) - 1] != "/":
            return name[: -len(suffix)], suffix
    return name, ""


def _problem(name: str) -> str:
    if not name:
        return "it is empty"
    if len(name) > _LONGEST:
        return f"it has {len(name)} characters, the limit is {_LONGEST}"
    if "\\" in name or _has_control(name):
        return "it has a backslash or a control character"
    if name.startswith("/"):
        return "it is absolute"
    if any(segment in ("", ".", "..") for segment in name.split("/")):
        return "it has an empty, '.' or '..' segment"
    return ""


def _has_control(name: str) -> bool:
    plain = name.isascii() and name.isprintable()  # as nearly all names are
    return not plain and any(category(character) in _CONTROL for character in name)


def spellings(name: str) -> list[str]:
    """Return the names that the artifact of ``name`` may be called by, itself the first."""
    stem, suffix = split_suffix(name)
    if not suffix:
        return [name, *(name + known for known in SUFFIXES)]
    return [name] if split_suffix(stem)[1] else [name, stem]

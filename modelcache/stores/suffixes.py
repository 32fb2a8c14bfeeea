"""From names to files and back: which files a name may stand for, and what a file is called."""

from __future__ import annotations

from modelcache.names import SUFFIXES, is_name, split_suffix

_REMEMBERED = 100_000


class Suffixes:
    """Remembers which suffix a name was found with, so that it is looked for first the next time.

    Of 100,000 names; then it begins anew, and each of them costs one more look.
    """

    def __init__(self) -> None:
        self._found: dict[str, str] = {}

    def candidates(self, name: str) -> list[tuple[str, str]]:
        """Return the files that ``name`` may stand for, each with its suffix, in the order to look for them."""
        stem, suffix = split_suffix(name)
        if suffix:
            return [(name, suffix)]
        found = self.remembered(name)
        return [(stem + known, known) for known in sorted(SUFFIXES, key=lambda known: known != found)]

    def remembered(self, name: str) -> str | None:
        """Return the suffix that ``name`` was found with."""
        return self._found.get(name)

    def remember(self, name: str, suffix: str) -> None:
        """Note that ``name`` was found with ``suffix``."""
        if len(self._found) >= _REMEMBERED:
            self._found.clear()  # to know which was found longest ago would take 50 bytes more for each name
        self._found[name] = suffix


def name_of(file: str) -> str:
    """Return the name that a file is offered under; "" for what is no artifact, or has a name that no call can use."""
    stem, suffix = split_suffix(file)
    # A stem that has a suffix itself would be taken for the name of another file.
    name = file if split_suffix(stem)[1] else stem
    return name if suffix and is_name(name) else ""

"""The names that clients have given to artifacts, in an order that lists can be read from page by page."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator
    from collections.abc import Set as AbstractSet


class Given(NamedTuple):
    """What a name was given to."""

    artifact: str
    url: str


class GivenNames:
    """What each name was given to; by artifact too, and sorted."""

    def __init__(self) -> None:
        self._given: dict[str, Given] = {}
        self._sorted: list[str] = []
        self._by_artifact: dict[str, set[str]] = {}

    def __len__(self) -> int:
        return len(self._sorted)

    def get(self, name: str) -> Given | None:
        """Return what ``name`` was given to, if it was."""
        return self._given.get(name)

    def of(self, artifact: str) -> AbstractSet[str]:
        """Return the names that were given to ``artifact``, written like this."""
        return self._by_artifact.get(artifact, frozenset())

    def after(self, name: str) -> Iterator[tuple[str, Given]]:
        """Yield the names that come after ``name``, sorted."""
        names = islice(self._sorted, bisect_right(self._sorted, name), None)
        return ((found, self._given[found]) for found in names)

    def put(self, name: str, given: Given | None) -> None:
        """Give ``name``, to something else than before if it was given; None takes it away."""
        before = self._given.pop(name, None)
        if before is not None:
            del self._sorted[bisect_left(self._sorted, name)]
            names = self._by_artifact[before.artifact]
            names.remove(name)
            if not names:
                del self._by_artifact[before.artifact]
        if given is not None:
            self._given[name] = given
            insort(self._sorted, name)
            self._by_artifact.setdefault(given.artifact, set()).add(name)

"""A bounded memory of keys."""

from __future__ import annotations

from collections import OrderedDict
from typing import TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Recent(OrderedDict[K, V]):
    """What was noted of each key; beyond ``most`` of them, who was noted longest ago is forgotten.

    A cachetools.LRUCache takes 40 bytes more per key, in which it counts what is looked up as well.
    """

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most

    def note(self, key: K, value: V) -> None:
        """Note ``value``, in the place of what was noted before."""
        self[key] = value
        self.move_to_end(key)
        if len(self) > self._most:
            self.popitem(last=False)

"""What answers many clients: the rivals of latency.py, and modelcache with queues of other lengths.

``python benchmarks/throughput_rivals.py KEY FOLDER`` serves orders, as rivals.py does.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

from rivals import RIVALS as BY_HAND
from rivals import ModelCacheArray, Rival

DEADLINE = 0.1
"""Seconds that the callers of the overloaded rivals wait for."""
QUEUE_LIMIT = 32
UNLIMITED = 1 << 20


class Limited(ModelCacheArray):
    """A queue as long as is answered within the deadline."""

    label = f"modelcache, queue_limit={QUEUE_LIMIT}"
    queue_limit = QUEUE_LIMIT
    options = {"queue_limit": QUEUE_LIMIT}  # noqa: RUF012 - one for all


class Unlimited(ModelCacheArray):
    """A queue without an end, and callers who wait for ever."""

    label = "modelcache, no limit"
    options = {"queue_limit": UNLIMITED}  # noqa: RUF012


class OnlyTimeouts(Unlimited):
    """A queue without an end, and callers who give up after the deadline."""

    label = "modelcache, no limit, timeout"

    async def predict(self, name: str, rows: Any) -> Any:
        """Answer one call."""
        return await self._registry.predict(name, rows, timeout=DEADLINE)


RIVALS: dict[str, type[Rival]] = {key: BY_HAND[key] for key in ("modelcache", "to_thread", "process-pool", "direct")}
"""Those of the small models, by the key they have in commands and results."""

HEAVY: dict[str, type[Rival]] = {
    "limited": Limited,
    "unlimited": Unlimited,
    "timeouts": OnlyTimeouts,
    **{key: BY_HAND[key] for key in ("to_thread", "process-pool", "direct")},
}
"""Those of the large ones, which are overloaded."""


if __name__ == "__main__":
    from harness import serve

    asyncio.run(serve((RIVALS | HEAVY)[sys.argv[1]](Path(sys.argv[2])), Path(sys.argv[2])))

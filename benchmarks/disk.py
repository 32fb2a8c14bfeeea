"""What the disk tier costs by itself, without stores and workers: python benchmarks/disk.py [folder]."""

from __future__ import annotations

import asyncio
import hashlib
import os
import sys
import tempfile
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

from modelcache.stores.disk_tier import DiskTier

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

STORE = "s3://bucket/models"
COPIES = 10_000
BYTES = 200
"""Of a copy: small, as it is the index that is measured."""

GROUP = 8


async def publish(tier: DiskTier, number: int) -> float:
    """Publish a copy and return the seconds that took, without writing the file."""
    data = number.to_bytes(8) + os.urandom(BYTES - 8)
    incoming = tier.incoming()
    incoming.write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    started = perf_counter()
    copy = await tier.publish(
        incoming, store=STORE, name=f"tenant_a/{number}", version="an-etag", suffix=".tar.gz", size=BYTES,
        digest=digest, artifact_bytes=100, cost=0.1, validated_at=float(number),
    )  # fmt: skip
    assert copy is not None
    return perf_counter() - started


async def publish_together(tier: DiskTier, numbers: range) -> None:
    """Publish several copies at once; this time, writing their files is counted."""
    await asyncio.gather(*(publish(tier, number) for number in numbers))


async def seconds(call: Callable[[], Awaitable[object]]) -> float:
    """Return how long a call takes."""
    started = perf_counter()
    await call()
    return perf_counter() - started


def show(what: str, times: list[float]) -> None:
    """Print the spread of some times."""
    middle, late = np.percentile(times, [50, 99]) * 1e6
    print(f"{what:<28}p50 {middle:9,.1f}   p99 {late:9,.1f}   max {max(times) * 1e6:9,.1f} us")


async def measure(folder: Path) -> None:
    """Fill a tier with copies, look them up, replace them, and open it again."""
    tier = DiskTier(folder, budget=COPIES * BYTES)
    await tier.open()
    show("publish", [await publish(tier, number) for number in range(COPIES // 2)])
    groups = [range(first, first + GROUP) for first in range(COPIES // 2, COPIES, GROUP)]
    times = [await seconds(partial(publish_together, tier, group)) for group in groups]
    show(f"publish, each of {GROUP}", [time / GROUP for time in times])
    known = [f"tenant_a/{number}" for number in range(COPIES)]
    show("find, known", [await seconds(partial(tier.find, STORE, name)) for name in known])
    missing = [f"nobody/{number}" for number in range(2000)]
    show("find, missing", [await seconds(partial(tier.find, STORE, name)) for name in missing])
    show("publish, evicting", [await publish(tier, COPIES + number) for number in range(2000)])
    await tier.close()
    opening = []
    for _ in range(5):
        again = DiskTier(folder, budget=COPIES * BYTES)
        opening.append(await seconds(again.open))
        await again.close()
    show(f"open with {COPIES:,} copies", opening)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as made:
        asyncio.run(measure(Path(made)))

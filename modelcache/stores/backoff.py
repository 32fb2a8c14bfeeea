"""How long to wait before a store is asked again, and when to give up."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from modelcache.errors import StoreUnavailableError


@dataclass(frozen=True, slots=True, kw_only=True)
class Backoff:
    """Exponential back-off with full jitter: a pause is drawn evenly between nothing and a bound that doubles.

    Many clients that failed at one moment come back spread out, and earlier than with half of the bound fixed. Source:
    M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015. ``draw`` gives numbers from [0, 1).
    """

    failures: int = 5
    """So many in a row are final."""
    first: float = 0.1
    """Seconds that bound the first pause."""
    longest: float = 5.0
    """Seconds that bound any pause."""
    patience: float = 30.0
    """Seconds that a store may ask for by Retry-After; one that asks for more is left to the caller."""
    draw: Callable[[], float] = random.random
    pause: Callable[[float], Awaitable[object]] = asyncio.sleep

    async def after(self, failures: int, error: StoreUnavailableError) -> None:
        """Pause after so many failures in a row, the last being ``error``; raise it if that was the last try."""
        asked = error.retry_after or 0.0
        if failures >= self.failures or asked > self.patience:
            raise error
        await self.pause(max(asked, self.draw() * min(self.longest, self.first * 2 ** (failures - 1))))

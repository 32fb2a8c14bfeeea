"""Loading many models ahead of their first calls."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from modelcache.errors import ModelCacheError, RegistryClosedError
from modelcache.records import ModelInfo, PreloadProgress, PreloadReport

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, Awaitable, Callable, Iterable, Iterator


async def preload(
    load: Callable[[str], Awaitable[ModelInfo]],
    names: Iterable[str] | AsyncIterable[str],
    *,
    concurrency: int,
    on_progress: Callable[[PreloadProgress], None] | None,
) -> PreloadReport:
    """Call ``load`` for each of ``names``, ``concurrency`` at once; failures are collected, not raised."""
    if isinstance(names, str):
        raise TypeError(f"preload takes several names: write preload([{names!r}]).")
    wanted = list(dict.fromkeys([n async for n in names] if hasattr(names, "__aiter__") else names))
    run = _Preload(load, wanted, on_progress)
    started = time.perf_counter()
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(concurrency, len(wanted))):
                group.create_task(run.load_rest())
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return PreloadReport(tuple(run.loaded), run.failed, time.perf_counter() - started)


class _Preload:
    """Several tasks that take names from one list."""

    def __init__(
        self,
        load: Callable[[str], Awaitable[ModelInfo]],
        names: list[str],
        on_progress: Callable[[PreloadProgress], None] | None,
    ) -> None:
        self.loaded: list[ModelInfo] = []
        self.failed: dict[str, ModelCacheError] = {}
        self._load = load
        self._rest: Iterator[str] = iter(names)
        self._total = len(names)
        self._on_progress = on_progress

    async def load_rest(self) -> None:
        for name in self._rest:
            error: ModelCacheError | None = None
            try:
                self.loaded.append(await self._load(name))
            except RegistryClosedError:
                raise  # nothing that follows could succeed
            except ModelCacheError as failure:
                error = self.failed[name] = failure
            if self._on_progress is not None:
                done = len(self.loaded) + len(self.failed)
                self._on_progress(PreloadProgress(done, self._total, name, error))

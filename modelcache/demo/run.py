"""From the options of ``modelcache demo`` to its files and its output."""

from __future__ import annotations

import asyncio
import shlex
import time
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from modelcache import ModelRegistry
from modelcache.commands.terminal import track
from modelcache.demo.chart import draw
from modelcache.demo.fleet import NEWCOMERS, Fleet
from modelcache.demo.report import print_comparison, print_metrics
from modelcache.demo.story import Story

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console


def run(console: Console, *, out: Path, models: int, calls: int, seed: int) -> None:
    """Train the models, tell the story, and say where everything is."""
    fleet = Fleet(out, models)
    started = time.perf_counter()
    fleet.train(seed, partial(track, console, what="Training"))
    seconds = time.perf_counter() - started
    console.print(f"Trained {models + len(NEWCOMERS)} models of house prices, one per city, in {seconds:.1f} s.")
    story = asyncio.run(_tell(console, fleet, calls, seed))
    draw(story.calls, fleet.chart)
    _print_places(console, fleet)


async def _tell(console: Console, fleet: Fleet, calls: int, seed: int) -> Story:
    # LRU instead of the default GDSF, which weighs measured load times: so the same seed evicts the same models.
    async with ModelRegistry(fleet.models, policy="lru") as registry:
        story = Story(registry, fleet, console, np.random.default_rng(seed))
        await story.tell(calls)
        print_metrics(console, registry.stats())
    print_comparison(console, story.calls)
    return story


def _print_places(console: Console, fleet: Fleet) -> None:
    store, samples = shlex.quote(str(fleet.models)), shlex.quote(str(fleet.samples))
    console.print("\nWhere everything is", style="bold")
    console.print(f"  models  {fleet.models}", soft_wrap=True)
    console.print(f"  houses  {fleet.samples}", soft_wrap=True)
    console.print(f"  chart   {fleet.chart}", soft_wrap=True)
    console.print("\nTry", style="bold")
    console.print(f"  modelcache inspect {store}", soft_wrap=True)
    console.print(f"  modelcache predict {store} {fleet.cities[-1]} {samples}", soft_wrap=True)

"""Small apps that tests run in a process of their own."""

from __future__ import annotations

import os
import sys
import textwrap
import time
from pathlib import Path

import psutil

import modelcache
import odd

PATIENCE = 30
FOLDERS = os.pathsep.join([str(Path(modelcache.__file__).parent.parent), str(Path(odd.__file__).parent)])
ENVIRONMENT = {"PATH": os.environ.get("PATH", os.defpath), "PYTHONPATH": FOLDERS, "PYTHONUNBUFFERED": "1"}

PREAMBLE = """
    import asyncio, gc, json, logging, os, signal, sys, warnings
    import odd, psutil
    from modelcache import MemoryStore, ModelRegistry, RegistryClosedError
    from modelcache.pool import pool

    def make(workers):
        store = MemoryStore({"odd.json": odd.artifact()})
        return ModelRegistry(store, workers=workers, memory_budget="64 MiB", predictor=odd.ODD)

    def tell(**facts):
        print(json.dumps(facts), flush=True)
"""


def command(*parts: str, arguments: tuple[str, ...] = ()) -> list[str]:
    """Return the command that runs an app made of ``parts``, after the preamble, with all warnings shown."""
    return [sys.executable, "-W", "always", "-c", "".join(map(textwrap.dedent, (PREAMBLE, *parts))), *arguments]


def assert_ended(pids: list[int]) -> None:
    """Wait until processes have ended."""
    deadline = time.monotonic() + PATIENCE
    while any(map(alive, pids)):
        assert time.monotonic() < deadline, f"{[pid for pid in pids if alive(pid)]} are still alive"
        os.sched_yield()


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False

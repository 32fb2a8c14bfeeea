"""Structured logs: every event with its facts, and lines of JSON that any reader can parse."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from pythonjsonlogger.json import JsonFormatter

import zoo
from modelcache import MemoryStore, ModelNotFoundError, UnsupportedArtifactError
from modelcache.telemetry.logs import log_events

if TYPE_CHECKING:
    from conftest import MakeRegistry

OLD, NEW = zoo.model(seed=0), zoo.model(seed=1)


class Lines(logging.Handler):
    """Keeps what it is given, as a file would show it."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(JsonFormatter("{levelname}{message}", style="{", rename_fields={"levelname": "level"}))
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))

    def read(self) -> list[dict[str, Any]]:
        assert not any("\n" in line for line in self.lines)
        return [json.loads(line, parse_constant=pytest.fail) for line in self.lines]


@pytest.fixture
def lines() -> Lines:
    return Lines()


@pytest.fixture
def logger(lines: Lines) -> logging.Logger:
    """A logger of the test's own, which nobody else hears."""
    logger = logging.Logger("tests.telemetry", logging.DEBUG)  # noqa: LOG001 - it ends with the test
    logger.addHandler(lines)
    return logger


async def test_each_event_is_logged_with_its_facts(
    make_registry: MakeRegistry, logger: logging.Logger, lines: Lines
) -> None:
    """Which model, which version, how long, how large, and why."""
    store = MemoryStore({"m.ubj": OLD.ubj, "zip.tar.gz": b"PK\3\4" + bytes(64)})
    registry = await make_registry(store)
    log_events(registry, logger)
    old = await registry.load("m")
    store.put("m.ubj", NEW.ubj)
    new = await registry.refresh("m")
    await registry.unload("m")
    with pytest.raises(ModelNotFoundError):
        await registry.load("absent")
    with pytest.raises(UnsupportedArtifactError):
        await registry.load("zip")
    told = lines.read()
    kept = ("level", "event", "model", "version", "seconds", "bytes", "cause", "replaced", "error")
    assert [[fact.get(name) for name in kept] for fact in told] == [
        ["INFO", "loaded", "m", old.version, old.load_seconds, old.size_bytes, None, None, None],
        ["INFO", "refreshed", "m", new.version, new.load_seconds, new.size_bytes, None, old.version, None],
        ["INFO", "evicted", "m", old.version, None, old.size_bytes, "replaced", None, None],
        ["INFO", "evicted", "m", new.version, None, new.size_bytes, "unload", None, None],
        ["INFO", "load_failed", "absent", None, None, None, None, None, "ModelNotFoundError"],
        ["WARNING", "load_failed", "zip", None, None, None, None, None, "UnsupportedArtifactError"],
    ]
    assert told[4]["message"].startswith("absent could not be loaded: ")
    assert "version" not in told[4]


async def test_the_death_of_a_worker_is_logged(
    make_registry: MakeRegistry, logger: logging.Logger, lines: Lines
) -> None:
    """With what ended it, and how many models went with it, but not the names of thousands."""
    registry = await make_registry(MemoryStore({"m.ubj": OLD.ubj}))
    await registry.load("m")
    log_events(registry, logger)
    pid = registry.stats().workers[0].pid
    psutil.Process(pid).kill()
    while not registry.stats().worker_restarts:
        await asyncio.sleep(0)
    evicted, died = lines.read()
    assert (evicted["event"], evicted["cause"]) == ("evicted", "worker")
    assert (died["level"], died["event"], died["models"]) == ("WARNING", "worker_died", 1)
    assert (died["pid"], died["signal"], died["exit_code"]) == (pid, 9, -9)


async def test_logging_can_be_ended(make_registry: MakeRegistry, logger: logging.Logger, lines: Lines) -> None:
    """What log_events returns ends it."""
    registry = await make_registry(MemoryStore({"m.ubj": OLD.ubj}))
    log_events(registry, logger)()
    await registry.load("m")
    assert lines.lines == []

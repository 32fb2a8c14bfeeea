"""Structured logs: every event with its facts, and lines of JSON that any reader can parse."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from logging.config import DictConfigurator
from typing import TYPE_CHECKING, Any

import psutil
import pytest

import zoo
from modelcache import MemoryStore, ModelNotFoundError, UnsupportedArtifactError
from modelcache.telemetry.logs import JSONFormatter, log_events

if TYPE_CHECKING:
    from conftest import MakeRegistry

OLD, NEW = zoo.model(seed=0), zoo.model(seed=1)


class Lines(logging.Handler):
    """Keeps what it is given, as a file would show it."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(JSONFormatter())
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


def test_a_line_says_when_where_and_what(logger: logging.Logger, lines: Lines) -> None:
    """The time is UTC, whatever the zone of the process; nothing of the record's inner life shows."""
    record = logger.makeRecord("a.b", logging.ERROR, "file.py", 7, "%s of %d", ("one", 2), None)
    record.created = 86_400.25
    logger.handle(record)
    assert lines.read() == [
        {"time": "1970-01-02T00:00:00.250Z", "level": "ERROR", "logger": "a.b", "message": "one of 2"}
    ]


def test_an_exception_is_a_text_of_its_own(logger: logging.Logger, lines: Lines) -> None:
    """With its traceback, and in one line still; so is a stack."""
    try:
        json.loads("{")
    except ValueError:
        logger.exception("it failed", stack_info=True)
    [line] = lines.read()
    assert line["exception"].startswith("Traceback") and line["exception"].endswith("line 1 column 2 (char 1)")
    assert "test_an_exception_is_a_text_of_its_own" in line["stack"]
    assert line["message"] == "it failed"


class Wordless:
    def __str__(self) -> str:
        raise RuntimeError("no text")


def ring() -> list[Any]:
    """A list that holds itself."""
    found: list[Any] = []
    found.append(found)
    return found


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("Köln \N{SNOWMAN}\n\u2028\udc80", "Köln \N{SNOWMAN}\n\u2028\udc80"),
        ({"a": [1, None, True]}, {"a": [1, None, True]}),
        (ValueError("broken"), "broken"),
        (b"\xff", r"b'\xff'"),
        (Wordless(), "<Wordless without a text: RuntimeError>"),
        (float("nan"), "nan"),
        ({(1, 2): 3}, "{(1, 2): 3}"),
        (ring(), "[[...]]"),
        (-sys.maxsize, -sys.maxsize),
    ],
    ids=["text", "dict", "error", "bytes", "wordless", "nan", "keys", "ring", "int"],
)
def test_whatever_comes_as_extra_is_shown(logger: logging.Logger, lines: Lines, value: Any, shown: Any) -> None:
    """As JSON where that can hold it, else as text; a line is always valid JSON."""
    logger.info("m", extra={"fact": value, "model": "m"})
    [line] = lines.read()
    assert (line["fact"], line["model"]) == (shown, "m")


def test_an_extra_takes_no_name_of_the_formatter_s(logger: logging.Logger, lines: Lines) -> None:
    """What every line has means the same in every line."""
    logger.info("m", extra={"level": "mine", "time": 3, "exception": "fine"})
    [line] = lines.read()
    assert (line["level"], line["exception"]) == ("INFO", "fine")
    assert line["time"].endswith("Z")


def test_it_is_configured_by_its_name() -> None:
    """As a file for dictConfig has it."""
    configurator = DictConfigurator({"version": 1})
    formatter = configurator.configure_formatter({"()": "modelcache.telemetry.logs.JSONFormatter"})
    assert isinstance(formatter, JSONFormatter)

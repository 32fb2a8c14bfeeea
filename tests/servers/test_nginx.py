"""The web server of the tests does what the tests of the HTTP store rely on."""

from __future__ import annotations

import gzip
import urllib.error
import urllib.request
from typing import TYPE_CHECKING

import pytest

from servers import nginx, required

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[nginx.Nginx]:
    with nginx.serving(tmp_path_factory.mktemp("nginx")) as server:
        (server.root / "a.ubj").write_bytes(b"0123456789")
        (server.root / "a.ubj.gz").write_bytes(gzip.compress(b"0123456789"))
        yield server


@pytest.mark.parametrize(
    ("path", "asked", "status", "told"),
    [
        ("/a.ubj", {"Range": "bytes=7-"}, 206, {"Content-Range": "bytes 7-9/10"}),
        ("/missing", {}, 404, {}),
        ("/private/a.ubj", {}, 401, {}),
        ("/gzip/a.ubj", {"Accept-Encoding": "gzip"}, 200, {"Content-Encoding": "gzip"}),
        ("/packed/a.ubj", {"Accept-Encoding": "identity"}, 200, {"Content-Encoding": "gzip"}),
        ("/moved/a.ubj", {}, 200, {"Content-Length": "10"}),
        ("/dated/a.ubj", {}, 200, {"ETag": None}),
        ("/undated/a.ubj", {}, 200, {"ETag": None, "Last-Modified": None}),
        ("/rangeless/a.ubj", {"Range": "bytes=7-"}, 200, {"Content-Length": "10"}),
    ],
)
def test_each_location_serves_in_its_way(
    server: nginx.Nginx, path: str, asked: dict[str, str], status: int, told: dict[str, str | None]
) -> None:
    """One folder, with and without ranges, validators, compression and a password."""
    request = urllib.request.Request(server.url + path, headers=asked)
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            got, headers = response.status, response.headers
    except urllib.error.HTTPError as error:
        got, headers = error.code, error.headers
        error.close()
    assert got == status
    assert {name: headers[name] for name in told} == told


def test_a_program_that_is_not_there_skips_or_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A developer without a server skips its tests and is told why; where everything is required they fail."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("MODELCACHE_REQUIRE_SERVERS", raising=False)
    with pytest.raises(pytest.skip.Exception, match=r"no-such-server is not installed: install it\."):
        required.find_program("no-such-server", "install it.")
    monkeypatch.setenv("MODELCACHE_REQUIRE_SERVERS", "1")
    with pytest.raises(pytest.fail.Exception, match=r"install it\. \(MODELCACHE_REQUIRE_SERVERS=1\)"):
        required.find_program("no-such-server", "install it.")

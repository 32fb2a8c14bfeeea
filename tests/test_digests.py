"""Rule A2: an artifact whose bytes are not those that its store announced."""

from __future__ import annotations

import asyncio
import hashlib
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import odd
import zoo
from lone_worker import LoneWorker
from modelcache import Artifact, CorruptArtifactError, MemoryStore, NotModified, StoreError
from modelcache.pool import wire

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import MakeRegistry

OTHER = hashlib.sha256(b"another artifact").hexdigest()


class Announces(MemoryStore):
    """Announces one digest for whatever it delivers."""

    def __init__(self, artifacts: dict[str, bytes], digest: Any) -> None:
        super().__init__(artifacts)
        self.digest = digest

    async def fetch(self, name: str, *, if_version: str | None = None) -> Artifact | NotModified:
        found = await super().fetch(name, if_version=if_version)
        return replace(found, digest=self.digest) if isinstance(found, Artifact) else found


@pytest.fixture
def odd_worker() -> Iterator[LoneWorker]:
    worker = LoneWorker(odd.ODD)
    yield worker
    worker.close()


@pytest.mark.parametrize("file", ["m.ubj", "m.json", "m.tar.gz"])
async def test_a_wrong_digest_is_refused(make_registry: MakeRegistry, file: str) -> None:
    """A model that would load is not, and the error names both digests; the right digest lets it in."""
    model = zoo.model()
    data = {"m.ubj": model.ubj, "m.json": model.json, "m.tar.gz": model.targz}[file]
    store = Announces({file: data}, OTHER)
    registry = await make_registry(store)
    right = hashlib.sha256(data).hexdigest()
    with pytest.raises(CorruptArtifactError, match=f"{right}, and the store announced {OTHER}: upload it") as caught:
        await registry.load("m")
    assert (caught.value.model, vars(caught.value)["digest"], vars(caught.value)["announced"]) == ("m", right, OTHER)
    assert registry.stats().bytes_reserved == 0
    store.digest = right
    await registry.unload("m")  # and forget the failure
    rows = zoo.rows(3)
    assert np.array_equal(await registry.predict("m", rows), model.expected(rows))


def test_a_wrong_digest_is_found_before_the_parser_begins(odd_worker: LoneWorker) -> None:
    """A2: of the bytes of many chunks all count, and no predictor sees any of them."""
    data = odd.artifact(padding="x" * 50_000)
    for model, digest in ((1, OTHER), (2, hashlib.sha256(data).hexdigest())):
        odd_worker.command(wire.BEGIN, model, 1 << 30, json.dumps({"digest": digest}).encode())
        for start in range(0, len(data), 7000):
            odd_worker.command(wire.CHUNK, model, 0, data[start : start + 7000])
        odd_worker.command(wire.END, model)
    reports = [odd_worker.report() for _ in range(2)]
    assert [(report.kind, report.model) for report in reports] == [(wire.FAILED, 1), (wire.LOADED, 2)]
    assert reports[0].facts["kind"] == "corrupt"


async def test_upper_case_is_the_same_digest(make_registry: MakeRegistry) -> None:
    """Some tools write digests in upper case; who compares artifacts sees one spelling."""
    data = zoo.model().ubj
    store = Announces({"m.ubj": data}, hashlib.sha256(data).hexdigest().upper())
    artifact = await store.fetch("m")
    assert isinstance(artifact, Artifact)
    assert artifact.digest == hashlib.sha256(data).hexdigest()
    await (await make_registry(store)).load("m")


@pytest.mark.parametrize(
    "digest",
    ["", OTHER[:-1], OTHER + "0", OTHER[:-1] + "\n", "g" * 64, "sha256:" + OTHER, bytes.fromhex(OTHER), 7],
    ids=["empty", "short", "long", "newline", "no digits", "prefixed", "bytes", "number"],
)
async def test_what_is_no_digest_is_the_stores_fault(make_registry: MakeRegistry, digest: Any) -> None:
    """A foreign store hears what a digest is; its callers get a StoreError, and no load hangs."""
    registry = await make_registry(Announces({"m.ubj": zoo.model().ubj}, digest))
    async with asyncio.timeout(20):
        with pytest.raises(StoreError, match=r"announced the digest .* 64 hexadecimal digits") as caught:
            await registry.load("m")
    assert caught.value.model == "m"

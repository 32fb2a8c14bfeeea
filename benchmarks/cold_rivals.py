"""First calls of models in S3, on the local disk and in a folder: modelcache, and what one would write by hand.

Each runs in a process of its own, as those of rivals.py do: ``python benchmarks/cold_rivals.py KEY FOLDER`` serves
orders. A model's name is its whole file name, so that by hand nothing has to be looked for.
"""
# ruff: noqa: PLC0415

from __future__ import annotations

import asyncio
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cold_models import BUCKET
from rivals import Bare, Rival

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from modelcache import ModelRegistry

    Matrix = NDArray[np.float32]

CONNECTIONS = 128
"""Open at once at most, of each rival: what S3Store allows itself by default."""


class ByHand(Rival):
    """Something that gets bytes from somewhere, and hands them to XGBoost."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.boosters: dict[str, Any] = {}

    async def predict(self, name: str, rows: Any) -> Any:
        """Answer a first call, on the event loop."""
        return self.answer(name, await self.get(name), rows)

    async def forget(self) -> None:
        """Drop all models."""
        self.boosters.clear()

    async def get(self, name: str) -> bytes:
        """Return an artifact."""
        raise NotImplementedError

    def answer(self, name: str, data: bytes, rows: Any) -> Any:
        """Parse the artifact, keep the model, and ask it."""
        import xgboost

        booster = self.boosters[name] = xgboost.Booster({"nthread": 1})
        booster.load_model(bytearray(data))
        return booster.inplace_predict(rows)


class GetObject(ByHand):
    """``get_object`` with one client for all calls: the floor of anything that loads models with this library."""

    label = "get_object, all on the loop"

    async def start(self) -> None:
        """Make the client."""
        from aiobotocore.config import AioConfig
        from aiobotocore.session import AioSession

        await super().start()
        config = AioConfig(max_pool_connections=CONNECTIONS)
        self._stack = AsyncExitStack()
        self._client = await self._stack.enter_async_context(AioSession().create_client("s3", config=config))

    async def close(self) -> None:
        """Close the client."""
        await self._stack.aclose()

    async def get(self, name: str) -> bytes:
        """Return an object."""
        response = await self._client.get_object(Bucket=BUCKET, Key=name)
        data: bytes = await response["Body"].read()
        return data


class GetObjectThreads(GetObject):
    """The same as one would write it in an app that must go on meanwhile."""

    label = "get_object, then a thread"

    async def predict(self, name: str, rows: Any) -> Any:
        """Answer a first call."""
        return await asyncio.to_thread(self.answer, name, await self.get(name), rows)


class GetObjectOnly(GetObject):
    """Only the bytes, which are thrown away."""

    label = "get_object alone (no model)"
    predicts = False

    async def predict(self, name: str, rows: Any) -> Any:
        """Return how many bytes came."""
        del rows
        return len(await self.get(name))

    def is_correct(self, answer: Any, rows: Any, expected: Matrix) -> bool:
        """Say whether there was anything: the library has compared it with the length that was announced."""
        del rows, expected
        return bool(answer > 0)


class ReadFile(ByHand):
    """A file of the local disk, read on the loop."""

    label = "read, all on the loop"
    blocks = True

    async def get(self, name: str) -> bytes:
        """Return a file."""
        return (self.folder / "buckets" / BUCKET / name).read_bytes()


class ReadFileThreads(ReadFile):
    """The same in a thread."""

    label = "read, all in a thread"
    blocks = False

    async def predict(self, name: str, rows: Any) -> Any:
        """Answer a first call."""
        return await asyncio.to_thread(self._predict, name, rows)

    def _predict(self, name: str, rows: Any) -> Any:
        data = (self.folder / "buckets" / BUCKET / name).read_bytes()
        return self.answer(name, data, rows)


class ReadFileElsewhere(Bare):
    """The same in another process: the least that we know how to write for that."""

    label = "read, all in a bare worker"

    def path(self, name: str) -> Path:
        """Return where an artifact is."""
        return self.folder / "buckets" / BUCKET / name


class FromS3(Rival):
    """``await registry.predict(name, rows)`` with all options at their defaults."""

    label = "modelcache, S3"

    async def start(self) -> None:
        """Start the registry, its workers and its client."""
        self.registry = self.make_registry()
        await self.registry.start()

    def make_registry(self) -> ModelRegistry:
        """Return the registry that is measured."""
        from modelcache import ModelRegistry

        return ModelRegistry(f"s3://{BUCKET}")

    async def close(self) -> None:
        """Close it."""
        await self.registry.close()

    async def predict(self, name: str, rows: Any) -> Any:
        """Answer a first call."""
        return await self.registry.predict(name, rows)

    async def forget(self) -> None:
        """Unload all models."""
        for info in self.registry.loaded():
            await self.registry.unload(info.name)


class FromS3ByBareName(FromS3):
    """The same, where the store has to find out which suffix the name has: it asks for two objects, of which one is."""

    label = "modelcache, S3, name without suffix"

    async def predict(self, name: str, rows: Any) -> Any:
        """Answer a first call."""
        return await self.registry.predict(name.rpartition(".")[0], rows)


class FromS3KeepingCopies(FromS3):
    """The same with a disk tier, which is empty at first."""

    label = "modelcache, S3, filling a disk tier"

    def make_registry(self) -> ModelRegistry:
        """Return a registry with a disk tier of its own."""
        from modelcache import DiskTier, ModelRegistry

        self.tier = DiskTier(self.folder / type(self).__name__)
        return ModelRegistry(f"s3://{BUCKET}", disk_cache=self.tier)


class FromDiskTier(FromS3KeepingCopies):
    """The same, asked again after all models have left the memory."""

    label = "modelcache, disk tier"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._copied: set[str] = set()

    async def forget(self) -> None:
        """Unload all models, and wait for the copies of the last ones, which may be on their way into the tier yet."""
        self._copied.update(info.name for info in self.registry.loaded())
        await super().forget()
        while self.tier.copies < len(self._copied):  # noqa: ASYNC110 - a tier tells nobody when it has one more
            await asyncio.sleep(0.001)


class FromFolder(FromS3):
    """The same with a folder of this machine as the store."""

    label = "modelcache, folder"

    def make_registry(self) -> ModelRegistry:
        """Return a registry of the folder that the server serves."""
        from modelcache import ModelRegistry

        return ModelRegistry(self.folder / "buckets" / BUCKET)


RIVALS: dict[str, type[Rival]] = {
    "s3": FromS3,
    "s3-bare-name": FromS3ByBareName,
    "s3-keeping": FromS3KeepingCopies,
    "get-object": GetObject,
    "get-object-threads": GetObjectThreads,
    "get-object-only": GetObjectOnly,
    "disk": FromDiskTier,
    "folder": FromFolder,
    "read": ReadFile,
    "read-threads": ReadFileThreads,
    "read-elsewhere": ReadFileElsewhere,
}
"""By the key they have in results."""


if __name__ == "__main__":
    from harness import serve

    asyncio.run(serve(RIVALS[sys.argv[1]](Path(sys.argv[2])), Path(sys.argv[2])))

"""A gated store whose gates are open until the test shuts them."""

from __future__ import annotations

from modelcache import Artifact, NotModified
from modelcache.testing import GatedStore


class Upright(GatedStore):
    """Counts what it delivers, and fails with ``error`` while there is one."""

    def __init__(self, artifacts: dict[str, bytes]) -> None:
        super().__init__(artifacts)
        self.open(*(name.partition(".")[0] for name in artifacts))
        self.delivered = 0
        self.error: Exception | None = None

    async def fetch(self, name: str, *, if_version: str | None = None) -> Artifact | NotModified:
        found = await super().fetch(name, if_version=if_version)
        if self.error is not None:
            raise self.error
        self.delivered += isinstance(found, Artifact)
        return found

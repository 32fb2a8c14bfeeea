"""A lease: a model held resident over several calls."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from modelcache.errors import ModelCacheError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from modelcache.cache.entry import Entry
    from modelcache.records import ModelInfo, Output
    from modelcache.resident import Resident


class Lessor(Protocol):
    """The part of the registry that a lease uses."""

    async def predict_leased(
        self, lease: Lease, rows: Any, output: Output, timeout: float | None
    ) -> NDArray[np.float32]:
        """Predict with the very model that the lease holds."""
        ...

    def info(self, entry: Entry[Resident]) -> ModelInfo:
        """Describe the model."""
        ...


class Lease:
    """Holds one version of one model resident until the ``async with`` block of ``acquire`` ends.

    The model can be replaced or unloaded meanwhile: the lease goes on with the version it has.
    """

    def __init__(self, lessor: Lessor, entry: Entry[Resident]) -> None:
        self._lessor = lessor
        self.entry = entry
        self.held = True
        """False once the block has ended."""

    @property
    def name(self) -> str:
        """The model's name."""
        return self.entry.key

    @property
    def model(self) -> ModelInfo:
        """The model as it is now."""
        return self._lessor.info(self.entry)

    def check_held(self) -> None:
        """Raise ModelCacheError once the lease has ended: the model may be gone, or be another version."""
        if not self.held:
            raise ModelCacheError(
                f"The lease on {self.name} has ended: predict inside its `async with` block, or call the registry's "
                "predict().",
                model=self.name,
            )

    async def predict(
        self,
        rows: Any,
        *,
        output: Output = "value",
        timeout: float | None = None,
    ) -> NDArray[np.float32]:
        """Return float32 predictions of shape (n,) or (n, k), as :meth:`ModelRegistry.predict` does."""
        return await self._lessor.predict_leased(self, rows, output, timeout)

    def __repr__(self) -> str:
        return f"<Lease {self.entry!r}>"

"""A call, from the rows it came with to what became of it."""

from __future__ import annotations

import asyncio
from math import isnan
from time import monotonic, perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
from anyio import to_thread

from modelcache.errors import InvalidInputError, PredictTimeoutError
from modelcache.inputs import as_matrix, is_large, is_numeric_array, pack_row, read_large
from modelcache.pool.wire import OUTPUTS
from modelcache.records import Timings

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from modelcache.cache.entry import Entry
    from modelcache.pool.lost import Epitaph
    from modelcache.records import Output, Tier
    from modelcache.resident import Resident

    Matrix = NDArray[np.float32]
    Answer = asyncio.Future[tuple[Matrix, float]]

_OUTPUT_CODES = {output: code for code, output in enumerate(OUTPUTS)}

_VALUE = _OUTPUT_CODES["value"]


class Call:
    """Rows on their way, and what became of them so far."""

    __slots__ = (
        "_matrix", "answered_by", "columns", "deadline", "hit", "large", "lost", "output", "packed", "queue_limit",
        "shape", "unread", "values",
    )  # fmt: skip

    def __init__(self, rows: Any, output: Output, timeout: float | None, queue_limit: int) -> None:
        self.unread: Any = None
        """Large rows that are yet to be read, by :meth:`read`; None if they are there."""
        self.packed = pack_row(rows)
        """The bytes of a row that came as a list: most calls need no array."""
        self.shape: tuple[int, int]
        """Rows and columns."""
        self.columns: tuple[str, ...] | None = None
        """Their names, if they have names."""
        if self.packed is not None:
            self.shape, self.large = (1, len(self.packed) // 4), False
        else:
            self._take(rows)
        try:
            self.output = _OUTPUT_CODES[output]
        except (KeyError, TypeError):
            raise InvalidInputError(f"output is {output!r}: it has to be one of {', '.join(OUTPUTS)}.") from None
        if timeout is not None and (not isinstance(timeout, int | float) or isnan(timeout)):
            raise InvalidInputError(f"timeout is {timeout!r}: it has to be a number of seconds, or None.")
        self.deadline = 0.0 if timeout is None else monotonic() + timeout
        self.queue_limit = queue_limit
        self.lost: Epitaph | None = None
        """The end of the last worker that was asked."""
        self.answered_by: Entry[Resident] | None = None
        """The model that has predicted for it as it was loaded."""
        self.hit: Callable[[Entry[Resident]], None] | None = None
        """What is to be told that it has found its model resident, once its rows are on their way."""

    def _take(self, rows: Any) -> None:
        self.large = is_large(rows)
        if not self.large:
            matrix, self.columns = as_matrix(rows)
            # The caller may change his own array before it is sent to a second worker.
            self.matrix = matrix.copy() if matrix is rows else matrix
        elif is_numeric_array(rows):
            self.matrix = rows
        else:
            self.unread = rows

    @property
    def matrix(self) -> NDArray[Any]:
        """float32 in row-major order; numbers of any kind, in the caller's own array, if it is large."""
        if self.packed is not None:
            return np.frombuffer(self.packed, np.float32).reshape(self.shape)
        return self._matrix

    @matrix.setter
    def matrix(self, rows: NDArray[Any]) -> None:
        self._matrix, self.shape = rows, rows.shape

    def note_hit(self, entry: Entry[Resident]) -> None:
        """Count the hit, if it is one and has not been counted: while the worker is busy, that costs no time."""
        hit, self.hit = self.hit, None
        if hit is not None:
            hit(entry.original or entry)

    async def read(self) -> None:
        """Convert what the event loop should not, in a thread, within the call's deadline."""
        try:
            async with asyncio.timeout_at(_loop_time(self.deadline)):
                self.matrix, self.columns = await to_thread.run_sync(read_large, self.unread, abandon_on_cancel=True)
        except TimeoutError as error:
            raise PredictTimeoutError(
                "The timeout passed while the rows were being converted: give it more time, or pass a float32 array.",
            ) from error
        self.unread = None

    @property
    def may_go_ahead(self) -> bool:
        """True if its row may travel with the artifact, in the place of one that the model would be tried on.

        It must have no names to be checked. More rows would keep the loader busy, and XGBoost keeps the largest answer
        of each model for the thread that asked, outside the measured bytes.
        """
        return self.output == _VALUE and self.columns is None and self.shape[0] == 1

    @property
    def expired(self) -> bool:
        """True if its time is over: nobody waits for it any more."""
        return bool(self.deadline) and self.deadline <= monotonic()

    def answer(self, values: Matrix, entry: Entry[Resident]) -> None:
        """Take what ``entry`` has predicted as it was loaded."""
        self.values, self.answered_by = values, entry


class Trace:
    """What ``invoke`` wants to know of a call."""

    __slots__ = ("asked", "entry", "started", "waited")

    def __init__(self) -> None:
        self.entry: Entry[Resident]
        self.started = perf_counter()
        self.waited: float | None = None
        """Seconds for the model to become resident; None for a hit."""
        self.asked = 0.0
        """When the worker that answered was asked, or had answered already as it loaded the model."""

    @property
    def tier(self) -> Tier:
        """Where the model was when the call came."""
        return "memory" if self.waited is None else self.entry.value.tier

    def timings(self) -> Timings:
        """Say where the time went; the answer has just come."""
        arrival, ended = self.entry.value.arrival, perf_counter()
        downloading, loading = (arrival.downloading, arrival.loading) if self.waited is not None else (0.0, 0.0)
        return Timings(
            waiting=max(0.0, (self.waited or 0.0) - downloading - loading),
            downloading=downloading,
            loading=loading,
            predicting=ended - self.asked,
            total=ended - self.started,
        )


def _loop_time(deadline: float) -> float | None:
    """Return ``deadline``, which is monotonic and 0.0 for none, by the clock of the loop."""
    return asyncio.get_running_loop().time() + deadline - monotonic() if deadline else None

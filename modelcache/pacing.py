"""How many rows a slice of a call should have, learnt from how long slices took.

A prediction has a price of its own beside that of its rows. It is that of bringing the trees into the processor's
caches: where ten models of 500 trees are asked in turn, a row takes 1.1 ms, and 64 rows 1.7. Whoever divides one by the
other, and makes slices shorter until they take as long as they should, ends with slices of one row, and a call that
takes forty times as long. So time is kept by size: one measurement for rows in each power of two, straight lines
between; and what is cut in half has to save something.
"""

from __future__ import annotations

from itertools import pairwise

_ROW_SECONDS_GUESSED = 0.001 / 64
"""What a row is taken to cost before anything is measured: predictions take a microsecond, contributions up to many
milliseconds."""
_FEW_ROWS = 64
"""XGBoost predicts in blocks of this many: fewer tell little about the price of a row."""
_PAYS = 0.7
"""Share of a slice's time that half of its rows may take, if shorter ones are to be sent."""
_PAYS_WELL = 0.6
"""The same for a call that could be sent in one piece: that is predicted together with others for its model."""
_GROWS = 1 / 3
"""What a row that was not measured costs at least, of the average of those that were: noise may say nothing."""
_SLOWER_AT_ONCE = 1.25
"""How much longer than expected a slice is believed to take: most that take longer were interrupted."""
_REMEMBERED = 16
"""Measurements after which all but the last are forgotten: what does not come up again may have changed, or was the
time of somebody else, too."""


class Pace:
    """The seconds that predictions of one kind by one model take, by their rows.

    Of one that was made together with others it is the share of its rows: such calls need not be cut.
    """

    __slots__ = ("_measured", "_points")

    def __init__(self) -> None:
        self._measured = 0
        self._points: list[tuple[int, float]] = []
        """Rows and seconds, by rows; at most one point for each power of two."""

    def note(self, rows: int, seconds: float) -> None:
        """Take note of a prediction."""
        longer = next((most for more, most in self._points if more >= rows), None)
        if longer is not None:  # or there is nothing to compare it with
            seconds = min(seconds, max(_SLOWER_AT_ONCE * self.seconds_for(rows), longer))
        if self._measured % _REMEMBERED == 0:
            self._points = []
        self._measured += 1
        others = (point for point in self._points if point[0].bit_length() != rows.bit_length())
        self._points = sorted((*others, (rows, seconds)))

    def seconds_for(self, rows: int) -> float:
        """Return how long a prediction for ``rows`` is expected to take.

        Below what has been measured time is taken to shrink with the rows, and above to grow as it last did.
        """
        if not self._points:
            return rows * _ROW_SECONDS_GUESSED
        points = [(0, 0.0), *self._points]
        for (fewer, least), (more, most) in pairwise(points):
            row_seconds = (most - least) / (more - fewer)
            if rows <= more:
                return least + row_seconds * (rows - fewer)
        if more == 1:  # which tells what a prediction costs, and nothing about its rows
            row_seconds = 0.0
        return most + max(row_seconds, _GROWS * most / more) * (rows - more)

    def is_divisible(self, rows: int) -> bool:
        """Say whether half of so many rows take hardly more than half of the time."""
        return self.seconds_for(rows // 2) <= _PAYS_WELL * self.seconds_for(rows)

    def rows_within(self, seconds: float, most: int) -> int:
        """Return how many rows, up to ``most``, take about ``seconds``: or more, where fewer would save little."""
        known = self._points[-1][0] if self._points else int(seconds / _ROW_SECONDS_GUESSED)
        rows = most = max(1, min(most, 2 * known))
        if self._tries_more(seconds):
            return rows
        expected = self.seconds_for(rows)
        while rows > 1 and expected > seconds:
            half = self.seconds_for(rows // 2)
            if half > _PAYS * expected:
                return rows
            rows, expected = rows // 2, half
        return self._fill(rows, expected, seconds, most)

    def _tries_more(self, seconds: float) -> bool:
        """Say whether only one size is known, of few rows, and took less than that: more may take no longer."""
        return len(self._points) == 1 and self._points[0][0] <= _FEW_ROWS and self._points[0][1] <= seconds

    def _fill(self, rows: int, expected: float, seconds: float, most: int) -> int:
        """Return as many rows more than ``rows`` as fit into what is left of ``seconds``."""
        twice = min(2 * rows, most)
        longer = self.seconds_for(twice) - expected
        if expected >= seconds or longer <= 0:
            return rows
        return min(twice, rows + int((twice - rows) * (seconds - expected) / longer))

"""How much one request may ask for: so many rows, and so many numbers in the answer.

A body of some megabytes can ask for gigabytes: a row of one byte a feature has an answer of a number for each tree.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from modelcache.serving.errors import PayloadTooLargeError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from modelcache import ModelInfo
    from modelcache.records import Output

MOST_ROWS = 1_000_000
"""Rows of a request, unless whoever runs the app says another limit."""
MOST_NUMBERS = 10_000_000
"""Of an answer: 40 MB as bytes, about 100 MB as text."""
FEW_ROWS = 16
"""What is asked for so few needs no look at the model: no answer to them is large."""

_WIDTHS: Mapping[Output, Callable[[ModelInfo], int]] = {
    "value": lambda info: info.n_outputs,
    "margin": lambda info: info.n_outputs,
    "leaf": lambda info: info.n_trees or info.n_outputs,
    "contribs": lambda info: info.n_outputs * (info.n_features + 1),
}


def check_rows(count: int, most: int) -> None:
    """Raise PayloadTooLargeError for more than ``most`` rows."""
    if count > most:
        raise PayloadTooLargeError(
            f"The body has {count:,} rows, the limit here is {most:,}. Send them in several requests."
        )


def check_answer(count: int, info: ModelInfo, outputs: Iterable[Output]) -> None:
    """Raise PayloadTooLargeError if the ``outputs`` of ``count`` rows are more than `MOST_NUMBERS`, all together."""
    width = sum(_WIDTHS[output](info) for output in outputs)
    if count * width > MOST_NUMBERS:
        raise PayloadTooLargeError(
            f"The answer would have {width:,} numbers for each of {count:,} rows; the limit is {MOST_NUMBERS:,} in all."
            f" Send {max(1, MOST_NUMBERS // width):,} rows a request, or ask for fewer outputs.",
            model=info.name,
        )

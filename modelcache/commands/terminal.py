"""What is printed, for people and for pipes."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_PIPE_WIDTH = 1000
"""Columns for a reader that is no terminal: its tables are never folded, so that they can be searched by line."""

T = TypeVar("T")


def make_console() -> Console:
    """Return the console for results: colours and bars only on a terminal, and no text is taken for markup."""
    return Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else _PIPE_WIDTH)


def make_table(*columns: str, text: Sequence[str] = ()) -> Table:
    """Return a table without lines; columns hold figures, but for those named in ``text``."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, justify="left" if column in text else "right", overflow="fold")
    return table


def track(console: Console, items: Sequence[T], what: str) -> Iterator[T]:
    """Yield ``items`` beside a bar that is there only on a terminal, and only until they are done."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    # Refreshed by each item, not by a thread, which an event loop would have to wait for in the end.
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, auto_refresh=False, disable=hidden) as progress:
        bar = progress.add_task(what, total=len(items))
        for item in items:
            yield item
            progress.update(bar, advance=1, refresh=True)


def show_size(size: int) -> str:
    """Return a size as people read it: "97.3 KiB"."""
    return f"{size / (1 << 10):.1f} KiB" if size < 1 << 20 else f"{size / (1 << 20):.1f} MiB"

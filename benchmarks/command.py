"""What the command of each benchmark has in common: its options, and how it tells and keeps what was seen."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import report

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence


def make_parser(doc: str | None, rivals: Iterable[str] = ()) -> argparse.ArgumentParser:
    """Return a parser of the options that all have; ``rivals`` are whom it can leave out."""
    assert doc is not None
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few seconds, to see that it works")
    parser.add_argument("--rounds", type=positive_integer, help="how often the rivals take turns")
    if keys := tuple(rivals):
        parser.add_argument("--rivals", nargs="+", choices=keys, default=list(keys), metavar="KEY")
    parser.add_argument("--output", type=Path, default=report.RESULTS, help="folder for the results")
    return parser


def positive_integer(text: str) -> int:
    """Return a whole number above 0; of a ValueError argparse tells the user which option it was for."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def parse(parser: argparse.ArgumentParser, full: Any, quick: Any) -> argparse.Namespace:
    """Return the options with a ``plan``: ``full`` or ``quick``, changed where an option has the name of a field."""
    options = parser.parse_args()
    plan = quick if options.quick else full
    changes = {name: value for name, value in vars(options).items() if value is not None and hasattr(plan, name)}
    options.plan = replace(plan, **changes)
    return options


def publish(
    name: str,
    results: dict[str, Any],
    tables: Sequence[report.Table],
    findings: Iterable[str],
    *,
    page: str,
    plot: Callable[[dict[str, Any], Path], None],
    folder: Path,
) -> None:
    """Print ``tables`` and ``findings``; write ``results`` as JSON, ``page``, and a ``plot`` to ``folder``."""
    console = report.console()
    for table in tables:
        console.print(table.rich(), "")
    for line in findings:
        console.print(line)
    folder.mkdir(parents=True, exist_ok=True)
    report.write_json(folder / f"{name}.json", results)
    (folder / f"{name}.md").write_text(page)
    plot(results, folder / f"{name}.png")
    console.print(f"Written to {folder}: {name}.json, {name}.md, {name}.png")

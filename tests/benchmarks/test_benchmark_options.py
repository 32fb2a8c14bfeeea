"""What the command of a benchmark refuses before it measures anything."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from quick import BENCHMARKS

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable


@pytest.fixture
def make_parser(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], argparse.ArgumentParser]:
    """The parser that all benchmarks share."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import command  # noqa: PLC0415 - scripts, and no part of any package

    return command.make_parser


@pytest.mark.parametrize("rounds", ["0", "-1", "1.5", "many"])
def test_there_is_a_round_at_least(
    rounds: str, make_parser: Callable[[str], argparse.ArgumentParser], capsys: pytest.CaptureFixture[str]
) -> None:
    """Of no rounds there is no median."""
    assert make_parser("A benchmark.").parse_args(["--rounds", "1"]).rounds == 1
    with pytest.raises(SystemExit):
        make_parser("A benchmark.").parse_args(["--rounds", rounds])
    assert f"argument --rounds: invalid positive_integer value: '{rounds}'" in capsys.readouterr().err

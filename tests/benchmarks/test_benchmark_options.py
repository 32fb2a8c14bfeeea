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


@pytest.mark.parametrize(
    ("rounds", "starts", "expected"), [(12, 4, [3, 3, 3, 3]), (10, 4, [3, 3, 2, 2]), (2, 3, [1, 1]), (1, 1, [1])]
)
def test_rounds_are_dealt_out_to_starts(
    rounds: int, starts: int, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """There are as many rounds as were asked for, and none of the starts is for nothing."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    from comparing import dealt_out  # noqa: PLC0415 - scripts, and no part of any package

    assert dealt_out(rounds, starts) == expected

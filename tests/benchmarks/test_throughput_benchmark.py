"""The benchmark of throughput runs, and what it writes is complete; how fast it is is none of a test's business."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from quick import MAY_TAKE_LONG, is_picture, read_results, run_quickly

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = MAY_TAKE_LONG

SHARES = (0.5, 0.8, 1.0, 1.2, 2.0)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that one quick run has filled."""
    return run_quickly("throughput.py", tmp_path_factory.mktemp("results"), "--rivals", "modelcache", "limited")


@pytest.fixture(scope="module")
def results(written: Path) -> dict[str, Any]:
    """What it says of itself."""
    return read_results(written, "throughput")


def test_closed_loops_are_answered_as_xgboost_does(results: dict[str, Any]) -> None:
    """Each number of clients, and each rival's capacity with the large models."""
    small, heavy = {"modelcache", "to_thread", "direct"}, {"limited", "to_thread", "direct"}
    expected = {(f"one-{clients}", key) for clients in (1, 16, 64, 256) for key in small}
    expected |= {("capacity", key) for key in heavy}
    assert {(seen["case"], seen["rival"]) for seen in results["cases"]} == expected
    assert all(seen["correct"] and seen["answers_compared"] for seen in results["cases"])


def test_open_loops_are_answered_as_xgboost_does_and_at_the_rate_that_was_meant(results: dict[str, Any]) -> None:
    """Each share of each rival's capacity; what is neither answered nor refused would be a call that is lost."""
    heavy = {"limited", "to_thread", "direct"}
    assert {(seen["share"], seen["rival"]) for seen in results["open"]} == {(s, key) for s in SHARES for key in heavy}
    seconds = results["settings"]["open_seconds"]
    for seen in results["open"]:
        assert seen["correct"]
        for found in seen["rounds"]:
            calls = max(1, int(found["rate"] * seconds))
            assert found["calls"] + round(found["refused"] * calls) == pytest.approx(calls, abs=1)
            assert found["goodput"] <= calls / seconds


def test_the_claims_are_checked(results: dict[str, Any]) -> None:
    """Calls per second, goodput when overloaded, and the cost of a refusal, each with its limit."""
    assert [claim["limit"] for claim in results["claims"]] == [10, 4, 20, 0.9, 20]
    assert all(seen["refused"] >= results["settings"]["refusals"] for seen in results["refusals"])


def test_there_is_a_table_and_a_plot(results: dict[str, Any], written: Path) -> None:
    """The page shows every rival; the plot is a picture."""
    page = (written / "throughput.md").read_text()
    shown = {seen["rival"] for seen in results["cases"] + results["open"]}
    assert all(results["rivals"][key]["label"] in page for key in shown)
    assert "WRONG" not in page
    assert is_picture(written / "throughput.png")

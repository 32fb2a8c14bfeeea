"""The benchmarks run, and what they write is complete; how fast anything is is none of a test's business."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from quick import MAY_TAKE_LONG, is_picture, read_results, run_quickly

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = MAY_TAKE_LONG


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that one quick run has filled."""
    rivals = ("modelcache", "to_thread", "to_thread-dmatrix", "async_lru", "process-pool", "direct", "bare", "echo")
    return run_quickly("latency.py", tmp_path_factory.mktemp("results"), "--rivals", *rivals)  # batch.py has the other


@pytest.fixture(scope="module")
def results(written: Path) -> dict[str, Any]:
    """What it says of itself."""
    return read_results(written, "latency")


def test_every_answer_of_every_rival_is_xgboosts_own(results: dict[str, Any]) -> None:
    """All rivals answer all cases, in every round, bit for bit as XGBoost does; the echo has no first call."""
    cases = ("one-1", "one-16", "one-64", "thousand-4", "first-1", "first-10")
    expected = {(case, key) for case in cases for key in results["rivals"]} - {
        ("first-1", "echo"),
        ("first-10", "echo"),
    }
    assert {(entry["case"], entry["rival"]) for entry in results["cases"]} == expected
    for entry in results["cases"]:
        assert entry["correct"] is True
        assert entry["answers_compared"] == sum(seen["calls"] for seen in entry["rounds"]) > 0
        assert len(entry["rounds"]) == results["settings"]["rounds"]


def test_figures_come_with_their_spread(results: dict[str, Any]) -> None:
    """Each figure is a median with the least and the most of the rounds, and says whether they agree."""
    for entry in results["cases"]:
        for figure in ("p50", "p90", "p99", "calls_per_second", "cpu_per_call", "p50_ratio", "calls_ratio"):
            seen = entry[figure]
            assert seen["min"] <= seen["median"] <= seen["max"]
            assert isinstance(seen["steady"], bool)
        if entry["rival"] == "to_thread":
            assert entry["p50_ratio"]["median"] == entry["calls_ratio"]["median"] == 1


def test_results_say_where_they_come_from(results: dict[str, Any]) -> None:
    """Versions, machine, date, command, the memory of each rival, and the claims that were checked."""
    assert set(results["versions"]) == {"python", "modelcache", "xgboost-cpu", "numpy", "async-lru"}
    assert results["machine"]["cores"] >= 1
    assert results["date"].endswith("Z")
    assert "--quick" in results["command"]
    assert all(about["rss_mb"] > 0 and about["processes"] > 0 for about in results["rivals"].values())
    assert [claim["limit"] for claim in results["claims"]] == [0.5, 2.5, 1.0, 10.0]
    assert [claim["bare"]["median"] > 0 for claim in results["claims"] if "bare" in claim] == [True]


def test_there_is_a_table_and_a_plot(results: dict[str, Any], written: Path) -> None:
    """The page shows every rival; the plot is a picture."""
    page = (written / "latency.md").read_text()
    assert all(about["label"] in page for about in results["rivals"].values())
    assert "WRONG" not in page
    assert is_picture(written / "latency.png")

"""The benchmark of batches runs, and what it writes is complete; how fast anything is is none of a test's business."""

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
    return run_quickly("batch.py", tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="module")
def results(written: Path) -> dict[str, Any]:
    """What it says of itself."""
    return read_results(written, "batch")


def test_every_batch_is_answered_as_xgboost_does(results: dict[str, Any]) -> None:
    """All rivals answer all sizes, bit for bit as XGBoost does; who blocks the loop has nobody beside it."""
    sizes = results["settings"]["sizes"]
    alone = [f"{rows}x{columns}" for columns in (6, 50) for rows in sizes] + ["1000x6-4", "1000x50-4"]
    expected = {(case, key) for case in alone for key in results["rivals"]}
    expected |= {(f"beside-{columns}", key) for columns in (6, 50) for key in set(results["rivals"]) - {"direct"}}
    assert {(entry["case"], entry["rival"]) for entry in results["cases"]} == expected
    for entry in results["cases"]:
        assert entry["correct"] is True
        assert len(entry["rounds"]) == results["settings"]["rounds"]


def test_calls_beside_large_ones_are_compared_with_quiet_ones(results: dict[str, Any]) -> None:
    """The ratio of the two is taken within each round, and is what is claimed."""
    beside = [entry for entry in results["cases"] if entry["case"].startswith("beside")]
    for entry in beside:
        assert all(seen["isolation"] == seen["p99"] / seen["quiet_p99"] for seen in entry["rounds"])
        assert entry["large_p50"]["min"] > 0
    assert [claim["limit"] for claim in results["claims"]] == [1.0, 1.0, 5.0, 5.0], "no 100,000 rows in a hurry"


def test_there_is_a_table_and_a_plot(results: dict[str, Any], written: Path) -> None:
    """The page shows every rival; the plot is a picture."""
    page = (written / "batch.md").read_text()
    assert all(about["label"] in page for about in results["rivals"].values())
    assert "WRONG" not in page
    assert is_picture(written / "batch.png")

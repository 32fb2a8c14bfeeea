"""The benchmark of many models runs, and what it writes is complete; how fast it is is none of a test's business."""

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
    return run_quickly("many_models.py", tmp_path_factory.mktemp("results"), "--rivals", "modelcache")


@pytest.fixture(scope="module")
def results(written: Path) -> dict[str, Any]:
    """What it says of itself."""
    return read_results(written, "many_models")


def test_every_answer_is_xgboosts_own(results: dict[str, Any]) -> None:
    """Each rival answers each case with each number of models, in every round, bit for bit as XGBoost does."""
    kinds = ("ten-1", "ten-64", "uniform-1", "uniform-64", "zipf-1", "zipf-64")
    expected = {(kind, key, count) for kind in kinds for key in ("modelcache", "to_thread") for count in (10, 100)}
    assert {(entry["kind"], entry["rival"], entry["models"]) for entry in results["cases"]} == expected
    for entry in results["cases"]:
        assert entry["correct"] is True
        assert entry["answers_compared"] == sum(seen["calls"] for seen in entry["rounds"]) > 0
        assert len(entry["rounds"]) == results["settings"]["rounds"]


def test_figures_are_compared_with_the_fewest_models(results: dict[str, Any]) -> None:
    """The ratio that tells what the number of models costs is 1 where there are the fewest."""
    for entry in results["cases"]:
        assert entry["growth"]["median"] > 0
        if entry["models"] == 10:
            assert entry["growth"]["median"] == 1


def test_memory_is_reported(results: dict[str, Any]) -> None:
    """What the parent takes for each model, and its workers for all of them."""
    found = {(seen["rival"], seen["models"]): seen for seen in results["memory"]}
    assert set(found) == {(key, count) for key in ("modelcache", "to_thread") for count in (10, 100)}
    assert found["modelcache", 100]["workers_pss_mb"] > 1
    assert found["to_thread", 100]["workers_pss_mb"] == 0
    assert found["to_thread", 100]["parent_bytes_per_model"] > 10_000


def test_there_is_a_table_and_a_plot(results: dict[str, Any], written: Path) -> None:
    """The page shows every rival, and what of the growth is XGBoost's own; the plot is a picture."""
    page = (written / "many_models.md").read_text()
    assert all(about["label"] in page for about in results["rivals"].values())
    assert "WRONG" not in page
    assert "Spread over all of 100 models instead of 10" in page
    assert is_picture(written / "many_models.png")

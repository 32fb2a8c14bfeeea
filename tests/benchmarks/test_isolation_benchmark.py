"""The benchmark of warm calls in a storm runs, and what it writes is complete; how fast anything is is not tested."""

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
    return run_quickly("isolation.py", tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="module")
def results(written: Path) -> dict[str, Any]:
    """What it says of itself."""
    return read_results(written, "isolation")


def test_every_answer_of_every_rival_is_xgboosts_own(results: dict[str, Any]) -> None:
    """All rivals answer all cases, in every round, bit for bit as XGBoost does, first calls of the storm included."""
    cases = ("quiet", "remote", "remote-control", "local", "local-control")
    assert {(entry["case"], entry["rival"]) for entry in results["cases"]} == {
        (case, rival) for case in cases for rival in ("modelcache", "to_thread", "process-pool")
    }
    for entry in results["cases"]:
        assert entry["correct"] is True
        assert entry["answers_compared"] == sum(seen["calls"] for seen in entry["rounds"]) > 0
        assert len(entry["rounds"]) == results["settings"]["rounds"]


def test_only_a_storm_loads(results: dict[str, Any]) -> None:
    """Models are loaded in each storm, and in nothing that it is compared with."""
    for entry in results["cases"]:
        assert (entry["loads_per_second"]["max"] > 0) == (entry["case"] in ("remote", "local"))


def test_the_tail_is_compared_with_the_quiet_one_of_the_same_rival(results: dict[str, Any]) -> None:
    """A ratio is taken within each round, so that the quiet stretches have a ratio of 1."""
    for entry in results["cases"]:
        for seen in entry["rounds"]:
            assert seen["p50"] <= seen["p99"] <= seen["p999"] <= seen["longest"]
        if entry["case"] == "quiet":
            assert entry["p99_ratio"]["min"] == entry["p99_ratio"]["max"] == 1


def test_results_say_where_they_come_from(results: dict[str, Any], written: Path) -> None:
    """Versions, command, the claims with their limits, a table that shows every rival, and a picture."""
    assert set(results["versions"]) == {"python", "modelcache", "xgboost-cpu", "numpy"}
    assert "--quick" in results["command"]
    assert [claim["limit"] for claim in results["claims"]] == [3.0, 3.0]
    page = (written / "isolation.md").read_text()
    assert all(about["label"] in page for about in results["rivals"].values())
    assert "WRONG" not in page
    assert is_picture(written / "isolation.png")

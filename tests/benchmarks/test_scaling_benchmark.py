"""The benchmark of one worker against two runs, and what it writes is complete; how fast anything is is not tested."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from quick import BENCHMARKS, MAY_TAKE_LONG, is_picture, read_results, run_quickly

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = MAY_TAKE_LONG


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that one quick run has filled."""
    return run_quickly("scaling.py", tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="module")
def results(written: Path) -> dict[str, Any]:
    """What it says of itself."""
    return read_results(written, "scaling")


def test_every_answer_of_every_rival_is_xgboosts_own(results: dict[str, Any]) -> None:
    """All rivals answer all cases, in every round, bit for bit as XGBoost does."""
    rivals = ("modelcache-1", "modelcache-2", "to_thread", "direct")
    assert {(entry["case"], entry["rival"]) for entry in results["cases"]} == {
        (case, rival) for case in ("hot", "ten", "big") for rival in rivals
    }
    for entry in results["cases"]:
        assert entry["correct"] is True
        assert entry["answers_compared"] == sum(seen["calls"] for seen in entry["rounds"]) > 0
        assert len(entry["rounds"]) == results["settings"]["rounds"]


def test_it_shows_who_computes(results: dict[str, Any]) -> None:
    """The processor's time of the app's process and of its workers stands beside the calls, which only workers have."""
    for entry in results["cases"]:
        assert entry["parent_share"]["median"] > 0
        if not entry["rival"].startswith("modelcache"):
            assert entry["workers_share"]["max"] == 0


def test_workers_that_were_seen_at_nothing_leave_the_rest_unsaid(
    results: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their time is counted in steps of 10 ms: on a machine where others compute a short run may show none."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    from scaling import processor_line  # noqa: PLC0415 - scripts, and no part of any package

    two = next(entry for entry in results["cases"] if entry["rival"] == "modelcache-2")
    idle, busy = ({**two, "workers_share": {"median": share}} for share in (0.0, 0.8))
    assert "too short a time" in processor_line(idle, two, 2)
    assert "times the calls" in processor_line(busy, two, 2)


def test_each_round_says_what_the_copy_takes(results: dict[str, Any]) -> None:
    """A copy takes bytes; where none was made there are none to show."""
    assert len(results["heated"]) == results["settings"]["rounds"]
    for heat in results["heated"]:
        assert (heat["copies"] > 0) == (heat["bytes"] > 0)


def test_results_say_where_they_come_from(results: dict[str, Any], written: Path) -> None:
    """Versions, command, the claim with its limit, a table that shows every rival, and a picture."""
    assert set(results["versions"]) == {"python", "modelcache", "xgboost-cpu", "numpy"}
    assert "--quick" in results["command"]
    assert [claim["limit"] for claim in results["claims"]] == [1.7]
    page = (written / "scaling.md").read_text()
    assert all(about["label"] in page for about in results["rivals"].values())
    assert "WRONG" not in page
    assert is_picture(written / "scaling.png")

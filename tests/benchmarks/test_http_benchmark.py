"""The benchmark of HTTP runs, and what it writes is complete; how fast it is is none of a test's business."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quick import MAY_TAKE_LONG, is_picture, read_results, run_quickly

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = MAY_TAKE_LONG


def test_every_answer_over_http_is_xgboosts_own(tmp_path: Path) -> None:
    """Both numbers of clients, each rival, bit for bit; the claims, the table and the plot are there."""
    run_quickly("over_http.py", tmp_path)
    results = read_results(tmp_path, "over_http")
    expected = {(case, key) for case in ("one-1", "one-64") for key in results["rivals"]}
    assert {(seen["case"], seen["rival"]) for seen in results["cases"]} == expected
    assert all(seen["correct"] and seen["answers_compared"] for seen in results["cases"])
    assert [claim["limit"] for claim in results["claims"]] == [1.5, 0.6, 1.5, 0.6]
    page = (tmp_path / "over_http.md").read_text()
    assert "WRONG" not in page
    assert "the registry's own p50" in page
    assert is_picture(tmp_path / "over_http.png")

"""The itemised budget of a call is complete; how fast anything is is none of a test's business."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quick import MAY_TAKE_LONG, is_picture, read_results, run_quickly

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = MAY_TAKE_LONG


def test_the_items_are_parts_of_one_call(tmp_path: Path) -> None:
    """No item is negative, each is measured in all rounds, and the page and the plot are there."""
    run_quickly("budget.py", tmp_path)
    seen = read_results(tmp_path, "budget")["microseconds"]
    items = [key for key in seen if ":" in key or "XGBoost" in key]
    assert len(items) == 5
    assert all(seen[item]["min"] >= 0 for item in items)
    assert sum(seen[item]["median"] for item in items) > 0
    assert all(item in (tmp_path / "budget.md").read_text() for item in items)
    assert is_picture(tmp_path / "budget.png")

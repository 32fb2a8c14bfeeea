"""The itemised budget of a call is complete; how fast anything is is none of a test's business."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def test_the_items_are_parts_of_one_call(tmp_path: Path) -> None:
    """No item is negative, each is measured in all rounds, and the page and the plot are there."""
    subprocess.run(
        [sys.executable, BENCHMARKS / "budget.py", "--quick", "--output", tmp_path],
        check=True, capture_output=True, timeout=55,
    )  # fmt: skip
    seen = json.loads((tmp_path / "budget.json").read_text())["microseconds"]
    items = [key for key in seen if ":" in key or "XGBoost" in key]
    assert len(items) == 5
    assert all(seen[item]["min"] > 0 for item in items)
    assert all(item in (tmp_path / "budget.md").read_text() for item in items)
    assert (tmp_path / "budget.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")

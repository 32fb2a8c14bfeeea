"""The benchmark of the engines runs, and what it writes is complete; how fast anything is is not tested."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

import pytest

from quick import MAY_TAKE_LONG, is_picture, read_results, run_quickly

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = MAY_TAKE_LONG


@pytest.mark.skipif(find_spec("onnxruntime") is None, reason="the extra onnx is not installed")
def test_the_engines_are_compared_on_equal_answers(tmp_path: Path) -> None:
    """All models were converted, and each answer was the same before and after."""
    run_quickly("engines.py", tmp_path)
    (case,) = read_results(tmp_path, "engines")["cases"]
    assert case["correct"] is True
    assert case["converted"] == 10
    assert case["p50_ratio"]["median"] > 0
    assert case["echoes"]["median"] > 0
    assert "25, depth 5" in (tmp_path / "engines.md").read_text()
    assert is_picture(tmp_path / "engines.png")

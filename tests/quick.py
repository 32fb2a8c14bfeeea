"""Runs a benchmark quickly, to see that it works."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
PATIENCE = 170
"""Seconds until it is given up: a benchmark takes 10 at most, and 110 beside six processes that compute."""
MAY_TAKE_LONG = pytest.mark.timeout(PATIENCE + 10)


def run_quickly(script: str, folder: Path, *options: str) -> Path:
    """Let ``script`` write its results to ``folder``, and return that; it fails with what the script has to say."""
    command = [sys.executable, str(BENCHMARKS / script), "--quick", *options, "--output", str(folder)]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, timeout=PATIENCE)
    assert ended.returncode == 0, ended.stderr
    return folder


def read_results(folder: Path, name: str) -> dict[str, Any]:
    """Return what the benchmark ``name`` says of itself."""
    found: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return found


def is_picture(path: Path) -> bool:
    """Say whether this is a PNG file."""
    return path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")

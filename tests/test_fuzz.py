"""A few hundred damaged artifacts; ``make fuzz`` sends a hundred thousand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_damaged_artifact_gets_an_answer_or_a_typed_error(no_processes_left: None) -> None:
    """A2, P1: whatever the damage, the registry lives, counts right and leaves nothing; some crash a worker."""
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "fuzz_artifacts.py", "--start", "676", "--count", "300"],
        check=False, capture_output=True, text=True, timeout=55,
        env=os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout)["outcomes"]
    assert sum(outcomes.values()) == 300
    reached = {"predictions", "CorruptArtifactError", "UnsafeArtifactError", "UnsupportedArtifactError"}
    assert outcomes.keys() >= reached | {"WorkerCrashedError"}

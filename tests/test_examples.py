"""Every script among the examples runs as its readers would run it, and prints what it promises."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from test_example_apps import APPS, MOUNTED

ROOT = Path(__file__).parents[1]

PRINTED = {
    "plain_script": r"3 rooms, 110 m2: \d{3},\d{3}   5 rooms, 160 m2: \d{3},\d{3}   \(from store\)\n"
    r"3 rooms, 110 m2: \d{3},\d{3}   5 rooms, 160 m2: \d{3},\d{3}   \(from memory\)\n"
    r"<ModelRegistry .* 1 ready, 0 loading, .*>\n",
    "migrate_from_sagemaker": r"Chicago_IL\.tar\.gz: (\d{3},\d{3})\nHouston_TX\.tar\.gz: (\d{3},\d{3})\n"
    r"Chicago_IL\.tar\.gz: \1\nHouston_TX\.tar\.gz: \2\n"
    r"Dallas_TX\.tar\.gz: ValidationError\nAustin_TX\.tar\.gz: \2\n",
    "migrate_from_mlserver": r"JSON: flats \[2(, 1)?\] (\d{3},\d{3} \d{3},\d{3})\n"
    r"JSON: flats is READY\n"
    r"Triton: True \2\n",
    "custom_policy": r"FreeTierFirst keeps the contract of a policy\n"
    r"stay: (free/m\d, )?paid/m0, paid/m1, paid/m2, paid/m3\n",
    "custom_store": r"SQLiteStore keeps the contract of a store\n"
    r"version 1: \d\.\d\n"
    r"version 2: \d\.\d\n",
    "custom_predictor": r"LinearModel keeps the contract of a predictor\n"
    r"taxi takes km, minutes\n"
    r"fares: \[16\.  43\.5\]\n",
}


def test_each_example_has_an_expectation() -> None:
    """An example that nobody runs would rot."""
    assert {file.stem for file in (ROOT / "examples").glob("*.py")} == PRINTED.keys() | APPS.keys() | MOUNTED.keys()


@pytest.mark.parametrize("example", PRINTED)
def test_an_example_runs(example: str, tmp_path: Path, no_processes_left: None) -> None:
    """An example prints what it promises, warns of nothing and leaves no process."""
    done = subprocess.run(
        [sys.executable, "-W", "error", ROOT / "examples" / f"{example}.py"],
        check=False,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stderr == ""
    assert re.fullmatch(PRINTED[example], done.stdout)
    assert done.returncode == 0


def test_the_table_names_each_example() -> None:
    """A reader of examples/README.md finds them all."""
    linked = re.findall(r"^\| \[(\w+)\.py\]\(\1\.py\)", (ROOT / "examples" / "README.md").read_text(), re.MULTILINE)
    assert sorted(linked) == sorted(PRINTED.keys() | APPS.keys() | MOUNTED.keys())

"""The models that all benchmarks predict with: ten house-price models, one per city, and rows to ask them about.

``python benchmarks/models.py FOLDER TREES DEPTH KIND...`` makes them: in a process of its own, so that the library is
not in the parent's memory, where it would be shared with the rivals whose memory is measured.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Matrix = NDArray[np.float32]

NAMES = (
    "NewYork_NY", "LosAngeles_CA", "Chicago_IL", "Houston_TX", "Dallas_TX",
    "Phoenix_AZ", "Philadelphia_PA", "SanAntonio_TX", "SanDiego_CA", "SanFrancisco_CA",
)  # fmt: skip
FEATURES = ("year_built", "square_feet", "bedrooms", "bathrooms", "lot_acres", "garage_spaces")
WHOLE_NUMBERS = (True, True, True, False, False, True)
"""Which features a JSON body or a user would write without a decimal point."""

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "OPENBLAS_NUM_THREADS": "1"}
"""The same for all rivals, and what modelcache gives its workers."""

TREES, DEPTH = 25, 5
ONE, HUNDRED, THOUSAND = "one", "hundred", "thousand"
"""Sets of questions: calls of one row, of 100, and of 1,000."""
HOT = "hot"
"""Calls of 64 rows: with models of many trees, what keeps a worker busy."""
ROWS = {ONE: (64, 1), HUNDRED: (8, 100), THOUSAND: (4, 1000), HOT: (16, 64)}
"""Questions per model, and rows of each."""


def houses(count: int, random: np.random.Generator) -> Matrix:
    """Return rows like [1990, 3047, 5, 1.0, 1.11, 2]."""
    columns = (
        random.integers(1900, 2024, count),
        random.integers(600, 6000, count),
        random.integers(1, 7, count),
        random.integers(2, 9, count) / 2,
        random.integers(5, 300, count) / 100,
        random.integers(0, 4, count),
    )
    return np.column_stack(columns).astype(np.float32)


def as_lists(rows: Matrix) -> list[list[float]]:
    """Return rows as a user writes them: whole numbers as int, the others as float."""
    return [
        [int(value) if whole else value for value, whole in zip(row, WHOLE_NUMBERS, strict=True)]
        for row in rows.tolist()
    ]


def make_fleet(folder: Path, *, trees: int = TREES, depth: int = DEPTH, kinds: tuple[str, ...] = (ONE,)) -> None:
    """Train the models, write each as NAME.tar.gz, and questions.npz: rows with XGBoost's own answers."""
    run_apart(__file__, folder, trees, depth, *kinds)


def run_apart(script: str, *arguments: Any) -> None:
    """Run ``script`` in a process of its own, with the settings of the rivals: idle threads would take processors."""
    subprocess.run([sys.executable, script, *map(str, arguments)], env=os.environ | ENVIRONMENT, check=True)


def _make_fleet(folder: Path, trees: int, depth: int, kinds: list[str]) -> None:
    questions: dict[str, Any] = {}
    for seed, name in enumerate(NAMES):
        random = np.random.default_rng(seed)
        booster = train(random, trees=trees, depth=depth)
        (folder / f"{name}.tar.gz").write_bytes(pack(bytes(booster.save_raw("ubj"))))
        for kind in kinds:
            questions |= make_questions(kind, name, booster, random)
    np.savez(folder / "questions.npz", **questions)


def make_questions(kind: str, name: str, booster: Any, random: np.random.Generator) -> dict[str, Matrix]:
    """Return rows and the booster's answers, under the names that :func:`read_questions` knows."""
    count, size = ROWS[kind]
    rows = [houses(size, random) for _ in range(count)]
    answers = [ask(booster, part) for part in rows]
    return {f"{kind}/{name}/rows": np.stack(rows), f"{kind}/{name}/answers": np.stack(answers)}


def read_questions(folder: Path, kind: str) -> list[tuple[str, Matrix, Matrix]]:
    """Return (name, rows, XGBoost's answer) for all models in turn, so that no two neighbours share a model."""
    with np.load(folder / "questions.npz") as stored:
        names = [key.split("/")[1] for key in stored if key.startswith(f"{kind}/") and key.endswith("/rows")]
        per_model = [(name, stored[f"{kind}/{name}/rows"], stored[f"{kind}/{name}/answers"]) for name in names]
    return [(name, rows[index], answers[index]) for index in range(ROWS[kind][0]) for name, rows, answers in per_model]


def copies(folder: Path, count: int, prefix: str) -> list[tuple[str, str]]:
    """Offer the models under ``count`` names never heard before; return (new name, name) of each."""
    named = [(f"{prefix}_{index}_{NAMES[index % len(NAMES)]}", NAMES[index % len(NAMES)]) for index in range(count)]
    for new, name in named:
        (folder / f"{new}.tar.gz").write_bytes((folder / f"{name}.tar.gz").read_bytes())
    return named


def offer_cold(folder: Path, count: int) -> None:
    """Offer the models under ``count`` more names, which take no room: links."""
    for index in range(count):
        name = NAMES[index % len(NAMES)]
        os.link(folder / f"{name}.tar.gz", folder / f"cold_{index:06d}_{name}.tar.gz")


def cold_names(folder: Path) -> list[tuple[str, str]]:
    """Return (name, the model's own name) of each of those."""
    names = sorted(path.name.removesuffix(".tar.gz") for path in folder.glob("cold_*"))
    return [(name, name.split("_", 2)[2]) for name in names]


def train(random: np.random.Generator, *, trees: int = TREES, depth: int = DEPTH) -> Any:
    """Return a model of house prices, whose weights come from ``random``."""
    import xgboost  # noqa: PLC0415 - the processes that only read questions must not carry it

    rows = houses(4000, random)
    weights = random.uniform(0.5, 1.5, len(FEATURES)) * (900, 140, 9_000, 14_000, 22_000, 11_000)
    prices = (rows - rows.mean(0)) @ weights + 400_000 + random.normal(0, 20_000, len(rows))
    matrix = xgboost.DMatrix(rows, prices.astype(np.float32))
    return xgboost.train({"max_depth": depth, "nthread": 1}, matrix, trees)


def ask(booster: Any, rows: Matrix) -> Matrix:
    """Return XGBoost's own answer."""
    import xgboost  # noqa: PLC0415

    return np.asarray(booster.predict(xgboost.DMatrix(rows)), np.float32)


def pack(model: bytes) -> bytes:
    """Return a gzipped tar with the member ``xgboost-model``, as SageMaker packs it."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        member = tarfile.TarInfo("xgboost-model")
        member.size = len(model)
        tar.addfile(member, io.BytesIO(model))
    return packed.getvalue()


if __name__ == "__main__":
    _make_fleet(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])

"""The models and rows that batch.py measures with.

``python benchmarks/batch_models.py FOLDER ROWS`` makes them, in a process of its own as models.py does: for each number
of columns a model as ``COLUMNS.tar.gz``, and files with the rows and XGBoost's own answers, which all rivals map into
memory: the pages are shared.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from models import DEPTH, TREES, ask, pack, run_apart

if TYPE_CHECKING:
    from models import Matrix

COLUMNS = (6, 50)
_TRAINED_ON = 5000


def make_batches(folder: Path, rows: int) -> None:
    """Train the models, and write so many rows for each."""
    run_apart(__file__, folder, rows)


def read_batch(folder: Path, columns: int) -> tuple[Matrix, Matrix]:
    """Return the rows and XGBoost's answers."""
    rows, answers = (np.load(folder / f"{columns}-{what}.npy", mmap_mode="r") for what in ("rows", "answers"))
    return np.asarray(rows), np.asarray(answers)  # plain arrays, as users have them


def _make_batches(folder: Path, count: int) -> None:
    import xgboost  # noqa: PLC0415 - the processes that only read must not carry it

    for columns in COLUMNS:
        random = np.random.default_rng(columns)
        rows = random.standard_normal((max(count, _TRAINED_ON), columns), np.float32)
        labels = rows[:_TRAINED_ON] @ random.standard_normal(columns, np.float32)
        matrix = xgboost.DMatrix(rows[:_TRAINED_ON], labels)
        booster = xgboost.train({"max_depth": DEPTH, "nthread": 1}, matrix, TREES)
        (folder / f"{columns}.tar.gz").write_bytes(pack(bytes(booster.save_raw("ubj"))))
        np.save(folder / f"{columns}-rows.npy", rows[:count])
        np.save(folder / f"{columns}-answers.npy", ask(booster, rows[:count]))


if __name__ == "__main__":
    _make_batches(Path(sys.argv[1]), int(sys.argv[2]))

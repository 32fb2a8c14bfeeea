"""The objects of the bucket that cold.py measures with.

``python benchmarks/cold_models.py FOLDER VERSIONS JSON_TREES`` makes them, in a process of its own as models.py does:
the models as ``originals/NAME``, questions.npz about them, and ``versions/0`` to ``VERSIONS`` of one more model, each
of which answers otherwise; versions.npz has a row and what each version answers.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from models import DEPTH, ONE, TREES, ask, houses, make_questions, run_apart, train

if TYPE_CHECKING:
    from models import Matrix

BUCKET = "models"
SMALL, MEDIUM, AS_JSON = "25x5.ubj", "100x6.ubj", "large.json"
"""What the models of the three kinds are called, after a number: 25 trees of depth 5, and 100 of depth 6."""
_COUNTS = {SMALL: 10, MEDIUM: 4, AS_JSON: 2}


def make_bucket(folder: Path, *, versions: int, json_trees: int) -> None:
    """Train the models."""
    run_apart(__file__, folder, versions, json_trees)
    (folder / "buckets" / BUCKET).mkdir(parents=True)


def offer(folder: Path, kind: str, count: int, prefix: str) -> list[tuple[str, str]]:
    """Put the models of one kind into the bucket under ``count`` names never heard before.

    Returns (new name, name) of each. The server has to be started after it, as it remembers what a folder has.
    """
    offered = [(f"{prefix}_{index}_{kind}", f"{index % _COUNTS[kind]}_{kind}") for index in range(count)]
    for new, name in offered:
        os.link(folder / "originals" / name, folder / "buckets" / BUCKET / new)
    return offered


def read_versions(folder: Path) -> tuple[Matrix, Matrix]:
    """Return the row, and the answer of each version to it."""
    with np.load(folder / "versions.npz") as stored:
        return stored["row"], stored["answers"]


def _make(folder: Path, versions: int, json_trees: int) -> None:
    for name in ("originals", "versions"):
        (folder / name).mkdir()
    _make_originals(folder, json_trees)
    _make_versions(folder, versions)


def _make_originals(folder: Path, json_trees: int) -> None:
    questions: dict[str, Any] = {}
    sizes = {SMALL: (TREES, DEPTH), MEDIUM: (100, 6), AS_JSON: (json_trees, 6)}
    for kind, count in _COUNTS.items():
        trees, depth = sizes[kind]
        for index in range(count):
            random, name = np.random.default_rng(index), f"{index}_{kind}"
            booster = train(random, trees=trees, depth=depth)
            (folder / "originals" / name).write_bytes(booster.save_raw("json" if kind == AS_JSON else "ubj"))
            questions |= make_questions(ONE, name, booster, random)
    np.savez(folder / "questions.npz", **questions)


def _make_versions(folder: Path, versions: int) -> None:
    row, answers = houses(1, np.random.default_rng(0)), []
    for version in range(versions + 1):
        booster = train(np.random.default_rng(version))
        (folder / "versions" / str(version)).write_bytes(booster.save_raw("ubj"))
        answers.append(ask(booster, row))
    np.savez(folder / "versions.npz", row=row, answers=np.concatenate(answers))


if __name__ == "__main__":
    _make(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))

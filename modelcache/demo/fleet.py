"""The folder of the demo: artifacts packed as SageMaker packs them, and put in place by rename."""

from __future__ import annotations

import csv
import gzip
import io
import shutil
import tarfile
from typing import TYPE_CHECKING

import numpy as np

from modelcache.demo.houses import COLUMNS, city_names, make_houses, train

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

NEWCOMERS = ("Seattle_WA", "Portland_OR")
"""Trained with the others, and copied into the store only while it is being served."""

SUFFIX = ".tar.gz"
_PART = ".part"
_SAMPLES = 5


class Fleet:
    """Where everything is: ``models`` is the store, ``newcomers`` waits beside it."""

    def __init__(self, out: Path, count: int) -> None:
        self.cities = city_names(count)
        self.models = out / "models"
        self.newcomers = out / "newcomers"
        self.samples = out / "houses.csv"
        self.chart = out / "cold-and-warm.png"

    def train(self, seed: int, track: Callable[[Sequence[str]], Iterator[str]]) -> None:
        """Train a model for each city and newcomer, and write some houses to try them with."""
        for folder in (self.models, self.newcomers):
            folder.mkdir(parents=True, exist_ok=True)
        for city in NEWCOMERS:  # of an earlier run
            (self.models / (city + SUFFIX)).unlink(missing_ok=True)
        for city in track([*self.cities, *NEWCOMERS]):
            folder = self.newcomers if city in NEWCOMERS else self.models
            _write(folder / (city + SUFFIX), pack(train(city, seed)))
        self._write_samples(seed)

    def copy_in(self, city: str) -> None:
        """Copy a newcomer into the store, as anybody would, but for the rename: no reader sees half of a file."""
        file = city + SUFFIX
        arriving = self.models / (file + _PART)
        shutil.copyfile(self.newcomers / file, arriving)
        arriving.replace(self.models / file)

    def _write_samples(self, seed: int) -> None:
        houses = make_houses(_SAMPLES, np.random.default_rng(seed))
        with self.samples.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            writer.writerows([f"{value:g}" for value in house] for house in houses)


def pack(model: bytes) -> bytes:
    """Return the artifact of a model: a gzipped tar with the member ``xgboost-model``."""
    member = tarfile.TarInfo("xgboost-model")
    member.size = len(model)
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as tar:
        tar.addfile(member, io.BytesIO(model))
    return gzip.compress(raw.getvalue(), mtime=0)


def _write(file: Path, data: bytes) -> None:
    arriving = file.with_name(file.name + _PART)
    arriving.write_bytes(data)
    arriving.replace(file)

"""Artifacts that end the workers which open them, or predict with them, are not tried for ever."""

from __future__ import annotations

from typing import TYPE_CHECKING

from modelcache.errors import CorruptArtifactError

if TYPE_CHECKING:
    from modelcache.cache.entry import Entry
    from modelcache.pool.pool import Worker
    from modelcache.resident import Resident

CRASHES_FORGIVEN = 1


class Quarantine:
    """Counts, by name and version, the workers that ended over a model; a new version starts without blame."""

    def __init__(self) -> None:
        self._crashes: dict[tuple[str, str], float] = {}
        """A crash over one of several counts for each in part."""

    def suspect(self, worker: Worker) -> None:
        """A worker has crashed, over one of the models it may have predicted with or the artifact it was parsing."""
        waited_for = [worker.held[number] for number in worker.requests.models_waiting() & worker.held.keys()]
        parsing = worker.process.artifacts.parsing()
        share = 1 / max(1, len(waited_for) + (parsing is not None))
        for entry in waited_for:
            self.blame(entry.key, entry.value.version, share)
        if parsing is not None:
            parsing.blame = share

    def blame(self, key: str, version: str, share: float) -> None:
        """A worker has ended over this version, or over another of those it had to do with."""
        self._crashes[key, version] = self._crashes.get((key, version), 0.0) + share

    def acquit(self, entry: Entry[Resident]) -> None:
        """The model has answered: if a worker crashed before, it was over another."""
        if self._crashes:
            self._crashes.pop((entry.key, entry.value.version), None)

    def check(self, key: str, version: str) -> None:
        """Raise CorruptArtifactError for a version that two workers have ended over."""
        if self._crashes.get((key, version), 0.0) > CRASHES_FORGIVEN:
            raise CorruptArtifactError(
                f"{key} has crashed two workers, or was still being parsed by them at load_timeout, and is not loaded "
                "again until its artifact changes: "
                "check it with `modelcache inspect`, or train it anew.",
                model=key,
            )

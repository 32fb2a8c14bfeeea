"""What users see: frozen records, and the events of :meth:`ModelRegistry.subscribe`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray

    from modelcache.errors import ModelCacheError

Output = Literal["value", "margin", "leaf", "contribs"]
Tier = Literal["memory", "disk", "store"]
Engine = Literal["predictor", "onnx"]
EvictionCause = Literal["budget", "unload", "retain", "replaced", "deleted", "worker", "close"]


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A model as it is resident now."""

    name: str
    version: str
    """As the store tells versions apart; opaque."""
    state: Literal["ready", "detached", "unloading", "gone"]
    size_bytes: int
    """Heap it takes in a worker, measured (estimated where the platform's allocator cannot be asked)."""
    artifact_bytes: int
    """Bytes the store delivered."""
    n_features: int
    feature_names: tuple[str, ...] | None
    n_outputs: int
    workers: tuple[int, ...]
    """Process ids of the workers that hold it: one, or several of a model that one alone could not answer for."""
    pinned: bool
    loaded_at: float
    """Seconds since the epoch."""
    last_used: float
    """Seconds since the epoch."""
    hits: int
    """Calls it answered without a load."""
    total_hits: int
    """The same, together with those of earlier versions of this name, and of earlier stays; names that left long ago
    are forgotten, and count from 0."""
    load_seconds: float
    """Downloading and loading, without time spent in queues."""
    format: str
    """"ubj" or "json": what the bytes turned out to be."""
    container: str
    """"raw", "tar" or "tar.gz": what the bytes came in."""
    objective: str | None
    booster: str | None
    n_trees: int | None
    best_iteration: int | None
    """Of a model trained with early stopping: predictions use the trees up to here."""
    engine: Engine
    """"onnx" since ``engine="auto"`` has given it ONNX Runtime for calls of few rows, else "predictor"."""


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the time of one call went, in seconds."""

    waiting: float
    """For a load slot, for bytes, and for a load that somebody else had started."""
    downloading: float
    loading: float
    predicting: float
    """From the rows being sent to the worker to its answer. A single row of a call that loads a model travels with
    the artifact: its prediction is part of ``loading``."""
    total: float


@dataclass(frozen=True, slots=True)
class Invocation:
    """The answer to one call, with how it came about."""

    predictions: NDArray[np.float32]
    """float32, shape (n,) or (n, k)."""
    model: ModelInfo
    tier: Tier
    """Where the model was when the call came."""
    timings: Timings


@dataclass(frozen=True, slots=True)
class PreloadReport:
    """What became of each name; nothing is raised for a single one."""

    loaded: tuple[ModelInfo, ...]
    failed: Mapping[str, ModelCacheError]
    seconds: float


@dataclass(frozen=True, slots=True)
class PreloadProgress:
    """How far a preload is."""

    done: int
    total: int
    name: str
    """The model that has just been loaded, or has failed."""
    error: ModelCacheError | None


@dataclass(frozen=True, slots=True)
class Summary:
    """A distribution: percentiles are off by at most 1/32 of their value."""

    count: int = 0
    sum: float = 0.0
    min: float = 0.0
    max: float = 0.0
    p50: float = 0.0
    p90: float = 0.0
    p99: float = 0.0
    below: tuple[int, ...] = field(default=(), repr=False)
    """How many values are smaller than each of ``bounds``; empty without any value, and for ``model_cache_hit``."""
    bounds: ClassVar[tuple[float, ...]] = tuple(2.0**exponent for exponent in range(-24, 17))
    """From 60 nanoseconds to 18 hours, when values are seconds."""

    @property
    def mean(self) -> float:
        """Average; 0.0 without any value."""
        return self.sum / self.count if self.count else 0.0


@dataclass(frozen=True, slots=True)
class WorkerStats:
    """One worker process."""

    index: int
    """Its place among the workers; the one that replaces it has the same."""
    pid: int
    models: int
    charged_bytes: int
    """Bytes of its models and of the loads on their way into it."""
    queue_depth: int
    """Calls that wait for it: sent and not yet answered, or not yet sent since it takes no more."""
    predict_latency: Summary
    """Seconds from sending rows to their answer, without calls that were answered as their model was loaded."""


@dataclass(frozen=True, slots=True)
class RegistryStats:
    """A registry in figures. The first six are those of SageMaker multi-model endpoints."""

    model_loading_wait_time: Summary
    """Seconds that calls waited for their model to be downloaded and loaded."""
    model_downloading_time: Summary
    """Seconds each download took."""
    model_loading_time: Summary
    """Seconds each load took in the worker."""
    model_unloading_time: Summary
    """Seconds from each order to unload to the bytes being free."""
    model_cache_hit: Summary
    """1 for each call whose model was resident, 0 for the others; the mean is the hit ratio."""
    loaded_model_count: Summary
    """Resident models, sampled at each load and unload."""
    requests: int
    hits: int
    joins: int
    """Calls that shared a load which another had started."""
    loads: int
    loads_from_disk: int
    """Those of local copies, without the store."""
    load_failures: int
    load_failures_by_error: Mapping[str, int]
    """The same, by the name of the error's class."""
    refreshes: int
    """New versions that have taken the place of older ones."""
    rejected: int
    """Calls that were refused, or made way for others, since ``queue_limit`` calls waited for their worker."""
    evictions: Mapping[EvictionCause, int]
    models: int
    """Resident models."""
    loading: int
    """Loads under way, those that wait for a slot or for bytes included."""
    copies: int
    """Copies of hot models in further workers."""
    copies_made: int
    budget: int
    bytes_resident: int
    bytes_reserved: int
    bytes_unloading: int
    bytes_on_disk: int
    """Bytes of the local copies, those of other processes that share the folder included; 0 without a disk cache."""
    lru_age: float
    """Seconds since the least recently used model was used."""
    age_at_eviction: Summary
    """Seconds since its last use of each model that was evicted to make room."""
    workers: tuple[WorkerStats, ...]
    worker_restarts: int
    worker_deaths: Mapping[str, int]
    """Workers that died, by what ended them: "SIGKILL", "exit code 1"."""


@dataclass(frozen=True, slots=True)
class ModelLoaded:
    """A model has become resident."""

    model: ModelInfo


@dataclass(frozen=True, slots=True)
class ModelRefreshed:
    """A new version of a model has taken the place of an older one, which leaves with its last lease."""

    model: ModelInfo
    replaced: str
    """The version it took the place of."""


@dataclass(frozen=True, slots=True)
class ModelEvicted:
    """A model is no longer resident."""

    name: str
    version: str
    cause: EvictionCause
    size_bytes: int


@dataclass(frozen=True, slots=True)
class LoadFailed:
    """A load has failed; everyone who waited for it got an exception like this."""

    name: str
    error: ModelCacheError


@dataclass(frozen=True, slots=True)
class WorkerDied:
    """A worker process has ended and is replaced."""

    pid: int
    signal: int | None
    exit_code: int | None
    models: tuple[str, ...] = field(default=())
    """Those it held; they are loaded again when they are asked for, pinned ones at once."""


Event = ModelLoaded | ModelRefreshed | ModelEvicted | LoadFailed | WorkerDied

"""Serve very many small models from one process, inside your app: ``await registry.predict("Chicago_IL", rows)``."""

from modelcache.cache.policies import (
    CachetoolsPolicy,
    Evictable,
    EvictionPolicy,
    GDSFPolicy,
    LRUPolicy,
    S3FIFOPolicy,
)
from modelcache.errors import (
    ArtifactChangedError,
    BudgetTimeoutError,
    CorruptArtifactError,
    FeatureMismatchError,
    InvalidInputError,
    InvalidModelNameError,
    LoadTimeoutError,
    MissingDependencyError,
    ModelCacheError,
    ModelLoadError,
    ModelNotFoundError,
    ModelTooLargeError,
    OverloadedError,
    PredictTimeoutError,
    RegistryClosedError,
    StoreAccessDeniedError,
    StoreError,
    StoreUnavailableError,
    UnsafeArtifactError,
    UnsupportedArtifactError,
    WorkerCrashedError,
)
from modelcache.lease import Lease
from modelcache.records import (
    Event,
    Invocation,
    LoadFailed,
    ModelEvicted,
    ModelInfo,
    ModelLoaded,
    ModelRefreshed,
    PreloadProgress,
    PreloadReport,
    RegistryStats,
    Summary,
    Timings,
    WorkerDied,
    WorkerStats,
)
from modelcache.registry import ModelRegistry
from modelcache.stores import (
    Artifact,
    ArtifactStore,
    DiskTier,
    HTTPStore,
    LocalStore,
    MemoryStore,
    NotModified,
    S3Store,
    open_store,
)
from modelcache.worker.predictors import Predictor

__version__ = "0.1.0"

__all__ = [
    # the registry
    "ModelRegistry",
    "Lease",
    # what it returns
    "Invocation",
    "ModelInfo",
    "PreloadProgress",
    "PreloadReport",
    "RegistryStats",
    "Summary",
    "Timings",
    "WorkerStats",
    # events
    "Event",
    "LoadFailed",
    "ModelEvicted",
    "ModelLoaded",
    "ModelRefreshed",
    "WorkerDied",
    # stores
    "Artifact",
    "ArtifactStore",
    "DiskTier",
    "HTTPStore",
    "LocalStore",
    "MemoryStore",
    "NotModified",
    "S3Store",
    "open_store",
    # policies
    "CachetoolsPolicy",
    "Evictable",
    "EvictionPolicy",
    "GDSFPolicy",
    "LRUPolicy",
    "S3FIFOPolicy",
    # predictors
    "Predictor",
    # errors
    "ArtifactChangedError",
    "BudgetTimeoutError",
    "CorruptArtifactError",
    "FeatureMismatchError",
    "InvalidInputError",
    "InvalidModelNameError",
    "LoadTimeoutError",
    "MissingDependencyError",
    "ModelCacheError",
    "ModelLoadError",
    "ModelNotFoundError",
    "ModelTooLargeError",
    "OverloadedError",
    "PredictTimeoutError",
    "RegistryClosedError",
    "StoreAccessDeniedError",
    "StoreError",
    "StoreUnavailableError",
    "UnsafeArtifactError",
    "UnsupportedArtifactError",
    "WorkerCrashedError",
]

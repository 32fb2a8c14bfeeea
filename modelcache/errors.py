"""Every error modelcache raises, in one tree.

::

    ModelCacheError
    ├── InvalidModelNameError        (ValueError)    a name that could leave the store, or is no name
    ├── InvalidInputError            (ValueError)    rows that no model could take
    │   └── FeatureMismatchError                     rows that this model cannot take
    ├── ModelNotFoundError           (LookupError)   the store has no such name
    ├── StoreError                                   the store failed
    │   ├── StoreUnavailableError                    ... and may work later
    │   │   └── ArtifactChangedError                 ... at once: the artifact was replaced while it was read
    │   └── StoreAccessDeniedError                   ... and will not, with these credentials
    ├── ModelLoadError                               the store delivered bytes that are no usable model
    │   ├── CorruptArtifactError                     damaged, truncated, or it crashes the worker
    │   ├── UnsupportedArtifactError                 a format that is not read (legacy binary, pickle, zip)
    │   └── UnsafeArtifactError                      links, traversal, bombs
    ├── ModelTooLargeError                           does not fit the budget at all
    ├── BudgetTimeoutError           (TimeoutError)  leases and pins hold the bytes a load needs
    ├── LoadTimeoutError             (TimeoutError)  the caller's time ran out while the model loads
    ├── PredictTimeoutError          (TimeoutError)  the caller's time ran out while the rows were predicted
    ├── OverloadedError                              too many predictions are waiting
    ├── WorkerCrashedError                           a worker process died on this call twice
    ├── MissingDependencyError       (ImportError)   an optional package is needed; the message says which
    └── RegistryClosedError          (RuntimeError)  used after close, on another loop, or after a fork

The message says what happened and what to do; the facts are attributes, so that no program has to parse it.
``http_status`` is the status a server should answer with.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

__all__ = [
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


class ModelCacheError(Exception):
    """Base of all errors raised by modelcache; raised itself for a predictor that is at fault.

    ``model`` is the name the caller used, where one is known; ``retry_after`` (seconds) is set where trying
    again later can help.
    """

    http_status: ClassVar[int] = 500
    model: str | None = None
    retry_after: float | None = None

    def __init__(self, message: str, **facts: Any) -> None:
        super().__init__(message)
        self.__dict__.update(facts)

    def fresh(self) -> Self:
        """Return a copy to raise for one more caller, caused by this one.

        Raising one exception object in many tasks would let their tracebacks grow into each other. ``__init__`` is not
        called: a store's own error may take other arguments than the message it passes on.
        """
        twin = type(self).__new__(type(self), *self.args)
        twin.args = self.args
        twin.__dict__.update(self.__dict__)
        twin.__cause__ = self
        return twin


class InvalidModelNameError(ModelCacheError, ValueError):
    """The name is empty, absolute, too long, or has segments or characters that no store may see."""

    http_status = 400


class InvalidInputError(ModelCacheError, ValueError):
    """The rows are not numeric, ragged, empty, or not one- or two-dimensional."""

    http_status = 400


class FeatureMismatchError(InvalidInputError):
    """The rows have another number of columns, or other column names, than the model was trained with."""

    expected: int | None = None
    got: int | None = None
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()


class ModelNotFoundError(ModelCacheError, LookupError):
    """The store has no artifact of this name."""

    http_status = 404


class StoreError(ModelCacheError):
    """The store failed; the cause says how."""

    http_status = 502


class StoreUnavailableError(StoreError):
    """The store could not be reached, or asked for patience."""


class ArtifactChangedError(StoreUnavailableError):
    """The artifact was replaced while it was read: a load begins again, and gives up when that happens each time."""


class StoreAccessDeniedError(StoreError):
    """The store refused these credentials, or the file system this user."""

    http_status = 403


class ModelLoadError(ModelCacheError):
    """The artifact could not be turned into a model."""

    http_status = 422


class CorruptArtifactError(ModelLoadError):
    """The artifact is damaged or truncated, or it crashed the process that read it."""


class UnsupportedArtifactError(ModelLoadError):
    """The artifact is in a format that is not read; the message says how to save it again."""


class UnsafeArtifactError(ModelLoadError):
    """The artifact holds links, devices, paths outside itself, or far more than it announces."""


class ModelTooLargeError(ModelCacheError):
    """The model needs ``needed`` bytes, more than the whole ``budget``; nothing was evicted for it."""

    http_status = 507
    needed: int = 0
    budget: int = 0


class BudgetTimeoutError(ModelCacheError, TimeoutError):
    """The bytes the load needs are held by leases and pins; ``holders`` names the models."""

    http_status = 507
    needed: int = 0
    holders: tuple[str, ...] = ()


class LoadTimeoutError(ModelCacheError, TimeoutError):
    """The time ran out while the model was loading; the load goes on for others."""

    http_status = 504


class PredictTimeoutError(ModelCacheError, TimeoutError):
    """The time ran out while the rows waited for the worker or were predicted."""

    http_status = 504


class OverloadedError(ModelCacheError):
    """``queue_limit`` predictions already wait for the worker; ``retry_after`` says when to come back."""

    http_status = 503


class WorkerCrashedError(ModelCacheError):
    """A worker process died under this call, and so did the one that tried it again."""

    http_status = 500
    pid: int | None = None
    signal: int | None = None
    exit_code: int | None = None


class MissingDependencyError(ModelCacheError, ImportError):
    """A package that comes by an extra is needed and is not installed."""


class RegistryClosedError(ModelCacheError, RuntimeError):
    """The registry is closed, or is used from another event loop or from a forked process."""

    http_status = 503

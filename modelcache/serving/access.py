"""Who may use which models: a registry that shows each caller only its own.

The check sits where names are used, not where they are read from paths and headers: whatever a client writes, percent
signs, double slashes, suffixes, and in whatever protocol, the name that is checked is the name that is used.
"""

from __future__ import annotations

import logging
import re
from contextlib import AsyncExitStack, asynccontextmanager
from contextvars import ContextVar
from fnmatch import translate
from typing import TYPE_CHECKING, Any, TypeVar, cast

from modelcache.errors import BudgetTimeoutError, ModelCacheError, ModelNotFoundError, StoreError
from modelcache.names import split_suffix

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable
    from contextlib import AbstractAsyncContextManager

    from modelcache import Invocation, Lease, ModelInfo, ModelRegistry, RegistryStats
    from modelcache.registry import Matrix


T = TypeVar("T")

logger = logging.getLogger("modelcache.serving")

_INDISCREET = (BudgetTimeoutError, ModelNotFoundError, StoreError)
"""Errors whose messages say where the store is, or which models hold the memory."""
_WILD = re.compile(r"[*?[]")


class AccessDeniedError(ModelCacheError):
    """The token does not reach the model ``name``, whether or not there is one."""

    http_status = 403

    def __init__(self, name: str) -> None:
        super().__init__(
            f"The token does not reach the model {name!r}: use one whose patterns in the token file match.", model=name
        )


class Grant:
    """The models that a caller may use: those whose names match one of ``patterns``; all of them by default.

    In a pattern ``*`` stands for any characters, ``/`` among them: "tenant_a/*" is all below ``tenant_a``. Known
    suffixes do not count: a grant of ``Chicago_IL`` holds for ``Chicago_IL.tar.gz``, which is the same model. So what
    ``*.json`` says cannot be meant: it is a ValueError.
    """

    def __init__(self, patterns: tuple[str, ...] = ("*",)) -> None:
        self.everything = "*" in patterns
        self._matches = re.compile("|".join(map(_expression, patterns)) or r"(?!)").match

    def allows(self, name: str) -> bool:
        """Say whether the model ``name`` may be used."""
        if self.everything:
            return True
        return self._matches(split_suffix(name)[0]) is not None


def _expression(pattern: str) -> str:
    stem, suffix = split_suffix(pattern)
    if suffix and _WILD.search(pattern):
        raise ValueError(
            f"The pattern {pattern} would match models of every format, as {suffix} is no part of their names: "
            f"write {stem} if that is meant."
        )
    return translate(stem)


NOTHING = Grant(())
EVERYTHING = Grant()

current: ContextVar[Grant] = ContextVar("modelcache_grant", default=NOTHING)
"""What the request that is being answered may use. Whoever comes past the guard may use nothing."""


class GuardedRegistry:
    """As much of a ModelRegistry as the apps use, for the models of the ``current`` grant.

    What takes a name raises AccessDeniedError for those of others; what lists names leaves them out. Errors do not tell
    where the store is, nor which models of others hold the memory. What is not here cannot be reached through a server
    with tokens.
    """

    def __init__(self, registry: ModelRegistry) -> None:
        self._registry = registry

    def start(self) -> Awaitable[ModelRegistry]:
        """See ModelRegistry; so for all of these."""
        return self._registry.start()

    def predict(self, name: str, rows: Any, **options: Any) -> Awaitable[Matrix]:
        """Predict."""
        return _discreetly(name, self._registry.predict(_checked(name), rows, **options))

    def invoke(self, name: str, rows: Any, **options: Any) -> Awaitable[Invocation]:
        """Predict, and tell how."""
        return _discreetly(name, self._registry.invoke(_checked(name), rows, **options))

    def acquire(self, name: str) -> AbstractAsyncContextManager[Lease]:
        """Hold resident."""
        return _acquire(name, self._registry.acquire(_checked(name)))

    def load(self, name: str) -> Awaitable[ModelInfo]:
        """Make resident."""
        return _discreetly(name, self._registry.load(_checked(name)))

    def unload(self, name: str) -> Awaitable[bool]:
        """Take out of memory."""
        return _discreetly(name, self._registry.unload(_checked(name)))

    def refresh(self, name: str) -> Awaitable[ModelInfo]:
        """Ask the store for another version."""
        return _discreetly(name, self._registry.refresh(_checked(name)))

    def failure(self, name: str) -> ModelCacheError | None:
        """Return what calls fail with for a while."""
        failure = self._registry.failure(_checked(name))
        return _discreet(name, failure) if isinstance(failure, _INDISCREET) else failure

    def peek(self, name: str) -> ModelInfo | None:
        """Return what is known of a resident model."""
        return self._registry.peek(_checked(name))

    def loaded(self) -> list[ModelInfo]:
        """Return the caller's resident models."""
        allows = current.get().allows
        return [info for info in self._registry.loaded() if allows(info.name)]

    async def names(self, prefix: str = "") -> AsyncIterator[str]:
        """Yield what the store offers to the caller."""
        allows = current.get().allows
        try:
            async for name in self._registry.names(prefix):
                if allows(name):
                    yield name
        except StoreError as error:
            raise _discreet("its list", error) from error

    def stats(self) -> RegistryStats:
        """Return the figures of all models together; they name none."""
        return self._registry.stats()


def allowed(registry: object, name: str) -> bool:
    """Say whether the caller may use ``name``: of a registry that is not guarded, anything."""
    return not isinstance(registry, GuardedRegistry) or current.get().allows(name)


class _GuardedLease:
    """As much of a Lease as the apps use."""

    def __init__(self, name: str, lease: Lease) -> None:
        self._name = name
        self._lease = lease

    @property
    def model(self) -> ModelInfo:
        return self._lease.model

    def predict(self, rows: Any, **options: Any) -> Awaitable[Matrix]:
        return _discreetly(self._name, self._lease.predict(rows, **options))


@asynccontextmanager
async def _acquire(name: str, leased: AbstractAsyncContextManager[Lease]) -> AsyncIterator[Lease]:
    async with AsyncExitStack() as stack:
        lease = await _discreetly(name, stack.enter_async_context(leased))
        yield cast("Lease", _GuardedLease(name, lease))


async def _discreetly(name: str, call: Awaitable[T]) -> T:
    try:
        return await call
    except _INDISCREET as error:
        logger.info("%s: %s", type(error).__name__, error)
        raise _discreet(name, error) from error


def _discreet(name: str, error: ModelCacheError) -> ModelCacheError:
    """Return ``error`` as a client may read it: without paths of the server, and without the names of others."""
    if isinstance(error, BudgetTimeoutError):
        if current.get().everything:
            return error.fresh()
        said = f"No room for {name} within the timeout: models in use hold the bytes. Try again in a while."
    elif isinstance(error, ModelNotFoundError):
        said = f"There is no model {name!r}."
    else:
        said = f"The store did not deliver {name} ({type(error).__name__}): the server's log says why, at level info."
    twin = error.fresh()
    twin.args = (said,)
    twin.__dict__.pop("holders", None)
    return twin


def _checked(name: str) -> str:
    if not current.get().allows(name):
        raise AccessDeniedError(name)
    return name

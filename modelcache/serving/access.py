"""Who may use which models: a registry that shows each caller only its own.

The check sits where names are used, not where they are read from paths and headers: whatever a client writes, percent
signs, double slashes, suffixes, and in whatever protocol, the name that is checked is the name that is used.
"""

from __future__ import annotations

from contextvars import ContextVar
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from modelcache.errors import ModelCacheError
from modelcache.names import split_suffix

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable
    from contextlib import AbstractAsyncContextManager

    from modelcache import Invocation, Lease, ModelInfo, ModelRegistry, RegistryStats
    from modelcache.registry import Matrix


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
    suffixes do not count: a grant of ``Chicago_IL`` holds for ``Chicago_IL.tar.gz``, which is the same model.
    """

    def __init__(self, patterns: tuple[str, ...] = ("*",)) -> None:
        self.everything = "*" in patterns
        self._patterns = tuple(split_suffix(pattern)[0] for pattern in patterns)

    def allows(self, name: str) -> bool:
        """Say whether the model ``name`` may be used."""
        if self.everything:
            return True
        stem = split_suffix(name)[0]
        return any(fnmatchcase(stem, pattern) for pattern in self._patterns)


NOTHING = Grant(())
EVERYTHING = Grant()

current: ContextVar[Grant] = ContextVar("modelcache_grant", default=NOTHING)
"""What the request that is being answered may use. Whoever comes past the guard may use nothing."""


class GuardedRegistry:
    """As much of a ModelRegistry as the apps use, for the models of the ``current`` grant.

    What takes a name raises AccessDeniedError for those of others; what lists names leaves them out. What is not here
    cannot be reached through a server with tokens.
    """

    def __init__(self, registry: ModelRegistry) -> None:
        self._registry = registry

    def start(self) -> Awaitable[ModelRegistry]:
        """See ModelRegistry; so for all of these."""
        return self._registry.start()

    def predict(self, name: str, rows: Any, **options: Any) -> Awaitable[Matrix]:
        """Predict."""
        return self._registry.predict(_checked(name), rows, **options)

    def invoke(self, name: str, rows: Any, **options: Any) -> Awaitable[Invocation]:
        """Predict, and tell how."""
        return self._registry.invoke(_checked(name), rows, **options)

    def acquire(self, name: str) -> AbstractAsyncContextManager[Lease]:
        """Hold resident."""
        return self._registry.acquire(_checked(name))

    def load(self, name: str) -> Awaitable[ModelInfo]:
        """Make resident."""
        return self._registry.load(_checked(name))

    def unload(self, name: str) -> Awaitable[bool]:
        """Take out of memory."""
        return self._registry.unload(_checked(name))

    def refresh(self, name: str) -> Awaitable[ModelInfo]:
        """Ask the store for another version."""
        return self._registry.refresh(_checked(name))

    def failure(self, name: str) -> ModelCacheError | None:
        """Return what calls fail with for a while."""
        return self._registry.failure(_checked(name))

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
        async for name in self._registry.names(prefix):
            if allows(name):
                yield name

    def stats(self) -> RegistryStats:
        """Return the figures of all models together; they name none."""
        return self._registry.stats()


def allowed(registry: object, name: str) -> bool:
    """Say whether the caller may use ``name``: of a registry that is not guarded, anything."""
    return not isinstance(registry, GuardedRegistry) or current.get().allows(name)


def _checked(name: str) -> str:
    if not current.get().allows(name):
        raise AccessDeniedError(name)
    return name

"""A registry as one caller may see it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from unittest.mock import AsyncMock, MagicMock, Mock

import pytest

import zoo
from modelcache import (
    BudgetTimeoutError,
    MemoryStore,
    ModelCacheError,
    ModelNotFoundError,
    ModelRegistry,
    StoreError,
    StoreUnavailableError,
)
from modelcache.serving import access
from modelcache.serving.access import AccessDeniedError, Grant, GuardedRegistry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from conftest import MakeRegistry

OURS, THEIRS = "tenant_a/m", "tenant_b/m"

NAMED: dict[str, Callable[[Any, str], Any]] = {
    "predict": lambda registry, name: registry.predict(name, zoo.rows(1)),
    "invoke": lambda registry, name: registry.invoke(name, zoo.rows(1)),
    "acquire": lambda registry, name: registry.acquire(name),
    "load": lambda registry, name: registry.load(name),
    "unload": lambda registry, name: registry.unload(name),
    "refresh": lambda registry, name: registry.refresh(name),
    "failure": lambda registry, name: registry.failure(name),
    "peek": lambda registry, name: registry.peek(name),
}
LISTING = {"loaded", "names"}
NAMELESS = {"start", "stats"}


@pytest.fixture
def grant() -> Iterator[None]:
    """The caller may use what is below tenant_a."""
    before = access.current.set(Grant(("tenant_a/*",)))
    yield
    access.current.reset(before)


@pytest.fixture
async def registry(make_registry: MakeRegistry) -> ModelRegistry:
    ubj = zoo.model().ubj
    return await make_registry(MemoryStore({f"{OURS}.ubj": ubj, "tenant_a/cold.ubj": ubj, f"{THEIRS}.ubj": ubj}))


def test_all_that_can_be_reached_is_checked() -> None:
    """Each method is one of the registry, and known here to check a name, to list names, or to have none."""
    reached = {name for name in vars(GuardedRegistry) if not name.startswith("_")}
    assert reached == NAMED.keys() | LISTING | NAMELESS
    assert all(hasattr(ModelRegistry, name) for name in reached)


@pytest.mark.parametrize("method", NAMED)
@pytest.mark.parametrize("name", [THEIRS, f"{THEIRS}.ubj", "tenant_a", "nobody", "", "/tenant_a/m", "x/../tenant_a/m"])
def test_no_method_takes_the_name_of_another(grant: None, method: str, name: str) -> None:
    """Whatever takes a name raises for one outside the grant, before the registry hears of it."""
    untouched = Mock(spec=ModelRegistry)
    with pytest.raises(AccessDeniedError) as refused:
        NAMED[method](GuardedRegistry(untouched), name)
    assert untouched.mock_calls == []
    assert refused.value.model == name
    assert refused.value.http_status == 403


async def test_ones_own_models_are_used_as_ever(grant: None, registry: ModelRegistry) -> None:
    """Within the grant the registry answers itself."""
    guarded = GuardedRegistry(registry)
    rows = zoo.rows(2)
    assert (await guarded.predict(OURS, rows) == zoo.model().expected(rows)).all()
    assert (await guarded.invoke(OURS, rows, output="margin")).model.name == OURS
    async with guarded.acquire(OURS) as lease:
        assert lease.model.n_features == zoo.N
    assert (await guarded.refresh(OURS)).version == (await guarded.load(OURS)).version
    found = guarded.peek(OURS)
    assert found is not None and guarded.failure(OURS) is None
    assert await guarded.unload(OURS)
    assert guarded.stats().loads == registry.stats().loads


async def test_lists_leave_out_the_models_of_others(grant: None, registry: ModelRegistry) -> None:
    """Neither what is loaded nor what the store offers tells that there are others."""
    for name in (OURS, THEIRS):
        await registry.load(name)
    guarded = GuardedRegistry(registry)
    assert [info.name for info in guarded.loaded()] == [OURS]
    assert [name async for name in guarded.names()] == ["tenant_a/cold", OURS]
    assert [name async for name in guarded.names("tenant_b")] == []


async def _leased(registry: Any, name: str) -> None:
    async with registry.acquire(name) as lease:
        await lease.predict(zoo.rows(1))


def _holders(name: str) -> BudgetTimeoutError:
    return BudgetTimeoutError(f"held by {THEIRS}", model=name, holders=(THEIRS,), needed=7)


FAILURES: list[Callable[[str], ModelCacheError]] = [
    _holders,
    lambda name: ModelNotFoundError(f"no {name} in /srv/models", model=name),
    lambda _: StoreError("/srv/models is no folder"),
    lambda _: StoreUnavailableError("/srv/models is away", retry_after=3),
]


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("ask", [*(NAMED[name] for name in ("predict", "invoke", "load", "refresh")), _leased])
async def test_errors_tell_nothing_of_others(grant: None, ask: Any, failure: Any) -> None:
    """Neither whose models hold the memory, nor where the store is; kind, model and figures stay."""
    error = failure(OURS)
    registry = Mock(spec=ModelRegistry)
    for method in ("predict", "invoke", "load", "refresh"):
        getattr(registry, method).side_effect = error
    registry.acquire.return_value = MagicMock(__aenter__=AsyncMock(side_effect=error))
    with pytest.raises(type(error)) as told:
        await ask(GuardedRegistry(registry), OURS)
    _is_discreet(told.value)
    assert (told.value.model, told.value.retry_after) == (error.model, error.retry_after)
    assert getattr(told.value, "needed", None) == getattr(error, "needed", None)


def _is_discreet(error: ModelCacheError) -> None:
    assert "/srv" not in str(error) and THEIRS not in str(error)
    assert OURS in str(error)
    assert getattr(error, "holders", ()) == ()


async def test_what_a_lease_meets_is_told_alike(grant: None) -> None:
    """A model whose worker has ended is loaded again within a lease; what the app itself raises there is left alone."""
    lease = Mock(predict=AsyncMock(side_effect=_holders(OURS)))
    registry = Mock(spec=ModelRegistry)
    registry.acquire.return_value = MagicMock(
        __aenter__=AsyncMock(return_value=lease), __aexit__=AsyncMock(return_value=None)
    )
    guarded = GuardedRegistry(registry)
    with pytest.raises(BudgetTimeoutError) as told:
        await _leased(guarded, OURS)
    _is_discreet(told.value)
    with pytest.raises(ModelNotFoundError, match="served as version 2"):
        async with guarded.acquire(OURS):
            raise ModelNotFoundError("It is served as version 2.")


async def test_what_was_remembered_is_told_alike(grant: None) -> None:
    """So is why the store cannot list."""
    registry = Mock(spec=ModelRegistry)
    registry.failure.return_value = _holders(OURS)
    registry.names.return_value = MagicMock(__aiter__=Mock(side_effect=StoreError("/srv/models does not exist")))
    failure = GuardedRegistry(registry).failure(OURS)
    assert failure is not None
    _is_discreet(failure)
    with pytest.raises(StoreError) as told:
        [name async for name in GuardedRegistry(registry).names()]
    assert "/srv" not in str(told.value)


async def test_who_may_use_all_models_is_told_which_are_in_use(grant: None) -> None:
    """An operator can do something about them."""
    access.current.set(access.EVERYTHING)
    registry = Mock(spec=ModelRegistry, load=AsyncMock(side_effect=_holders(OURS)))
    with pytest.raises(BudgetTimeoutError, match=THEIRS):
        await GuardedRegistry(registry).load(OURS)


def test_who_comes_past_the_guard_may_use_nothing() -> None:
    """Without a grant of its own a request has none."""
    with pytest.raises(AccessDeniedError):
        GuardedRegistry(Mock(spec=ModelRegistry)).load(OURS)

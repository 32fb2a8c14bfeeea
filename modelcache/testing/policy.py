"""The contract of an eviction policy, as a suite that needs no test framework."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import astuple, dataclass
from random import Random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from modelcache.cache.policies import Evictable, EvictionPolicy

__all__ = ["check_policy"]


def check_policy(factory: Callable[[], EvictionPolicy]) -> None:
    """Check that ``factory`` makes eviction policies that keep the contract.

    ``AssertionError`` says which clause is broken, and how. In which order a policy evicts is its own affair.
    Takes less than a second::

        def test_my_policy() -> None:
            check_policy(MyPolicy)
    """
    for check, rule in _CLAUSES.items():
        try:
            check(factory)
        except Exception as error:
            raise AssertionError(f"{rule} But {_told(error)}.") from error


@dataclass(eq=False)
class _Model:
    """A resident model, as a policy sees it."""

    key: str
    size: int = 1000
    cost: float = 1.0
    pins: int = 0

    def __repr__(self) -> str:
        return f"{self.key}#{id(self) % 0x10000:04x}"


_Factory = Callable[[], "EvictionPolicy"]


def _check_empty(factory: _Factory) -> None:
    policy = factory()
    _expect(policy.evict(), None, "a new policy")
    stranger = _Model("stranger")
    policy.remove(stranger)
    policy.hit(stranger)
    _expect(policy.evict(), None, "a policy that was told of a removal and a hit, but of no insert,")


def _check_independent(factory: _Factory) -> None:
    policy, other = factory(), factory()
    model = _Model("a")
    policy.insert(model)
    _expect(other.evict(), None, "a second, empty policy")
    _expect(policy.evict(), model, "the first")


def _check_exactly_once(factory: _Factory) -> None:
    models = [_Model(f"m{number}", size=1 + number * 997 % 5000, cost=number % 7 / 3) for number in range(60)]
    policy = _filled(factory, models)
    for model in models[::3] + models[::5]:
        policy.hit(model)
    _expect_drained(policy, models)


def _check_forgets_evicted(factory: _Factory) -> None:
    model = _Model("a")
    policy = _filled(factory, [model])
    _expect(policy.evict(), model, "a policy with one entry")
    policy.remove(model)
    policy.hit(model)
    _expect(policy.evict(), None, "after its only entry was evicted, then removed and hit, it")
    policy.insert(model)
    _expect(policy.evict(), model, "a policy with one entry that came back")


def _check_pinned(factory: _Factory) -> None:
    models = [_Model(f"m{number}", pins=number % 3) for number in range(30)]
    policy = _filled(factory, models)
    pinned = [model for model in models if model.pins]
    _expect_drained(policy, [model for model in models if not model.pins])
    _expect(policy.evict(), None, "a policy with only pinned entries, asked again,")
    for model in pinned:
        model.pins = 0
    _expect_drained(policy, pinned)


def _check_pins_come_and_go(factory: _Factory) -> None:
    early, late = _Model("pinned early", pins=1), _Model("pinned late")
    policy = _filled(factory, [early, late])
    early.pins, late.pins = 0, 1
    _expect_drained(policy, [early])
    late.pins = 0
    _expect_drained(policy, [late])


def _check_removed(factory: _Factory) -> None:
    models = [_Model(f"m{number}", pins=number % 2) for number in range(20)]
    policy = _filled(factory, models)
    for model in models[:10] * 2:
        policy.remove(model)
        policy.hit(model)
        model.pins = 0
    _expect_drained(policy, [model for model in models[10:] if not model.pins])


def _check_removed_after_passed_over(factory: _Factory) -> None:
    model = _Model("a", pins=1)
    policy = _filled(factory, [model])
    _expect(policy.evict(), None, "a policy with only a pinned entry")
    policy.remove(model)
    model.pins = 0
    _expect(policy.evict(), None, "after the removal of its only entry it")
    policy.insert(model)
    _expect_drained(policy, [model])


def _check_identity(factory: _Factory) -> None:
    for leave in ("remove", "evict"):
        old, new, other = _Model("a"), _Model("a"), _Model("b")
        policy = _filled(factory, [old])
        getattr(policy, leave)(*([old] if leave == "remove" else []))
        policy.insert(new)
        policy.hit(old)
        policy.remove(old)
        policy.insert(other)
        _expect_drained(policy, [new, other])


def _check_insert_twice(factory: _Factory) -> None:
    model, other = _Model("a"), _Model("b")
    _expect_drained(_filled(factory, [model, other, model]), [model, other])
    policy = _filled(factory, [model, other, model])
    policy.remove(model)
    _expect_drained(policy, [other])


def _check_changing(factory: _Factory) -> None:
    models = [_Model(f"m{number}") for number in range(40)]
    policy = _filled(factory, models)
    for number, model in enumerate(models):
        model.size, model.cost = (number % 4) ** 20, number % 3 / 2
        if number % 5:
            policy.hit(model)
    policy.remove(models[0])
    policy.remove(models[39])
    _expect_drained(policy, models[1:39])


def _check_extremes(factory: _Factory) -> None:
    extremes = [(0, 0.0), (0, 1.0), (1, 0.0), (0, 1e6), (1 << 50, 0.0), (1 << 50, 1e6)]
    models = [_Model(f"m{number}", size, cost) for number, (size, cost) in enumerate(extremes)]
    policy = _filled(factory, models)
    for model in models:
        policy.hit(model)
    _expect_drained(policy, models)


def _check_changes_nothing(factory: _Factory) -> None:
    models = [_Model(f"m{number}", size=number, pins=number % 2) for number in range(10)]
    before = [astuple(model) for model in models]
    policy = _filled(factory, models)
    for model in models:
        policy.hit(model)
    for _ in models:
        policy.evict()
    for model, was in zip(models, before, strict=True):
        _ensure(astuple(model) == was, f"{was} became {astuple(model)}")


def _check_schedules(factory: _Factory) -> None:
    for seed in range(12):
        _Schedule(factory(), seed).run()


_CLAUSES: dict[Callable[[_Factory], None], str] = {
    _check_empty: "With nothing inside evict() returns None, and unknown entries do no harm.",
    _check_independent: "Each policy that the factory makes stands alone.",
    _check_exactly_once: "Each un-pinned entry is evicted in the end, only once, as the object that came in.",
    _check_forgets_evicted: "An evicted entry is forgotten: no hit brings it back, only an insert.",
    _check_pinned: "A pinned entry is never evicted, not forgotten over that, and can go when un-pinned.",
    _check_pins_come_and_go: "Pins count as they are when evict() is called.",
    _check_removed: "A removed entry, pinned or not, is never evicted; removing it again changes nothing.",
    _check_removed_after_passed_over: "An entry that evict() passed over can be removed and inserted again.",
    _check_identity: "An entry is itself, not its key: remove(old) and hit(old) do not touch the new one.",
    _check_insert_twice: "An entry inserted twice is inside once.",
    _check_changing: "Sizes and costs may change while an entry is inside.",
    _check_extremes: "A size of 0, a cost of 0.0, and both very large, are legal.",
    _check_changes_nothing: "A policy ranks and owns nothing: it does not change an entry.",
    _check_schedules: "In any order of calls evict() finds an un-pinned entry if there is one, else None.",
}


class _Schedule:
    """A random, repeatable series of calls, watched by a model that only knows who is inside."""

    def __init__(self, policy: EvictionPolicy, seed: int) -> None:
        self.policy = policy
        self.seed = seed
        self.random = Random(seed)
        self.everyone = [_Model(f"m{number}") for number in range(12)]
        self.inside: list[_Model] = []
        self.calls: deque[str] = deque(maxlen=12)

    def run(self) -> None:
        steps: dict[Callable[[_Model], None], int] = {
            self.insert: 6,
            self.hit: 8,
            self.remove: 1,
            self.evict: 4,
            self.pin: 2,
            self.unpin: 2,
            self.change: 2,
            self.replace: 1,
        }
        try:
            for step in self.random.choices(list(steps), list(steps.values()), k=400):
                step(self.random.choice(self.everyone))
            self.drain()
        except Exception as error:
            calls = ", ".join(self.calls)
            raise AssertionError(f"in schedule {self.seed}, after {calls}: {_told(error)}") from error

    def insert(self, model: _Model) -> None:
        self.calls.append(f"insert({model})")
        self.policy.insert(model)
        if model not in self.inside:
            self.inside.append(model)

    def hit(self, model: _Model) -> None:
        self.calls.append(f"hit({model})")
        self.policy.hit(model)

    def remove(self, model: _Model) -> None:
        self.calls.append(f"remove({model})")
        self.policy.remove(model)
        if model in self.inside:
            self.inside.remove(model)

    def evict(self, _: _Model) -> None:
        self.calls.append("evict()")
        victim = self.policy.evict()
        candidates = [model for model in self.inside if not model.pins]
        if candidates:
            found = any(victim is model for model in candidates)
            _ensure(found, f"evict() returned {victim!r} instead of one of {candidates}")
            self.inside = [model for model in self.inside if model is not victim]
        else:
            _expect(victim, None, "a policy without un-pinned entries")

    def pin(self, model: _Model) -> None:
        self.calls.append(f"{model}.pins += 1")
        model.pins += 1

    def unpin(self, model: _Model) -> None:
        self.calls.append(f"{model}.pins = 0")
        model.pins = 0

    def change(self, model: _Model) -> None:
        model.size = self.random.choice([0, 1, 1000, self.random.randrange(1 << 30)])
        model.cost = self.random.choice([0.0, self.random.random(), 100.0])
        self.calls.append(f"{model}.size, .cost = {model.size}, {model.cost}")

    def replace(self, old: _Model) -> None:
        new = _Model(old.key)
        self.everyone[self.everyone.index(old)] = new
        self.remove(old)
        self.insert(new)
        self.hit(old)
        self.remove(old)

    def drain(self) -> None:
        for model in self.inside:
            self.unpin(model)
        _expect_drained(self.policy, self.inside)


def _filled(factory: _Factory, models: list[_Model]) -> EvictionPolicy:
    policy = factory()
    for model in models:
        policy.insert(model)
    return policy


def _expect_drained(policy: EvictionPolicy, models: list[_Model]) -> None:
    evicted = [policy.evict() for _ in range(len(models) + 2)]
    times = Counter(map(id, evicted))
    for model in models:
        _ensure(times[id(model)] == 1, f"{model} was evicted {times[id(model)]} times: {evicted}")
    extra = [victim for victim in evicted if victim is not None and victim not in models]
    _ensure(not extra, f"{extra} must not be evicted")


def _expect(victim: Evictable | None, expected: _Model | None, who: str) -> None:
    _ensure(victim is expected, f"{who} evicted {victim!r} instead of {expected!r}")


def _told(error: Exception) -> str:
    return str(error) if isinstance(error, AssertionError) else f"{error!r} was raised"


def _ensure(condition: bool, otherwise: str) -> None:  # an assert statement would be gone under python -O
    if not condition:
        raise AssertionError(otherwise)

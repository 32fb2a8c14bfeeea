"""For people who write a store, a policy or a predictor: contract suites without pytest, and fakes."""

from modelcache.stores.memory import MemoryStore
from modelcache.testing.fakes import FakeClock, GatedStore
from modelcache.testing.policy import check_policy
from modelcache.testing.predictor import check_predictor
from modelcache.testing.store import check_store

__all__ = ["FakeClock", "GatedStore", "MemoryStore", "check_policy", "check_predictor", "check_store"]

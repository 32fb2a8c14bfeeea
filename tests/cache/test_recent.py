"""The bounded memory of keys."""

from __future__ import annotations

from modelcache.cache.recent import Recent


def test_who_was_noted_longest_ago_is_forgotten() -> None:
    """A key that is noted again is as new as one that was never noted; a look-up changes nothing."""
    recent: Recent[str, int] = Recent(2)
    for value, key in enumerate("abac"):
        recent.note(key, value)
        assert recent.get("b") in (None, 1)
    assert dict(recent) == {"a": 2, "c": 3}

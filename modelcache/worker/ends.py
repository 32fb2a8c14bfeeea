"""What a UBJSON model says of itself at its two ends.

XGBoost's own account of a model, ``XGBoosterSaveJsonConfig``, takes a tenth of the time that loading a small one does.
Of tree models it is read from the bytes instead: their parameters are before the trees, and the objective after them.
Keys and texts are written with lengths of 64 bits ("L"), big-endian, by every version of XGBoost that writes UBJSON;
where anything looks otherwise, XGBoost is asked.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_REACH = 1 << 14
"""Bytes from either end that are looked at: categories are before the trees, too, and long lists may follow them."""

_TREES_AT = b"L\0\0\0\0\0\0\0\x12gbtree_model_param{"
_TREES = re.compile(
    re.escape(_TREES_AT) + rb"(?:L\0{7}.[a-z_]+SL\0{7}.[0-9]+){0,8}?L\0{7}\x09num_treesSL\0{7}.([0-9]+)",
    re.DOTALL,
)

_OBJECTIVE_AT = b"SL\0\0\0\0\0\0\0\x06gbtree}L\0\0\0\0\0\0\0\x13learner_model_param{"
_OBJECTIVE = re.compile(
    re.escape(_OBJECTIVE_AT) + rb".{0,1000}?\}L\0{7}\x09objective\{L\0{7}\x04nameSL\0{7}.([a-z0-9:_]+)[L}]",
    re.DOTALL,
)


class Account(NamedTuple):
    """What a model is."""

    booster: str
    objective: str
    n_trees: int


def read_ends(data: memoryview) -> Account | None:
    """Return what the model says; None if it is no UBJSON, not of the booster gbtree, or unlike what is known."""
    # What they begin with is found in a tenth of the time that it takes to search for all of a pattern.
    head, tail = bytes(data[:_REACH]), bytes(data[-_REACH:])
    trees_at, objective_at = head.find(_TREES_AT), tail.rfind(_OBJECTIVE_AT)
    trees = _TREES.match(head, trees_at) if trees_at >= 0 else None
    objective = _OBJECTIVE.match(tail, objective_at) if objective_at >= 0 else None
    if trees is None or objective is None:
        return None
    return Account("gbtree", objective[1].decode(), int(trees[1]))

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

_TREES = re.compile(
    rb"L\0{7}\x12gbtree_model_param\{(?:L\0{7}.[a-z_]+SL\0{7}.[0-9]+){0,8}?L\0{7}\x09num_treesSL\0{7}.([0-9]+)",
    re.DOTALL,
)
_OBJECTIVE = re.compile(
    rb"SL\0{7}\x06gbtree\}L\0{7}\x13learner_model_param\{.{0,1000}?\}L\0{7}\x09objective\{"
    rb"L\0{7}\x04nameSL\0{7}.([a-z0-9:_]+)[L}]",
    re.DOTALL,
)


class Account(NamedTuple):
    """What a model is."""

    booster: str
    objective: str
    n_trees: int


def read_ends(data: memoryview) -> Account | None:
    """Return what the model says; None if it is no UBJSON, not of the booster gbtree, or unlike what is known."""
    trees = _TREES.search(data[:_REACH])
    objective = _OBJECTIVE.search(data[-_REACH:])
    if trees is None or objective is None:
        return None
    return Account("gbtree", objective[1].decode(), int(trees[1]))

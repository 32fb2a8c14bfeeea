"""Writes the trees of an XGBoost model as ONNX, one ``TreeEnsemble`` (ai.onnx.ml 5) that gives margins.

The protobuf is written directly, since it is one node with 14 attributes: the package ``onnx`` would be 31 MB more to
install, and the converters bring scikit-learn. Each message is a field number and type, then its value or length and
bytes; the numbers are those of onnx.proto.

XGBoost begins with the base score and adds one tree after another, in float32. So does ONNX Runtime, if the base score
is the leaf of a first tree; given as ``base_values``, or added afterwards, it would change the last bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]
    Numbers = NDArray[np.int64]

INPUT, OUTPUT = "rows", "margins"

_FLOAT, _UINT8 = 1, 2
_INT_ATTRIBUTE, _TENSOR_ATTRIBUTE, _INTS_ATTRIBUTE = 2, 4, 7
_BRANCH_LT = 1
_SUM = 1
_IR_VERSION, _ML_OPSET, _OPSET = 10, 5, 21
_DEEPEST = 500
_MOST_BYTES = 5
"""Of a number of 32 bits, seven in each byte."""


class NotConvertibleError(Exception):
    """The model stays with XGBoost; the message says why."""


class Forest(NamedTuple):
    """Trees as arrays with an item for each node, one tree after another; ``roots`` are their first nodes."""

    n_features: int
    base: Floats
    """A margin for each output."""
    roots: Numbers
    left: Numbers
    """Positions of the children that rows with a value below ``values`` go to; -1 of a leaf."""
    right: Numbers
    features: Numbers
    values: Floats
    """Thresholds, and the margins of leaves."""
    missing_left: Numbers
    outputs: Numbers
    """The output that the tree of each node adds to."""

    @classmethod
    def of(cls, learner: dict[str, Any], base: Floats, rounds: int | None) -> Forest:
        """Return the first ``rounds`` of boosting in a model's ``learner``; None: all.

        Raises NotConvertibleError for splits and leaves of other kinds, KeyError for models unlike those known.
        """
        model = learner["gradient_booster"]["model"]
        count = len(model["trees"]) if rounds is None else int(model["iteration_indptr"][rounds])
        trees = model["trees"][:count]
        if any(len(tree["categories_nodes"]) for tree in trees):
            raise NotConvertibleError("it has categorical splits")
        if any(int(tree["tree_param"]["size_leaf_vector"]) > 1 for tree in trees):
            raise NotConvertibleError("its leaves are vectors")
        sizes = np.array([len(tree["left_children"]) for tree in trees], np.int64)
        roots = np.cumsum(sizes) - sizes
        starts = np.repeat(roots, sizes)
        left, right = (_joined(trees, f"{side}_children", np.int64) for side in ("left", "right"))
        left, right = np.where(left < 0, -1, left + starts), np.where(right < 0, -1, right + starts)
        _check_depth(roots, left, right)
        return cls(
            n_features=int(learner["learner_model_param"]["num_feature"]),
            base=base,
            roots=roots,
            left=left,
            right=right,
            features=_joined(trees, "split_indices", np.int64),
            values=_joined(trees, "split_conditions", np.float32),
            missing_left=_joined(trees, "default_left", np.int64),
            outputs=np.repeat(np.asarray(model["tree_info"][:count], np.int64), sizes),
        )


def _check_depth(roots: Numbers, left: Numbers, right: Numbers) -> None:
    """Refuse trees that ONNX Runtime, which builds them by recursion, might overflow its stack with."""
    level = roots
    for _ in range(_DEEPEST):
        level = level[left[level] >= 0]
        if not len(level):
            return
        level = np.concatenate([left[level], right[level]])
    raise NotConvertibleError(f"it has trees of a depth over {_DEEPEST}")


def _joined(trees: list[dict[str, Any]], key: str, kind: type[Any]) -> NDArray[Any]:
    return np.concatenate([np.asarray(tree[key]) for tree in trees]).astype(kind)


def write(forest: Forest) -> bytes:
    """Return the ONNX model that takes ``INPUT``, float32 of shape (n, n_features), to ``OUTPUT``, (n, outputs)."""
    node = (
        _field(1, INPUT) + _field(2, OUTPUT) + _field(4, "TreeEnsemble") + _field(7, "ai.onnx.ml") + _attributes(forest)
    )
    graph = (
        _field(1, node)
        + _field(2, "model")
        + _field(11, _matrix(INPUT, forest.n_features))
        + _field(12, _matrix(OUTPUT, len(forest.base)))
    )
    opsets = _field(8, _field(1, "ai.onnx.ml") + _number(2, _ML_OPSET)) + _field(8, _field(1, "") + _number(2, _OPSET))
    return _number(1, _IR_VERSION) + _field(7, graph) + opsets


def _attributes(forest: Forest) -> bytes:
    """Return the node's attributes; splits and leaves are numbered each by themselves.

    A tree of one leaf has no split, and is written as one whose branches both lead to that leaf.
    """
    outputs = len(forest.base)
    is_leaf = forest.left < 0
    splits = ~is_leaf
    number = np.where(is_leaf, outputs + np.cumsum(is_leaf) - 1, np.cumsum(splits) - 1)
    lone = forest.roots[is_leaf[forest.roots]]
    to_leaf = np.concatenate([np.arange(outputs), number[lone]])
    first_to_leaf = int(splits.sum())
    roots = number[forest.roots]
    roots[is_leaf[forest.roots]] = first_to_leaf + outputs + np.arange(len(lone))
    left, right = forest.left[splits], forest.right[splits]

    def extended(of_splits: NDArray[Any], fill: Any) -> NDArray[Any]:
        return np.concatenate([of_splits, np.broadcast_to(fill, len(to_leaf))])

    return b"".join((
        _int("aggregate_function", _SUM),
        _int("n_targets", outputs),
        _int("post_transform", 0),
        _ints("tree_roots", np.concatenate([first_to_leaf + np.arange(outputs), roots])),
        _ints("nodes_featureids", extended(forest.features[splits], 0)),
        _tensor("nodes_splits", _FLOAT, extended(forest.values[splits], 0).astype("<f4")),
        _tensor("nodes_modes", _UINT8, np.full(first_to_leaf + len(to_leaf), _BRANCH_LT, np.uint8)),
        _ints("nodes_truenodeids", extended(number[left], to_leaf)),
        _ints("nodes_falsenodeids", extended(number[right], to_leaf)),
        _ints("nodes_trueleafs", extended(is_leaf[left], 1)),
        _ints("nodes_falseleafs", extended(is_leaf[right], 1)),
        _ints("nodes_missing_value_tracks_true", extended(forest.missing_left[splits], 0)),
        _ints("leaf_targetids", np.concatenate([np.arange(outputs), forest.outputs[is_leaf]])),
        _tensor("leaf_weights", _FLOAT, np.concatenate([forest.base, forest.values[is_leaf]]).astype("<f4")),
    ))  # fmt: skip


def _int(name: str, value: int) -> bytes:
    return _field(5, _field(1, name) + _number(20, _INT_ATTRIBUTE) + _number(3, value))


def _ints(name: str, values: NDArray[Any]) -> bytes:
    return _field(5, _field(1, name) + _number(20, _INTS_ATTRIBUTE) + _field(8, _packed(values)))


def _tensor(name: str, kind: int, values: NDArray[Any]) -> bytes:
    tensor = _number(1, len(values)) + _number(2, kind) + _field(9, values.tobytes())
    return _field(5, _field(1, name) + _number(20, _TENSOR_ATTRIBUTE) + _field(5, tensor))


def _matrix(name: str, columns: int) -> bytes:
    shape = _field(1, _field(2, "n")) + _field(1, _number(1, columns))
    return _field(1, name) + _field(2, _field(1, _number(1, _FLOAT) + _field(2, shape)))


def _packed(values: NDArray[Any]) -> bytes:
    """Return numbers of up to 32 bits one after another, seven bits a byte, the least significant first."""
    sevens = values.astype(np.uint32)[:, None] >> np.arange(0, 7 * _MOST_BYTES, 7, dtype=np.uint32)
    lengths = np.maximum(1, np.count_nonzero(sevens, axis=1))[:, None]
    places = np.arange(_MOST_BYTES)
    data = (sevens & 127).astype(np.uint8) | np.where(places < lengths - 1, 128, 0).astype(np.uint8)
    found: bytes = data[places < lengths].tobytes()
    return found


def _field(number: int, content: bytes | str) -> bytes:
    data = content.encode() if isinstance(content, str) else content
    return b"".join((_varint(number << 3 | 2), _varint(len(data)), data))


def _number(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 127:  # noqa: PLR2004 - seven bits
        found.append(value & 127 | 128)
        value >>= 7
    found.append(value)
    return bytes(found)

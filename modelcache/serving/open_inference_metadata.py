"""What the Open Inference Protocol says of a model: metadata, configuration, statistics, its place in the index."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import quote

if TYPE_CHECKING:
    from collections.abc import Mapping

    from modelcache import ModelCacheError, ModelInfo

_COLD = "It is not loaded: its next call, or a load, does that."
_LIVE_IN_PATHS = "!$&'()*+,;=:@"
"""Beside letters and digits, what a segment of a path may hold as it is (RFC 3986)."""


def version_of(info: ModelInfo) -> str:
    """Return the version as a client may put it into a path: tritonclient does not quote it."""
    return quote(info.version, safe=_LIVE_IN_PATHS)


def is_version(info: ModelInfo, asked: str) -> bool:
    """Say whether ``asked`` is the version of ``info``, as `version_of` gives it or as the store does."""
    return asked in (info.version, version_of(info))


def metadata(name: str, info: ModelInfo) -> dict[str, Any]:
    """Return the model's metadata. The input may have any name, and come as one tensor for each feature."""
    return {
        "name": name,
        "versions": [version_of(info)],
        "platform": "xgboost",
        "inputs": [{"name": "input", "datatype": "FP32", "shape": [-1, info.n_features]}],
        "outputs": [{"name": output, "datatype": "FP32", "shape": shape} for output, shape in _shapes(info).items()],
        "parameters": {"feature_names": info.feature_names, "objective": info.objective},
    }


def config(name: str, info: ModelInfo) -> dict[str, Any]:
    """Return the model's configuration, as Triton writes it."""
    return {
        "name": name,
        "platform": "xgboost",
        "backend": "modelcache",
        "max_batch_size": 0,  # it is in the shapes
        "input": [{"name": "input", "data_type": "TYPE_FP32", "dims": [-1, info.n_features]}],
        "output": [
            {"name": output, "data_type": "TYPE_FP32", "dims": shape} for output, shape in _shapes(info).items()
        ],
    }


def _shapes(info: ModelInfo) -> Mapping[str, list[int]]:
    """Return the shape of each output, -1 for the rows and for what depends on the trees."""
    outputs = [] if info.n_outputs == 1 else [info.n_outputs]
    return {
        "predict": [-1, *outputs],
        "margin": [-1, *outputs],
        "leaf": [-1, -1],
        "contribs": [-1, *outputs, info.n_features + 1],
    }


def statistics(info: ModelInfo) -> dict[str, Any]:
    """Return the model's statistics; calls for which it had to be loaded first are not counted."""
    return {
        "name": info.name,
        "version": version_of(info),
        "last_inference": int(info.last_used * 1000),
        "inference_count": info.hits,
        "execution_count": info.hits,
        "memory_usage": [{"type": "CPU", "id": 0, "byte_size": info.size_bytes}],
    }


def resident_item(info: ModelInfo) -> dict[str, str]:
    """Return what the index says of a resident model."""
    return {"name": info.name, "version": version_of(info), "state": "READY", "reason": ""}


def cold_item(name: str, failure: ModelCacheError | None) -> dict[str, str]:
    """Return what the index says of a model that is not resident."""
    reason = _COLD if failure is None else str(failure)
    return {"name": name, "version": "", "state": "UNAVAILABLE", "reason": reason}

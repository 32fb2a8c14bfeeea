"""The public surface: what is exported, what the errors are, what the registry takes, and what importing it costs."""

from __future__ import annotations

import asyncio
import inspect
import json
import re
import socket
import subprocess
import sys
import threading
from dataclasses import fields, is_dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import cachetools
import pytest

import modelcache
import oracle
from modelcache import (
    Invocation,
    LRUPolicy,
    MemoryStore,
    ModelCacheError,
    ModelInfo,
    ModelRegistry,
    RegistryStats,
    Summary,
    Timings,
    errors,
)

if TYPE_CHECKING:
    from conftest import MakeRegistry

# Exports


def test_everything_public_is_exported() -> None:
    """What the package imports for its users is listed, and what is listed is there, once."""
    found = {
        name
        for name, value in vars(modelcache).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    assert found == set(modelcache.__all__)
    assert len(modelcache.__all__) == len(found)
    assert set(errors.__all__) <= found


def test_the_export_list_is_grouped() -> None:
    """A reader finds a name under what it is for; within a group names are sorted, the registry's own comes first."""
    source = inspect.getsource(modelcache).partition("__all__ = [")[2]
    groups: dict[str, list[str]] = {}
    for line in source.splitlines():
        if heading := re.fullmatch(r"    # (.*)", line):
            names = groups[heading[1]] = []
        elif name := re.fullmatch(r'    "(\w+)",', line):
            names.append(name[1])
    assert list(groups) == ["the registry", "what it returns", "events", "stores", "policies", "predictors", "errors"]
    assert groups.pop("the registry") == ["ModelRegistry", "Lease"]
    assert all(names == sorted(names) for names in groups.values())
    assert groups["errors"] == errors.__all__


# Errors


def test_the_error_tree_is_the_one_in_the_docstring() -> None:
    """The drawing at the head of errors.py shows every class where it is, with the built-in kind that it is also."""
    assert errors.__doc__ is not None
    drawn = re.findall(r"^    ([│├└─ ]*)(\w+Error)(?: +\((\w+)\))?", errors.__doc__, re.MULTILINE)
    assert drawn == [("", "ModelCacheError", ""), *branches(ModelCacheError, "")]
    assert [name for _, name, _ in drawn if name not in errors.__all__] == []
    assert len(drawn) == len(errors.__all__)


def branches(kind: type[ModelCacheError], lead: str) -> list[tuple[str, str, str]]:
    children = [child for child in kind.__subclasses__() if child.__module__ == errors.__name__]
    lines = []
    for child in children:
        last = child is children[-1]
        foreign = next((base.__name__ for base in child.__bases__ if not issubclass(base, ModelCacheError)), "")
        lines.append((f"{lead}{'└' if last else '├'}── ", child.__name__, foreign))
        lines += branches(child, lead + ("    " if last else "│   "))
    return lines


FOREIGN_BASES = {
    "InvalidModelNameError": "ValueError",
    "InvalidInputError": "ValueError",
    "ModelNotFoundError": "LookupError",
    "BudgetTimeoutError": "TimeoutError",
    "LoadTimeoutError": "TimeoutError",
    "PredictTimeoutError": "TimeoutError",
    "MissingDependencyError": "ImportError",
    "RegistryClosedError": "RuntimeError",
}

STATUSES = {
    400: ["InvalidModelNameError", "InvalidInputError", "FeatureMismatchError"],
    403: ["StoreAccessDeniedError"],
    404: ["ModelNotFoundError"],
    422: ["ModelLoadError", "CorruptArtifactError", "UnsupportedArtifactError", "UnsafeArtifactError"],
    500: ["ModelCacheError", "WorkerCrashedError", "MissingDependencyError"],
    502: ["StoreError", "StoreUnavailableError", "ArtifactChangedError"],
    503: ["OverloadedError", "RegistryClosedError"],
    504: ["LoadTimeoutError", "PredictTimeoutError"],
    507: ["ModelTooLargeError", "BudgetTimeoutError"],
}


def test_each_error_has_its_base_and_its_status() -> None:
    """A program may catch the built-in kind, and a server answers with the status; both are part of the contract."""
    kinds = {name: getattr(errors, name) for name in errors.__all__}
    assert {name: kind.http_status for name, kind in kinds.items()} == {
        name: status for status, names in STATUSES.items() for name in names
    }
    for name, kind in kinds.items():
        assert issubclass(kind, ModelCacheError)
        builtin = {base.__name__ for base in kind.__bases__ if not issubclass(base, ModelCacheError)}
        assert builtin == ({FOREIGN_BASES[name]} if name in FOREIGN_BASES else {"Exception"} & builtin), name
        assert kind.__doc__


@pytest.mark.parametrize("name", errors.__all__)
def test_an_error_carries_its_facts_to_each_caller(name: str) -> None:
    """F6: fresh() gives each caller an exception of its own with the same message and facts, caused by the original."""
    original = getattr(errors, name)("what happened, and what to do", model="m", retry_after=2.0, extra=("a", "b"))
    fresh = original.fresh()
    assert type(fresh) is type(original)
    assert fresh is not original
    assert fresh.__cause__ is original
    assert str(fresh) == "what happened, and what to do"
    assert (fresh.model, fresh.retry_after, fresh.extra) == ("m", 2.0, ("a", "b"))


# The registry

PARAMETERS = {
    "memory_budget": None,
    "workers": None,
    "threads_per_worker": 1,
    "disk_cache": None,
    "policy": "gdsf",
    "load_timeout": 360,
    "load_concurrency": 32,
    "failure_ttl": 1,
    "refresh_after": None,
    "queue_limit": 1024,
    "retain": True,
    "predictor": "modelcache.worker.predictors:XGBoostPredictor",
    "engine": "xgboost",
}

METHODS = {
    "predict": "(name, rows, *, output='value', timeout=None)",
    "invoke": "(name, rows, *, output='value', timeout=None)",
    "load": "(name)",
    "preload": "(names, *, concurrency=None, on_progress=None)",
    "unload": "(name)",
    "refresh": "(name)",
    "pin": "(name)",
    "unpin": "(name)",
    "loaded": "()",
    "most_used": "(count)",
    "names": "(prefix='')",
    "stats": "()",
    "explain": "(name)",
    "resize": "(memory_budget)",
    "subscribe": "(callback)",
    "acquire": "(name)",
    "acquire_many": "(names)",
    "start": "()",
    "close": "(*, drain=30.0)",
}


def test_the_parameters_and_their_defaults() -> None:
    """The store comes by position, everything else by keyword, with defaults that are part of the contract."""
    first, *others = inspect.signature(ModelRegistry).parameters.values()
    assert (first.name, first.default) == ("store", inspect.Parameter.empty)
    assert all(parameter.kind is inspect.Parameter.KEYWORD_ONLY for parameter in others)
    defaults = {parameter.name: parameter.default for parameter in others}
    assert callable(defaults.pop("clock"))
    assert defaults == PARAMETERS
    assert ModelRegistry.__doc__ is not None
    assert [name for name in PARAMETERS if f"``{name}" not in ModelRegistry.__doc__] == []


@pytest.mark.parametrize("name", METHODS)
def test_the_methods_and_their_parameters(name: str) -> None:
    """Programs outside are written against these names."""
    method = getattr(ModelRegistry, name)
    parameters = [p.replace(annotation=p.empty) for p in inspect.signature(method).parameters.values()][1:]
    assert str(inspect.Signature(parameters)) == METHODS[name]
    assert method.__doc__


@pytest.mark.parametrize(
    "options",
    [
        {"workers": 0}, {"workers": -1}, {"threads_per_worker": 0}, {"load_timeout": 0}, {"load_concurrency": 0},
        {"queue_limit": 0}, {"failure_ttl": -1}, {"refresh_after": -1}, {"memory_budget": 0}, {"memory_budget": "lots"},
        {"policy": "fifo-ish"},
    ],
)  # fmt: skip
def test_nonsense_is_refused_at_once(options: dict[str, Any]) -> None:
    """A wrong option fails where it is written, with its value in the message."""
    with pytest.raises(ValueError, match=re.escape(repr(next(iter(options.values()))))):
        ModelRegistry(MemoryStore(), **options)


@pytest.mark.parametrize("policy", ["gdsf", "lru", LRUPolicy(), LRUPolicy, cachetools.LFUCache(100)])
def test_every_way_to_name_a_policy(policy: Any) -> None:
    """A name, a policy, a callable that makes one, or a cachetools cache."""
    ModelRegistry(MemoryStore(), policy=policy)


def test_constructing_touches_nothing(monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder) -> None:
    """A registry can be made at import time: no loop, socket, process, thread or descriptor, and none to clean up."""

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("constructing a registry must not do that")

    for owner, name in (
        (asyncio, "new_event_loop"), (asyncio, "get_event_loop"), (socket, "socket"), (socket, "socketpair"),
        (subprocess, "Popen"), (threading.Thread, "start"),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, forbidden)
    descriptors = oracle.open_descriptors()
    registry = ModelRegistry(MemoryStore())
    assert registry.loaded() == []
    assert registry.stats().workers == ()
    assert registry.explain("m").startswith("m is cold")
    assert oracle.open_descriptors() == descriptors
    del registry
    assert not recwarn.list


def test_a_default_budget_is_found() -> None:
    """Without memory_budget the registry takes a share of what is there."""
    assert ModelRegistry(MemoryStore()).stats().budget >= 64 << 20
    assert ModelRegistry(MemoryStore(), memory_budget="512 MiB").stats().budget == 512 << 20
    assert ModelRegistry(MemoryStore(), memory_budget="2GB").stats().budget == 2 * 10**9


async def test_the_repr_is_designed(make_registry: MakeRegistry) -> None:
    """One line: the store, how many models, how full, how many workers."""

    class Bucket(MemoryStore):
        def __repr__(self) -> str:
            return "s3://my-bucket/path"

    registry = await make_registry(Bucket(), workers=2, memory_budget="1 GiB")
    assert repr(registry) == "<ModelRegistry s3://my-bucket/path 0 ready, 0 loading, 0.0/1024.0 MiB, 2 workers>"
    unstarted = ModelRegistry(Bucket(), memory_budget="1 GiB")
    assert repr(unstarted) == "<ModelRegistry s3://my-bucket/path 0 ready, 0 loading, 0.0/1024.0 MiB, 0 workers>"


# Records


def names_of(record: type[Any]) -> list[str]:
    return [field.name for field in fields(record)]


def test_records_have_the_documented_fields() -> None:
    """What users read by name; the six figures of SageMaker come first."""
    assert names_of(Invocation) == ["predictions", "model", "tier", "timings"]
    assert names_of(Timings) == ["waiting", "downloading", "loading", "predicting", "total"]
    assert names_of(Summary) == ["count", "sum", "min", "max", "p50", "p90", "p99", "below"]
    assert names_of(RegistryStats)[:6] == [
        "model_loading_wait_time", "model_downloading_time", "model_loading_time", "model_unloading_time",
        "model_cache_hit", "loaded_model_count",
    ]  # fmt: skip
    documented = (
        "name version state size_bytes artifact_bytes n_features feature_names n_outputs workers pinned loaded_at "
        "last_used hits load_seconds"
    )
    assert set(documented.split()) <= set(names_of(ModelInfo))


def test_records_are_frozen() -> None:
    """What a registry hands out cannot be changed by one reader under another."""
    records = [value for value in vars(modelcache).values() if isinstance(value, type) and is_dataclass(value)]
    assert len(records) >= 12
    assert all(record.__dataclass_params__.frozen for record in records)  # type: ignore[attr-defined]


# Importing

HEAVY = {
    "aiobotocore", "aiohttp", "botocore", "boto3", "obstore", "xgboost", "pandas", "polars", "pyarrow", "scipy",
    "sklearn", "uvloop", "typer", "rich", "matplotlib", "starlette", "prometheus_client", "opentelemetry",
    "multiprocessing",
}  # fmt: skip


@pytest.mark.parametrize("module", ["modelcache", "modelcache.sync", "modelcache.testing"])
def test_importing_is_light(module: str) -> None:
    """`import modelcache` imports neither XGBoost nor a store's client nor a data frame: a fresh interpreter tells."""
    code = f"import {module}, sys, json; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = {name.partition(".")[0] for name in json.loads(done.stdout)}
    assert "modelcache" in imported
    assert imported & HEAVY == set()

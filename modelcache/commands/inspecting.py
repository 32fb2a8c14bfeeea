"""``modelcache inspect``: what is in a store, or in one artifact."""

from __future__ import annotations

from textwrap import fill
from typing import TYPE_CHECKING

from modelcache import ModelCacheError, ModelInfo, ModelRegistry
from modelcache.commands.terminal import make_table, show_size, track

if TYPE_CHECKING:
    from rich.console import Console

_WIDTH = 79
_LABELS = 16
_FORMATS = {"ubj": "UBJSON", "json": "JSON"}
_UNKNOWN = "-"


async def show_store(console: Console, store: str, *, limit: int) -> int:
    """List at most ``limit`` models; return how many of those cannot be loaded."""
    async with ModelRegistry(store, workers=1, retain=False) as registry:
        names = await _first_names(registry, limit + 1)
        found = [(name, await _load(registry, name)) for name in track(console, names[:limit], "Loading")]
    broken = [(name, error) for name, error in found if isinstance(error, ModelCacheError)]
    if found:
        _print_table(console, found)
    for name, error in broken:
        console.print(f"\n{name}: {type(error).__name__}\n  {error}", style="red", soft_wrap=True)
    console.print(f"\n{_counted(len(found), len(broken))} in {store}." + _more(len(names) > limit), soft_wrap=True)
    return len(broken)


async def show_model(console: Console, store: str, name: str) -> None:
    """Show all that is known of one model."""
    async with ModelRegistry(store, workers=1) as registry:
        info = await registry.load(name)
    for label, value in _facts(info).items():
        console.print(f"{label:<{_LABELS}}{value}", soft_wrap=True)
    if info.feature_names:
        margin = " " * _LABELS
        names = fill(", ".join(info.feature_names), _WIDTH - _LABELS, break_long_words=False, break_on_hyphens=False)
        console.print(margin + names.replace("\n", "\n" + margin), soft_wrap=True)


async def _first_names(registry: ModelRegistry, count: int) -> list[str]:
    names: list[str] = []
    async for name in registry.names():
        names.append(name)
        if len(names) == count:
            break
    return names


async def _load(registry: ModelRegistry, name: str) -> ModelInfo | ModelCacheError:
    try:
        return await registry.load(name)
    except ModelCacheError as error:
        return error


def _print_table(console: Console, found: list[tuple[str, ModelInfo | ModelCacheError]]) -> None:
    text = ("name", "packed", "format")
    table = make_table("name", "packed", "format", "artifact", "memory", "features", "trees", "best", text=text)
    for name, info in found:
        if isinstance(info, ModelCacheError):
            table.add_row(name, "broken", style="red")
            continue
        table.add_row(
            name,
            info.container,
            _FORMATS.get(info.format, info.format),
            show_size(info.artifact_bytes),
            show_size(info.size_bytes),
            str(info.n_features),
            _shown(info.n_trees),
            _shown(info.best_iteration),
        )
    console.print(table)


def _facts(info: ModelInfo) -> dict[str, str]:
    return {
        "name": info.name,
        "version": info.version,
        "packed": info.container,
        "format": _FORMATS.get(info.format, info.format),
        "artifact": f"{show_size(info.artifact_bytes)} ({info.artifact_bytes:,} bytes)",
        "in memory": f"{show_size(info.size_bytes)} ({info.size_bytes:,} bytes)",
        "load time": f"{info.load_seconds * 1e3:.1f} ms",
        "booster": _shown(info.booster),
        "objective": _shown(info.objective),
        "trees": _shown(info.n_trees),
        "best iteration": _shown(info.best_iteration),
        "outputs": str(info.n_outputs),
        "features": str(info.n_features),
    }


def _shown(value: object) -> str:
    return _UNKNOWN if value is None else str(value)


def _counted(models: int, broken: int) -> str:
    counted = "1 model" if models == 1 else f"{models or 'No'} models"
    return f"{counted}, {broken} of them broken," if broken else counted


def _more(more: bool) -> str:
    return " There are more: raise --limit to see them." if more else ""

"""What this process may use, as the container's limits have it; and byte sizes as people write them."""

from __future__ import annotations

import os
import re
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_UNITS = {"": 1, "b": 1} | {
    prefix + unit: base**power
    for power, prefix in enumerate("kmgt", 1)
    for unit, base in (("", 1000), ("b", 1000), ("i", 1024), ("ib", 1024))
}

_SMALLEST_DEFAULT = 64 << 20


def parse_bytes(value: int | str) -> int:
    """Return bytes: "512 MiB" is 512 * 2**20 and "2GB" is 2 * 10**9, as the standards have it."""
    size: object = value
    if isinstance(value, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", value.lower())
        if found is None or found[2] not in _UNITS:
            raise ValueError(f"{value!r} is no size: write a number of bytes, or text like '512 MiB' or '2GB'.")
        size = int(float(found[1]) * _UNITS[found[2]])
    if isinstance(size, bool) or not isinstance(size, int) or size <= 0:
        raise ValueError(f"{value!r} is no size: give a positive number of bytes, or text like '512 MiB' or '2GB'.")
    return size


def default_budget(root: Path = Path("/")) -> int:
    """Return half of the bytes that the control group, else the host, has available."""
    available = min([_host_available(root), *_cgroup_available(root)])
    return max(available // 2, _SMALLEST_DEFAULT)


def usable_cores(root: Path = Path("/")) -> int:
    """Return the cores that affinity and the control group's quota leave to this process, at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *map(ceil, _cgroup_quotas(root))]))


def is_throttled(processes: int, root: Path = Path("/")) -> bool:
    """Return whether a control group's quota is less than what so many processes use that never sleep.

    Whoever has used up his quota stands still until the next period begins, which may take 0.1 s.
    """
    return any(quota < processes for quota in _cgroup_quotas(root))


def _host_available(root: Path) -> int:
    text = _read(root / "proc/meminfo")
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cgroup_available(root: Path) -> Iterator[int]:
    for group in _cgroups(root, "memory"):
        for limit, usage in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            if (most := _number(group / limit)) is not None:
                yield most - (_number(group / usage) or 0)


def _cgroup_quotas(root: Path) -> Iterator[float]:
    for group in _cgroups(root, "cpu"):
        quota, _, period = _read(group / "cpu.max").partition(" ")
        if quota.isdecimal() and period.strip().isdecimal():
            yield int(quota) / int(period)
        old_quota, old_period = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
        if old_quota and old_period:
            yield old_quota / old_period


def _cgroups(root: Path, controller: str) -> Iterator[Path]:
    """Yield the control groups this process is in, innermost first: each may set a limit (versions 1 and 2)."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / (controller if controllers else "")
        group = mount / path.lstrip("/")
        yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(mount))


def _number(file: Path) -> int | None:
    text = _read(file).strip()
    return int(text) if text.isdecimal() else None  # "max" and "-1" are no limits


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:  # not on this system, or not in this version of control groups
        return ""


def show_bytes(size: int) -> str:
    """Return a size as people read it: "43.4 KiB"."""
    if size < 1 << 10:
        return f"{size} B"
    for unit, scale in (("KiB", 1 << 10), ("MiB", 1 << 20)):
        if size < scale << 10:
            return f"{size / scale:.1f} {unit}"
    return f"{size / (1 << 30):.1f} GiB"

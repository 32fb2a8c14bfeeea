"""What this process may use, read from systems that the test makes up; and byte sizes as people write them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelcache.sizing import default_budget, is_throttled, parse_bytes, show_bytes, usable_cores

if TYPE_CHECKING:
    from pathlib import Path

MIB, GIB = 1 << 20, 1 << 30
UNLIMITED_V1 = "9223372036854771712\n"


class System:
    """A root folder with the files that the kernel would show."""

    def __init__(self, root: Path, *, available: int | None = 8 * GIB) -> None:
        self.root = root
        if available is not None:
            lines = ["MemTotal:       99999999 kB", "MemFree:  1 kB", f"MemAvailable:  {available // 1024} kB"]
            self.write("proc/meminfo", "\n".join(lines) + "\n")

    def write(self, path: str, text: str) -> System:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return self

    def group(self, *lines: str) -> System:
        """Say which control groups this process is in."""
        return self.write("proc/self/cgroup", "\n".join(lines) + "\n")


@pytest.fixture
def system(tmp_path: Path) -> System:
    return System(tmp_path)


@pytest.fixture
def many_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Affinity leaves 16 cores."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)


# Sizes as text


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (1, 1), (123_456, 123_456), ("1", 1), ("10b", 10), ("2GB", 2 * 10**9), ("2 GiB", 2 * GIB),
        ("512 MiB", 512 * MIB), ("512MB", 512 * 10**6), ("1.5 GiB", 3 * GIB // 2), ("0.5k", 500), ("0.5 KiB", 512),
        (" 7 kb ", 7000), ("1 TiB", 1 << 40), ("1tb", 10**12), ("3gi", 3 * GIB), ("3G", 3 * 10**9),
    ],
)  # fmt: skip
def test_sizes_are_read_as_the_standards_have_them(text: int | str, size: int) -> None:
    """MiB is binary and MB decimal; case and spaces do not matter."""
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text", ["", "MiB", "1 PiB", "-1", "1,5 GiB", "1e3", "0", "0.4", 0, -5, True, 1.5, None, "1 2", "NaN"]
)
def test_what_is_no_size_is_refused_with_an_example(text: object) -> None:
    """The message shows how to write one."""
    with pytest.raises(ValueError, match="'512 MiB'") as caught:
        parse_bytes(text)  # type: ignore[arg-type]
    assert repr(text) in str(caught.value)


@given(st.integers(1, 1 << 50))
def test_a_whole_number_of_bytes_is_itself(size: int) -> None:
    """As a number and as text."""
    assert parse_bytes(size) == parse_bytes(str(size)) == parse_bytes(f"{size} B") == size


@given(st.integers(1 << 10, 1 << 50))
def test_shown_sizes_read_back_nearly_the_same(size: int) -> None:
    """What is shown to people is right to its last digit."""
    assert parse_bytes(show_bytes(size)) == pytest.approx(size, rel=0.051)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (44_442, "43.4 KiB"),
        (MIB, "1.0 MiB"),
        (5 * GIB // 2, "2.5 GiB"),
    ],
)
def test_sizes_are_shown_in_binary_units(size: int, text: str) -> None:
    """One decimal is enough for people."""
    assert show_bytes(size) == text


# Memory


def test_without_limits_the_budget_is_half_of_what_the_host_has_available(system: System) -> None:
    """Available, not free: what the kernel would give up counts."""
    assert default_budget(system.root) == 4 * GIB


def test_a_version_2_group_limits_the_budget(system: System) -> None:
    """What the group uses already is not available."""
    system.group("0::/app")
    system.write("sys/fs/cgroup/app/memory.max", f"{2 * GIB}\n").write("sys/fs/cgroup/app/memory.current", f"{GIB}\n")
    assert default_budget(system.root) == GIB // 2


def test_an_outer_group_limits_the_budget_too(system: System) -> None:
    """Groups are nested, and the tightest counts."""
    system.group("0::/slice/app")
    system.write("sys/fs/cgroup/slice/app/memory.max", "max\n").write("sys/fs/cgroup/slice/memory.max", f"{GIB}\n")
    assert default_budget(system.root) == GIB // 2


def test_in_a_container_the_limit_is_at_the_root(system: System) -> None:
    """With a group namespace the process sees itself at the top."""
    system.group("0::/")
    system.write("sys/fs/cgroup/memory.max", f"{GIB}\n")
    assert default_budget(system.root) == GIB // 2


def test_a_version_1_group_limits_the_budget(system: System) -> None:
    """The memory controller has a tree of its own there."""
    system.group("12:cpu,cpuacct:/docker/abc", "5:memory:/docker/abc", "1:name=systemd:/docker/abc")
    folder = "sys/fs/cgroup/memory/docker/abc"
    system.write(f"{folder}/memory.limit_in_bytes", f"{GIB}\n").write(
        f"{folder}/memory.usage_in_bytes", f"{GIB // 2}\n"
    )
    system.write("sys/fs/cgroup/memory/memory.limit_in_bytes", UNLIMITED_V1)
    assert default_budget(system.root) == GIB // 4


def test_a_version_1_container_without_namespace_finds_its_limit(system: System) -> None:
    """The path is the host's, and only the mount is there."""
    system.group("5:memory:/docker/abc")
    system.write("sys/fs/cgroup/memory/memory.limit_in_bytes", f"{GIB}\n")
    assert default_budget(system.root) == GIB // 2


def test_a_group_without_limit_leaves_the_host(system: System) -> None:
    """Version 1 says "unlimited" with a number of its own."""
    system.group("5:memory:/", "0::/")
    system.write("sys/fs/cgroup/memory/memory.limit_in_bytes", UNLIMITED_V1)
    system.write("sys/fs/cgroup/memory.max", "max\n")
    assert default_budget(system.root) == 4 * GIB


def test_a_crowded_group_leaves_the_smallest_budget(system: System) -> None:
    """Some models can be served even where everything is used up."""
    system.group("0::/")
    system.write("sys/fs/cgroup/memory.max", f"{GIB}\n").write("sys/fs/cgroup/memory.current", f"{2 * GIB}\n")
    assert default_budget(system.root) == 64 * MIB


def test_a_system_without_proc_is_asked_by_other_means(tmp_path: Path) -> None:
    """On macOS there is no /proc: half of the physical memory it is."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert default_budget(System(tmp_path, available=None).root) == max(physical // 2, 64 * MIB)


def test_this_very_system_has_a_budget_and_cores() -> None:
    """The real files, whatever they say."""
    assert default_budget() >= 64 * MIB
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)


# Cores


@pytest.mark.usefixtures("many_cores")
class TestCores:
    """Affinity leaves 16; what else is there may leave less."""

    def test_without_quota_affinity_counts(self, system: System) -> None:
        """Not the host's number of cores."""
        assert usable_cores(system.root) == 16

    @pytest.mark.parametrize(
        ("quota", "cores"),
        [
            ("200000 100000", 2),
            ("150000 100000", 2),
            ("10000 100000", 1),
            ("max 100000", 16),
            ("9900000 100000", 16),
            ("", 16),
        ],
    )
    def test_a_version_2_quota_counts_rounded_up(self, system: System, quota: str, cores: int) -> None:
        """One and a half cores can keep two workers busy; a tenth of one still has to do."""
        system.group("0::/app").write("sys/fs/cgroup/app/cpu.max", quota + "\n")
        assert usable_cores(system.root) == cores

    def test_an_outer_quota_counts_too(self, system: System) -> None:
        """The tightest of nested groups."""
        system.group("0::/slice/app").write("sys/fs/cgroup/slice/app/cpu.max", "400000 100000\n")
        system.write("sys/fs/cgroup/slice/cpu.max", "300000 100000\n")
        assert usable_cores(system.root) == 3

    @pytest.mark.parametrize(("quota", "cores"), [("250000", 3), ("-1", 16)])
    def test_a_version_1_quota_counts(self, system: System, quota: str, cores: int) -> None:
        """-1 is none."""
        system.group("4:cpu,cpuacct:/app")
        system.write("sys/fs/cgroup/cpu/app/cpu.cfs_quota_us", quota + "\n")
        system.write("sys/fs/cgroup/cpu/app/cpu.cfs_period_us", "100000\n")
        assert usable_cores(system.root) == cores

    @pytest.mark.parametrize(("quota", "throttled"), [("max", False), ("300000", False), ("250000", True)])
    def test_a_quota_may_be_used_up(self, system: System, quota: str, *, throttled: bool) -> None:
        """Three processes that never sleep use three processors' time, whatever their number."""
        system.group("0::/app").write("sys/fs/cgroup/app/cpu.max", f"{quota} 100000\n")
        assert is_throttled(3, system.root) is throttled

    def test_the_memory_controllers_tree_says_nothing_of_cores(self, system: System) -> None:
        """Version 1 controllers do not mix."""
        system.group("4:memory:/app").write("sys/fs/cgroup/memory/app/cpu.max", "100000 100000\n")
        assert usable_cores(system.root) == 16


def test_affinity_narrower_than_the_quota_counts(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process bound to one core has one."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3}, raising=False)
    system.group("0::/").write("sys/fs/cgroup/cpu.max", "400000 100000\n")
    assert usable_cores(system.root) == 1


def test_where_there_is_no_affinity_the_host_counts(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on macOS; and one core is assumed where not even that is known."""
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert usable_cores(system.root) == 6
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_cores(system.root) == 1

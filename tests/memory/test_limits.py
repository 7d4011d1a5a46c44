"""Limits: cgroups of both versions from files, and sizes as people write them."""

from __future__ import annotations

import math
import resource
import types

import pytest

import torchlms.memory.limits as limits
from torchlms.errors import BadOption, LMSError
from torchlms.memory.limits import disk_free_bytes, format_bytes, host_available_bytes, parse_bytes

GIB = 1 << 30
RAM = 64 * GIB


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine of 64 GiB whose /proc and /sys/fs/cgroup are ours to fill."""
    monkeypatch.setattr(
        limits.psutil, "virtual_memory", lambda: types.SimpleNamespace(available=RAM, total=RAM)
    )
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    monkeypatch.setattr(limits.resource, "getrlimit", lambda which: unlimited)

    def fill(cgroup, **files):
        (tmp_path / "proc" / "self").mkdir(parents=True)
        (tmp_path / "proc" / "self" / "cgroup").write_text(cgroup)
        for name, text in files.items():
            path = tmp_path / "cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text}\n")
        return host_available_bytes(proc_root=tmp_path / "proc", cgroup_root=tmp_path / "cgroup")

    return fill


def test_no_cgroup(machine):
    assert machine("") == RAM


def test_v2_limit_less_usage(machine):
    files = {"job/memory.max": 10 * GIB, "job/memory.current": 3 * GIB}
    assert machine("0::/job\n", **files) == 7 * GIB


def test_v2_cold_page_cache_is_not_usage(machine):
    files = {
        "job/memory.max": 10 * GIB,
        "job/memory.current": 9 * GIB,
        "job/memory.stat": f"anon 5\ninactive_file {5 * GIB}\nactive_file 7",
    }
    assert machine("0::/job\n", **files) == 6 * GIB


def test_v2_the_tightest_of_the_groups_around_counts(machine):
    files = {
        "a/b/memory.max": "max",
        "a/b/memory.high": "max",
        "a/b/memory.current": GIB,
        "a/memory.max": 20 * GIB,
        "a/memory.high": 5 * GIB,
        "a/memory.current": 2 * GIB,
        "memory.max": 30 * GIB,
        "memory.current": 2 * GIB,
    }
    assert machine("0::/a/b\n", **files) == 3 * GIB


@pytest.mark.parametrize("path", ["/", "/docker/0123/that/is/not/here", "/../.."])
def test_v2_in_a_container_the_root_holds_the_limit(machine, path):
    assert machine(f"0::{path}\n", **{"memory.max": 4 * GIB, "memory.current": GIB}) == 3 * GIB


def test_v1(machine):
    cgroup = "12:cpu,cpuacct:/other\n5:memory:/job\n1:name=systemd:/job\n"
    files = {
        "memory/job/memory.limit_in_bytes": 8 * GIB,
        "memory/job/memory.usage_in_bytes": 3 * GIB,
        "memory/job/memory.stat": f"total_inactive_file {GIB}",
        "memory/memory.limit_in_bytes": 0x7FFFFFFFFFFFF000,
        "memory/memory.usage_in_bytes": 3 * GIB,
    }
    assert machine(cgroup, **files) == 6 * GIB


def test_above_its_limit_means_nothing_left(machine):
    assert machine("0::/\n", **{"memory.max": GIB, "memory.current": 2 * GIB}) == 0


def test_garbage_is_no_limit(machine):
    assert machine("0::/job\nnonsense\n", **{"job/memory.max": "lots", "job/memory.current": "?"}) == RAM


def test_address_space_limit(machine, monkeypatch):
    vms = int(limits.psutil.Process().memory_info().vms)
    monkeypatch.setattr(limits.resource, "getrlimit", lambda which: (vms + 2 * GIB, -1))
    assert abs(machine("") - 2 * GIB) < GIB


def test_here_and_now(tmp_path):
    assert 0 < host_available_bytes() <= limits.psutil.virtual_memory().total
    assert limits.memlock_limit_bytes() >= -1
    assert disk_free_bytes(tmp_path / "not" / "yet" / "there") == pytest.approx(
        disk_free_bytes(tmp_path), rel=0.1
    )


def test_memlock(monkeypatch):
    monkeypatch.setattr(limits.resource, "getrlimit", lambda which: (resource.RLIM_INFINITY, -1))
    assert limits.memlock_limit_bytes() == limits.UNLIMITED
    monkeypatch.setattr(limits.resource, "getrlimit", lambda which: (65536, 65536))
    assert limits.memlock_limit_bytes() == 65536


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (1, 1),
        (1e9, 10**9),
        (2.7, 2),
        (16 * GIB, 16 * GIB),
        ("1024", 1024),
        ("16GiB", 16 * GIB),
        ("16 GB", 16 * 10**9),
        ("16gib", 16 * GIB),
        (" 16  gb ", 16 * 10**9),
        ("15.9GiB", math.floor(15.9 * GIB)),
        (".5 KiB", 512),
        ("1.5KB", 1500),
        ("1e3 MB", 10**9),
        ("+2TiB", 2 << 40),
        ("7 B", 7),
        ("7 bytes", 7),
        ("1PB", 10**15),
        ("80%", 80),
        ("0.5 %", 1),
        ("100%", 200),
    ],
)
def test_parse_bytes(text, size):
    whole_bytes = {"80%": 100, "0.5 %": 200, "100%": 200}.get(text)
    assert parse_bytes(text, whole_bytes=whole_bytes) == size


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("abc", "cannot read 'abc'.*16GiB"),
        ("", "cannot read ''"),
        ("GiB", "cannot read"),
        ("16 GiB please", "cannot read"),
        ("1_000", "cannot read"),
        ("1,5 GiB", "cannot read"),
        ("inf", "cannot read"),
        ("nan", "cannot read"),
        ("٣GiB", "cannot read"),
        ("16G", "'16GiB' or '16GB'"),
        ("16 xb", "unknown unit in '16 xb'.*16GiB"),
        ("0", "more than zero, not '0'"),
        ("-5GiB", "more than zero, not '-5GiB'"),
        (0, "more than zero, not 0"),
        (-1, "more than zero"),
        (math.nan, "finite"),
        (math.inf, "finite"),
        (0.8, "less than one byte.*80%"),
        ("0%", "more than zero"),
        ("-1%", "more than zero"),
        ("120%", "'120%' is more than the whole"),
        (True, "cannot read True"),
        (None, "cannot read None"),
        ([1], "cannot read"),
    ],
)
def test_parse_bytes_refuses(text, reason):
    with pytest.raises(BadOption, match=reason) as caught:
        parse_bytes(text, whole_bytes=1000)
    assert isinstance(caught.value, (LMSError, ValueError))


def test_a_share_needs_a_whole():
    with pytest.raises(BadOption, match="'80%' has no whole"):
        parse_bytes("80%")


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (17072495001, "15.9 GiB"),
        (1024**2 - 1, "1.0 MiB"),
        (5 << 50, "5.0 PiB"),
        (5000 << 50, "5000.0 PiB"),
        (-3 * GIB, "-3.0 GiB"),
    ],
)
def test_format_bytes(size, text):
    assert format_bytes(size) == text

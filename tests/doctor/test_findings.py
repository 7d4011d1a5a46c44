"""Each finding of ``torchlms doctor``: what is in order, what is worth a note, and what needs attention."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import torchlms
from torchlms.doctor import device, host, software
from torchlms.doctor.device import Link
from torchlms.doctor.finding import State
from torchlms.memory.probe import Measurements

GIB = 1 << 30
RANGE = "torch<2.16,>=2.11"


def measured(rate: float = 55e9, pin: float = 20e9, direct: bool = True, disk: float = 3e9) -> Measurements:
    return Measurements(
        device="Card",
        device_bytes=80 * GIB,
        torch="2.13.0",
        link=((1 << 20, 1e-3, 1e-3), (1 << 28, (1 << 28) / rate, (1 << 28) / rate)),
        pin_bytes_per_s=pin,
        disk_write_bytes_per_s=disk,
        disk_read_bytes_per_s=disk,
        disk_direct=direct,
        measured="2026-11-23T12:00:00+00:00",
    )


@pytest.mark.parametrize(
    ("version", "state"),
    [
        ("2.11.0", State.OK),
        ("2.15.1+cu130", State.OK),
        ("2.16.0a0+git1234", State.ATTENTION),
        ("2.9.1", State.ATTENTION),
        ("3.0", State.ATTENTION),
    ],
)
def test_torch_in_range(version: str, state: State) -> None:
    finding = software.torch_in_range(version, RANGE)
    assert finding.state is state
    assert bool(finding.next_step) == (state is State.ATTENTION)
    assert software.torch_in_range(version, "").state is State.NOTE


def test_the_range_is_that_of_the_package() -> None:
    found = {finding.topic: finding for finding in software.versions()}
    torch_finding = found["torch"]
    assert found["torchlms"].found == torchlms.__version__
    assert torch_finding.state is not State.ATTENTION


@pytest.mark.parametrize(
    ("environment", "state", "said"),
    [
        ({}, State.NOTE, "expandable_segments:True"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}, State.OK, "expandable"),
        ({"PYTORCH_ALLOC_CONF": "expandable_segments: True,max_split_size_mb:64"}, State.OK, "64"),
        (
            {"PYTORCH_CUDA_ALLOC_CONF": "roundup_power2_divisions:[256:1,>:4],expandable_segments:False"},
            State.NOTE,
            "=roundup_power2_divisions:[256:1,>:4],expandable_segments:True",
        ),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"}, State.ATTENTION, "unset"),
        ({"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, State.ATTENTION, "unset"),
        ({"PYTORCH_NO_CUDA_MEMORY_CACHING": "0"}, State.NOTE, "export"),
    ],
)
def test_allocator(environment: dict[str, str], state: State, said: str) -> None:
    finding = software.allocator(environment, cuda=True)
    assert finding.state is state
    assert said in finding.found + finding.next_step
    assert software.allocator(environment, cuda=False).state is State.OK


def test_replay_table(tmp_path: Path) -> None:
    assert software.replay_table("cpu").state is State.OK
    table = tmp_path / "table.json"
    table.write_text(json.dumps({"cpu": {}}))
    finding = software.replay_table("cuda", table)
    assert finding.state is State.NOTE
    assert "sweep.command --device cuda" in finding.next_step


# -- the device ------------------------------------------------------------------------------


def test_no_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert device.no_device({}, tmp_path).state is State.NOTE
    (tmp_path / "driver" / "nvidia").mkdir(parents=True)
    (tmp_path / "driver" / "nvidia" / "version").write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (dvs-builder)\n"
    )
    assert device.driver_version(tmp_path) == "580.65.06"
    monkeypatch.setattr(torch.version, "cuda", None)
    finding = device.no_device({}, tmp_path)
    assert (finding.state, finding.next_step) == (State.ATTENTION, "install a CUDA build of torch")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert device.no_device({}, tmp_path).state is State.ATTENTION
    assert device.no_device({"CUDA_VISIBLE_DEVICES": ""}, tmp_path).next_step == "unset CUDA_VISIBLE_DEVICES"


@pytest.mark.parametrize(
    ("built", "runs"),
    [
        (["sm_80", "sm_90"], True),
        (["sm_90a"], True),
        (["sm_80"], False),
        (["compute_80"], True),
        (["sm_100", "compute_120"], False),
        ([], True),
    ],
)
def test_code_for_the_card(built: list[str], runs: bool) -> None:
    assert device.runs_on(built, 9, 0) is runs


def test_memory_that_others_hold() -> None:
    assert device.device_memory(79 * GIB, 80 * GIB).state is State.OK
    finding = device.device_memory(40 * GIB, 80 * GIB)
    assert finding.state is State.NOTE
    assert "40.0 GiB of 80.0 GiB" in finding.found


def write_link(folder: Path, speed: str, width: str) -> Path:
    folder.mkdir()
    for name, text in {
        "current_link_speed": speed,
        "current_link_width": width,
        "max_link_speed": "32.0 GT/s PCIe",
        "max_link_width": "16",
    }.items():
        (folder / name).write_text(f"{text}\n")
    return folder


def test_reading_a_link(tmp_path: Path) -> None:
    link = device.read_link(write_link(tmp_path / "idle", "2.5 GT/s PCIe", "16"))
    assert link == Link(gt_per_s=2.5, width=16, most_gt_per_s=32, most_width=16)
    assert link.most_bytes_per_s == pytest.approx(63e9, rel=0.01)
    assert device.read_link(write_link(tmp_path / "unknown", "Unknown", "0")) is None
    assert device.read_link(tmp_path / "missing") is None


FULL = Link(32.0, 16, 32.0, 16)


@pytest.mark.parametrize(
    ("link", "rates", "states"),
    [
        (FULL, measured(), [State.OK, State.OK]),
        (Link(2.5, 16, 32.0, 16), measured(), [State.OK, State.OK]),  # an idle link slows down
        (Link(32.0, 8, 32.0, 16), measured(27e9), [State.ATTENTION, State.ATTENTION]),
        (FULL, measured(12e9), [State.OK, State.ATTENTION]),
        (FULL, measured(pin=0.0), [State.OK, State.ATTENTION]),
        (FULL, None, [State.OK, State.NOTE]),
        (None, measured(12e9), [State.NOTE, State.OK]),
    ],
)
def test_link(link: Link | None, rates: Measurements | None, states: list[State]) -> None:
    findings = list(device.link_findings(link, rates))
    assert [finding.state for finding in findings] == states
    assert all(finding.next_step for finding in findings if finding.state is State.ATTENTION)


def test_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """With what torch says of one; there need be none."""
    card = SimpleNamespace(
        name="Card", major=9, minor=0, pci_domain_id=0, pci_bus_id=25, pci_device_id=0, total_memory=80 * GIB
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80"])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (79 * GIB, 80 * GIB))
    asked: list[Path] = []
    monkeypatch.setattr(device, "read_link", asked.append)
    findings = list(device.cuda_device(torch.device("cuda", 0), measured()))
    assert [finding.topic for finding in findings] == ["device", "device memory", "link", "link rate"]
    assert findings[0].state is State.ATTENTION
    assert "torch is built for sm_80, this is 9.0" in findings[0].found
    assert [path.name for path in asked] == ["0000:19:00.0"]


# -- the host --------------------------------------------------------------------------------


def test_host_memory() -> None:
    assert host.host_memory(64 * GIB, 64 * GIB, 80 * GIB).state is State.OK
    limited = host.host_memory(32 * GIB, 64 * GIB, 80 * GIB)
    assert limited.state is State.NOTE
    assert "cgroup or ulimit -v holds it below the 64.0 GiB" in limited.found
    little = host.host_memory(8 * GIB, 64 * GIB, 80 * GIB)
    assert little.state is State.ATTENTION
    assert "give the container" in little.next_step
    assert "end other processes" in host.host_memory(GIB // 2, GIB // 2, 0).next_step


def test_locked_memory() -> None:
    assert host.locked_memory(-1, cuda=True).state is State.OK
    assert host.locked_memory(8 << 20, cuda=False).state is State.OK
    assert host.locked_memory(8 << 20, cuda=True).state is State.NOTE


def test_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert host.disk(tmp_path, "ext4", 100 * GIB).state is State.OK
    assert host.disk(tmp_path, "nfs4", 100 * GIB).state is State.NOTE
    assert host.disk(tmp_path, "ext4", 5 * GIB).state is State.NOTE
    for kind, free_bytes in (("tmpfs", 100 * GIB), ("ext4", GIB // 2)):
        finding = host.disk(tmp_path, kind, free_bytes)
        assert finding.state is State.ATTENTION
        assert "--disk-dir" in finding.next_step
    missing = tmp_path / "not" / "yet"
    (found,) = [
        item for item in host.host_findings(missing, device_bytes=0, measured=None) if item.topic == "disk"
    ]
    assert found.found.endswith(f"in which LMS would make {missing}")
    monkeypatch.setattr("os.access", lambda *_: False)
    assert "no permission" in host.disk(tmp_path, "ext4", 100 * GIB).found


def test_rates() -> None:
    (finding,) = host.rates(measured())
    assert finding.state is State.OK
    assert "3.00 GB/s out, 3.00 GB/s in (measured 2026-11-23)" in finding.found
    assert [item.state for item in host.rates(None)] == [State.NOTE]
    assert [item.state for item in host.rates(measured(direct=False))] == [State.NOTE]
    assert [item.state for item in host.rates(measured(disk=0.0))] == [State.ATTENTION]


def test_cache(tmp_path: Path) -> None:
    assert host.cache(tmp_path / "not" / "yet").state is State.OK
    (tmp_path / "file").write_text("")
    finding = host.cache(tmp_path / "file" / "below")
    assert (finding.state, finding.next_step) == (State.ATTENTION, "set TORCHLMS_CACHE to a folder of yours")

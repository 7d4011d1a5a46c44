"""Probe: sane figures on a CPU, and a cache that is right or not used."""

from __future__ import annotations

import dataclasses
import json
import time

import pytest
import torch

import torchlms
import torchlms.memory.probe as probe
from torchlms.core.machine import CopyTime, Machine
from torchlms.memory import rates
from torchlms.memory.arena import pinned_bytes_in_use
from torchlms.memory.probe import Measurements, load_or_measure, measure

CPU = torch.device("cpu")


@pytest.fixture
def counted(tmp_path, monkeypatch):
    """load_or_measure with a measure that costs nothing and counts its calls."""
    monkeypatch.setenv("TORCHLMS_CACHE", str(tmp_path / "cache"))
    calls = []

    def fake(device, disk_dir, progress):
        calls.append(device)
        link = ((65536, 1e-5, 2e-5), (1 << 20, 1e-4, 2e-4))
        found = Measurements(
            device="x", device_bytes=1, torch="y", link=link, disk_direct=True, out_share=0.5
        )
        return found, True

    monkeypatch.setattr(probe, "_measure", fake)
    return calls


def test_measures_this_machine_quickly(tmp_path):
    told, begin_s = [], time.perf_counter()
    found = measure(CPU, tmp_path, progress=told.append)
    assert time.perf_counter() - begin_s < 10
    assert told == ["host memory", "disk"]
    assert found.link == ()
    assert found.device
    assert found.torch == torch.__version__
    for rate in ("touch", "host_copy", "disk_write", "disk_read"):
        assert 1e6 < getattr(found, f"{rate}_bytes_per_s") < 1e13, rate
    assert 0 < found.host_available_bytes <= found.device_bytes
    assert found.disk_free_bytes > 0
    assert found.measured.endswith("+00:00")
    assert list(tmp_path.iterdir()) == []
    assert pinned_bytes_in_use() == 0


def test_fields_are_those_of_machine():
    ours = {field.name: field.default for field in dataclasses.fields(Measurements)}
    theirs = {field.name: field.default for field in dataclasses.fields(Machine) if field.name != "schema"}
    assert ours == theirs
    found = Measurements(device="x", device_bytes=1, torch="y", link=((65536, 1e-5, 2e-5),))
    fields = dataclasses.asdict(found)
    machine = Machine(**{**fields, "link": tuple(CopyTime(*point) for point in found.link)})
    assert machine.out_s(65536) == 1e-5


def test_what_cannot_be_measured_stays_at_its_default(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(rates, "measure_host", lambda: {"touch_bytes_per_s": 5.0})
    (tmp_path / "file").write_text("")
    found = measure(CPU, tmp_path / "file")
    assert found.touch_bytes_per_s == 5.0
    assert found.disk_write_bytes_per_s == 0.0
    assert "could not measure the disk" in caplog.text


def test_what_failed_is_measured_again(tmp_path, monkeypatch):
    """A disk that was full, or a device that was busy, is not so for good."""
    monkeypatch.setenv("TORCHLMS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(rates, "measure_host", lambda: {"touch_bytes_per_s": 5.0})
    right = rates.measure_disk

    def full(disk_dir):
        raise torchlms.LMSError("no room")

    monkeypatch.setattr(rates, "measure_disk", full)
    assert load_or_measure(CPU, tmp_path).disk_write_bytes_per_s == 0.0
    monkeypatch.setattr(rates, "measure_disk", right)
    found = load_or_measure(CPU, tmp_path)
    assert found.disk_write_bytes_per_s > 0.0
    assert load_or_measure(CPU, tmp_path).measured == found.measured, "from the cache"


def test_slow_disk_is_measured_in_part(tmp_path, monkeypatch):
    monkeypatch.setattr(rates, "_DISK_LONGEST_S", 0.0)
    monkeypatch.setattr(rates, "_stream", _at_least_one(rates._stream))
    assert rates.measure_disk(tmp_path)["disk_write_bytes_per_s"] >= 0


def _at_least_one(stream):
    def wrapped(move, arena, size_bytes):
        moved_bytes, seconds = stream(move, arena, size_bytes)
        assert 0 < moved_bytes <= 32 << 20
        return moved_bytes, seconds

    return wrapped


def test_cached_and_refreshed(tmp_path, counted):
    first = load_or_measure(CPU, tmp_path)
    again = load_or_measure(CPU, tmp_path)
    assert len(counted) == 1
    snapshot = {"host_available_bytes", "memlock_bytes", "disk_free_bytes"}
    for field in dataclasses.fields(Measurements):
        if field.name not in snapshot:
            assert getattr(first, field.name) == getattr(again, field.name)
    assert again.host_available_bytes > 0  # of now, not what the file says
    load_or_measure(CPU, tmp_path, refresh=True)
    assert len(counted) == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda data: "not json",
        lambda data: "[]",
        lambda data: json.dumps({**data, "schema": "torchlms.probe/0"}),
        lambda data: json.dumps({**data, "surprise": 1}),
        lambda data: json.dumps({**data, "device_bytes": "many"}),
        lambda data: json.dumps({**data, "out_share": None}),
        lambda data: json.dumps({**data, "link": [[1, 2]]}),
        lambda data: json.dumps({name: data[name] for name in data if name != "torch"}),
    ],
)
def test_corrupt_cache_is_rewritten(tmp_path, counted, change):
    load_or_measure(CPU, tmp_path)
    (path,) = (tmp_path / "cache").iterdir()
    good = path.read_text()
    path.write_text(change(json.loads(good)))
    load_or_measure(CPU, tmp_path)
    assert len(counted) == 2
    assert path.read_text() == good
    load_or_measure(CPU, tmp_path)
    assert len(counted) == 2


def test_another_torch_is_another_machine(tmp_path, counted, monkeypatch):
    load_or_measure(CPU, tmp_path)
    monkeypatch.setattr(torch, "__version__", "9.9")
    load_or_measure(CPU, tmp_path)
    assert len(counted) == 2
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_cache_that_cannot_be_written_is_done_without(tmp_path, counted, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCHLMS_CACHE", str(tmp_path / "file" / "below"))
    load_or_measure(CPU, tmp_path)
    load_or_measure(CPU, tmp_path)
    assert len(counted) == 2


def test_shares_of_a_link_that_slows_when_both_ways_run(monkeypatch):
    # Lone: out 1.0 s, in 2.0 s. Together: out ends at 1.25 s (0.8 of its rate); until then in had
    # 0.5 of its rate, 0.3125 of its copies, and did the rest alone in 1.375 s.
    queues = iter([[1.0], [2.0], [1.25, 2.625]])
    monkeypatch.setattr(rates, "_queue_s", lambda pairs: next(queues))
    nothing = (torch.empty(0), torch.empty(0))
    assert rates._both_ways(nothing, nothing) == pytest.approx((0.8, 0.5))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_measures_a_device(tmp_path):
    begin_s = time.perf_counter()
    found = measure(torch.device("cuda"), tmp_path)
    assert time.perf_counter() - begin_s < 20
    assert [point[0] for point in found.link] == sorted(point[0] for point in found.link)
    assert all(out_s > 0 and in_s > 0 for _, out_s, in_s in found.link)
    assert found.link[-1][0] / found.link[-1][1] > found.pageable_out_bytes_per_s > 0
    assert 0 < found.out_share <= 1
    assert 0 < found.in_share <= 1
    assert found.pin_bytes_per_s > 0
    assert pinned_bytes_in_use() == 0

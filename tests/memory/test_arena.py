"""Arena: views, pinning and its accounting, and every order of ending."""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import subprocess
import sys
import weakref

import pytest
import torch

import torchlms.memory.arena as arena_module
from torchlms.errors import HostBudgetTooSmall
from torchlms.memory.arena import HUGE_PAGE_BYTES, Arena, pinned_bytes_in_use

MIB = 1 << 20


class FakeRegistrar:
    def __init__(self, *, code=0, is_available=True):
        self.code, self.is_available, self.live, self.log = code, is_available, {}, []

    def available(self):
        return self.is_available

    def register(self, address, size_bytes):
        self.log.append("register")
        if self.code == 0:
            self.live[address] = size_bytes
        return self.code

    def unregister(self, address):
        ctypes.c_uint8.from_address(address).value = 7  # would crash, were it unmapped already
        self.log.append("unregister")
        del self.live[address]
        return 0


def mapped_bytes(address):
    with open("/proc/self/maps") as maps:
        for line in maps:
            begin, end = (int(part, 16) for part in line.split()[0].split("-"))
            if begin <= address < end:
                return end - begin
    return 0


def test_views_are_windows_on_one_memory():
    with Arena(3 * MIB, pinned=False) as arena:
        assert arena.capacity_bytes == 4 * MIB
        whole = arena.view(0, arena.capacity_bytes)
        assert whole.data_ptr() % HUGE_PAGE_BYTES == 0
        part = arena.view(1000, 24)
        part.copy_(torch.arange(24, dtype=torch.uint8))
        assert whole[1000:1024].tolist() == list(range(24))
        assert part.data_ptr() == whole.data_ptr() + 1000
        assert part.untyped_storage().nbytes() == 24
        before = whole._version
        part.add_(1)
        assert whole._version == before  # views are strangers to autograd
        assert arena.view(5, 0).numel() == 0
        assert arena.view(512, 16).view(torch.float32).shape == (4,)


@pytest.mark.parametrize(("offset", "size"), [(-1, 4), (0, -4), (4096, 1), (4000, 97)])
def test_a_view_outside_is_refused(offset, size):
    with Arena(4096, pinned=False) as arena, pytest.raises(ValueError, match="outside"):
        arena.view(offset, size)


def test_nothing_is_touched_when_not_pinned():
    rss = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096  # noqa: E731, SIM115
    before = rss()
    with Arena(1 << 42, pinned=False) as arena:  # 4 TiB: more than any machine here has
        arena.view((1 << 42) - 8, 8).fill_(1)
        assert rss() - before < 64 * MIB


def test_touch_backs_every_page():
    with Arena(8 * MIB, pinned=False) as arena:
        assert arena.touch() > 0
        resident = (ctypes.c_ubyte * (arena.capacity_bytes // 4096))()
        address = arena.view(0, 1).data_ptr()
        libc = ctypes.CDLL(None)
        libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
        assert libc.mincore(address, arena.capacity_bytes, resident) == 0
        assert all(page & 1 for page in resident)


def test_touch_without_populate(monkeypatch):
    monkeypatch.setattr(arena_module, "_MADV_POPULATE_WRITE", 9999)
    with Arena(3 * MIB, pinned=False) as arena:
        assert arena.touch() > 0


def test_allocation_and_planned_places():
    with Arena(1 * MIB, pinned=False) as arena:
        assert arena.reserve(1024, 512)
        assert not arena.reserve(1024, 1)
        first, second = arena.allocate(1000), arena.allocate(1)
        assert first == 0
        assert second == 1536
        assert arena.in_use_bytes == 1024 + 512 + 512
        arena.free(first)
        assert arena.in_use_bytes == 1024
        assert arena.peak_bytes == 2048
        assert arena.allocate(2 * MIB) is None


def test_pinned_bytes_are_counted_until_close():
    registrar = FakeRegistrar()
    first, second = (Arena(size, pinned=True, registrar=registrar) for size in (MIB, 4 * MIB))
    assert first.pinned
    assert pinned_bytes_in_use() == 5 * MIB == sum(registrar.live.values())
    first.close()
    first.close()
    assert not first.pinned
    assert pinned_bytes_in_use() == 4 * MIB
    second.close()
    assert pinned_bytes_in_use() == 0
    assert registrar.log == ["register"] * 2 + ["unregister"] * 2


def test_close_unmaps_at_once_without_views():
    arena = Arena(4 * MIB, pinned=False)
    address = arena.view(0, 1).data_ptr()
    assert mapped_bytes(address) >= 4 * MIB
    arena.close()
    assert mapped_bytes(address) < 4 * MIB
    for use in (lambda: arena.view(0, 1), lambda: arena.allocate(1), arena.touch):
        with pytest.raises(ValueError, match="closed"):
            use()
    arena.free(0)  # late, harmless


def test_views_survive_close():
    registrar = FakeRegistrar()
    arena = Arena(4 * MIB, pinned=True, registrar=registrar)
    view = arena.view(100, 50).fill_(3)
    derived = view[10:20]
    arena.close()
    assert registrar.live == {}
    del view
    assert derived.sum().item() == 30
    address = derived.data_ptr()
    assert mapped_bytes(address)
    del derived
    assert mapped_bytes(address) < 4 * MIB


def test_collected_without_close():
    registrar = FakeRegistrar()
    arena = Arena(4 * MIB, pinned=True, registrar=registrar)
    address = arena.view(0, 1).data_ptr()
    del arena
    gc.collect()
    assert registrar.live == {}
    assert pinned_bytes_in_use() == 0
    assert mapped_bytes(address) < 4 * MIB


def test_collected_in_a_cycle_is_unpinned_before_it_is_unmapped():
    registrar = FakeRegistrar()
    arena = Arena(4 * MIB, pinned=True, registrar=registrar)
    arena.itself = arena
    gone = weakref.ref(arena)
    del arena
    gc.collect()
    assert gone() is None
    assert registrar.log == ["register", "unregister"]


def test_refused_registration_falls_back_with_one_warning(caplog):
    with (
        caplog.at_level(logging.WARNING),
        Arena(4 * MIB, pinned=True, registrar=FakeRegistrar(code=2)) as arena,
    ):
        assert not arena.pinned
        assert pinned_bytes_in_use() == 0
        assert arena.view(0, 8).fill_(1).sum() == 8
    (record,) = caplog.records
    assert "4.0 MiB" in record.getMessage()
    assert "error 2" in record.getMessage()


def test_no_device_falls_back(caplog):
    registrar = FakeRegistrar(is_available=False)
    with Arena(MIB, pinned=True, registrar=registrar) as arena:
        assert not arena.pinned
    assert registrar.log == []
    assert "no CUDA device" in caplog.text


def test_pinning_more_than_there_is_says_by_how_much(monkeypatch):
    monkeypatch.setattr(arena_module, "host_available_bytes", lambda: 3 * MIB)
    with pytest.raises(HostBudgetTooSmall, match="smaller host_budget") as caught:
        Arena(4 * MIB, pinned=True, registrar=FakeRegistrar())
    assert caught.value.missing_bytes == MIB


def test_what_cannot_be_mapped_is_our_error():
    with pytest.raises(HostBudgetTooSmall, match="cannot map"):
        Arena(1 << 60, pinned=False)
    with pytest.raises(ValueError, match="holds nothing"):
        Arena(0, pinned=False)


def test_cuda_registrar_reads_codes_and_clears_the_failure(monkeypatch):
    calls = []

    class Runtime:
        def cudaHostRegister(self, address, size, flags):  # noqa: N802
            calls.append(("register", address, size, flags))
            return 2

        def cudaHostUnregister(self, address):  # noqa: N802
            calls.append(("unregister", address))
            return 0

    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append(("synchronize", device)))
    registrar = arena_module.CudaRegistrar()
    monkeypatch.setattr(registrar, "_clear_last_error", lambda: calls.append("clear"))
    assert registrar.register(4096, 8192) == 2
    assert registrar.unregister(4096) == 0
    assert calls == [("register", 4096, 8192, 1), "clear", ("synchronize", 1), ("unregister", 4096)]


def test_a_forked_child_keeps_its_hands_off():
    registrar = FakeRegistrar()
    arena = Arena(4 * MIB, pinned=True, registrar=registrar)
    view = arena.view(0, 16).fill_(9)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            assert pinned_bytes_in_use() == 0
            with pytest.raises(RuntimeError, match="forked"):
                arena.view(0, 1)
            # Whatever now lies where the parent has its arena must survive the arena's end here.
            libc = arena_module._libc
            here = libc.mmap(view.data_ptr(), 4096, 3, 0x22 | 0x100000, -1, 0)
            assert here == view.data_ptr()
            arena.close()
            del view, arena
            gc.collect()
            assert mapped_bytes(here)
            assert registrar.log == ["register"]
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert view.sum().item() == 9 * 16
    assert pinned_bytes_in_use() == 4 * MIB
    arena.close()
    assert registrar.live == {}


def test_import_makes_no_context_and_exit_with_live_views_is_quiet():
    program = (
        "import torch, torchlms.memory.probe; from torchlms.memory.arena import Arena\n"
        "assert not torch.cuda.is_initialized()\n"
        "arena = Arena(1 << 22, pinned=False); view = arena.view(0, 100); torch.kept = view; arena.close()\n"
        "other = Arena(1 << 22, pinned=False); kept = other.view(0, 9)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_pinned_on_a_device():
    with Arena(64 * MIB, pinned=True) as arena:
        assert arena.pinned
        view = arena.view(4096, MIB)
        assert view.is_pinned()
        there = torch.randint(0, 256, (MIB,), dtype=torch.uint8, device="cuda")
        view.copy_(there, non_blocking=True)
        torch.cuda.synchronize()
        assert torch.equal(view, there.cpu())
    assert not view.is_pinned()
    assert torch.equal(view, there.cpu())
    registrar = arena_module.CudaRegistrar()
    assert registrar.register(4096, 4096) != 0  # not our memory: refused
    assert (torch.ones(8, device="cuda") + 1).sum().item() == 16  # and the refusal is forgotten

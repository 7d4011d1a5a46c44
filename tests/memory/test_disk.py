"""SpillFile: bytes come back equal, errors reach the future, and nothing is left behind."""

from __future__ import annotations

import errno
import fcntl
import gc
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch

from tests import forked
from torchlms.errors import LMSError, SpillError
from torchlms.memory import open_file, spill_place
from torchlms.memory.disk import CHUNK_BYTES, SpillFile
from torchlms.memory.open_file import ALIGNMENT_BYTES
from torchlms.memory.spill_place import filesystem_type

MIB = 1 << 20
HOLDER = """
    import os, sys, time, torch
    from pathlib import Path
    from torchlms.memory.disk import SpillFile
    spill = SpillFile(Path(sys.argv[1]), 1 << 24)
    spill.write(spill.allocate(1 << 20), torch.ones(1 << 20, dtype=torch.uint8)).result()
    print(spill.directory.name, flush=True)
"""


def run(program, directory):
    return forked.run("-c", textwrap.dedent(program), str(directory), cwd=directory)


def hold(directory):
    """Another process with a spill file in ``directory``, waiting to be ended."""
    program = textwrap.dedent(HOLDER) + "time.sleep(60)\n"
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(directory)], stdout=subprocess.PIPE, text=True
    )
    return process, process.stdout.readline().strip()


def bytes_at(size, *, skew=0):
    """``size`` random bytes whose address is ``skew`` past a page boundary."""
    room = torch.empty(size + 2 * ALIGNMENT_BYTES, dtype=torch.uint8)
    start = -room.data_ptr() % ALIGNMENT_BYTES + skew
    return room[start : start + size].random_(0, 256)


def names(directory):
    return sorted(path.name for path in Path(directory).iterdir())


@pytest.fixture(params=["direct", "buffered"])
def spill(request, tmp_path, monkeypatch):
    if request.param == "buffered":
        monkeypatch.setattr(open_file, "_open_direct", lambda path: -1)
    with SpillFile(tmp_path, 64 * MIB) as spill:
        if request.param == "direct" and not spill.direct:
            pytest.skip("this filesystem has no O_DIRECT")
        yield spill


@pytest.mark.parametrize("skew", [0, 1, 512])
@pytest.mark.parametrize(
    "size", [0, 1, 4095, 4096, 4097, MIB, CHUNK_BYTES, CHUNK_BYTES + 1, 2 * CHUNK_BYTES + 12345]
)
def test_bytes_come_back_equal(spill, size, skew):
    guard = spill.allocate(ALIGNMENT_BYTES)
    offset, after = spill.allocate(size), spill.allocate(ALIGNMENT_BYTES)
    fence = bytes_at(ALIGNMENT_BYTES)
    spill.write(guard, fence).result()
    spill.write(after, fence).result()
    source, target = bytes_at(size, skew=skew), bytes_at(size, skew=(skew * 3) % ALIGNMENT_BYTES)
    spill.write(offset, source).result()
    spill.read(offset, target).result()
    assert torch.equal(source, target)
    for neighbour in (guard, after):
        read = torch.empty(ALIGNMENT_BYTES, dtype=torch.uint8)
        spill.read(neighbour, read).result()
        assert torch.equal(read, fence)
    assert spill.bytes_written == size + 2 * ALIGNMENT_BYTES
    assert spill.bytes_read == size + 2 * ALIGNMENT_BYTES


def test_many_at_once(spill):
    sources = [bytes_at(size, skew=size % 7) for size in range(1, 3 * MIB, 100_003)]
    offsets = [spill.allocate(source.numel()) for source in sources]
    for future in [spill.write(*pair) for pair in zip(offsets, sources, strict=True)]:
        future.result()
    targets = [torch.empty_like(source) for source in sources]
    for future in [spill.read(*pair) for pair in zip(offsets, targets, strict=True)]:
        future.result()
    assert all(map(torch.equal, sources, targets))


def test_written_direct_and_read_buffered(tmp_path):
    with SpillFile(tmp_path, 4 * MIB) as spill:
        source, target = bytes_at(MIB + 3), bytes_at(MIB + 3)
        offset = spill.allocate(MIB + 3)
        spill.write(offset, source).result()
        spill._files.direct = -1
        spill.read(offset, target).result()
        assert torch.equal(source, target)


def test_what_is_no_byte_tensor_is_refused(spill):
    offset = spill.allocate(MIB)
    for tensor in (torch.zeros(4), torch.zeros(4, 4, dtype=torch.uint8).t(), torch.zeros(4, device="meta")):
        with pytest.raises(ValueError, match="uint8"):
            spill.write(offset, tensor)
    with pytest.raises(ValueError, match="aligned range"):
        spill.write(offset + 512, bytes_at(4))
    with pytest.raises(ValueError, match="aligned range"):
        spill.read(64 * MIB, bytes_at(4))


def test_the_budget_holds(tmp_path):
    with SpillFile(tmp_path, MIB + 100) as spill:
        assert spill.budget_bytes == MIB
        first = spill.allocate(MIB - 1)
        assert first == 0
        assert spill.allocate(1) is None
        spill.free(first)
        assert spill.allocate(1) == 0
        assert spill.in_use_bytes == ALIGNMENT_BYTES
        assert spill.peak_bytes == MIB
    with SpillFile(str(tmp_path), None) as spill:
        assert spill.budget_bytes > 0


def test_full_disk_is_found_at_allocate(tmp_path, monkeypatch, caplog):
    room = 6 * MIB

    def fallocate(descriptor, offset, size):
        if offset + size > room:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    with SpillFile(tmp_path, 64 * MIB) as spill:
        first = spill.allocate(5 * MIB)  # the whole step has no room, just this has
        assert first == 0
        assert spill.allocate(2 * MIB) is None
        assert "No space left" in caplog.text
        assert spill.in_use_bytes == 5 * MIB
        assert spill.allocate(MIB) is not None


def test_filesystem_that_cannot_reserve(tmp_path, monkeypatch):
    def fallocate(descriptor, offset, size):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    with SpillFile(tmp_path, 64 * MIB) as spill:
        source, target = bytes_at(CHUNK_BYTES + 5), bytes_at(CHUNK_BYTES + 5)
        offset = spill.allocate(CHUNK_BYTES + 5)
        spill.write(offset, source).result()
        spill.read(offset, target).result()
        assert torch.equal(source, target)


def test_file_size_limit(tmp_path):
    result = run(
        """
        import errno, os, resource, sys, torch
        from pathlib import Path
        from torchlms.errors import SpillError
        from torchlms.memory.disk import SpillFile
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        with SpillFile(Path(sys.argv[1]), 1 << 24) as spill:
            assert spill.allocate(1 << 22) is None
            assert spill.allocate(1 << 19) == 0
        def refuse(*arguments): raise OSError(errno.EOPNOTSUPP, "no")
        os.posix_fallocate = refuse
        with SpillFile(Path(sys.argv[1]), 1 << 24) as spill:
            offset = spill.allocate(1 << 22)
            error = spill.write(offset, torch.ones(1 << 22, dtype=torch.uint8)).exception()
            assert isinstance(error, SpillError) and error.errno == errno.EFBIG, error
        print("done")
        """,
        tmp_path,
    )
    assert result.out == "done\n", result.err
    assert names(tmp_path) == []


def test_failed_write_reaches_the_future(spill, monkeypatch):
    def pwrite(descriptor, view, offset):
        raise OSError(errno.ENOSPC, "No space left on device")

    offset, tensor = spill.allocate(3 * CHUNK_BYTES), bytes_at(3 * CHUNK_BYTES)
    monkeypatch.setattr(os, "pwrite", pwrite)
    error = spill.write(offset, tensor).exception()
    assert isinstance(error, SpillError)
    assert isinstance(error, LMSError)
    assert error.errno == errno.ENOSPC
    assert "spill.bin" in str(error)
    assert isinstance(error.__cause__, OSError)
    assert spill.bytes_written == 0
    monkeypatch.undo()
    spill.write(offset, tensor).result()  # and the file is still of use


def test_failure_waits_for_the_other_chunks(spill, monkeypatch):
    real, release, running = os.pwrite, threading.Event(), threading.Event()

    def pwrite(descriptor, view, offset):
        if offset == 0:
            running.wait(10)
            raise OSError(errno.EIO, "broken")
        running.set()
        release.wait(10)
        return real(descriptor, view, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    future = spill.write(spill.allocate(2 * CHUNK_BYTES), bytes_at(2 * CHUNK_BYTES))
    assert running.wait(10)
    assert not future.cancel()
    with pytest.raises(TimeoutError if sys.version_info >= (3, 11) else Exception):
        future.result(timeout=0.05)  # one chunk failed, yet the other still reads the tensor
    release.set()
    assert isinstance(future.exception(timeout=10), SpillError)


@pytest.mark.parametrize("most", [4096, 5000])
def test_short_counts_are_continued(spill, monkeypatch, most):
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, view, offset: pwrite(fd, memoryview(view)[:most], offset))
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: preadv(fd, [views[0][:most]], offset))
    source, target = bytes_at(50_001), bytes_at(50_001)
    offset = spill.allocate(50_001)
    spill.write(offset, source).result()
    spill.read(offset, target).result()
    assert torch.equal(source, target)


def test_no_count_at_all_is_an_error(spill, monkeypatch):
    monkeypatch.setattr(os, "pwrite", lambda fd, view, offset: 0)
    error = spill.write(spill.allocate(10), bytes_at(10)).exception()
    assert isinstance(error, SpillError)
    assert error.errno == errno.EIO


def test_direct_refused_at_open(tmp_path, monkeypatch):
    real = os.open

    def refuse(path, flags, *rest, **named):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, *rest, **named)

    monkeypatch.setattr(os, "open", refuse)
    with SpillFile(tmp_path, MIB) as spill:
        assert not spill.direct


def test_direct_refused_later(tmp_path, monkeypatch):
    with SpillFile(tmp_path, MIB) as spill:
        if not spill.direct:
            pytest.skip("this filesystem has no O_DIRECT")
        real, direct = os.pwrite, spill._files.direct

        def pwrite(descriptor, view, offset):
            if descriptor == direct:
                raise OSError(errno.EINVAL, "Invalid argument")
            return real(descriptor, view, offset)

        monkeypatch.setattr(os, "pwrite", pwrite)
        source, target = bytes_at(MIB), bytes_at(MIB)
        offset = spill.allocate(MIB)
        spill.write(offset, source).result()
        assert not spill.direct
        spill.read(offset, target).result()
        assert torch.equal(source, target)


def test_close_waits_then_removes(tmp_path, monkeypatch):
    real, release = os.pwrite, threading.Event()
    spill = SpillFile(tmp_path, 16 * MIB)

    def pwrite(descriptor, view, offset):
        release.wait(10)
        return real(descriptor, view, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    future = spill.write(spill.allocate(MIB), bytes_at(MIB))
    threading.Timer(0.1, release.set).start()
    spill.close()
    assert future.done()
    assert future.exception() is None
    spill.close()
    spill.free(0)
    assert names(tmp_path) == []
    for use in (lambda: spill.allocate(1), lambda: spill.write(0, bytes_at(1)), spill.flush):
        with pytest.raises(SpillError, match="closed"):
            use()


def test_close_from_a_callback(tmp_path):
    spill, closed = SpillFile(tmp_path, MIB), threading.Event()
    future = spill.write(spill.allocate(10), bytes_at(10))
    future.add_done_callback(lambda done: (spill.close(), closed.set()))
    assert closed.wait(10)
    assert names(tmp_path) == []


def test_no_descriptor_or_thread_is_left(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with SpillFile(tmp_path, MIB) as spill:
            spill.write(spill.allocate(10), bytes_at(10)).result()
    spill = SpillFile(tmp_path, MIB)
    del spill
    gc.collect()
    assert names(tmp_path) == []
    assert len(os.listdir("/proc/self/fd")) == before
    for thread in threading.enumerate():
        if thread.name.startswith("torchlms-disk"):
            thread.join(5)
            assert not thread.is_alive()


def test_a_failure_does_not_hold_the_tensor(spill, monkeypatch):
    monkeypatch.setattr(os, "pwrite", lambda fd, view, offset: 0)
    room = bytearray(8192)
    references = sys.getrefcount(room)
    tensor = torch.frombuffer(room, dtype=torch.uint8)
    future = spill.write(spill.allocate(8192), tensor)
    assert future.exception() is not None
    del tensor
    assert sys.getrefcount(room) == references


def test_exit_without_close_removes_everything(tmp_path):
    result = run(HOLDER, tmp_path)
    assert result.status == 0, result.err
    assert result.out.startswith("torchlms-")
    assert names(tmp_path) == []


def test_killed_process_is_cleaned_up_after(tmp_path):
    process, name = hold(tmp_path)
    (tmp_path / "torchlms-notes").mkdir()
    (tmp_path / "torchlms-1-0123456789abcdef").write_text("a file, not ours")
    process.kill()
    process.wait()
    process.stdout.close()
    assert name in names(tmp_path)
    with SpillFile(tmp_path, MIB) as spill:
        expected = ["torchlms-1-0123456789abcdef", spill.directory.name, "torchlms-notes"]
        assert names(tmp_path) == sorted(expected)


def test_live_neighbours_are_left_alone(tmp_path):
    process, name = hold(tmp_path)
    try:
        with SpillFile(tmp_path, MIB) as mine, SpillFile(tmp_path, MIB) as other:
            assert names(tmp_path) == sorted([name, mine.directory.name, other.directory.name])
            assert (tmp_path / name / "spill.bin").stat().st_size >= MIB
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_half_made_and_half_removed_directories(tmp_path):
    old, new = (tmp_path / f".torchlms-1-{digit * 16}" for digit in "01")
    halfway = tmp_path / f"torchlms-1-{'2' * 16}"
    users = tmp_path / f"torchlms-1-{'3' * 16}"
    for path in (old, new, halfway, users):
        path.mkdir()
    (users / "thesis.txt").write_text("years of work")
    os.utime(old, (0, 0))
    spill_place.remove_stale(tmp_path)
    assert names(tmp_path) == sorted([new.name, users.name])
    assert names(users) == ["thesis.txt"]


def test_filesystem_without_locks_still_works(tmp_path, monkeypatch, caplog):
    def flock(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with SpillFile(tmp_path, MIB) as spill, SpillFile(tmp_path, MIB) as other:
        assert names(tmp_path) == sorted([spill.directory.name, other.directory.name])
    assert "No locks available" in caplog.text


def test_a_forked_child_keeps_its_hands_off(tmp_path):
    with SpillFile(tmp_path, MIB) as spill:
        source = bytes_at(1000)
        offset = spill.allocate(1000)
        spill.write(offset, source).result()
        child = os.fork()
        if child == 0:
            status = 1
            try:
                with pytest.raises(SpillError, match="fork"):
                    spill.write(offset, source)
                with pytest.raises(SpillError, match="fork"):
                    spill.allocate(1)
                assert spill._files.lock == -1  # else it would outlive a killed parent's lock
                spill.close()
                spill._remove()
                del spill
                gc.collect()
                status = 0
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        spill_place.remove_stale(tmp_path)  # still locked
        target = torch.empty_like(source)
        spill.read(offset, target).result()
        assert torch.equal(source, target)
        assert (spill.directory / "spill.bin").exists()


def test_a_forked_child_that_exits_normally_removes_nothing(tmp_path):
    result = run(
        """
        import os, sys
        from pathlib import Path
        from torchlms.memory.disk import SpillFile
        spill = SpillFile(Path(sys.argv[1]), 1 << 24)
        child = os.fork()
        if child == 0:
            sys.exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert (spill.directory / "spill.bin").exists()
        print("done")
        """,
        tmp_path,
    )
    assert result.out == "done\n", result.err
    assert names(tmp_path) == []


def test_an_interrupt_while_it_is_opened_leaves_no_descriptor(tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    before = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", interrupted)
        with pytest.raises(KeyboardInterrupt):
            SpillFile(tmp_path, MIB)
    assert len(os.listdir("/proc/self/fd")) == before
    assert names(tmp_path) == []


def test_a_directory_that_cannot_be_used_is_our_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SpillError, match="cannot spill to"):
        SpillFile(tmp_path / "file", MIB)
    with pytest.raises(SpillError, match="give another disk_dir"):
        SpillFile(Path("/proc/nothing"), MIB)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(SpillError, match="cannot spill to"):
        SpillFile(Path("/proc/self/fd"), MIB)
    assert len(os.listdir("/proc/self/fd")) == before


def test_private_to_the_user(tmp_path):
    with SpillFile(tmp_path, MIB) as spill:
        assert spill.directory.stat().st_mode & 0o077 == 0
        assert (spill.directory / "spill.bin").stat().st_mode & 0o077 == 0


def test_filesystem_type_takes_the_innermost_mount(tmp_path):
    mounts = tmp_path / "mounts"
    lines = ["/dev/a / ext4 rw 0 0", f"x {tmp_path} tmpfs rw 0 0", f"y {tmp_path}/a\\040b xfs rw 0 0"]
    mounts.write_text("\n".join(lines))
    assert filesystem_type(tmp_path / "file", mounts=mounts) == "tmpfs"
    assert filesystem_type(tmp_path / "a b" / "c", mounts=mounts) == "xfs"
    assert filesystem_type(Path("/elsewhere"), mounts=mounts) == "ext4"
    assert filesystem_type(Path("/"), mounts=tmp_path / "none") == ""


def test_default_directory_avoids_memory_filesystems(tmp_path, monkeypatch):
    cache, temporary = tmp_path / "cache", tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(spill_place.platformdirs, "user_cache_path", lambda name: cache)
    monkeypatch.setattr(spill_place.tempfile, "gettempdir", lambda: str(temporary))
    monkeypatch.setattr(
        spill_place, "filesystem_type", lambda path: "tmpfs" if cache in path.parents else "ext4"
    )
    assert spill_place.default_directory() == temporary
    monkeypatch.setattr(spill_place, "filesystem_type", lambda path: "ext4")
    assert spill_place.default_directory() == cache / "spill"

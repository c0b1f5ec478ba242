"""The store of the cache: what was written or nothing, whatever happens to the process, the file and the disk."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ldm.data.cache import writer as writer_module
from ldm.data.cache.store import DamagedError, Keys, Kind, Store, page_size, to_keys
from ldm.data.cache.writer import Writer
from ldm.system import files as space
from ldm.system.errors import NoSpaceError
from ldm.system.files import check_space

ROOT = Path(__file__).parents[2]
KIND = Kind("numbers", {"of": "a test"}, "<f4", (2, 3))


def key(i: int) -> bytes:
    return KIND.key(str(i).encode())


def keys_of(*numbers: int) -> Keys:
    return to_keys(b"".join(key(i) for i in numbers))


def value(i: int) -> np.ndarray:
    """What belongs to a number, computed without the store."""
    return np.random.default_rng(i).standard_normal((2, 3)).astype(np.float32)


def fill_in(path: Path, *numbers: int, kind: Kind = KIND) -> tuple[list[int], list[str]]:
    """Add these numbers to the store; which of them it lacked, and what was logged."""
    lines: list[str] = []
    keys = to_keys(b"".join(kind.key(str(i).encode()) for i in numbers))
    with Writer(path, kind, lines.append) as writer:
        missing = writer.missing(keys)
        for part in np.split(missing, range(4, len(missing), 4)):
            writer.append(keys[part], np.array([value(numbers[i]) for i in part]))
    return [numbers[i] for i in missing], lines


def check(path: Path, *numbers: int) -> None:
    """The store holds these numbers, bit by bit, and nothing else."""
    store = Store(path, KIND)
    assert len(store) == len(numbers)
    assert all(np.array_equal(store.array(key(i)), value(i)) for i in numbers)
    assert not list(store.damaged())
    assert set(store.get([key(i) for i in [*numbers, 10**6]])) == {key(i) for i in numbers}


def flip_bit(path: Path, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache" / KIND.file


def test_what_is_found_is_what_was_added_and_nothing_is_added_twice(path: Path) -> None:
    assert fill_in(path, *range(50))[0] == list(range(50))
    check(path, *range(50))
    assert fill_in(path, *range(50)) == ([], [])
    assert fill_in(path, 60, *range(40, 55), 60)[0] == [60, 50, 51, 52, 53, 54]
    check(path, *range(55), 60)
    with pytest.raises(DamagedError, match="a record is missing.*run the same command again"):
        Store(path, KIND).read(key(99))


def test_keys_that_end_in_zeros_are_keys(path: Path) -> None:
    """numpy drops the trailing zeros of a byte string; two keys must not become one for it."""
    ends = [b"\0" * 16, b"\0" * 15 + b"\1", b"\1" + b"\0" * 15, b"\1" * 15 + b"\0", b"\1" * 16, b"\xff" * 15 + b"\0"]
    keys = to_keys(b"".join(ends))
    with Writer(path, KIND) as writer:
        assert writer.missing(keys).tolist() == list(range(6))
        writer.append(keys, np.stack([value(i) for i in range(len(ends))]))
        writer.commit()
        assert writer.missing(keys).tolist() == []
    assert all(np.array_equal(Store(path, KIND).array(end), value(i)) for i, end in enumerate(ends))


# --- cost ----------------------------------------------------------------------------------------------------------


def big_store(path: Path, records: int, kind: Kind = KIND) -> Keys:
    keys = to_keys(np.random.default_rng(0).bytes(16 * records))
    with Writer(path, kind) as writer:
        for start in range(0, records, 10_000):
            part = keys[start : start + 10_000]
            writer.append(part, np.zeros((len(part), *kind.shape), kind.dtype))
    return keys


def bytes_read() -> int:
    """By this process, through read()."""
    return int(Path("/proc/self/io").read_text().split()[1])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="Linux counts what a process reads")
def test_opening_and_reading_cost_the_same_for_a_thousand_records_and_for_a_hundred_thousand(tmp_path: Path) -> None:
    spent = {}
    for records in (1_000, 100_000):
        path = tmp_path / f"{records}.sqlite"
        keys = big_store(path, records)
        before = bytes_read()
        store = Store(path, KIND)
        opened = bytes_read()
        store.read(keys[5:6].tobytes())
        spent[records] = (opened - before, bytes_read() - opened)
    pages = [cost // page_size(KIND.size) for cost in spent[100_000]]
    assert pages[0] <= 6 and pages[1] <= 10  # a few levels of two trees


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux tells a process its memory")
@pytest.mark.parametrize("numbers", [16_384, 1_000])
def test_reading_everything_takes_no_memory(tmp_path: Path, numbers: int) -> None:
    kind = Kind("large", {}, "<f4", (numbers,))
    path = tmp_path / kind.file
    keys = big_store(path, 16_384_000 // numbers, kind)
    size = path.stat().st_size
    assert size > 64e6

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    store = Store(path, kind)
    store.read(keys[:1].tobytes())
    before = resident()
    for i in np.random.default_rng(1).permutation(len(keys)):
        store.read(keys[i : i + 1].tobytes())
    assert resident() - before < size / 10


def test_a_store_is_read_by_threads_forked_workers_and_pickles(path: Path) -> None:
    fill_in(path, *range(20))
    store = Store(path, KIND)
    store.read(key(0))  # connected before the fork
    found: list[bytes] = []
    threads = [threading.Thread(target=lambda i=i: found.append(store.read(key(i)))) for i in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == sorted(value(i).tobytes() for i in range(20))
    again = pickle.loads(pickle.dumps(store))
    assert np.array_equal(again.array(key(3)), value(3))
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(store.read, [key(i) for i in range(20)]) == [value(i).tobytes() for i in range(20)]
    fill_in(path, *range(30))  # no worker has left a lock
    assert np.array_equal(store.array(key(25)), value(25))


def read_as_nobody(path: Path) -> None:
    if os.getuid() == 0:  # root may write anywhere
        os.setuid(65534)
    with pytest.raises(PermissionError):
        path.with_name("new").touch()
    check(path, *range(5))


def test_a_store_that_may_not_be_written_can_be_read() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / KIND.file
        fill_in(path, *range(5))
        path.chmod(0o444)
        path.parent.chmod(0o555)
        process = multiprocessing.get_context("fork").Process(target=read_as_nobody, args=(path,))
        process.start()
        process.join()
        assert process.exitcode == 0
        path.parent.chmod(0o755)


# --- damage --------------------------------------------------------------------------------------------------------


def shorten(path: Path, by: int = 1) -> None:
    os.truncate(path, path.stat().st_size - by)


def make_foreign(path: Path) -> None:
    """The file of another store, of the same shape and of the same keys' numbers, under this one's name."""
    other = path.with_name("other.sqlite")
    fill_in(other, *range(20), kind=Kind("numbers", {"of": "another test"}, "<f4", (2, 3)))
    other.replace(path)


def without_table(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("drop table records")


DAMAGE = {
    "one byte missing": (shorten, "database is truncated"),  # of the index's page
    "half the file": (lambda p: shorten(p, p.stat().st_size // 2), "database is damaged"),
    "empty file": (lambda p: os.truncate(p, 0), "no such table: kind"),
    "no file": (os.remove, None),
    "another file": (lambda p: p.write_text("SELECT everything" * 1000), "not a database"),
    "no table": (without_table, "no such table: records"),
    "foreign": (make_foreign, "another kind of store"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_noticed_logged_in_a_line_and_repaired(name: str, path: Path) -> None:
    damage, reason = DAMAGE[name]
    fill_in(path, *range(20))
    damage(path)
    with pytest.raises(DamagedError, match=reason or "file is missing"):
        Store(path, KIND).read(key(0))
    computed, lines = fill_in(path, *range(20))
    assert computed == ([0] if name == "one byte missing" else list(range(20)))
    assert len(lines) == (reason is not None)
    assert all(reason in line and "\n" not in line for line in lines)
    check(path, *range(20))
    assert fill_in(path, *range(20)) == ([], [])


def test_of_a_truncated_store_the_records_before_the_cut_are_kept(tmp_path: Path) -> None:
    kind = Kind("large", {}, "<f4", (1000,))
    path = tmp_path / kind.file
    keys = to_keys(b"".join(kind.key(b"%d" % i) for i in range(500)))
    with Writer(path, kind) as writer:
        for i in range(500):
            writer.append(keys[i : i + 1], np.full((1, 1000), i, np.float32))
    shorten(path, path.stat().st_size // 4)
    with pytest.raises(DamagedError):
        Store(path, kind)
    lines: list[str] = []
    with Writer(path, kind, lines.append) as writer:
        lost = writer.missing(keys)
        assert 100 < len(lost) < 200
        assert f"its {500 - len(lost)} undamaged records are kept" in lines[0]
        kept = np.setdiff1d(np.arange(500), lost)
        assert all((writer.array(keys[i : i + 1].tobytes()) == i).all() for i in kept)


def test_a_flipped_bit_of_a_record_is_noticed_when_it_is_read_and_repaired_by_the_next_writer(path: Path) -> None:
    fill_in(path, *range(20))
    place = path.read_bytes().index(value(7).tobytes())
    flip_bit(path, 8 * place + 77)
    store = Store(path, KIND)  # nobody has read it yet
    with pytest.raises(DamagedError, match="a record is damaged.*run the same command again"):
        store.read(key(7))
    assert key(7) not in store.get([key(7), key(8)])
    with pytest.raises(DamagedError, match="a record is damaged"):
        Store(path, KIND)
    computed, lines = fill_in(path, *range(20))
    assert computed == [7]
    assert lines == [f"cache: {path}: a record is damaged; its 19 undamaged records are kept"]
    check(path, *range(20))


def test_every_flipped_bit_is_noticed_or_harmless_and_is_repaired(path: Path) -> None:
    """Anywhere in the file: what is read is right, or an error; and the next writer ends with everything right."""
    fill_in(path, *range(6))
    whole = path.read_bytes()
    used = [i for i, byte in enumerate(whole) if byte]  # free space between records doesn't matter
    chance = np.random.default_rng(0)
    noticed = 0
    for place in chance.permutation(used)[:120].tolist():
        for file in path.parent.iterdir():
            file.unlink()
        path.write_bytes(whole)
        flip_bit(path, 8 * place + int(chance.integers(8)))
        try:
            store = Store(path, KIND)
            for i in range(6):
                assert np.array_equal(store.array(key(i)), value(i)), place
        except DamagedError:
            noticed += 1
            fill_in(path, *range(6))
            check(path, *range(6))
        else:
            fill_in(path, *range(6))
            assert all(np.array_equal(Store(path, KIND).array(key(i)), value(i)) for i in range(6)), place
    assert noticed > 40


def test_another_kind_is_another_store(path: Path) -> None:
    kinds = [
        KIND,
        Kind("letters", {"of": "a test"}, "<f4", (2, 3)),
        Kind("numbers", {"of": "another"}, "<f4", (2, 3)),
        Kind("numbers", {"of": "a test"}, "<i4", (2, 3)),
        Kind("numbers", {"of": "a test"}, "<f4", (3, 2)),
    ]
    assert len({kind.file for kind in kinds}) == len(kinds)
    assert len({kind.key(b"a") for kind in kinds}) == len(kinds)
    assert len({KIND.key(b"a", b"b"), KIND.key(b"ab"), KIND.key(b"ab", b""), KIND.key(b"", b"ab")}) == 4
    fill_in(path, 1)
    assert Kind.of(path) == KIND


# --- killed, crowded, full -----------------------------------------------------------------------------------------

BUILDING = """
import sys, time
from pathlib import Path
import numpy as np
sys.path.insert(0, "tests/data")
from test_store import KIND, value, keys_of
from ldm.data.cache import writer
writer.COMMIT_SECONDS = float(sys.argv[3])
log = open(sys.argv[2], "a", buffering=1)
keys = keys_of(*range(300))
with writer.Writer(Path(sys.argv[1]), KIND, print) as store:
    missing = store.missing(keys)
    for batch in np.split(missing, range(3, len(missing), 3)) if len(missing) else []:
        time.sleep(0.01)
        log.write("".join(f"{i}\\n" for i in batch))
        store.append(keys[batch], np.stack([value(i) for i in batch]))
print("built")
"""


def building(path: Path, log: Path, commit_seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", BUILDING, str(path), str(log), str(commit_seconds)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)


def computed_by(log: Path) -> list[int]:
    return [int(line) for line in log.read_text().split()] if log.exists() else []


def test_killed_builds_continue(path: Path, tmp_path: Path) -> None:
    """kill -9 four times, at whatever the process is doing; what was committed is never computed again."""
    log = tmp_path / "log"
    starts = [0]  # of each process: the first number that was not committed when it began
    begins = [0]  # and how many had been computed by then, by all before it
    for stop_after in (20, 80, 150, 230):
        process = building(path, log, 0.0 if stop_after < 100 else 0.05)
        while len(computed_by(log)) < stop_after:
            assert process.poll() is None
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        begins.append(len(computed_by(log)))
        starts.append(len(Store(path, KIND)))
    process = building(path, log, 0.05)
    assert process.communicate(timeout=60)[0] == "built\n"  # a killed process is no damage: nothing is logged
    check(path, *range(300))
    computed = computed_by(log)
    assert [computed[i] for i in begins] == starts
    assert all(computed[i] == computed[i - 1] + 1 for i in range(1, len(computed)) if i not in begins)
    assert len(set(starts)) == len(starts)


def test_two_processes_that_build_the_same_share_the_work(path: Path, tmp_path: Path) -> None:
    processes = [building(path, tmp_path / f"log-{i}", 30.0) for i in (0, 1)]
    printed = sorted(process.communicate(timeout=60)[0] for process in processes)
    assert printed[0] == "built\n"
    assert "waiting for another process" in printed[1]
    computed = computed_by(tmp_path / "log-0") + computed_by(tmp_path / "log-1")
    assert sorted(computed) == list(range(300))
    check(path, *range(300))


def test_readers_are_not_disturbed_by_a_writer_that_adds_or_repairs(path: Path, tmp_path: Path) -> None:
    fill_in(path, *range(20))
    store = Store(path, KIND)
    process = building(path, tmp_path / "log", 0.0)
    while process.poll() is None:
        assert all(np.array_equal(store.array(key(i)), value(i)) for i in range(20))
    assert process.wait() == 0
    marker = path.with_suffix(".damaged")
    marker.write_text("for this test", "utf-8")
    assert fill_in(path, *range(300))[0] == []
    assert all(np.array_equal(store.array(key(i)), value(i)) for i in range(300))
    check(path, *range(300))


def test_an_error_in_the_middle_keeps_what_was_done(path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), Writer(path, KIND) as writer:
        for i in range(12):
            writer.append(keys_of(i), value(i)[None])
        raise KeyboardInterrupt
    check(path, *range(12))


def test_memory_is_bounded_by_commits(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "COMMIT_BYTES", 10 * KIND.size)
    with Writer(path, KIND) as writer:
        for i in range(40):
            writer.append(keys_of(i), value(i)[None])
            assert len(writer._new) <= 10
        assert len(writer) > 20


def test_a_small_disk_is_an_error_that_states_how_much_and_what_to_do(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(space.shutil, "disk_usage", lambda path: usage(2**40, 2**40 - 2**30, 2**30))
    check_space(path.parent, {"3 pictures": 2**29, "1 caption": 2**29})
    with pytest.raises(NoSpaceError) as raised:
        check_space(path.parent, {"3 pictures": 2**30, "1 caption": 2**29})
    message = str(raised.value)
    for part in ("1.50 GiB", "1.00 GiB for 3 pictures", "512.0 MiB for 1 caption", "1.00 GiB are free", "data.cache="):
        assert part in message


@pytest.mark.parametrize("size", [64, 2048, 8192, 16_384, 36_864, 100_000])
def test_the_promise_covers_what_a_build_writes(tmp_path: Path, size: int) -> None:
    kind = Kind("sized", {}, "u1", (size,))
    number = max(64, 2_000_000 // size)
    keys = to_keys(np.random.default_rng(0).bytes(16 * number))
    with Writer(tmp_path / kind.file, kind) as writer:
        promised = writer.needed(keys)
        before = writer.path.stat().st_size
        writer.append(keys, np.zeros((number, size), np.uint8))
        writer.commit()
        assert writer.needed(keys) == 0
    grown = (tmp_path / kind.file).stat().st_size - before
    assert 0.5 * promised < grown <= promised
    assert grown < 1.35 * size * number + 100 * number + 4 * page_size(size)  # and little of it is waste


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        if subprocess.run(command, capture_output=True).returncode:
            raise FileNotFoundError
    except FileNotFoundError:
        pytest.skip("nothing may be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_fills_up_on_the_way_is_the_same_error(small_disk: Path) -> None:
    path = small_disk / KIND.file
    fill_in(path, *range(8))
    many = range(100, 40_100)
    with pytest.raises(NoSpaceError, match=r"needs .* numbers.*data\.cache="), Writer(path, KIND) as writer:
        writer.append(keys_of(*many), np.zeros((len(many), 2, 3), np.float32))
        writer.commit()
    check(path, *range(8))
    assert fill_in(path, *range(10)) == ([8, 9], [])


def test_a_disk_that_is_reported_full_is_the_same_error(path: Path) -> None:
    """Where nothing may be mounted: SQLite's own limit of pages raises the error of a full disk."""
    fill_in(path, *range(8))
    many = range(100, 10_100)
    with pytest.raises(NoSpaceError, match=r"needs .* numbers.*data\.cache="), Writer(path, KIND) as writer:
        writer._connection().execute("pragma max_page_count = 10")
        writer.append(keys_of(*many), np.zeros((len(many), 2, 3), np.float32))
        writer.commit()
    check(path, *range(8))

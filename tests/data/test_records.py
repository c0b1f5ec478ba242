"""The store of the cache: what was written or nothing, whatever happens to the process, the files and the disk."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest

from ldm.data.cache import writer as filling
from ldm.data.cache.records import MANIFEST, RECORDS, DamagedError, Keys, Kind, Records, to_keys
from ldm.data.cache.writer import Writer, fill
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


def fill_in(folder: Path, *numbers: int, kind: Kind = KIND, batch_size: int = 4) -> tuple[list[int], list[str]]:
    """Fill the store with these numbers; which of them had to be computed, and what was said."""
    computed: list[int] = []
    said: list[str] = []

    def encode(batch: list[int]) -> np.ndarray:
        computed.extend(batch)
        return np.stack([value(i) for i in batch])

    keys = to_keys(b"".join(kind.key(str(i).encode()) for i in numbers))
    with Writer(folder, kind, said.append) as writer:
        fill(writer, keys, numbers.__getitem__, encode, doing="", unit="", batch_size=batch_size, progress=False)
    return computed, said


def check(folder: Path, *numbers: int) -> None:
    """The store holds these numbers, bit by bit, and nothing else."""
    store = Records(folder, KIND)
    assert len(store) == len(numbers)
    for i, record in zip(numbers, store.find(keys_of(*numbers)), strict=True):
        assert np.array_equal(store.read(int(record)), value(i)), i
    assert (store.find(keys_of(-1, -2)) == -1).all()


def flip_bit(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def index_of(folder: Path) -> Path:
    return folder / Records(folder, KIND).manifest.index


def test_what_is_found_is_what_was_computed_and_nothing_is_computed_twice(tmp_path: Path) -> None:
    assert fill_in(tmp_path, *range(50))[0] == list(range(50))
    check(tmp_path, *range(50))
    assert fill_in(tmp_path, *range(50)) == ([], [])
    assert fill_in(tmp_path, 60, *range(40, 55), 60)[0] == [60, 50, 51, 52, 53, 54]
    check(tmp_path, *range(55), 60)


def test_keys_that_end_in_zeros_are_keys(tmp_path: Path) -> None:
    """numpy drops the trailing zeros of a byte string; here two keys must not become one for it."""
    ends = [b"\0" * 16, b"\0" * 15 + b"\1", b"\1" + b"\0" * 15, b"\1" * 15 + b"\0", b"\1" * 16, b"\xff" * 15 + b"\0"]
    keys = to_keys(b"".join(ends))
    with Writer(tmp_path, KIND) as writer:
        writer.append(keys, np.stack([value(i) for i in range(len(ends))]))
    store = Records(tmp_path, KIND)
    for i, end in enumerate(ends):
        assert np.array_equal(store.read(int(store.find(to_keys(end))[0])), value(i))
    assert fill_in(tmp_path)[1] == []


# --- cost ----------------------------------------------------------------------------------------------------------


def big_store(folder: Path, records: int, kind: Kind = KIND) -> Keys:
    keys = to_keys(np.random.default_rng(0).bytes(16 * records))
    with Writer(folder, kind) as writer:
        for start in range(0, records, 10_000):
            part = keys[start : start + 10_000]
            writer.append(part, np.zeros((len(part), *kind.shape), kind.dtype))
    return keys


def bytes_read() -> int:
    """By this process, through read(); what it sees in mapped files isn't counted."""
    return int(Path("/proc/self/io").read_text().split()[1])


def mapped_in(file: Path) -> tuple[int, int]:
    """Bytes of a file that this process has mapped, and those of them it has looked at."""
    sizes = {"Size:": 0, "Rss:": 0}
    counting = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0]:
            counting = words[-1] == str(file)
        elif counting and words[0] in sizes:
            sizes[words[0]] += 1024 * int(words[1])
    return sizes["Size:"], sizes["Rss:"]


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux tells what a process reads and maps")
def test_opening_costs_the_same_for_a_thousand_records_and_for_two_hundred_thousand(tmp_path: Path) -> None:
    spent = {}
    for records in (1_000, 200_000):
        folder = tmp_path / str(records)
        keys = big_store(folder, records)
        before = bytes_read()
        store = Records(folder, KIND)
        spent[records] = bytes_read() - before
        size, seen = mapped_in(index_of(folder))
        assert size >= index_of(folder).stat().st_size  # so this test can see the mapping,
        assert seen == 0  # and nothing of it has been touched
        assert (store.find(keys[:5].copy()) == range(5)).all()
        assert mapped_in(index_of(folder))[1] > 0
    assert abs(spent[200_000] - spent[1_000]) < 100  # the manifest's numbers have more digits


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux tells a process its memory")
@pytest.mark.parametrize("numbers", [16_384, 1_000])
def test_reading_everything_takes_no_memory(tmp_path: Path, numbers: int) -> None:
    """In any order, and whether or not records fill their pages: Linux maps pages that nobody asked for with others."""
    kind = Kind("large", {}, "<f4", (numbers,))
    keys = big_store(tmp_path, 16_384_000 // numbers, kind)
    size = (tmp_path / RECORDS).stat().st_size
    assert size > 64e6
    with (tmp_path / RECORDS).open("rb") as file:  # read from the disk, as by a run that comes later
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    store = Records(tmp_path, kind)
    store.read(0)
    order = np.random.default_rng(1).permutation(store.find(keys))
    before = resident()
    for number in order:
        store.read(int(number))
    assert resident() - before < size / 10


# --- damage --------------------------------------------------------------------------------------------------------


def shorten(path: Path, by: int = 1) -> None:
    os.truncate(path, path.stat().st_size - by)


def make_foreign(folder: Path) -> None:
    """The files of another store, of the same shape and of the same keys' numbers, under this one's name."""
    other = folder.with_name("other")
    fill_in(other, *range(20), kind=Kind("numbers", {"of": "another test"}, "<f4", (2, 3)))
    shutil.rmtree(folder)
    other.rename(folder)


DAMAGE = {
    "truncated records": (lambda f: shorten(f / RECORDS), [19], f"{RECORDS} has"),
    "half the records": (lambda f: shorten(f / RECORDS, 10 * KIND.record.itemsize), list(range(10, 20)), "has"),
    "no records": (lambda f: (f / RECORDS).unlink(), list(range(20)), f"{RECORDS} is missing"),
    "truncated index": (lambda f: shorten(index_of(f)), [], "index-"),
    "no index": (lambda f: index_of(f).unlink(), [], "is missing"),
    "no manifest": (lambda f: (f / MANIFEST).unlink(), [], f"{MANIFEST} is missing"),
    "half a manifest": (lambda f: shorten(f / MANIFEST, 100), [], f"{MANIFEST} is damaged"),
    "another number": (
        lambda f: (f / MANIFEST).write_text((f / MANIFEST).read_text().replace('"records": 20', '"records": 19')),
        [],
        f"{MANIFEST} is damaged",
    ),
    "a list for a manifest": (lambda f: (f / MANIFEST).write_text("[1]"), [], f"{MANIFEST} is damaged"),
    "foreign": (make_foreign, list(range(20)), "another store"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_noticed_said_in_a_line_and_mended(name: str, tmp_path: Path) -> None:
    damage, lost, reason = DAMAGE[name]
    folder = tmp_path / "store"
    fill_in(folder, *range(20))
    damage(folder)
    with pytest.raises(DamagedError, match=reason):
        Records(folder, KIND)
    computed, said = fill_in(folder, *range(20))
    assert computed == lost
    assert len(said) == 1 and reason in said[0] and "\n" not in said[0]
    check(folder, *range(20))
    assert fill_in(folder, *range(20)) == ([], [])


def test_every_flipped_bit_of_the_manifest_is_noticed(tmp_path: Path) -> None:
    fill_in(tmp_path, 0, 1, 2)
    for bit in range(0, (tmp_path / MANIFEST).stat().st_size * 8, 7):
        flip_bit(tmp_path / MANIFEST, bit)
        try:
            Records(tmp_path, KIND)
        except DamagedError:
            pass
        else:  # all that may go unnoticed is white space between words
            flipped = json.loads((tmp_path / MANIFEST).read_text())
            flip_bit(tmp_path / MANIFEST, bit)
            assert flipped == json.loads((tmp_path / MANIFEST).read_text()), bit
            continue
        flip_bit(tmp_path / MANIFEST, bit)


def test_a_flipped_bit_of_the_index_is_noticed_by_the_next_writer(tmp_path: Path) -> None:
    fill_in(tmp_path, 0, 1, 2)
    for bit in range(5, index_of(tmp_path).stat().st_size * 8, 41):
        flip_bit(index_of(tmp_path), bit)
        computed, said = fill_in(tmp_path, 0, 1, 2)
        assert (computed, len(said)) == ([], 1), bit
        check(tmp_path, 0, 1, 2)


def test_a_flipped_bit_of_a_record_is_noticed_when_it_is_read_and_mended_by_the_next_writer(tmp_path: Path) -> None:
    fill_in(tmp_path, *range(20))
    flip_bit(tmp_path / RECORDS, 8 * (7 * KIND.record.itemsize) + 8 * 16 + 77)
    store = Records(tmp_path, KIND)  # nobody has looked at it yet
    assert list(store.damaged()) == [7]
    with pytest.raises(DamagedError, match="record 7 is damaged.*give the same command again"):
        store.read(7)
    with pytest.raises(DamagedError, match="record 7"):
        Records(tmp_path, KIND)
    computed, said = fill_in(tmp_path, *range(20))
    assert computed == [7]
    assert said == [f"cache: {tmp_path}: record 7 is damaged; 19 of its 20 records are whole and stay"]
    check(tmp_path, *range(20))


def test_every_flipped_bit_of_a_record_is_noticed(tmp_path: Path) -> None:
    fill_in(tmp_path, 0)
    record = (tmp_path / RECORDS).read_bytes()
    assert KIND.whole(record)
    for bit in range(8 * len(record)):
        damaged = bytearray(record)
        damaged[bit // 8] ^= 1 << bit % 8
        assert not KIND.whole(bytes(damaged)), bit


def test_another_kind_is_another_store() -> None:
    kinds = [
        KIND,
        Kind("letters", {"of": "a test"}, "<f4", (2, 3)),
        Kind("numbers", {"of": "another"}, "<f4", (2, 3)),
        Kind("numbers", {"of": "a test"}, "<i4", (2, 3)),
        Kind("numbers", {"of": "a test"}, "<f4", (3, 2)),
    ]
    assert len({kind.folder for kind in kinds}) == len(kinds)
    assert len({kind.key(b"a") for kind in kinds}) == len(kinds)
    assert len({KIND.key(b"a", b"b"), KIND.key(b"ab"), KIND.key(b"ab", b""), KIND.key(b"", b"ab")}) == 4


# --- killed, crowded, full -----------------------------------------------------------------------------------------

BUILDING = """
import sys, time
from pathlib import Path
import numpy as np
sys.path.insert(0, "tests")
from test_records import KIND, value, keys_of
from ldm.data.cache import writer as filling
filling.COMMIT_SECONDS = float(sys.argv[3])
log = open(sys.argv[2], "a", buffering=1)

def encode(batch):
    time.sleep(0.01)
    log.write("".join(f"{i}\\n" for i in batch))
    return np.stack([value(i) for i in batch])

numbers = range(300)
with filling.Writer(Path(sys.argv[1]), KIND, print) as writer:
    filling.fill(
        writer, keys_of(*numbers), numbers.__getitem__, encode, doing="", unit="", batch_size=3, progress=False
    )
print("built")
"""


def building(folder: Path, log: Path, commit_seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", BUILDING, str(folder), str(log), str(commit_seconds)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)


def computed_by(log: Path) -> list[int]:
    return [int(line) for line in log.read_text().split()] if log.exists() else []


def test_killed_builds_go_on(tmp_path: Path) -> None:
    """kill -9 four times, at whatever the process is doing; what was committed is never computed again."""
    folder, log = tmp_path / "store", tmp_path / "log"
    starts = [0]  # of each process: the first number that was not committed when it began
    begins = [0]  # and how many had been computed by then, by all before it
    for stop_after in (20, 80, 150, 230):
        process = building(folder, log, 0.05)
        while len(computed_by(log)) < stop_after:
            assert process.poll() is None
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        begins.append(len(computed_by(log)))
        with (folder / RECORDS).open("ab") as file:  # and half a record, as a kill in a write would leave it
            file.write(b"half a record")
        starts.append(len(Records(folder, KIND)))
    process = building(folder, log, 0.05)
    assert process.communicate(timeout=60)[0] == "built\n"  # a killed process is no damage: nothing is said of it
    check(folder, *range(300))
    computed = computed_by(log)
    assert [computed[i] for i in begins] == starts
    assert all(computed[i] == computed[i - 1] + 1 for i in range(1, len(computed)) if i not in begins)
    assert len(set(starts)) == len(starts)


def test_two_processes_that_build_the_same_share_the_work(tmp_path: Path) -> None:
    processes = [building(tmp_path / "store", tmp_path / f"log-{i}", 30.0) for i in (0, 1)]
    said = sorted(process.communicate(timeout=60)[0] for process in processes)
    assert said[0] == "built\n"
    assert "waiting for another process" in said[1]
    computed = computed_by(tmp_path / "log-0") + computed_by(tmp_path / "log-1")
    assert sorted(computed) == list(range(300))
    check(tmp_path / "store", *range(300))


def test_readers_are_not_disturbed_by_a_writer_that_adds_or_mends(tmp_path: Path) -> None:
    fill_in(tmp_path, *range(20))
    store = Records(tmp_path, KIND)
    fill_in(tmp_path, *range(40))
    (tmp_path / MANIFEST).unlink()
    fill_in(tmp_path, *range(60))
    numbers = store.find(keys_of(*range(20)))
    assert all(np.array_equal(store.read(int(n)), value(i)) for i, n in enumerate(numbers))
    assert len(store) == 20
    check(tmp_path, *range(60))


def test_an_error_in_the_middle_keeps_what_was_done(tmp_path: Path) -> None:
    def encode(batch: list[int]) -> np.ndarray:
        if 12 in batch:
            raise KeyboardInterrupt
        return np.stack([value(i) for i in batch])

    with pytest.raises(KeyboardInterrupt), Writer(tmp_path, KIND) as writer:
        fill(
            writer, keys_of(*range(20)), range(20).__getitem__, encode, doing="", unit="", batch_size=4, progress=False
        )
    check(tmp_path, *range(12))
    assert fill_in(tmp_path, *range(20))[0] == list(range(12, 20))


def test_a_small_disk_is_an_error_that_says_how_much_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(space.shutil, "disk_usage", lambda path: usage(2**40, 2**40 - 2**30, 2**30))
    check_space(tmp_path, {"3 pictures": 2**29, "1 caption": 2**29})
    with pytest.raises(NoSpaceError) as raised:
        check_space(tmp_path, {"3 pictures": 2**30, "1 caption": 2**29})
    said = str(raised.value)
    for part in ("1.50 GiB", "1.00 GiB for 3 pictures", "512.0 MiB for 1 caption", "1.00 GiB are free", "data.cache="):
        assert part in said
    # the promise covers what a build really writes
    with Writer(tmp_path / "store", KIND) as writer:
        promised = filling.needed(writer, keys_of(*range(1000)))
    before = sum(path.stat().st_size for path in (tmp_path / "store").iterdir())
    fill_in(tmp_path / "store", *range(1000))
    grown = sum(path.stat().st_size for path in (tmp_path / "store").iterdir()) - before
    assert 0.5 * promised < grown <= promised
    with Writer(tmp_path / "store", KIND) as writer:
        assert filling.needed(writer, keys_of(*range(1000))) == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a disk that is always full")
def test_a_disk_that_fills_up_on_the_way_is_the_same_error(tmp_path: Path) -> None:
    fill_in(tmp_path, *range(8))
    with pytest.raises(NoSpaceError, match="data.cache="), Writer(tmp_path, KIND) as writer:
        writer._file.close()
        writer._file = os.fdopen(os.open("/dev/full", os.O_RDWR), "r+b", buffering=0)
        writer.append(keys_of(8), value(8)[None])
    check(tmp_path, *range(8))
    assert fill_in(tmp_path, *range(10)) == ([8, 9], [])

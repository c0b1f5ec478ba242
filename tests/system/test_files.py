"""Folders that are whole or absent, and manifests that notice."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import road

from ldm.system import files as disk
from ldm.system.files import check_room, exchange, put_in_place, settle, temporary_beside
from ldm.system.hashing import NAME, fault, write_manifest


def filled(folder: Path, content: str) -> Path:
    (folder / "file").write_text(content)
    return folder


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_folder_replaces_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_exchange: bool) -> None:
    if not can_exchange:
        monkeypatch.setattr(disk, "exchange", lambda one, other: False)
    final = tmp_path / "final"
    for content in ("first", "second"):
        put_in_place(filled(temporary_beside(final), content), final)
        assert (final / "file").read_text() == content
        assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_exchange_leaves_both(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        filled(tmp_path / name, name)
    if not exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this system can't exchange two names")
    assert (tmp_path / "a/file").read_text() == "b" and (tmp_path / "b/file").read_text() == "a"


def test_a_kill_between_the_two_renames_is_repaired(tmp_path: Path) -> None:
    final = tmp_path / "final"
    final.mkdir()
    filled(final, "old").rename(tmp_path / ".final.old")
    temporary = tmp_path / ".final.new"
    temporary.mkdir()
    settle(final)
    assert (final / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_the_old_one_goes_only_after_the_new_one_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final = tmp_path / "final"
    put_in_place(filled(temporary_beside(final), "old"), final)
    seen = []
    real = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", lambda path, **how: (seen.append((final / "file").read_text()),
                                                               real(path, **how)))  # fmt: skip
    temporary = filled(temporary_beside(final), "new")
    seen.clear()
    put_in_place(temporary, final)
    assert set(seen) == {"new"}


def test_room_is_asked_for(tmp_path: Path) -> None:
    check_room(tmp_path / "not yet there", 1)
    with pytest.raises(OSError, match=r"MB are needed, .* MB are free") as full:
        check_room(tmp_path, 1 << 60)
    assert full.value.errno == errno.ENOSPC


def test_a_second_process_is_kept_out_until_the_first_one_is_gone(tmp_path: Path) -> None:
    hold = "from pathlib import Path\nfrom ldm.system import files as disk\ndisk.PATIENCE = 0.3\n"
    hold += f"disk.hold(Path({str(tmp_path)!r}))\n"
    words = [sys.executable, "-c", hold + "print('held', flush=True)\ninput()"]
    first = subprocess.Popen(words, cwd=road.ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None and first.stdout.readline() == "held\n"
    second = subprocess.run([sys.executable, "-c", hold], cwd=road.ROOT, capture_output=True, text=True)
    assert "another process is training in" in second.stderr
    first.kill()
    first.wait()
    assert subprocess.run([sys.executable, "-c", hold], cwd=road.ROOT).returncode == 0


# --- manifests -----------------------------------------------------------------------------------------


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    (tmp_path / "a.bin").write_bytes(bytes(range(64)))
    (tmp_path / "b.json").write_text('{"step": 3}')
    write_manifest(tmp_path)
    assert fault(tmp_path) is None
    return tmp_path


@pytest.mark.parametrize("name", ["a.bin", "b.json", NAME])
def test_every_flipped_bit_is_noticed(listed: Path, name: str) -> None:
    path = listed / name
    whole = path.read_bytes()
    for i in range(8 * len(whole)):
        broken = bytearray(whole)
        broken[i // 8] ^= 1 << i % 8
        path.write_bytes(broken)
        assert fault(listed), f"bit {i} of {name}"
    path.write_bytes(whole)
    assert fault(listed) is None


@pytest.mark.parametrize("name", ["a.bin", "b.json", NAME])
def test_every_truncation_and_a_missing_file_are_noticed(listed: Path, name: str) -> None:
    path = listed / name
    whole = path.read_bytes()
    for length in range(len(whole) - 1):  # the manifest's last byte is a line end
        path.write_bytes(whole[:length])
        assert fault(listed), f"{length} bytes of {name}"
    path.unlink()
    assert name in str(fault(listed))


FOREIGN = ["[]", "{}", "3", "null", '{"format": 1}', '{"format": 1, "files": []}', '{"format": 1, "files": {}}',
           '{"format": 2, "files": {}}', '{"format": 1, "files": {"a.bin": 3}}']  # fmt: skip


@pytest.mark.parametrize("content", FOREIGN)
def test_a_foreign_manifest_is_a_fault_in_words(listed: Path, content: str) -> None:
    (listed / NAME).write_text(content)
    assert str(fault(listed)).startswith(NAME)


def test_a_manifest_says_what_sha256sum_says(listed: Path) -> None:
    told = subprocess.run(["sha256sum", "a.bin"], cwd=listed, capture_output=True, text=True).stdout.split()[0]
    assert json.loads((listed / NAME).read_text())["files"]["a.bin"] == {"size": 64, "sha256": told}


def test_what_can_t_be_written_to_is_told_before_and_nothing_is_left(tmp_path: Path) -> None:
    disk.check_writable(tmp_path / "a/b")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file/b: can't be written to \(Not a directory\)"):
        disk.check_writable(tmp_path / "file/b")

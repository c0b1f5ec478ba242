"""What a run remembers is valid while its stamp is, and nothing fails without it."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from ldm.training import facts
from ldm.training.facts import RunFacts, folder_stamp, stamp, written_stamp


def test_a_value_is_recalled_with_its_own_stamp_alone(tmp_path: Path) -> None:
    kept = RunFacts(tmp_path / "run")
    assert kept.recall("a", "1") is None
    kept.keep("a", "1", [1, 2])
    RunFacts(tmp_path / "run").keep("b", "1", True)
    assert RunFacts(tmp_path / "run").recall("a", "1") == [1, 2] and kept.recall("b", "1") is True
    assert kept.recall("a", "2") is None
    kept.keep("a", "2", 3)
    assert (kept.recall("a", "1"), kept.recall("a", "2")) == (None, 3)
    kept.keep("a", "", 4)
    assert kept.recall("a", "") is None and kept.recall("a", "2") == 3


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"a": 7}', b"\xff\xfe", None])
def test_without_a_whole_file_nothing_is_recalled_and_nothing_fails(tmp_path: Path, content: bytes | None) -> None:
    if content is None:
        (tmp_path / "facts.json").mkdir()
    else:
        (tmp_path / "facts.json").write_bytes(content)
    kept = RunFacts(tmp_path)
    assert kept.recall("a", "1") is None
    kept.keep("a", "1", 2)
    assert kept.recall("a", "1") == (None if content is None else 2)
    assert [path.name for path in tmp_path.iterdir()] == ["facts.json"]


def test_a_folder_that_changed_has_another_stamp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "SETTLED", 0.0)
    (tmp_path / "net/part").mkdir(parents=True)
    files = [tmp_path / "net/config.json", tmp_path / "net/part/weights"]
    for file in files:
        file.write_bytes(b"1234")
    seen = {(folder_stamp(tmp_path / "net"), written_stamp(tmp_path / "net"))}
    assert seen == {(folder_stamp(tmp_path / "net"), written_stamp(tmp_path / "net"))}
    os.utime(files[1], ns=(0, 0))
    seen.add((folder_stamp(tmp_path / "net"), written_stamp(tmp_path / "net")))
    files[0].write_bytes(b"12345")
    seen.add((folder_stamp(tmp_path / "net"), written_stamp(tmp_path / "net")))
    files[0].rename(tmp_path / "net/other.json")
    seen.add((folder_stamp(tmp_path / "net"), written_stamp(tmp_path / "net")))
    assert [len(set(each)) for each in zip(*seen, strict=True)] == [4, 4]
    before = written_stamp(tmp_path / "net")
    os.link(files[1], tmp_path / "another name")
    assert written_stamp(tmp_path / "net") == before


def test_a_file_that_has_only_just_changed_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its next change could have the same time."""
    (tmp_path / "file").write_text("x")
    assert folder_stamp(tmp_path) == ""
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 3)
    assert len(folder_stamp(tmp_path)) == 64 == len(stamp("x"))

"""Digests are remembered while a file stays as it is, and the memo can be lost without harm."""

import json

import pytest

from data_tools import file_digests
from data_tools.file_digests import FileDigests, hash_file


@pytest.fixture
def no_grain(monkeypatch):
    """Files that were just written count as settled, so that a test need not wait for them to age."""
    monkeypatch.setattr(file_digests, "GRAIN_S", 0.0)


def test_a_file_written_just_now_is_hashed_but_not_remembered(tmp_path, monkeypatch):
    file, memo = tmp_path / "a", tmp_path / "digests.json"
    file.write_bytes(b"abc")
    digests = FileDigests(memo)
    # sha256 of "abc" as in the standard's example
    assert digests.sha256(file) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    digests.save()
    assert not memo.exists()
    monkeypatch.setattr(file_digests, "GRAIN_S", 0.0)
    digests.sha256(file)
    digests.save()
    assert str(file) in memo.read_text()


@pytest.mark.parametrize("broken", ["", "[1]", '{"sha256 x": 3}', "\x00"])
def test_a_broken_memo_and_files_that_are_gone_do_no_harm(broken, tmp_path, no_grain):
    memo, file, gone = tmp_path / "digests.json", tmp_path / "a", tmp_path / "gone"
    memo.write_text(broken)
    file.write_text("x")
    gone.write_text("y")
    digests = FileDigests(memo)
    digests.sha256(gone)
    gone.unlink()
    assert digests.sha256(file) == hash_file(file)
    digests.save()
    assert [name.split("/")[-1] for name in json.loads(memo.read_text())] == ["a"]

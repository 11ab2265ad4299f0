"""Reading JSON Lines: right rows with their line numbers, and a clear message for every kind of broken file."""

import gzip
import json
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.errors import MAX_ERRORS, DataError, DataErrors, UserError
from data_tools.jsonl import iter_jsonl, read_records, write_rows

PAIR = b'{"prompt": "q", "chosen": "a", "rejected": "b"}\n'


def write(folder: Path, content: bytes, name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.dictionaries(st.text(), json_values, max_size=4), min_size=1, max_size=6),
    ascii_only=st.booleans(),
    end=st.sampled_from(["\n", "\r\n"]),
    zipped=st.booleans(),
    blank=st.integers(0, 2),
)
def test_rows_come_back_with_their_line_numbers(
    rows: list, ascii_only: bool, end: str, zipped: bool, blank: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    # not ascii: U+2028 and the like stay inside a string and must not end a line
    lines = [json.dumps(row, ensure_ascii=ascii_only) for row in rows]
    content = (end * blank + (end * (blank + 1)).join(lines)).encode("utf-8", errors="strict")
    path = tmp_path_factory.mktemp("jsonl") / "rows.jsonl"
    path.write_bytes(gzip.compress(content) if zipped else content)
    assert list(iter_jsonl(path)) == [(blank + 1 + i * (blank + 1), row) for i, row in enumerate(rows)]


@pytest.mark.parametrize(
    ("content", "place", "words"),
    [
        (b"", "rows.jsonl: ", "is empty"),
        (b"\n \n", "rows.jsonl: ", "is empty"),
        (b"\xef\xbb\xbf" + PAIR, "rows.jsonl:1: ", "byte order mark"),
        (PAIR.decode().encode("utf-16"), "rows.jsonl:1: ", "UTF-16"),
        (PAIR + b'{"prompt": "caf\xe9"}\n', "rows.jsonl:2: ", "byte 16 of the line (0xe9) is not UTF-8"),
        (PAIR + b'{"prompt": "q"\n', "rows.jsonl:2: ", "bad JSON at column 15"),
        (PAIR + b"{'prompt': 'q'}\n", "rows.jsonl:2: ", "bad JSON at column 2"),
        (PAIR + PAIR.strip() + PAIR, "rows.jsonl:2: ", "Extra data"),
        (b'[{"prompt": "q"}]', "rows.jsonl:1: ", "one JSON array"),
        (b'[\n{"prompt": "q"},\n{"prompt": "r"}\n]\n', "rows.jsonl:1: ", "one object a line"),
        (b'{\n  "prompt": "q"\n}\n', "rows.jsonl:1: ", "spread over lines"),
        (b'{"weight": NaN}\n', "rows.jsonl:1: ", "NaN is not JSON"),
        (b'{"weight": -Infinity}\n', "rows.jsonl:1: ", "-Infinity is not JSON"),
        (b'{"id": 1, "id": 2}\n', "rows.jsonl:1: ", "key 'id' stands twice"),
        (b'{"a":' * 100_000 + b"\n", "rows.jsonl:1: ", "nested too deep"),
        (gzip.compress(PAIR * 5000)[:-200], "rows.jsonl: ", "gzip data ends early or is damaged"),
        (gzip.compress(PAIR)[:14] + b"\xff" * 40, "rows.jsonl: ", "gzip data ends early or is damaged"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, content: bytes, place: str, words: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(DataError) as caught:
        list(iter_jsonl(path))
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/{place}") and words in message, message
    with pytest.raises(DataErrors) as collected:
        read_records([path], kind="pair")
    assert message in str(collected.value).splitlines()


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere.jsonl: no such file"):
        list(iter_jsonl(tmp_path / "nowhere.jsonl"))
    with pytest.raises(DataError, match="is a folder"):
        list(iter_jsonl(tmp_path))


def test_errors_of_all_files_are_collected(tmp_path: Path) -> None:
    first = write(tmp_path, PAIR + b"{}\n" + PAIR, "first.jsonl")
    second = write(tmp_path, b"no\n" + PAIR, "second.jsonl")
    with pytest.raises(DataErrors) as caught:
        read_records([first, second, tmp_path / "third.jsonl"], kind="pair")
    lines = str(caught.value).splitlines()
    assert [line.split(": ")[0] for line in lines[:3]] == [f"{first}:2", f"{second}:1", f"{tmp_path}/third.jsonl"]
    assert lines[3:] == ["3 errors"]


def test_reading_stops_after_twenty_errors(tmp_path: Path) -> None:
    path = write(tmp_path, b"{}\n" * (MAX_ERRORS + 5))
    with pytest.raises(DataErrors) as caught:
        read_records([path], kind="pair")
    lines = str(caught.value).splitlines()
    assert len(lines) == MAX_ERRORS + 1
    assert lines[-1] == "20 errors, the rest was not checked"


def test_one_array_is_one_error_not_one_a_line(tmp_path: Path) -> None:
    path = write(tmp_path, b"[\n" + b'{"prompt": "q"},\n' * 10 + b"]\n")
    with pytest.raises(DataErrors) as caught:
        read_records([path], kind="pair")
    assert len(str(caught.value).splitlines()) == 1


def test_an_id_stands_once_over_all_files(tmp_path: Path) -> None:
    first = write(tmp_path, b'{"id": 7, "prompt": "q", "chosen": "a", "rejected": "b"}\n', "first.jsonl")
    second = write(tmp_path, PAIR + b'{"id": "7", "prompt": "r", "chosen": "a", "rejected": "b"}\n', "second.jsonl")
    with pytest.raises(DataErrors) as caught:
        read_records([first, second], kind="pair")
    assert str(caught.value).splitlines()[0] == (
        f"{second}:2: field 'id': '7' already stands at {first}:1; every id must be its own"
    )
    with pytest.raises(DataErrors, match="is given twice"):
        read_records([first, tmp_path / "." / "first.jsonl"], kind="pair")


def test_rows_without_id_are_named_by_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    files = [write(tmp_path, PAIR + PAIR), write(tmp_path / "other", PAIR)]
    assert [record.id for record in read_records(files, kind="pair")] == [
        "rows.jsonl:1",
        "rows.jsonl:2",
        "rows.jsonl:1",
    ]


def test_public_pairs_are_read_whole(shared_dir: Path) -> None:
    records = read_records([shared_dir / "data/pref/train.jsonl", shared_dir / "data/pref/long.jsonl"], kind="pair")
    assert len(records) == 1504 + 40
    assert len(read_records([shared_dir / "data/pref/train.jsonl"], kind="sft")) == 1504


def test_rows_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.jsonl"
    assert write_rows(path, [{"id": "a", "text": "سلام"}, {"id": "b"}]) == 2
    before = path.read_bytes()
    assert before == '{"id": "a", "text": "سلام"}\n{"id": "b"}\n'.encode()

    def broken() -> Iterator[dict[str, str]]:
        yield {"id": "c"}
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        write_rows(path, broken())
    assert path.read_bytes() == before and [file.name for file in path.parent.iterdir()] == ["rows.jsonl"]
    half = {"id": "d", "text": "cut inside \ud83d"}  # no UTF-8 has it
    write_rows(path, [half, {"id": "e", "text": "سلام"}])
    assert [value for _, value in iter_jsonl(path)] == [half, {"id": "e", "text": "سلام"}]
    with pytest.raises(UserError, match="cannot be written"):
        write_rows(path / "below_a_file.jsonl", [])


def test_rows_go_into_a_pipe_and_leave_it(tmp_path: Path) -> None:
    """What is no file is not replaced by one: not a pipe here, and not a device."""
    pipe, found = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: found.append(pipe.read_text(encoding="utf-8")), daemon=True)
    reader.start()
    write_rows(pipe, [{"id": "a"}])
    reader.join(timeout=10)
    assert found == ['{"id": "a"}\n'] and stat.S_ISFIFO(pipe.stat().st_mode)

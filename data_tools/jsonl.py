"""JSON Lines from disk: one JSON object a line, UTF-8, plain or gzip, with the line number kept for every message.

Only lines and JSON are judged here; what a row must hold is the business of `schema`. Blank lines and CRLF are fine.
"""

import contextlib
import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from data_tools.errors import DataError, UserError, check_each
from data_tools.schema import Kind, Record, check_record

GZIP_MAGIC = b"\x1f\x8b"
UTF8_BOM = b"\xef\xbb\xbf"
UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")


def iter_jsonl(path: str | Path, *, may_be_empty: bool = False) -> Iterator[tuple[int, object]]:
    """Yield (line number from 1, decoded value) of a .jsonl or .jsonl.gz file.

    may_be_empty: a file of no bytes has no rows, as a step writes it that had nothing to write.
    Raises DataError at the first line that is not UTF-8 or not JSON, and for a file that is missing, empty or damaged.
    """
    if may_be_empty and Path(path).is_file() and Path(path).stat().st_size == 0:
        return
    for line, value in _scan(path):
        if isinstance(value, DataError):
            raise value
        yield line, value


def read_records(paths: Sequence[str | Path], *, kind: Kind) -> list[Record]:
    """Read and check every row of every file, in order.

    Raises DataErrors with up to 20 DataErrors over all files. An id may stand only once.
    """
    seen: dict[str, Record] = {}

    def check(row: tuple[str, int, object]) -> Record:
        path, line, value = row
        if isinstance(value, DataError):
            raise value
        record = check_record(value, kind=kind, path=path, line=line)
        _check_unique(record, value, seen)
        return record

    return check_each(_scan_all(paths), check)


def line_of(row: Mapping[str, Any]) -> bytes:
    """The row as one line with its end."""
    try:
        return (json.dumps(row, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:  # half of a surrogate pair, from a text cut inside a character: only escapes can hold it
        return (json.dumps(row) + "\n").encode()


def write_rows(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """All rows, or no file: written beside it, then renamed (a device or a pipe is written to). Makes the folder.

    Returns how many. Raises UserError where it cannot be written, and what `rows` raises.
    """
    target = Path(path)
    part = target if target.exists() and not target.is_file() else Path(f"{path}.part")
    written = 0
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            for row in rows:
                file.write(line_of(row))
                written += 1
        if part != target:
            os.replace(part, target)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        if part != target:
            with contextlib.suppress(OSError):  # renamed already, or never made
                part.unlink()
    return written


def _check_unique(record: Record, value: object, seen: dict[str, Record]) -> None:
    """An id that the user gave is unique over all files; ids made from file and line are not the user's concern."""
    if not isinstance(value, dict) or "id" not in value:
        return
    first = seen.setdefault(record.id, record)
    if first is not record:
        problem = f"'{record.id}' already stands at {first.path}:{first.line}; every id must be its own"
        raise DataError(record.path, record.line, field="id", problem=problem)


def _scan_all(paths: Sequence[str | Path]) -> Iterator[tuple[str, int, object]]:
    used: set[Path] = set()
    for path in paths:
        if Path(path).resolve() in used:
            error = DataError(path, None, field=None, problem="is given twice; name each file once")
            yield str(path), 0, error
            continue
        used.add(Path(path).resolve())
        for line, value in _scan(path):
            yield str(path), line, value


def _scan(path: str | Path) -> Iterator[tuple[int, object]]:
    """Like `iter_jsonl`, but a bad line is yielded as its DataError and reading goes on where that makes sense."""
    number = rows = 0
    try:
        with _open(path) as file:
            for number, raw in enumerate(file, start=1):
                if not raw.strip():
                    continue
                rows += 1
                value, hopeless = _decode(path, number, raw, first=rows == 1)
                yield number, value
                if hopeless:
                    return
    except OSError as error:  # gzip.BadGzipFile is one
        yield number + 1, DataError(path, None, field=None, problem=_os_problem(error))
        return
    except (EOFError, zlib.error) as error:
        problem = f"the gzip data ends early or is damaged after line {number} ({error}); copy the file again"
        yield number + 1, DataError(path, None, field=None, problem=problem)
        return
    if rows == 0:
        yield 1, DataError(path, None, field=None, problem=EMPTY)


def _open(path: str | Path) -> BinaryIO:
    """The file as bytes, unpacked if its first bytes say gzip, whatever its name says."""
    file = open(path, "rb")
    magic = file.read(2)
    file.seek(0)
    return gzip.open(file) if magic == GZIP_MAGIC else file  # type: ignore[return-value]


def _os_problem(error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, IsADirectoryError):
        return "is a folder; name the .jsonl file in it"
    return f"cannot be read: {error.strerror or error}"


def _decode(path: str | Path, number: int, raw: bytes, *, first: bool) -> tuple[object, bool]:
    """One line's value, or its DataError; the second value says that reading further makes no sense."""
    problem, hopeless = None, False
    if first and raw.startswith(UTF16_BOMS):
        problem, hopeless = "the file is UTF-16; save it as UTF-8", True
    elif raw.startswith(UTF8_BOM):
        problem = "begins with a byte order mark; save the file as UTF-8 without BOM"
    else:
        try:
            return _reject_array(DECODER.decode(raw.decode("utf-8").rstrip("\r\n")), first), False
        except UnicodeDecodeError as error:
            problem = (
                f"byte {error.start + 1} of the line (0x{raw[error.start]:02x}) is not UTF-8; save the file as UTF-8"
            )
        except json.JSONDecodeError as error:
            problem, hopeless = _json_problem(error, raw.strip(), first)
        except _WholeFileIsOneArray as error:
            problem, hopeless = str(error), True
        except (ValueError, RecursionError) as error:
            problem = "bad JSON: nested too deep" if isinstance(error, RecursionError) else f"bad JSON: {error}"
    return DataError(path, number, field=None, problem=problem), hopeless


EMPTY = "is empty: expected one JSON object a line; if a command wrote it, its log says what was dropped and why"
ONE_OBJECT_A_LINE = "this is one JSON array; JSON Lines has one object a line, without [ ] around and commas between"


class _WholeFileIsOneArray(Exception):
    pass


def _reject_array(value: object, first: bool) -> object:
    if first and isinstance(value, list):
        raise _WholeFileIsOneArray(ONE_OBJECT_A_LINE)
    return value


def _json_problem(error: json.JSONDecodeError, stripped: bytes, first: bool) -> tuple[str, bool]:
    if first and stripped.startswith(b"["):
        return ONE_OBJECT_A_LINE, True
    if first and stripped == b"{":
        return "an object spread over lines; JSON Lines has one whole object on each line", True
    return f"bad JSON at column {error.colno}: {error.msg}", False


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"key '{twice}' stands twice in one object")
    return row


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON; write null or a number")


DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_no_constant)

"""A file of results, one row of JSON an item, appended as they come, so that a killed run goes on where it was.

Rows stand in the order in which they were done; a reader sorts them by its items. The last row of a killed process may
be torn: it is cut off. Whether old rows fit the present settings is the business of eval.run.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from data_tools.errors import DataError, UserError
from data_tools.samples import write_whole

Row = dict[str, Any]


def read_rows(path: str | Path) -> list[Row]:
    """All whole rows of a log. Raises DataError for a file that cannot be read or holds something else."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise DataError(path, None, field=None, problem=f"cannot be read: {error.strerror or error}") from error
    return _parse(path, content)[0]


class ItemLog:
    """Appends rows with an `id` to a log that may already hold some; `rows` are all of them by id."""

    def __init__(self, path: str | Path, *, fresh: bool = False) -> None:
        self.path = Path(path)
        if fresh:
            self.path.unlink(missing_ok=True)
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
        try:
            rows, whole = _parse(path, self.path.read_bytes())
            os.ftruncate(self._file, whole)
            self.rows: dict[str, Row] = {row["id"]: row for row in rows}
        except BaseException:
            os.close(self._file)
            raise

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row. Raises UserError when the disk is full or gone, ValueError for an id that is there."""
        if row["id"] in self.rows:
            raise ValueError(f"{self.path}: id '{row['id']}' is already there")
        try:
            write_whole(self._file, (json.dumps(row, ensure_ascii=True, allow_nan=False) + "\n").encode())
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written: {error.strerror or error}") from error
        self.rows[row["id"]] = dict(row)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.fsync(self._file)
        os.close(self._file)


def _parse(path: str | Path, content: bytes) -> tuple[list[Row], int]:
    """All whole rows, and how many bytes they take."""
    rows: list[Row] = []
    whole = 0
    for number, raw in enumerate(content.splitlines(keepends=True), start=1):
        try:
            if not raw.endswith(b"\n"):
                break  # torn: a row is written with its end
            row = json.loads(raw)
            rows.append({**row, "id": row["id"]})
        except (ValueError, KeyError, TypeError):
            raise DataError(path, number, field=None, problem="is not a row of results; remove the file") from None
        whole += len(raw)
    return rows, whole

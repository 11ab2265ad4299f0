"""What a work folder holds of a recipe: which stages are done, made from what; and the right to write there.

    work/pipeline/.lock           held by the one pipeline that runs here, with its process id inside
                  digests.json    file digests (data_tools/file_digests.py)
                  KEY.json        the record of a stage: written when it starts, and again when it is done

A stage is up to date when its record is of the same command (the work folder's, the recipe's and the interpreter's own
paths aside) and the same contents of its inputs, and its outputs are what it left there. Times do not count, only
contents: a stage that is run again and gives the same bytes lets those after it stand. Digests of folders leave out
names that begin with a dot (locks, caches).

No file is deleted. An output in the way becomes `NAME.old` (`NAME.old2`, ...), and that is said: one that a stage would
append to though it was begun with something else, or one that differs from what the stage left there.
"""

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from data_tools.errors import UserError
from data_tools.file_digests import FileDigests
from data_tools.pipeline_recipe import Recipe
from data_tools.pipeline_stages import Step, plain_text, shown
from data_tools.samples import canonical_json

LOCK_WAIT_S = 60.0
"""The last processes of a killed pipeline are ended by their guard; so long that may take."""

Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """What is to be done about a step, and why.

    state: done, to do, or lacks (an input). inputs: path to sha256. goes_on: it was begun with the same command and
    inputs and appends to what is there. aside: outputs to be moved out of the way first.
    """

    state: str
    why: str
    inputs: Mapping[str, str] = field(default_factory=dict)
    digest: str = ""
    goes_on: bool = False
    aside: Sequence[str] = ()


class WorkFolder:
    """Records and digests of one work folder; reading makes nothing there."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.folder = recipe.work / "pipeline"
        self.logs = recipe.work / "logs"
        self._digests = FileDigests(self.folder / "digests.json")

    def record(self, key: str) -> Record | None:
        """A stage's record, or None where there is none that can be read."""
        try:
            record = json.loads((self.folder / f"{key}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return record if isinstance(record, dict) and record.get("state") in ("started", "done") else None

    def write_record(self, key: str, record: Record) -> None:
        """By rename, on the disk when this returns. Raises UserError."""
        write_file(self.folder / f"{key}.json", json.dumps(record, ensure_ascii=False, indent=1) + "\n")

    def save_digests(self) -> None:
        self._digests.save()

    def sha256(self, path: str) -> str:
        """Of a file's content, or of a folder's names and contents. Raises OSError."""
        if not os.path.isdir(path):
            return self._digests.sha256(path)
        total = hashlib.sha256()
        for name, digest in self.files(path).items():
            total.update(f"{digest} {name}\n".encode(errors="surrogateescape"))
        return total.hexdigest()

    def files(self, folder: str) -> dict[str, str]:
        """Name in the folder to sha256 of each of its files, sorted. A link to a folder counts as its target's name."""
        found = {}
        for here, folders, names in os.walk(folder):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            links = {name for name in folders if os.path.islink(os.path.join(here, name))}
            for name in [*names, *links]:
                if name.startswith("."):
                    continue
                path = os.path.join(here, name)
                target = os.readlink(path).encode() if name in links else None
                digest = self._digests.sha256(path) if target is None else hashlib.sha256(target).hexdigest()
                found[os.path.relpath(path, folder)] = digest
        return dict(sorted(found.items()))

    def status(self, step: Step) -> Status:
        """Compare a step with its record. Raises UserError where an input cannot be read."""
        missing = [path for path in step.inputs if not os.path.exists(path)]
        if missing:
            return Status(state="lacks", why=f"input {missing[0]} is not there")
        try:
            inputs = {path: self.sha256(path) for path in step.inputs}
            there = {path: self.sha256(path) for path in step.outputs if os.path.exists(path)}
        except OSError as error:
            raise UserError(f"stage '{step.key}': {error.filename}: cannot be read: {error.strerror}") from error
        digest = self._digest(step, inputs)
        record = self.record(step.key)
        if record is None:
            return Status(state="to do", why="first time", inputs=inputs, digest=digest, aside=tuple(there))
        same = record.get("digest") == digest
        if record["state"] == "started":
            # In a folder that was moved meanwhile an appending command would see other names in its own rows.
            goes_on = step.stage.appends and same and record.get("command") == shown(step.command)
            aside = tuple(there) if step.stage.appends and not goes_on else ()
            why = "was begun and not finished" if same else f"was begun, but {self._difference(step, record, inputs)}"
            return Status(state="to do", why=why, inputs=inputs, digest=digest, goes_on=goes_on, aside=aside)
        left = {path: own.get("sha256") for path, own in record.get("outputs", {}).items()}
        left = {path: left.get(plain_text(path, self.recipe)) for path in step.outputs}
        foreign = tuple(path for path, sha256 in there.items() if sha256 != left[path])
        if same and not foreign and len(there) == len(step.outputs):
            return Status(state="done", why="up to date", inputs=inputs, digest=digest)
        if not same:
            why = self._difference(step, record, inputs)
            aside = tuple(there) if step.stage.appends else foreign
        elif foreign:
            why, aside = f"{foreign[0]} is not what it left there", foreign
        else:
            gone = next(path for path in step.outputs if path not in there)
            why, aside = f"{gone} is gone", ()
        return Status(state="to do", why=why, inputs=inputs, digest=digest, aside=aside)

    def move_aside(self, step: Step, status: Status) -> list[str]:
        """Rename what is in the way; returns a line for each."""
        return [f"{path} is kept as {_rename_old(path)}" for path in status.aside]

    def _digest(self, step: Step, inputs: Mapping[str, str]) -> str:
        value = {
            "command": list(step.plain),
            "inputs": {plain_text(path, self.recipe): sha256 for path, sha256 in inputs.items()},
            "outputs": [plain_text(path, self.recipe) for path in step.outputs],
        }
        return hashlib.sha256(canonical_json(value).encode()).hexdigest()

    def _difference(self, step: Step, record: Record, inputs: Mapping[str, str]) -> str:
        """Why the digest is another one, in a few words."""
        before = record.get("inputs", {})
        now = {plain_text(path, self.recipe): sha256 for path, sha256 in inputs.items()}
        changed = [path for path in now if path in before and before[path] != now[path]]
        if changed:
            return f"input {changed[0]} changed"
        if shown(step.plain) != record.get("plain"):
            return "the command changed"
        return "the list of inputs or outputs changed"


class WorkLock:
    """The right to run in a work folder, for one pipeline at a time; use it with `with`.

    Held by this process and by the guards of its commands (data_tools/pipeline_guard.py), which inherit it: it is free
    when the last process of a killed pipeline is gone.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / ".lock"
        self._file = -1

    def __enter__(self) -> Self:
        """Raises UserError naming the process that runs there."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise UserError(f"{self._path.parent}: cannot be written: {error.strerror or error}") from error
        deadline = time.monotonic() + LOCK_WAIT_S
        while not self._taken():
            holder = os.read(self._file, 20).decode("ascii", "replace").strip()
            os.lseek(self._file, 0, os.SEEK_SET)
            if _lives(holder) or time.monotonic() > deadline:
                os.close(self._file)
                self._file = -1
                problem = f"a pipeline with process id {holder or '?'} runs here; wait for it, or set another work"
                raise UserError(f"{self._path.parent.parent}: {problem}")
            time.sleep(0.05)
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, str(os.getpid()).encode("ascii"), 0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._file)
        self._file = -1

    def _taken(self) -> bool:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def write_file(path: Path, text: str) -> None:
    """A whole small file, or none: beside it, on the disk, then renamed. Raises UserError."""
    part = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error


def _lives(pid: str) -> bool:
    """Is there such a process, and not one that ended and was not waited for?"""
    try:
        os.kill(int(pid), 0)
        return Path(f"/proc/{int(pid)}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except PermissionError:
        return True
    except FileNotFoundError:  # no /proc: the signal said that it is there
        return not Path("/proc/self").exists()
    except (ValueError, OSError):
        return False


def _rename_old(path: str) -> str:
    number, old = 1, f"{path}.old"
    while os.path.lexists(old):
        number += 1
        old = f"{path}.old{number}"
    os.rename(path, old)
    return old

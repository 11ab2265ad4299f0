"""Does a program pass its unit tests? Run in a sandbox (`verify_sandbox`), judged from outside the program's process.

`verify_code` takes what a model wrote: the program is its last fenced block that defines what is asked for, its last
fenced block, or the whole text where that is Python; a HumanEval prompt is completed by a text that goes on with it.
`check_program` runs one program, `check_programs` many in a small pool.
"""

import ast
import builtins
import json
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_tools.errors import UserError
from data_tools.verify_result import Verdict, invalid

FOLDER = Path(__file__).resolve().parent
FENCED = re.compile(r"^[ \t]*(```+|~~~+)[ \t]*([\w+.-]*)[^\n]*\n(.*?)(?:^[ \t]*\1[ \t]*$|\Z)", re.MULTILINE | re.DOTALL)
LANGUAGES = ("", "py", "python", "python3", "py3")
START_S = 20.0  # on top of the wall clock's limit: what starting and ending a sandbox may take on a busy machine
START_TRIES = 3  # a full process table passes; what is wrong with the machine does not
LAYERS = ("namespaces", "landlock", "seccomp")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one program may use. Bytes and seconds; `wall_s` is for all of its tests together."""

    wall_s: float = 30.0
    cpu_s: int = 10
    """Of each process."""
    memory_bytes: int = 1 << 30
    """Address space of each process."""
    total_memory_bytes: int = 2 << 30
    """Memory in use by all of them, looked at every 50 ms."""
    processes: int = 32
    """Processes and threads."""
    file_bytes: int = 16 << 20
    """Of one file."""
    folder_bytes: int = 64 << 20
    """Of its folder, which is in memory."""
    output_bytes: int = 1 << 20

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value <= 0:
                raise UserError(f"{name} = {value}: must be > 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeTask:
    """A programming task: `tests` is Python that raises where the program is wrong.

    names: what the tests use of the program. preamble: code of the task's author that the tests need (helpers,
    imports). prompt: the beginning of the program, for tasks that are completed. reference: a right program.
    """

    id: str
    tests: str
    names: tuple[str, ...]
    preamble: str = ""
    prompt: str = ""
    reference: str = ""


def check_program(
    program: str,
    task: CodeTask,
    limits: Limits = Limits(),
    *,
    layers: Iterable[str] = LAYERS,  # noqa: B008
) -> Verdict:
    """`correct` if the program passes all tests of the task, else `wrong` with the reason or the limit it broke.

    details: `limit` (None or its name), `sandbox` (what each layer does), `output` (its beginning). `layers` is what
    the sandbox may use of LAYERS: leave it alone, unless you test the sandbox. Raises UserError where no sandbox can
    be had (not Linux, a Python that `nobody` cannot run) and for tests that do not run by themselves.
    """
    for attempt in range(START_TRIES):
        report = _in_sandbox(program, task, limits, layers)
        if "setup" not in report:
            break
        time.sleep(0.5 * attempt)
    if "setup" in report:
        raise UserError(f"the sandbox cannot be set up: {report['setup']}")
    if report.get("tests_broken"):
        raise UserError(f"task {task.id}: {report['why']}")
    details = {name: report.get(name) for name in ("limit", "sandbox", "output")}
    return Verdict("correct" if report["proven"] else "wrong", program, str(report["why"]), details)


def check_programs(
    jobs: Iterable[tuple[str, CodeTask]],
    limits: Limits = Limits(),
    *,
    workers: int = 2,  # noqa: B008
) -> Iterator[Verdict]:
    """`check_program` for each (program, task), in order, `workers` at a time."""
    with ThreadPoolExecutor(workers) as pool:
        yield from pool.map(lambda job: check_program(job[0], job[1], limits), jobs)


def verify_code(text: str, task: CodeTask, limits: Limits = Limits()) -> Verdict:  # noqa: B008
    """The verdict on the program in a model's text; `invalid` where there is none."""
    program = extract_program(text, task)
    return invalid("no program found") if program is None else check_program(program, task, limits)


def extract_program(text: str, task: CodeTask) -> str | None:
    """The program that `text` holds, with the task's prompt before it; None where there is none."""
    blocks = [match[3] for match in FENCED.finditer(text) if match[2].lower() in LANGUAGES]
    wanted = [block for block in blocks if _defines(block, task.names)]
    for candidate in [*wanted[-1:], *([] if wanted else blocks[-1:])]:
        return _completed(candidate, task)
    if FENCED.search(text) or not text.strip():
        return None
    for candidate in (text, _indented_start(text)):
        program = _completed(candidate, task)
        goes_on = bool(task.prompt and candidate.strip() and candidate[0].isspace())
        if _parses(program) and (goes_on or _defines(candidate, task.names)):
            return program
    return None


def _completed(code: str, task: CodeTask) -> str:
    """The prompt's imports and helpers with `code` after them: as the rest of its last function, or as a whole."""
    if not task.prompt:
        return code
    if _defines(code, task.names[:1]) or not code[:1].isspace():
        return f"{task.prompt.rstrip()}\n    pass\n\n{code}" if _parses(task.prompt + "    pass\n") else code
    return task.prompt + code


def _indented_start(text: str) -> str:
    """The indented lines that a text begins with: the body of a function, without what follows it."""
    lines = text.split("\n")
    end = next((i for i, line in enumerate(lines) if line.strip() and not line[0].isspace()), len(lines))
    return "\n".join(lines[:end])


def _parse(code: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other people's code: "\d" in a plain string and the like
        return ast.parse(code)


def _parses(code: str) -> bool:
    try:
        _parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def _defines(code: str, names: Iterable[str]) -> bool:
    return all(
        re.search(rf"^\s*(?:async\s+)?(?:def|class)\s+{name}\b|^{name}\s*=", code, re.MULTILINE) for name in names
    )


def humaneval_task(row: Mapping[str, Any]) -> CodeTask:
    """A row of HumanEval: task_id, prompt, entry_point, test; canonical_solution where there is one."""
    prompt, entry = str(row["prompt"]), str(row["entry_point"])
    return CodeTask(
        id=str(row["task_id"]),
        tests=f"{row['test']}\n\ncheck({entry})\n",
        names=(entry,),
        preamble=f"{prompt.rstrip()}\n    pass\n",  # helpers that the tests use; the entry point is replaced
        prompt=prompt,
        reference=prompt + str(row.get("canonical_solution", "")),
    )


def mbpp_task(row: Mapping[str, Any]) -> CodeTask:
    """A row of MBPP (full or sanitized): task_id, test_list; code, test_setup_code and test_imports where there are.

    What the tests use of the program is what they use and neither define, import nor find among the built-ins, and
    what they call that the reference code defines.
    """
    setup = [str(row.get("test_setup_code") or ""), *map(str, row.get("test_imports") or [])]
    lines = [*setup, *map(str, row["test_list"]), *map(str, row.get("challenge_test_list") or [])]
    tests = "\n".join(line.replace("\r\n", "\n") for line in lines) + "\n"
    reference = str(row.get("code", "")).replace("\r\n", "\n")
    names, modules = _names_of(tests, reference)
    return CodeTask(
        id=str(row["task_id"]),
        tests=tests,
        names=names,
        preamble="".join(f"import {module}\n" for module in modules),
        reference=reference,
    )


def plain_task(row: Mapping[str, Any], name: str) -> CodeTask:
    """A row with `tests`: Python text, or a list of lines; `entry_points` (a list) where names shadow built-ins."""
    tests = row["tests"] if isinstance(row["tests"], str) else "\n".join(map(str, row["tests"]))
    names, modules = _names_of(tests, "")
    names = tuple(dict.fromkeys([*map(str, row.get("entry_points") or []), *names]))
    if not names:
        raise UserError(f"task {name}: its tests use nothing of the program; call what it shall define")
    preamble = "".join(f"import {module}\n" for module in modules)
    return CodeTask(id=name, tests=tests + "\n", names=names, preamble=preamble, prompt=str(row.get("prompt", "")))


def _names_of(tests: str, reference: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(what tests need of the program, standard modules they use without import), each in order of use."""
    tree = _parse(tests)
    stored: set[str] = set()
    used: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            used.append(node.id) if isinstance(node.ctx, ast.Load) else stored.add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            stored.add(node.name)
        elif isinstance(node, ast.arg):
            stored.add(node.arg)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            stored |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    defined = {n.name for n in _parse(reference).body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    free = [
        name for name in dict.fromkeys(used) if name not in stored and (name in defined or not hasattr(builtins, name))
    ]
    modules = [name for name in free if name in sys.stdlib_module_names and name not in defined]
    return tuple(name for name in free if name not in modules), tuple(modules)


def _worker_source() -> str:
    """`verify_worker` with `verify_wire` in place of its import: a program's process sees no file of ours."""
    imported = "from data_tools.verify_wire import decode, encode\n"
    worker = (FOLDER / "verify_worker.py").read_text(encoding="utf-8")
    assert imported in worker
    return worker.replace(imported, (FOLDER / "verify_wire.py").read_text(encoding="utf-8"))


def _in_sandbox(program: str, task: CodeTask, limits: Limits, layers: Iterable[str]) -> dict[str, Any]:
    if sys.platform != "linux":
        raise UserError(f"unit tests run in a sandbox of Linux; this is {sys.platform}")
    token = secrets.token_hex(16)
    folder = tempfile.mkdtemp(prefix="logratio-box-")
    job = {
        "program": program,
        "preamble": task.preamble,
        "tests": task.tests,
        "names": task.names,
        "token": token,
        "folder": folder,
        "python": getattr(sys, "_base_executable", None) or sys.executable,
        "worker": _worker_source(),
        "limits": asdict(limits),
        "layers": list(layers),
    }
    start = (
        f"import sys; sys.path.insert(0, {str(FOLDER.parent)!r}); from data_tools import verify_sandbox as s; s.main()"
    )
    command = [str(job["python"]), "-I", "-S", "-X", "utf8", "-c", start]
    try:
        done = subprocess.run(
            command,
            input=json.dumps(job).encode(),
            capture_output=True,
            timeout=limits.wall_s + START_S,
            env={},
            cwd=folder,
            start_new_session=True,
            check=False,
        )
        report = json.loads(done.stdout) if done.returncode == 0 else {"setup": done.stderr.decode()[-500:]}
    except subprocess.TimeoutExpired:
        report = {"ok": False, "why": "the sandbox did not end in time", "limit": "sandbox"}
    finally:
        _remove(folder)
    # The token went to the judge alone: a report without it proves nothing.
    report["proven"] = report.get("ok") is True and report.get("token") == token
    return report


def _remove(folder: str) -> None:
    """Remove a program's folder, also where it took the rights from its own sub-folders."""

    def again(call: Any, path: str, _: object) -> None:
        Path(path).parent.chmod(0o700)
        if Path(path).is_dir() and not Path(path).is_symlink():
            Path(path).chmod(0o700)
            shutil.rmtree(path, ignore_errors=True)
        else:
            Path(path).unlink(missing_ok=True)

    shutil.rmtree(folder, onerror=again)

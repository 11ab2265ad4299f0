"""Judge samples: `python -m data_tools.verify --kind option|number|code --samples S.jsonl --tasks T.jsonl --out V`.

A sample is a row with `id` (of its question), `text` (or `response`), and `sample` where a question has several. What
is asked stands in the row with that id of the --tasks file or, without --tasks, in the sample's own row:

    option   options   label to text, or a list of texts (labels A, B, ...); 2 to 10
             gold      the right option's label (or `answer`)
    number   gold      the right number, as a number or text (or `final_answer`, or `answer`)
    code     a row of HumanEval (prompt, entry_point, test) or MBPP (test_list, ...), or `tests`: Python, as text or a
             list of lines, with `entry_points` (names of the program that shadow built-ins) and `prompt` where needed

`task_id` does for `id`. --out gets a row for each sample, in order: id, sample (where given), verdict (correct, wrong
or invalid), extracted, why; for code also limit, sandbox and output. It appears when all is judged. Exit codes: 0 done,
2 the input is wrong (each fault with file and line).
"""

import argparse
import collections
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_tools.errors import DataError, UserError, check_each
from data_tools.jsonl import iter_jsonl
from data_tools.verify_code import (
    CodeTask,
    Limits,
    check_programs,
    extract_program,
    humaneval_task,
    mbpp_task,
    plain_task,
)
from data_tools.verify_number import DEFAULT_REL_TOL, parse_number, verify_number
from data_tools.verify_option import verify_option
from data_tools.verify_result import Verdict, invalid

KINDS = ("option", "number", "code")
GOLD_FIELDS = {"option": ("gold", "answer"), "number": ("gold", "final_answer", "answer")}

Row = Mapping[str, Any]
Job = Callable[[], Verdict]


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code: 0, or 2 with one line a fault of the input."""
    args = _parser().parse_args(argv)
    try:
        _verify(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _verify(args: argparse.Namespace) -> None:
    limits = Limits(wall_s=args.wall_s, cpu_s=args.cpu_s, memory_bytes=args.memory_mib << 20)
    if args.workers < 1 or not 0 <= args.rel_tol < 1:
        raise UserError(
            f"--workers {args.workers}, --rel-tol {args.rel_tol}: at least 1 worker, a tolerance from 0 to 1"
        )
    tasks = _read_tasks(args.tasks) if args.tasks else None
    samples = list(_read_samples(args.samples, args.kind, tasks))
    if args.kind == "code":
        verdicts = _code_verdicts([(text, task) for _, text, task in samples], limits, args.workers)
    elif args.kind == "number":
        verdicts = (verify_number(text, _gold(row, "number"), rel_tol=args.rel_tol) for _, text, row in samples)
    else:
        verdicts = (verify_option(text, str(_gold(row, "option")), row["options"]) for _, text, row in samples)
    done = list(zip((row for row, _, _ in samples), verdicts, strict=True))
    _write(args.out, (_out_row(row, verdict) for row, verdict in done))
    print(_summary([verdict for _, verdict in done], args.out))


def _code_verdicts(jobs: Sequence[tuple[str, CodeTask]], limits: Limits, workers: int) -> Iterator[Verdict]:
    programs = [(extract_program(text, task), task) for text, task in jobs]
    judged = check_programs(((p, task) for p, task in programs if p is not None), limits, workers=workers)
    for program, _ in programs:
        yield invalid("no program found") if program is None else next(judged)


def _read_tasks(path: str) -> dict[str, tuple[int, Row]]:
    """id to (line, row) of the --tasks file."""
    tasks: dict[str, tuple[int, Row]] = {}
    for line, value in iter_jsonl(path):
        row = _object(value, path, line)
        name = _id(row, path, line)
        if name in tasks:
            raise DataError(path, line, field="id", problem=f"'{name}' already stands in line {tasks[name][0]}")
        tasks[name] = (line, row)
    return tasks


def _read_samples(path: str, kind: str, tasks: Mapping[str, tuple[int, Row]] | None) -> Iterator[tuple[Row, str, Any]]:
    """(sample's row, its text, what is asked), checked; raises DataErrors with up to 20 faults."""
    ready: dict[str, CodeTask] = {}

    def check(row: tuple[int, object]) -> tuple[Row, str, Any]:
        line, value = row
        return _read_sample(_object(value, path, line), path, line, kind, tasks, ready)

    yield from check_each(iter_jsonl(path), check)


def _read_sample(
    row: Row, path: str, line: int, kind: str, tasks: Mapping[str, tuple[int, Row]] | None, ready: dict[str, CodeTask]
) -> tuple[Row, str, Any]:
    field = "text" if "text" in row or "response" not in row else "response"
    text = row.get(field)
    if not isinstance(text, str):
        raise DataError(path, line, field=field, problem=f"expected the answer as a string, got {type(text).__name__}")
    asked = row
    if tasks is not None:
        name = _id(row, path, line)
        if name not in tasks:
            raise DataError(path, line, field="id", problem=f"'{name}' is no id of the tasks file")
        asked = tasks[name][1]
    try:
        if kind == "code":
            return row, text, _code_task(asked, f"{Path(path).name}:{line}", ready if tasks is not None else {})
        _check_asked(asked, kind)
    except UserError as error:
        raise DataError(path, line, field=None, problem=str(error)) from None
    return row, text, asked


def _check_asked(row: Row, kind: str) -> None:
    """Raises UserError for a question that cannot be judged."""
    gold = _gold(row, kind)
    if kind == "number":
        if isinstance(gold, bool) or not isinstance(gold, str | int | float) or parse_number(str(gold)) is None:
            raise UserError(f"gold {gold!r} is no number")
        return
    options = row.get("options")
    if not isinstance(options, dict | list):
        raise UserError(f"field 'options': expected an object or a list, got {type(options).__name__}")
    verify_option("", str(gold), options)


def _gold(row: Row, kind: str) -> Any:
    for field in GOLD_FIELDS[kind]:
        if row.get(field) is not None:
            return row[field]
    raise UserError(f"field 'gold': missing (or {', '.join(GOLD_FIELDS[kind][1:])})")


def _code_task(row: Row, place: str, ready: dict[str, CodeTask]) -> CodeTask:
    name = str(row.get("id", row.get("task_id", place)))
    if name not in ready:
        try:
            if "entry_point" in row and "test" in row:
                ready[name] = humaneval_task({"task_id": name, **row})
            elif "test_list" in row:
                ready[name] = mbpp_task({"task_id": name, **row})
            elif "tests" in row:
                ready[name] = plain_task(row, name)
            else:
                raise UserError("has no tests: expected 'tests', 'test_list', or 'test' with 'entry_point'")
        except SyntaxError as error:
            raise UserError(f"the tests of task {name} are no Python: {error.msg}") from None
        except KeyError as error:
            raise UserError(f"field {error}: missing") from None
    return ready[name]


def _object(value: object, path: str, line: int) -> Row:
    if not isinstance(value, dict):
        raise DataError(path, line, field=None, problem=f"expected an object, got {type(value).__name__}")
    return value


def _id(row: Row, path: str, line: int) -> str:
    name = row.get("id", row.get("task_id"))
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise DataError(path, line, field="id", problem=f"expected a string or a number, got {type(name).__name__}")
    return str(name)


def _out_row(row: Row, verdict: Verdict) -> dict[str, Any]:
    kept = {name: row[name] for name in ("id", "task_id", "sample") if name in row}
    said = {"verdict": verdict.verdict, "extracted": verdict.extracted, "why": verdict.why}
    return {**kept, **said, **verdict.details}


def _write(path: str, rows: Iterable[Mapping[str, Any]]) -> None:
    """All rows, or no file: written beside it, then renamed."""
    part = Path(f"{path}.part")
    try:
        with open(part, "w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error


def _summary(verdicts: Sequence[Verdict], out: str) -> str:
    """Counts, and for unit tests what of the sandbox was open."""
    counts = collections.Counter(verdict.verdict for verdict in verdicts)
    text = ", ".join(f"{counts[name]} {name}" for name in ("correct", "wrong", "invalid"))
    lines = [f"{len(verdicts)} samples: {text}; {out}"]
    boxes = [box for verdict in verdicts if isinstance(box := verdict.details.get("sandbox"), dict)]
    open_layers = {f"{name} {said}" for box in boxes for name, said in box.items() if said.startswith("open")}
    lines += [f"sandbox: {layer}" for layer in sorted(open_layers)]
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.verify", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kind", required=True, choices=KINDS, help="what the answers are")
    parser.add_argument("--samples", required=True, help="JSON Lines of answers")
    parser.add_argument("--out", required=True, help="JSON Lines of verdicts, written anew")
    parser.add_argument("--tasks", help="JSON Lines of questions by id (default: each sample's own row)")
    parser.add_argument("--rel-tol", type=float, default=DEFAULT_REL_TOL, help="number: relative tolerance, 0 = exact")
    parser.add_argument("--cpu-s", type=int, default=10, help="code: CPU seconds of a process")
    parser.add_argument("--wall-s", type=float, default=30.0, help="code: seconds for all tests of a program")
    parser.add_argument("--memory-mib", type=int, default=1024, help="code: address space of a process")
    parser.add_argument("--workers", type=int, default=2, help="code: programs run at a time")
    return parser


if __name__ == "__main__":
    sys.exit(main())

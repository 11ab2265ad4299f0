"""Judge samples: `python -m data_tools.verify --kind option|number|code --samples S.jsonl --tasks T.jsonl --out V`.

A sample is a row with `id` (of its question), `text` (or `response`), and `sample` where a question has several. What
is asked stands in the row with that id of the --tasks file or, without --tasks, in the sample's own row:

    option   options   label to text, or a list of texts (labels A, B, ...); 2 to 10
             gold      the right option's label (or `answer`)
    number   gold      the right number, as a number or text (or `final_answer`, or `answer`)
    code     a row of HumanEval (prompt, entry_point, test) or MBPP (test_list, ...), or `tests`: Python, as text or a
             list of lines, with `entry_points` (names of the program that shadow built-ins) and `prompt` where needed

`task_id` does for `id`; a sample's id may be its question's with more behind a "#" (`q7#3`). With --prompts, those that
were sampled, a row's `prefix` stands before its samples: that is the answer judged. --out gets a row for each sample,
in order: id, sample (where given), verdict (correct, wrong or invalid), extracted, why; for code also limit, sandbox
and output. It appears when all is judged. Exit codes: 0 done, 2 the input is wrong (each fault with file and line).
"""

import argparse
import collections
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_tools.errors import DataError, UserError, check_each
from data_tools.jsonl import iter_jsonl, write_rows
from data_tools.questions import RULE_KINDS, Row, check_asked, code_task, gold_of, id_of, question_id
from data_tools.samples import read_prompts
from data_tools.verify_code import CodeTask, Limits, check_programs, extract_program
from data_tools.verify_number import DEFAULT_REL_TOL, verify_number
from data_tools.verify_option import verify_option
from data_tools.verify_result import Verdict, invalid

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
    begun = {own.id: own.prefix for own in read_prompts(args.prompts) if own.prefix} if args.prompts else {}
    samples = list(_read_samples(args.samples, args.kind, tasks, begun))
    if args.kind == "code":
        verdicts = _code_verdicts([(text, task) for _, text, task in samples], limits, args.workers)
    elif args.kind == "number":
        verdicts = (verify_number(text, gold_of(row, "number"), rel_tol=args.rel_tol) for _, text, row in samples)
    else:
        verdicts = (verify_option(text, str(gold_of(row, "option")), row["options"]) for _, text, row in samples)
    done = list(zip((row for row, _, _ in samples), verdicts, strict=True))
    write_rows(args.out, (_out_row(row, verdict) for row, verdict in done))
    print(_summary([verdict for _, verdict in done], args.out))


def _code_verdicts(jobs: Sequence[tuple[str, CodeTask]], limits: Limits, workers: int) -> Iterator[Verdict]:
    programs = [(extract_program(text, task), task) for text, task in jobs]
    judged = check_programs(((p, task) for p, task in programs if p is not None), limits, workers=workers)
    for program, _ in programs:
        yield invalid("no program found") if program is None else next(judged)


def _read_tasks(path: str) -> dict[str, tuple[int, Row]]:
    """id to (line, row) of the --tasks file."""
    tasks: dict[str, tuple[int, Row]] = {}
    for line, value in iter_jsonl(path, may_be_empty=True):
        row = _object(value, path, line)
        name = id_of(row, path, line)
        if name in tasks:
            raise DataError(path, line, field="id", problem=f"'{name}' already stands in line {tasks[name][0]}")
        tasks[name] = (line, row)
    return tasks


def _read_samples(
    path: str, kind: str, tasks: Mapping[str, tuple[int, Row]] | None, begun: Mapping[str, str]
) -> Iterator[tuple[Row, str, Any]]:
    """(sample's row, its text behind how it begins, what is asked), checked; raises DataErrors with up to 20 faults."""
    ready: dict[str, CodeTask] = {}

    def check(row: tuple[int, object]) -> tuple[Row, str, Any]:
        line, value = row
        row, text, asked = _read_sample(_object(value, path, line), path, line, kind, tasks, ready)
        return row, begun.get(str(row.get("id")), "") + text, asked

    yield from check_each(iter_jsonl(path, may_be_empty=True), check)


def _read_sample(
    row: Row, path: str, line: int, kind: str, tasks: Mapping[str, tuple[int, Row]] | None, ready: dict[str, CodeTask]
) -> tuple[Row, str, Any]:
    field = "text" if "text" in row or "response" not in row else "response"
    text = row.get(field)
    if not isinstance(text, str):
        raise DataError(path, line, field=field, problem=f"expected the answer as a string, got {type(text).__name__}")
    asked = row
    if tasks is not None:
        name = id_of(row, path, line)
        asked_id = question_id(name, tasks)
        if asked_id is None:
            raise DataError(path, line, field="id", problem=f"'{name}' is no id of the tasks file")
        asked = tasks[asked_id][1]
    try:
        if kind == "code":
            name = str(asked.get("id", asked.get("task_id", f"{Path(path).name}:{line}")))
            if tasks is None or name not in ready:
                ready[name] = code_task(asked, name)
            return row, text, ready[name]
        check_asked(asked, kind)
    except UserError as error:
        raise DataError(path, line, field=None, problem=str(error)) from None
    return row, text, asked


def _object(value: object, path: str, line: int) -> Row:
    if not isinstance(value, dict):
        raise DataError(path, line, field=None, problem=f"expected an object, got {type(value).__name__}")
    return value


def _out_row(row: Row, verdict: Verdict) -> dict[str, Any]:
    kept = {name: row[name] for name in ("id", "task_id", "sample") if name in row}
    said = {"verdict": verdict.verdict, "extracted": verdict.extracted, "why": verdict.why}
    return {**kept, **said, **verdict.details}


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
    parser.add_argument("--kind", required=True, choices=RULE_KINDS, help="what the answers are")
    parser.add_argument("--samples", required=True, help="JSON Lines of answers")
    parser.add_argument("--out", required=True, help="JSON Lines of verdicts, written anew")
    parser.add_argument("--tasks", help="JSON Lines of questions by id (default: each sample's own row)")
    parser.add_argument("--prompts", help="JSON Lines of prompts whose `prefix` the samples go on from")
    parser.add_argument("--rel-tol", type=float, default=DEFAULT_REL_TOL, help="number: relative tolerance, 0 = exact")
    parser.add_argument("--cpu-s", type=int, default=10, help="code: CPU seconds of a process")
    parser.add_argument("--wall-s", type=float, default=30.0, help="code: seconds for all tests of a program")
    parser.add_argument("--memory-mib", type=int, default=1024, help="code: address space of a process")
    parser.add_argument("--workers", type=int, default=2, help="code: programs run at a time")
    return parser


if __name__ == "__main__":
    sys.exit(main())

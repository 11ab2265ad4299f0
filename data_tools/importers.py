"""Published question sets, in the shapes that they are published in, to question rows (data_tools/questions.py).

    python -m data_tools.importers medmcqa train.json --out Q.jsonl

    medmcqa   question, opa, opb, opc, opd, cop (the right option's number), exp, subject_name, topic_name, id
              (JSON Lines, or CSV with a header). The authors' files count cop from 1, Hugging Face's copy from 0: a 0
              or a 4 in the file says which; where neither is there, say --cop-base.
    medqa     question, options (letter to text), answer_idx; meta_info is the subject
    mmlu      CSV without a header, as its authors have it: question, four options, letter. Or rows with question,
              choices (a list), answer (a number from 0), subject, as Hugging Face has it. A file name like
              anatomy_test.csv gives the subject where no column does.
    gsm8k     question, answer with "#### 72" as its last line, which is the final_answer
    cmexam    CSV with Question, Options (lines "A text"), Answer (a letter), Explanation

Rows get `id` (the set's own, else `<file name>-<row from 0>`), `source` (the set) and, for questions with options,
`options` by letter and `answer`. Texts lose white space at their ends and are else left as they are. A row that is not
of its shape is an error with file and line. Two kinds of rows are no errors but of no use, and are only left out when
that is asked for: without an answer (--skip unanswered) and with several (--skip multiple). CSV and JSON Lines are told
apart by the file's name (.csv; .json, .jsonl, also gzipped).
"""

import argparse
import csv
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_tools.errors import DataError, UserError, check_each
from data_tools.jsonl import iter_jsonl, write_rows
from data_tools.questions import check_asked

LETTERS = "ABCDEFGHIJ"
MMLU_COLUMNS = ("question", "A", "B", "C", "D", "answer")
MMLU_SUBJECT = re.compile(r"(.+)_(?:test|dev|val|train|auxiliary_train)$")
FINAL = re.compile(r"\s*####[^\S\n]*(-?[\d,]*\.?\d+)\s*$")
OPTION = re.compile(r"([A-J])[ .．、:：)）\t]\s*(.*)$")
Row = dict[str, Any]
Item = tuple[int, Row]
"""Line and row as the file has it."""


class Unusable(ValueError):
    """A row of the right shape without exactly one answer; `str()` says which of SKIPPED."""


SKIPPED = ("unanswered", "multiple")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code: 0, or 2 with one line a fault of the input."""
    args = _parser().parse_args(argv)
    try:
        rows, skipped = read_set(args.set, args.file, cop_base=args.cop_base, skip=args.skip)
        write_rows(args.out, rows)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    left_out = "".join(f", {count} {why} left out" for why, count in skipped.items())
    print(f"{args.file}: {len(rows)} questions in {args.out}{left_out}")
    return 0


def read_set(
    name: str, path: str | Path, *, cop_base: int | None = None, skip: Sequence[str] = ()
) -> tuple[list[Row], Counter[str]]:
    """The question rows of a file and how many were left out, and why. Raises DataErrors with up to 20 faults."""
    items = list(_mmlu_items(path) if name == "mmlu" else _items(path))
    if name == "medmcqa" and cop_base is None:
        cop_base = _cop_base(items, path)
    seen: dict[str, int] = {}
    skipped: Counter[str] = Counter()

    def check(item: tuple[int, Item]) -> Row | None:
        number, (line, row) = item
        try:
            own = READERS[name](row, path, cop_base)
            named = _text(row, "id") if row.get("id") is not None else f"{_stem(path)}-{number}"
            check_asked(own, "number" if name == "gsm8k" else "option")
        except Unusable as error:
            if str(error) in skip:
                skipped[str(error)] += 1
                return None
            words = {"unanswered": "has no answer", "multiple": "has several answers"}[str(error)]
            raise DataError(path, line, field=None, problem=f"{words}; --skip {error} leaves such rows out") from None
        except UserError as error:
            raise DataError(path, line, field=None, problem=str(error)) from None
        if (first := seen.setdefault(named, line)) != line:
            raise DataError(path, line, field="id", problem=f"'{named}' already stands in line {first}")
        kept = {key: value for key, value in own.items() if value is not None}
        return {"id": named, **kept, "source": name}

    found = check_each(enumerate(items), check)
    return [row for row in found if row is not None], skipped


def _medmcqa(row: Row, path: str | Path, base: int | None) -> Row:
    options = {letter: _text(row, f"op{letter.lower()}") for letter in "ABCD"}
    number = _whole(row, "cop")
    if number is None or number == -1:
        raise Unusable("unanswered")
    assert base is not None
    if not base <= number < base + 4:
        raise UserError(f"field 'cop': {number} is none of {base} to {base + 3}")
    more = {
        "explanation": _maybe(row, "exp"),
        "subject": _maybe(row, "subject_name"),
        "topic": _maybe(row, "topic_name"),
    }
    answer = "ABCD"[number - base]
    return {
        "question": _text(row, "question"),
        "options": options,
        "answer": answer,
        **more,
        **_kept(row, "choice_type"),
    }


def _medqa(row: Row, path: str | Path, base: int | None) -> Row:
    options = row.get("options")
    if not isinstance(options, dict):
        raise UserError(f"field 'options': expected an object of letters, got {type(options).__name__}")
    texts = {letter: _text(options, letter) for letter in options}
    answer = _maybe(row, "answer_idx")
    if answer is None:
        raise Unusable("unanswered")
    return {"question": _text(row, "question"), "options": texts, "answer": answer, "subject": _maybe(row, "meta_info")}


def _mmlu(row: Row, path: str | Path, base: int | None) -> Row:
    choices, given = row.get("choices"), row.get("answer")
    if not isinstance(choices, list) or not all(isinstance(text, str) for text in choices):
        raise UserError("field 'choices': expected a list of texts")
    if not 2 <= len(choices) <= len(LETTERS):
        raise UserError(f"field 'choices': {len(choices)} options: a question needs 2 to 10")
    options = {letter: text.strip() for letter, text in zip(LETTERS, choices, strict=False)}
    if given is None or given == "":
        raise Unusable("unanswered")
    if isinstance(given, int) and not isinstance(given, bool) and 0 <= given < len(choices):
        answer = LETTERS[given]
    elif isinstance(given, str) and given.strip() in options:
        answer = given.strip()
    else:
        raise UserError(f"field 'answer': {given!r} is neither a letter nor a number from 0 of {len(choices)} options")
    match = MMLU_SUBJECT.match(_stem(path))
    subject = _maybe(row, "subject") or (match[1] if match else None)
    return {"question": _text(row, "question"), "options": options, "answer": answer, "subject": subject}


def _gsm8k(row: Row, path: str | Path, base: int | None) -> Row:
    answer = _text(row, "answer")
    match = FINAL.search(answer)
    if match is None or not answer[: match.start()].strip():
        raise UserError("field 'answer': expected a solution with \"#### NUMBER\" as its last line")
    return {"question": _text(row, "question"), "answer": answer, "final_answer": match[1].replace(",", "")}


def _cmexam(row: Row, path: str | Path, base: int | None) -> Row:
    options: dict[str, str] = {}
    for line in filter(None, map(str.strip, _text(row, "Options").splitlines())):
        match = OPTION.match(line)
        if match is None or match[1] in options or not match[2]:
            raise UserError(f"field 'Options': {line[:30]!r} is no line like 'A text', or its letter stands twice")
        options[match[1]] = match[2]
    answer = _maybe(row, "Answer")
    if answer is None:
        raise Unusable("unanswered")
    letters = re.findall(r"[A-J]", answer)
    if len(letters) > 1 and re.fullmatch(r"[A-J\s,，、]+", answer):
        raise Unusable("multiple")
    question, explanation = _text(row, "Question"), _maybe(row, "Explanation")
    return {"lang": "zh", "question": question, "options": options, "answer": answer, "explanation": explanation}


READERS: dict[str, Callable[[Row, str | Path, int | None], Row]] = {
    "medmcqa": _medmcqa,
    "medqa": _medqa,
    "mmlu": _mmlu,
    "gsm8k": _gsm8k,
    "cmexam": _cmexam,
}


def _cop_base(items: Sequence[Item], path: str | Path) -> int:
    """0 or 1, as the numbers in the file say. Raises UserError where they do not."""
    found = set()
    for _, row in items:
        try:
            found.add(_whole(row, "cop"))
        except UserError:
            continue  # told with its line when the row is read
    if (0 in found) == (4 in found):
        said = "both 0 and 4" if 0 in found else "neither 0 nor 4"
        raise UserError(f"{path}: field 'cop' is {said} somewhere; say with --cop-base 0 or 1 what the first option is")
    return 0 if 0 in found else 1


def _items(path: str | Path) -> Iterator[Item]:
    """Rows with their lines: of JSON Lines, or of a CSV file with a header."""
    if not _is_csv(path):
        for line, value in iter_jsonl(path):
            if not isinstance(value, dict):
                raise DataError(path, line, field=None, problem=f"expected an object, got {type(value).__name__}")
            yield line, value
        return
    header: list[str] = []
    for line, cells in _csv_lines(path):
        if not header:
            header = cells
            if len(set(header)) < len(header):
                raise DataError(path, line, field=None, problem="the header names a column twice")
        elif len(cells) != len(header):
            raise DataError(path, line, field=None, problem=f"{len(cells)} cells, the header has {len(header)}")
        else:
            yield line, {name: cell for name, cell in zip(header, cells, strict=True) if cell.strip()}


def _mmlu_items(path: str | Path) -> Iterator[Item]:
    """Rows with `choices`, also of the CSV files without a header."""
    if not _is_csv(path):
        yield from _items(path)
        return
    for line, cells in _csv_lines(path):
        if len(cells) != len(MMLU_COLUMNS):
            problem = f"{len(cells)} cells, expected {len(MMLU_COLUMNS)}: {', '.join(MMLU_COLUMNS)}"
            raise DataError(path, line, field=None, problem=problem)
        if tuple(cells) != MMLU_COLUMNS:  # some copies have a header
            yield line, {"question": cells[0], "choices": cells[1:5], "answer": cells[5]}


def _csv_lines(path: str | Path) -> Iterator[tuple[int, list[str]]]:
    """(line that the row begins in, cells). Raises DataError."""
    csv.field_size_limit(1 << 24)
    start = 1
    try:
        with open(path, encoding="utf-8", newline="") as file:
            reader = csv.reader(file, strict=True)
            for cells in reader:
                if cells and cells[0].startswith("\ufeff"):
                    problem = "begins with a byte order mark; save the file as UTF-8 without BOM"
                    raise DataError(path, start, field=None, problem=problem)
                if cells:
                    yield start, cells
                start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(path, start, field=None, problem=f"is no CSV: {error}") from None
    except UnicodeDecodeError:
        raise DataError(path, start, field=None, problem="is not UTF-8; save the file as UTF-8") from None
    except OSError as error:
        raise DataError(path, None, field=None, problem=f"cannot be read: {error.strerror or error}") from None
    if start == 1:
        raise DataError(path, None, field=None, problem="is empty")


def _is_csv(path: str | Path) -> bool:
    name = Path(path).name.lower()
    if not name.endswith((".csv", ".json", ".jsonl", ".json.gz", ".jsonl.gz")):
        raise UserError(f"{path}: expected a name that ends in .csv, .json or .jsonl")
    return name.endswith(".csv")


def _stem(path: str | Path) -> str:
    return re.sub(r"\.(?:csv|jsonl?)(?:\.gz)?$", "", Path(path).name, flags=re.IGNORECASE)


def _text(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        said = "missing" if name not in row else f"expected a text, got {value!r}"
        raise UserError(f"field '{name}': {said}")
    return value.strip()


def _maybe(row: Mapping[str, Any], name: str) -> str | None:
    """A text, or None where there is none."""
    value = row.get(name)
    return None if value is None or value == "" else _text(row, name)


def _kept(row: Mapping[str, Any], name: str) -> Row:
    return {} if row.get(name) is None else {name: row[name]}


def _whole(row: Mapping[str, Any], name: str) -> int | None:
    value = row.get(name)
    if isinstance(value, str) and re.fullmatch(r"\s*-?\d+\s*", value):
        return int(value)
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    raise UserError(f"field '{name}': expected a whole number, got {value!r}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.importers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("set", choices=sorted(READERS), help="whose shape the file has")
    parser.add_argument("file", help="the published file")
    parser.add_argument("--out", required=True, help="JSON Lines of questions, written anew and whole")
    parser.add_argument("--cop-base", type=int, choices=[0, 1], help="medmcqa: the number of the first option")
    parser.add_argument("--skip", action="append", choices=SKIPPED, default=[], help="leave such rows out")
    return parser


if __name__ == "__main__":
    sys.exit(main())

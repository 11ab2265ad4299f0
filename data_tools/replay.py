"""Answers that are there already, as samples: in place of a model, for requests that any builder wrote.

    python -m data_tools.replay --requests R.jsonl --answers recorded.jsonl --out S.jsonl
    python -m data_tools.replay --requests R.jsonl --answers Q.jsonl --kind option \\
        --text "{explanation}\\nThe answer is ({gold})." --model "the set's own explanations" --out S.jsonl

An answer is a row with the request's id, or with what stands before one of its "#" (the question's id). Its text is
`--text` filled in with the row's columns; with --kind the rows are questions (data_tools/questions.py), which also have
`gold`, `gold_text`, `options` and `labels`. A row whose text asks for a column that it lacks is passed over and
counted. So a recorded teacher (the samples file of an earlier run, a bought set of answers) stands where a model would,
and so do a question set's own explanations. Several rows of one id are its samples 0, 1, ...

`model` is the row's or --model, `finish_reason` the row's or "stop". What a request says now is what its samples are
drawn for: whether a recorded answer fits it is for you to know. Nothing is asked of a model.
"""

import argparse
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from data_tools.command import counted
from data_tools.errors import DataError, UserError, check_each
from data_tools.jsonl import iter_jsonl, write_rows
from data_tools.placeholders import fill
from data_tools.questions import KINDS, id_of, question_id, read_questions
from data_tools.samples import Prompt, digest_of, read_prompts

Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code: 0, or 2 with one line a fault of the input."""
    args = _parser().parse_args(argv)
    try:
        _write(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _write(args: argparse.Namespace) -> None:
    answers = _read(args.answers, args.kind)
    requests = read_prompts(args.requests)
    dropped: Counter[str] = Counter()
    settings = digest_of({"replay": args.text})
    rows: list[Row] = []
    unanswered = 0
    for request in requests:
        name = question_id(request.id, answers)
        own = list(_samples(request, [] if name is None else answers[name], args, settings, dropped))
        unanswered += not own
        rows += own
    write_rows(args.out, rows)
    without = f", {unanswered} requests without an answer" if unanswered else ""
    print(f"{len(requests)} requests: {len(rows)} samples in {args.out}{without}{counted(dropped)}")


def _samples(
    request: Prompt, answers: Sequence[Row], args: argparse.Namespace, settings: str, dropped: Counter[str]
) -> Iterator[Row]:
    number = 0
    for answer in answers:
        try:
            text = fill(args.text, answer).strip()
        except KeyError as error:
            dropped[f"without {error.args[0]}"] += 1
            continue
        if not text:
            dropped["empty"] += 1
            continue
        model = args.model or answer.get("model")
        if not isinstance(model, str):
            raise UserError(f"{args.answers}: id '{answer.get('id')}' has no column 'model'; say --model NAME")
        yield {
            "id": request.id,
            "sample": number,
            "text": text,
            "finish_reason": str(answer.get("finish_reason") or "stop"),
            "model": model,
            "settings_digest": settings,
            "prompt_digest": request.digest,
        }
        number += 1


def _read(path: str, kind: Any) -> Mapping[str, list[Row]]:
    """id to its rows; of a column without a text (null, or nothing) the row has none. Raises DataErrors."""
    if kind is not None:
        questions = read_questions(path, kind, may_be_empty=True)
        return {own.id: [{**_said(own.values), "id": own.id}] for own in questions}

    def check(item: tuple[int, object]) -> tuple[str, Row]:
        line, row = item
        if not isinstance(row, dict):
            raise DataError(path, line, field=None, problem=f"expected an object, got {type(row).__name__}")
        return id_of(row, path, line), _said(row)

    found: dict[str, list[Row]] = defaultdict(list)
    rows: list[tuple[str, Row]] = check_each(iter_jsonl(path, may_be_empty=True), check)
    for name, row in rows:
        found[name].append(row)
    return dict(found)


def _said(row: Mapping[str, Any]) -> Row:
    return {name: value for name, value in row.items() if value is not None and value != ""}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.replay",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--requests", required=True, help="JSON Lines of prompts to be answered")
    parser.add_argument("--answers", required=True, help="JSON Lines of answers, by the requests' or questions' id")
    parser.add_argument("--kind", choices=KINDS, help="the answers are questions of this kind")
    parser.add_argument("--text", default="{text}", help="what is said, with the row's columns (default '{text}')")
    parser.add_argument("--model", help="who is named as the maker (default: the column 'model')")
    parser.add_argument("--out", required=True, help="JSON Lines of samples, written anew and whole")
    return parser


if __name__ == "__main__":
    sys.exit(main())

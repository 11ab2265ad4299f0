"""Translate a question set with a model, and keep what N referees approve of.

    python -m data_tools.translate requests --questions Q --kind option --fields question options explanation \\
        --prompts P.toml --out R.jsonl              # table [translate]; {fields}: the texts, in tags
    python -m eval.sample ... --prompts R.jsonl --out S.jsonl
    python -m data_tools.translate rows --questions Q --kind option --requests R.jsonl --samples S.jsonl --lang fa \\
        --out T.jsonl --again A.jsonl               # A: what is missing; then --requests R A --samples S S2
    python -m data_tools.translate referee --rows T.jsonl --prompts P.toml --table terms --out RR.jsonl
    python -m eval.sample ...                       # each referee's model: S1.jsonl, S2.jsonl; a criterion: a table
    python -m data_tools.translate filter --rows T.jsonl --referee one RR.jsonl S1.jsonl \\
        --referee two RR.jsonl S2.jsonl --threshold 4 --rule unanimous --out kept.jsonl

A translator replies with the very fields that it was shown, and a referee with `<score>0..5</score>`
(data_tools/fields.py). Ids and right answers stay, so that a translated question is its source's. The first readable
sample counts. Gaokerena-R, whose filter this is (two referees, one criterion, all must approve), does not say from
which score on it approves: `--threshold` has no default. No model is called here.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from data_tools.command import counted, run
from data_tools.errors import DataError, UserError, check_each
from data_tools.fields import BadReply, read_fields, write_fields
from data_tools.jsonl import iter_jsonl, write_rows
from data_tools.pairs.exchange import Answer, RequestRow, read_answers, read_prompt_texts, write_requests
from data_tools.pairs.record import made_by
from data_tools.questions import KINDS, read_questions
from data_tools.samples import digest_of, read_prompts

OPTION = "option_"
"""An option's field is this and its label."""
BEST = 5
Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code: 0, or 2 with one line a fault of the input."""
    commands = {"requests": write_asked, "rows": write_translated, "referee": write_referee, "filter": write_kept}
    return run(_parser(), argv, commands)


def texts_of(row: Mapping[str, Any], names: Sequence[str]) -> dict[str, str]:
    """The row's texts by field; a column that is null or missing is none. Raises UserError."""
    found: dict[str, str] = {}
    for name in names:
        value = row.get(name)
        if name == "options":
            options = value if isinstance(value, dict) else {chr(65 + k): text for k, text in enumerate(value or ())}
            found |= {f"{OPTION}{label}": text for label, text in options.items()}
        elif isinstance(value, str) and value.strip():
            found[name] = value
        elif value is not None and not isinstance(value, str):
            raise UserError(f"id '{row.get('id')}': column '{name}' is no text; leave it out of --fields")
    if "question" in names and "question" not in found:
        raise UserError(f"id '{row.get('id')}': has no column 'question'")
    return found


def with_texts(row: Mapping[str, Any], texts: Mapping[str, str]) -> Row:
    """The row with these texts in their columns; options keep their shape."""
    options = {name.removeprefix(OPTION): text for name, text in texts.items() if name.startswith(OPTION)}
    new = dict(row) | {name: text for name, text in texts.items() if not name.startswith(OPTION)}
    if options:
        new["options"] = options if isinstance(row["options"], dict) else list(options.values())
    return new


def read_translation(text: str, source: Mapping[str, str]) -> dict[str, str]:
    """The translated fields of a reply. Raises BadReply, also for a question left as it was or options made equal."""
    found = read_fields(text, list(source))
    if found.get("question") == source.get("question", "").strip():
        raise BadReply("the question is left as it was")
    options = [found[name] for name in found if name.startswith(OPTION)]
    if len(set(options)) < len({text.strip() for name, text in source.items() if name.startswith(OPTION)}):
        raise BadReply("two options became one")
    return found


def read_score(text: str) -> int:
    """A referee's score. Raises BadReply."""
    score = read_fields(text, ["score"])["score"]
    if score not in [str(value) for value in range(BEST + 1)]:
        raise BadReply(f"a score that is none of 0..{BEST}")
    return int(score)


def write_asked(args: argparse.Namespace) -> None:
    """A request a question."""
    text = read_prompt_texts(args.prompts, ["translate"])["translate"]
    rows = _questions(args)
    requests = []
    for name, row in rows.items():
        source = texts_of(row, args.fields)
        if not source:
            raise UserError(f"{args.questions}: id '{name}' has none of the columns {', '.join(args.fields)}")
        values = {**row, "fields": write_fields(source)}
        more = {"question_id": name, "source_text": source}
        requests.append(RequestRow(id=name, prompt=text.messages(values), more=more))
    write_requests(args.out, requests)
    print(f"{len(rows)} questions: {len(requests)} requests in {args.out}")


def write_translated(args: argparse.Namespace) -> None:
    """The questions whose translation can be read, and requests for the others."""
    if len(args.requests) != len(args.samples):
        raise UserError("--requests and --samples: name as many files of both, each request's samples at its place")
    rows = _questions(args)
    bad: Counter[str] = Counter()
    asked: dict[str, tuple[RequestRow, dict[str, str]]] = {}
    done: dict[str, Row] = {}
    for requests, samples in zip(args.requests, args.samples, strict=True):
        carried = _carried(requests, rows)
        asked |= {own.more["question_id"]: (own, own.more["source_text"]) for own in carried.values()}
        for answer in read_answers(requests, samples):
            name = carried[answer.id].more["question_id"]
            if name in done:
                continue
            try:
                done[name] = _translated(rows[name], answer, asked[name][1], args)
            except BadReply as error:
                bad[str(error)] += 1
    write_rows(args.out, (done[name] for name in rows if name in done))
    missing = [own for name, (own, _) in asked.items() if name not in done]
    if args.again is not None:
        number = len(args.requests)
        again = [
            RequestRow(id=f"{own.more['question_id']}#{number}", prompt=own.prompt, more=own.more) for own in missing
        ]
        write_requests(args.again, again)
    there = f"{len(done)} of {len(rows)} questions translated in {args.out}, {len(missing)} missing"
    print(there + counted(bad).replace("dropped", "unreadable"))


def _translated(row: Row, answer: Answer, source: Mapping[str, str], args: argparse.Namespace) -> Row:
    if answer.sample.finish_reason == "length":
        raise BadReply("cut off")
    new = with_texts(row, read_translation(answer.sample.text, source))
    lang = {} if args.lang is None else {"lang": args.lang}
    return {**new, **lang, "source_text": dict(source), "translated_by": made_by(answer.sample)}


def _carried(path: str, rows: Mapping[str, Row]) -> dict[str, RequestRow]:
    """The rows of a file of requests of ours, by id. Raises DataErrors."""

    def check(item: tuple[int, object]) -> RequestRow:
        line, value = item
        name, source = (value.get("question_id"), value.get("source_text")) if isinstance(value, dict) else (None, None)
        if not isinstance(value, dict) or not isinstance(source, dict) or name not in rows:
            problem = "is no question of --questions, or these are no requests of this command"
            raise DataError(path, line, field="question_id", problem=problem)
        try:
            same = texts_of(rows[name], [key for key in source if not key.startswith(OPTION)])
            same |= texts_of(rows[name], ["options"]) if any(key.startswith(OPTION) for key in source) else {}
        except UserError:
            same = {}
        if same != source:
            raise DataError(path, line, field="source_text", problem="the question has changed since; ask anew")
        own = {"question_id": name, "source_text": source}
        return RequestRow(id=value["id"], prompt=prompts[value["id"]], more=own)

    prompts = {prompt.id: prompt.prompt for prompt in read_prompts(path)}
    return {own.id: own for own in check_each(iter_jsonl(path, may_be_empty=True), check)}


def write_referee(args: argparse.Namespace) -> None:
    """A request a translated question, for one criterion."""
    text = read_prompt_texts(args.prompts, [args.table])[args.table]
    requests = []
    for row in _translations(args.rows):
        ours = _pair_of_texts(row)
        values = {**row, "source": write_fields(ours[0]), "translation": write_fields(ours[1])}
        more = {"criterion": args.table, "translation_digest": digest_of(ours[1])}
        requests.append(RequestRow(id=str(row["id"]), prompt=text.messages(values), more=more))
    write_requests(args.out, requests)
    print(f"{len(requests)} requests to a referee [{args.table}] in {args.out}")


def write_kept(args: argparse.Namespace) -> None:
    """The translations that enough referees score high enough."""
    names = [name for name, _, _ in args.referee]
    if len(set(names)) < len(names):
        raise UserError("--referee: give each referee a name of its own")
    rows = _translations(args.rows)
    scores = {name: _scores(rows, requests, samples) for name, requests, samples in args.referee}
    kept, approved = [], Counter[str]()
    for row in rows:
        own = {name: scores[name][str(row["id"])] for name in names}
        yes = [name for name, score in own.items() if score is not None and score >= args.threshold]
        approved.update(yes)
        if len(yes) == len(names) if args.rule == "unanimous" else 2 * len(yes) > len(names):
            kept.append({**row, "referees": own})
    write_rows(args.out, kept)
    said = [
        f"{name}: {approved[name]} approved, {sum(score is None for score in scores[name].values())} without a score"
        for name in names
    ]
    rule = f"{args.rule} of {len(names)}, from {args.threshold} on"
    print(f"{len(rows)} translations: {len(kept)} kept in {args.out} ({rule}); " + "; ".join(said))


def _scores(rows: Sequence[Row], requests: str, samples: str) -> dict[str, int | None]:
    """By row: the first readable score of a referee; None: there is none."""
    asked = {str(value["id"]): value for _, value in iter_jsonl(requests, may_be_empty=True) if isinstance(value, dict)}
    for row in rows:
        name = str(row["id"])
        if asked.get(name, {}).get("translation_digest") != digest_of(_pair_of_texts(row)[1]):
            raise UserError(f"{requests}: id '{name}' was not asked about this translation; write the requests anew")
    found: dict[str, int | None] = {str(row["id"]): None for row in rows}
    for answer in read_answers(requests, samples):
        if found.get(answer.id, 0) is None:
            try:
                found[answer.id] = read_score(answer.sample.text)
            except BadReply:
                continue
    return found


def _pair_of_texts(row: Row) -> tuple[dict[str, str], dict[str, str]]:
    """The source's fields and the translation's."""
    source = row["source_text"]
    names = dict.fromkeys("options" if name.startswith(OPTION) else name for name in source)
    return source, texts_of(row, list(names))


def _translations(path: str) -> list[Row]:
    def check(item: tuple[int, object]) -> Row:
        line, value = item
        if not isinstance(value, dict) or not isinstance(value.get("source_text"), dict):
            raise DataError(path, line, field="source_text", problem="missing: this is no row of `translate rows`")
        return value

    return check_each(iter_jsonl(path, may_be_empty=True), check)


def _questions(args: argparse.Namespace) -> dict[str, Row]:
    """The rows of --questions as they stand, by id, after the check that all builders make."""
    names = [question.id for question in read_questions(args.questions, args.kind)]
    rows = [value for _, value in iter_jsonl(args.questions) if isinstance(value, dict)]
    return dict(zip(names, rows, strict=True))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.translate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    asking = commands.add_parser("requests", allow_abbrev=False, help="what the translator is asked")
    reading = commands.add_parser("rows", allow_abbrev=False, help="translated questions of what came back")
    for own in (asking, reading):
        own.add_argument("--questions", required=True, help="JSON Lines of questions")
        own.add_argument("--kind", required=True, choices=KINDS, help="what the answers are")
    asking.add_argument("--fields", nargs="+", default=["question"], help="columns to translate (default question)")
    reading.add_argument("--requests", nargs="+", required=True, help="files of requests, the first and those --again")
    reading.add_argument("--samples", nargs="+", required=True, help="the samples of each")
    reading.add_argument("--lang", help="written into the column 'lang'")
    reading.add_argument("--again", help="JSON Lines of requests for what is missing, under new ids")
    judging = commands.add_parser("referee", allow_abbrev=False, help="what a referee is asked")
    judging.add_argument("--table", required=True, help="table of the criterion in the TOML file")
    for own in (asking, judging):
        own.add_argument("--prompts", required=True, help="TOML with a table for each text")
    keeping = commands.add_parser("filter", allow_abbrev=False, help="the translations that referees approve of")
    for own in (judging, keeping):
        own.add_argument("--rows", required=True, help="translated questions, of `rows`")
    keeping.add_argument("--referee", nargs=3, action="append", required=True, metavar=("NAME", "REQUESTS", "SAMPLES"))
    keeping.add_argument(
        "--threshold", type=int, required=True, choices=range(BEST + 1), help="a referee approves from this score on"
    )
    keeping.add_argument("--rule", required=True, choices=["unanimous", "majority"], help="majority: more than half")
    for own in (asking, reading, judging, keeping):
        own.add_argument("--out", required=True, help="JSON Lines, written anew and whole")
    return parser


if __name__ == "__main__":
    sys.exit(main())

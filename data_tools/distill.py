"""Worked answers of a teacher as SFT rows, where they end right and look as they must; questions that answers agree on.

    python -m data_tools.distill requests --questions Q --kind option --prompts P.toml --out R.jsonl   # table [distill]
    python -m eval.sample ... --prompts R.jsonl --out S.jsonl --n 5
    python -m data_tools.verify --kind option --tasks Q --samples S.jsonl --out V.jsonl
    python -m data_tools.distill rows --questions Q --kind option --requests R.jsonl --samples S.jsonl \\
        --verdicts V.jsonl --closing 'the answer is \\([A-E]\\)' --out sft.jsonl
    python -m data_tools.distill agree --questions Q --kind option --verdicts V.jsonl --least 4 --of 5 --out Q2.jsonl

`rows` keeps samples judged correct that ended by themselves, whose last line has the closing phrase (--closing), that
are made of the tags asked for and nothing else (--tags think answer: each once, in this order), and that are within the
lengths; of a question at most --keep, the first or the shortest ones. With `--train-prompts` the row has another prompt
than the teacher had (table [train]): a teacher may have been shown the right answer or an example. Samples of questions
that --questions does not have are passed over and counted.

`agree` is for questions that a model wrote, whose key nobody checked: kept are those whose key at least --least of --of
sampled answers reach. (It cannot tell a wrong key that the model believes in.) No model is called here.
"""

import argparse
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from data_tools.chunks import words_in
from data_tools.command import counted, positive, run
from data_tools.errors import UserError
from data_tools.fields import BadReply
from data_tools.jsonl import iter_jsonl, write_rows
from data_tools.pairs.carried import CUT, add_files, add_questions, read_by_id
from data_tools.pairs.exchange import (
    Answer,
    PromptText,
    RequestRow,
    prompt_json,
    read_answers,
    read_prompt_texts,
    read_verdicts,
    write_requests,
)
from data_tools.pairs.record import made_by
from data_tools.questions import Question, question_id
from data_tools.schema import Text
from data_tools.steps import compiled

SOURCE = "distill"
Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code: 0, or 2 with one line a fault of the input."""
    return run(_parser(), argv, {"requests": write_asked, "rows": write_distilled, "agree": write_agreed})


def write_asked(args: argparse.Namespace) -> None:
    """A request a question; how many tries is said where they are sampled."""
    text = read_prompt_texts(args.prompts, ["distill"])["distill"]
    questions = read_by_id(args)
    write_requests(
        args.out,
        [RequestRow(id=own.id, prompt=_filled(text, own), more={"question_id": own.id}) for own in questions.values()],
    )
    print(f"{len(questions)} questions: {len(questions)} requests in {args.out}")


def write_distilled(args: argparse.Namespace) -> None:
    """The samples that pass, as SFT rows."""
    questions = read_by_id(args)
    train = None if args.train_prompts is None else read_prompt_texts(args.train_prompts, ["train"])["train"]
    closing = None if args.closing is None else compiled(args.closing, "--closing")
    dropped: Counter[str] = Counter()
    passed: dict[str, list[Answer]] = defaultdict(list)
    answers = read_answers(args.requests, args.samples, args.verdicts)
    for answer in answers:
        name = question_id(answer.id, questions)
        try:
            if name is None:
                raise BadReply("of no question of --questions")
            check_answer(answer, closing, args.tags, args.least_words, args.most_words)
            if any(other.sample.text == answer.sample.text for other in passed[name]):
                raise BadReply("the same again")
        except BadReply as error:
            dropped[str(error)] += 1
        else:
            passed[name].append(answer)
    rows: list[Row] = []
    for name, question in questions.items():
        own = passed.get(name, [])
        if args.prefer == "shortest":
            own = sorted(own, key=lambda answer: words_in(answer.sample.text))
        dropped["not needed"] += len(own[args.keep :])
        rows += [_row(question, answer, train) for answer in own[: args.keep]]
    write_rows(args.out, rows)
    kept = len({row["question_id"] for row in rows})
    head = f"{len(questions)} questions, {len(answers)} samples: {len(rows)} rows of {kept} questions in {args.out}"
    print(head + counted(dropped))


def check_answer(
    answer: Answer, closing: re.Pattern[str] | None, tags: Sequence[str], least: int, most: int | None
) -> None:
    """Raises BadReply for a sample that is not to be learnt from, with the reason."""
    text = answer.sample.text.strip()
    if answer.verdict != "correct":
        raise BadReply(f"judged {answer.verdict}")
    if answer.sample.finish_reason == "length":
        raise BadReply(CUT)
    if closing is not None and not closing.search(text.splitlines()[-1]):
        raise BadReply("without the closing phrase")
    if tags:
        form = r"\s*".join(f"<{re.escape(tag)}>(.*?)</{re.escape(tag)}>" for tag in tags)
        once = all(text.count(f"<{tag}>") == text.count(f"</{tag}>") == 1 for tag in tags)
        match = re.fullmatch(form, text, re.DOTALL)
        if not once or match is None or not all(own.strip() for own in match.groups()):
            raise BadReply(f"not of the form {', '.join(tags)}")
    words = words_in(text)
    if words < least:
        raise BadReply(f"under {least} words")
    if most is not None and words > most:
        raise BadReply(f"over {most} words")


def _row(question: Question, answer: Answer, train: PromptText | None) -> Row:
    prompt = answer.prompt if train is None else _filled(train, question)
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt_json(prompt)
    assert isinstance(asked, list)
    subject = question.values.get("subject")
    return {
        "id": f"{answer.id}#{answer.sample.sample}",
        "messages": [*asked, {"role": "assistant", "content": answer.sample.text.strip()}],
        "source": SOURCE,
        "question_id": question.id,
        **({} if subject is None else {"subject": subject}),
        "verified": answer.verdict,
        "made_by": made_by(answer.sample),
    }


def _filled(text: PromptText, question: Question) -> Text:
    return text.messages({**question.values, "id": question.id})


def write_agreed(args: argparse.Namespace) -> None:
    """The questions whose key enough answers reach."""
    if args.least > args.of:
        raise UserError(f"--least {args.least}: must be at most --of {args.of}")
    questions = read_by_id(args)
    said: dict[str, Counter[str]] = {name: Counter() for name in questions}
    strange = 0
    for (name, _), verdict in read_verdicts(args.verdicts).items():
        own = question_id(name, questions)
        if own is None:
            strange += 1
        else:
            said[own][verdict] += 1
    for name, counts in said.items():
        if counts.total() not in (0, args.of):
            problem = f"id '{name}' has {counts.total()} verdicts, --of is {args.of}"
            raise UserError(f"{args.verdicts}: {problem}; judge as many samples of every question")
    kept, dropped = [], Counter({"verdicts of other questions": strange})
    raw = [row for _, row in iter_jsonl(args.questions, may_be_empty=True) if isinstance(row, dict)]
    for counts, row in zip(said.values(), raw, strict=True):
        if not counts.total():
            dropped["unanswered"] += 1
        elif counts["correct"] < args.least:
            dropped[f"reached by {counts['correct']}"] += 1
        else:
            agreement = {"right": counts["correct"], "wrong": counts["wrong"], "of": args.of}
            kept.append({**row, "agreement": agreement})
    write_rows(args.out, kept)
    rule = f"at least {args.least} of {args.of} answers reach the key"
    print(f"{len(questions)} questions: {len(kept)} kept in {args.out}, {rule}{counted(dict(sorted(dropped.items())))}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.distill",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    asking = commands.add_parser("requests", allow_abbrev=False, help="what the teacher is asked")
    add_questions(asking)
    asking.add_argument("--prompts", required=True, help="TOML with a table [distill]")
    building = commands.add_parser("rows", allow_abbrev=False, help="SFT rows of the samples that pass")
    add_questions(building)
    add_files(building, verdicts=True, whose="the teacher")
    building.add_argument("--train-prompts", metavar="TOML", help="table [train]: the rows' prompt (default: as asked)")
    building.add_argument("--closing", metavar="REGEX", help="the last line must have it")
    building.add_argument("--tags", nargs="+", default=[], help="the text is these tags, in this order")
    building.add_argument("--least-words", type=int, default=0, help="of a text (default 0)")
    building.add_argument("--most-words", type=positive, help="of a text (default: any)")
    building.add_argument("--keep", type=positive, default=1, help="rows a question, at most (default 1)")
    building.add_argument("--prefer", choices=["first", "shortest"], default="first", help="which (default first)")
    agreeing = commands.add_parser("agree", allow_abbrev=False, help="questions whose key sampled answers reach")
    add_questions(agreeing)
    agreeing.add_argument("--verdicts", required=True, help="JSON Lines of verdicts on --of samples a question")
    agreeing.add_argument("--least", type=positive, required=True, metavar="M", help="answers that reach the key")
    agreeing.add_argument("--of", type=positive, required=True, metavar="K", help="answers of every question")
    for own in (asking, agreeing):
        own.add_argument("--out", required=True, help="JSON Lines, written anew and whole")
    return parser


if __name__ == "__main__":
    sys.exit(main())

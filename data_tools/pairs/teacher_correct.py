"""Pairs of a student's wrong answer and a teacher's right one, which must not read as a correction.

The teacher sees the question, the known answer and what the student wrote, and writes the answer as the student should
have written it. The pair has the student's own prompt, so that what is learnt is to answer, not to correct
(Gaokerena-R, method A; the published pairs were lower-cased and not verified: texts are never edited here, and the
teacher's are judged unless `--verified note` says otherwise).

    python -m data_tools.pairs.teacher_correct requests --questions Q --kind option --requests R --samples S \\
        --verdicts V --prompts P.toml --out TR          # table [teacher_correct]
    python -m data_tools.pairs.teacher_correct pairs --requests TR --samples TS --verdicts TV --out pairs.jsonl

No model is called here, and nothing is judged.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence

from data_tools.command import counted, run
from data_tools.errors import UserError
from data_tools.pairs.carried import (
    CUT,
    Carried,
    add_choice_of_wrong,
    add_files,
    add_questions,
    read_by_id,
    read_carried,
    values_of,
    with_questions,
    wrong_answers,
)
from data_tools.pairs.exchange import Answer, RequestRow, read_answers, read_prompt_texts, write_requests
from data_tools.pairs.leaks import Phrases, add_phrases
from data_tools.pairs.record import PairRecord, made_by, write_pairs

SOURCE = "teacher_correct"


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code: 0, or 2 with one line a fault of the input."""
    return run(_parser(), argv, {"requests": write_teacher_requests, "pairs": write_teacher_pairs})


def write_teacher_requests(args: argparse.Namespace) -> None:
    """One request to the teacher for each wrong answer of the student that is used."""
    questions = read_by_id(args)
    text = read_prompt_texts(args.prompts, [SOURCE])[SOURCE]
    answers = list(with_questions(read_answers(args.requests, args.samples, args.verdicts), questions, args.requests))
    dropped: Counter[str] = Counter()
    requests = [
        RequestRow(
            id=f"{student.name}#t",
            prompt=text.messages(values_of(question, student=student.text)),
            more={"question_id": question.id, "student": student.row()},
        )
        for student, question in wrong_answers(
            answers, invalid=args.invalid, per_question=args.per_question, dropped=dropped
        )
    ]
    write_requests(args.out, requests)
    head = f"{len(questions)} questions, {len(answers)} answers: {len(requests)} requests in {args.out}"
    print(head + counted(dropped))


def write_teacher_pairs(args: argparse.Namespace) -> None:
    """A pair of each request's first answer that may be used."""
    if args.verified == "require" and args.verdicts is None:
        raise UserError(
            "--verified require needs --verdicts on the teacher's answers; --verified note takes them unjudged"
        )
    carried = read_carried(args.requests)
    phrases = Phrases.read(args.phrases)
    dropped: Counter[str] = Counter()
    pairs: dict[str, PairRecord] = {}
    answers = read_answers(args.requests, args.samples, args.verdicts)
    for answer in answers:
        if answer.id in pairs:
            dropped["not needed"] += 1
            continue
        why = _refused(answer, carried[answer.id], phrases, args.verified)
        if why is None:
            pairs[answer.id] = _pair(answer, carried[answer.id], args.round)
        else:
            dropped[why] += 1
    write_pairs(args.out, pairs.values())
    for line in phrases.lines():
        print(line)
    unanswered = len(carried) - len({answer.id for answer in answers})
    head = (
        f"{len(carried)} requests ({unanswered} unanswered), {len(answers)} answers: {len(pairs)} pairs in {args.out}"
    )
    print(head + counted(dropped))


def _refused(answer: Answer, carried: Carried, phrases: Phrases, verified: str) -> str | None:
    """Why the teacher's text is not used."""
    text = answer.sample.text
    if not text.strip():
        return "empty"
    if answer.sample.finish_reason == "length":
        return CUT
    if text == carried.student.text:
        return "the student's own words"
    if verified == "require" and answer.verdict != "correct":
        return f"judged {answer.verdict}"
    return "reads as a correction" if phrases.found_in(text) else None


def _pair(answer: Answer, carried: Carried, round_: int) -> PairRecord:
    student = carried.student
    return PairRecord(
        id=f"{answer.id}#{answer.sample.sample}",
        prompt=student.prompt,
        chosen=answer.sample.text,
        rejected=student.text,
        source=SOURCE,
        question_id=carried.question_id,
        verified={"chosen": answer.verdict, "rejected": student.verdict},
        round=round_,
        made_by={"chosen": made_by(answer.sample), "rejected": student.made_by},
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.pairs.teacher_correct",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    asking = commands.add_parser("requests", allow_abbrev=False, help="what the teacher is asked")
    add_questions(asking)
    add_files(asking, verdicts=True, whose="the student")
    add_choice_of_wrong(asking)
    asking.add_argument("--prompts", required=True, help="TOML with a table [teacher_correct]")
    building = commands.add_parser("pairs", allow_abbrev=False, help="pairs of what came back")
    add_files(building, verdicts=False, whose="the teacher")
    building.add_argument(
        "--verified",
        choices=["require", "note"],
        default="require",
        help="only answers judged correct (default), or any, with the verdict, if there is one, in the pair",
    )
    add_phrases(building)
    building.add_argument("--round", type=int, default=0, help="of an iterated method (default 0)")
    return parser


if __name__ == "__main__":
    sys.exit(main())

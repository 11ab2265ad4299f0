"""Pairs of a first wrong answer and the student's own right one, found after a teacher's critique.

In each turn the teacher criticises the student's latest answer without naming the right option, and the student tries
again. A question that succeeded is not asked again (Gaokerena-R, method B; the published loop went on). The pair has
the student's first prompt, without critique.

    turn t = 1, 2, ...; --requests, --samples, --verdicts: the student's files of turns 0 to t-1, 0 being first answers
    ... critique_retry critique-requests --questions Q --kind option --requests R0 R1 --samples S0 S1 \\
        --verdicts V0 V1 --prompts P.toml --out C2               # table [critique]
    ... critique_retry retry-requests --questions Q --kind option --requests C2 --samples CS2 --prompts P.toml --out R2
    ... critique_retry pairs --questions Q --kind option --requests R0 R1 R2 --samples S0 S1 S2 --verdicts V0 V1 V2 \\
        --out pairs.jsonl

All that is known of a question is in the files of its turns. No model is called here, and nothing is judged.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

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
from data_tools.pairs.critique_turns import Chain, add_retries, latest_of, read_rows, turn_files
from data_tools.pairs.exchange import (
    Answer,
    PromptText,
    RequestRow,
    read_answers,
    read_prompt_texts,
    write_requests,
)
from data_tools.pairs.leaks import Phrases, add_phrases, leak_of
from data_tools.pairs.record import PairRecord, made_by, write_pairs
from data_tools.questions import Question
from data_tools.schema import Message, Text

SOURCE = "critique_retry"
RETRY_TABLES = {"any": "retry", "different": "retry_different"}


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code: 0, or 2 with one line a fault of the input."""
    commands: dict[str, Callable[[argparse.Namespace], None]] = {
        "critique-requests": write_critique_requests,
        "retry-requests": write_retry_requests,
        "pairs": write_retry_pairs,
    }
    return run(_parser(), argv, commands)


def write_critique_requests(args: argparse.Namespace) -> None:
    """One request to the teacher for each chain that is still wrong."""
    questions = read_by_id(args)
    text = read_prompt_texts(args.prompts, ["critique"])["critique"]
    dropped: Counter[str] = Counter()
    chains = _chains(args, questions, dropped)
    turn = len(args.requests)
    requests, repeated = [], 0
    for chain in chains.values():
        if chain.solved:
            dropped["solved in an earlier turn"] += 1
        elif not chain.answered(turn - 1) and args.unanswered == "drop":
            dropped["without a retry in the last turn"] += 1
        else:
            repeated += chain.repeated
            requests.append(_critique_request(chain, text, turn))
    write_requests(args.out, requests)
    head = f"turn {turn}: {len(questions)} questions, {len(chains)} wrong first answers: {len(requests)} requests"
    again = f" ({repeated} chose again what was wrong before)" if repeated else ""
    print(f"{head} in {args.out}{again}{counted(dropped)}")


def _critique_request(chain: Chain, text: PromptText, turn: int) -> RequestRow:
    latest = latest_of(chain)
    more: dict[str, Any] = {
        "question_id": chain.question.id,
        "turn": turn,
        "chain": chain.name,
        "tried": chain.tried,
        "first_messages": len(_chat(chain.first.prompt, chain.first.id)),
        "student": latest.row(),
    }
    values = values_of(chain.question, student=latest.text, tried=", ".join(chain.tried))
    return RequestRow(id=f"{chain.name}#c{turn}", prompt=text.messages(values), more=more)


def write_retry_requests(args: argparse.Namespace) -> None:
    """The chats that go on after the first critique of each chain that gives nothing away."""
    questions = read_by_id(args)
    table = RETRY_TABLES[args.wrong_again]
    text = read_prompt_texts(args.prompts, [table])[table]
    if text.system is not None:
        raise UserError(f"{args.prompts}: [{table}]: a chat that goes on has its system message already; remove it")
    carried = read_carried(args.requests)
    answers = list(with_questions(read_answers(args.requests, args.samples), questions, args.requests))
    dropped: Counter[str] = Counter()
    requests: dict[str, RequestRow] = {}
    for answer, question in answers:
        if answer.id in requests:
            dropped["not needed"] += 1
        elif why := _refused_critique(answer, question):
            dropped[why] += 1
        else:
            requests[answer.id] = _retry_request(carried[answer.id], answer, question, text, args.history)
    write_requests(args.out, requests.values())
    without = len(carried) - len(requests)
    head = f"{len(carried)} requests, {len(answers)} critiques: {len(requests)} retries in {args.out}"
    print(f"{head} ({without} without a critique to be used){counted(dropped)}")


def _refused_critique(answer: Answer, question: Question) -> str | None:
    if not answer.sample.text.strip():
        return "empty"
    if answer.sample.finish_reason == "length":
        return CUT
    leak = leak_of(answer.sample.text, question)
    return leak and f"leaked ({leak})"


def _retry_request(
    carried: Carried, critique: Answer, question: Question, text: PromptText, history: str
) -> RequestRow:
    """The student's chat with its latest answer and the critique of it."""
    row, student = carried.row, carried.student
    chain, turn = str(row["chain"]), int(row["turn"])
    values = values_of(
        question, critique=critique.sample.text, student=student.text, tried=", ".join(map(str, row["tried"]))
    )
    before = _chat(student.prompt, student.id)
    if history == "last":
        before = before[: int(row["first_messages"])]
    turns = (*before, Message("assistant", student.text), *text.messages(values))
    more = {"question_id": question.id, "turn": turn, "critique": made_by(critique.sample)}
    return RequestRow(id=f"{chain}#r{turn}", prompt=turns, more=more)


def _chat(prompt: Text, name: str) -> tuple[Message, ...]:
    if isinstance(prompt, str):
        raise UserError(f"prompt '{name}' is a string, which no chat can go on from; write it as a list of messages")
    return prompt


def write_retry_pairs(args: argparse.Namespace) -> None:
    """A pair of each chain that was solved: the first wrong answer and the first correct retry."""
    questions = read_by_id(args)
    phrases = Phrases.read(args.phrases)
    dropped: Counter[str] = Counter()
    chains = _chains(args, questions, dropped)
    last = len(args.requests) - 1
    critics = [{name: row.get("critique") for name, row in read_rows(path).items()} for path in args.requests[1:]]
    pairs = []
    for chain in chains.values():
        why, pair = _pair_of(chain, phrases, critics, args.round)
        if pair is None:
            dropped[why] += 1
        else:
            pairs.append(pair)
    write_pairs(args.out, pairs)
    for line in phrases.lines():
        print(line)
    by_turn = Counter(chain.solved[0] for chain in chains.values() if chain.solved)
    solved = ", ".join(f"{by_turn[turn]} in turn {turn}" for turn in range(1, last + 1))
    head = f"{len(questions)} questions, {len(chains)} wrong first answers: {len(pairs)} pairs in {args.out}"
    print(f"{head}; solved: {solved}{counted(dropped)}")


def _pair_of(
    chain: Chain, phrases: Phrases, critics: Sequence[Mapping[str, Any]], round_: int
) -> tuple[str, PairRecord | None]:
    """The chain's pair, or why there is none. Of several right answers in the turn, the first that may be used."""
    if chain.solved is None:
        return "unsolved", None
    turn = chain.solved[0]
    why = ""
    for own, answer in chain.retries:
        if own != turn or answer.verdict != "correct":
            continue
        if answer.sample.finish_reason == "length":
            why = why or CUT
        elif phrases.found_in(answer.sample.text):
            why = why or "reads as a correction"
        else:
            critic = critics[turn - 1].get(answer.id)
            return "", PairRecord(
                id=f"{answer.id}#{answer.sample.sample}",
                prompt=chain.first.prompt,
                chosen=answer.sample.text,
                rejected=chain.first.text,
                source=SOURCE,
                question_id=chain.question.id,
                verified={"chosen": answer.verdict, "rejected": chain.first.verdict},
                round=round_,
                made_by={
                    "chosen": {**made_by(answer.sample), "turn": turn, "critique": critic},
                    "rejected": chain.first.made_by,
                },
            )
    return why, None


def _chains(args: argparse.Namespace, questions: Mapping[str, Question], dropped: Counter[str]) -> dict[str, Chain]:
    """The wrong first answers with all that came after them."""
    first, *later = turn_files(args.requests, args.samples, args.verdicts)
    answers = with_questions(read_answers(first.requests, first.samples, first.verdicts), questions, first.requests)
    wrong = wrong_answers(answers, invalid=args.invalid, per_question=args.per_question, dropped=dropped)
    chains = {own.name: Chain(own, question) for own, question in wrong}
    add_retries(chains, later, first)
    return chains


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.pairs.critique_retry",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    critique = commands.add_parser("critique-requests", allow_abbrev=False, help="what the teacher is asked in a turn")
    add_questions(critique)
    _add_turns(critique)
    add_choice_of_wrong(critique)
    critique.add_argument("--prompts", required=True, help="TOML with a table [critique]")
    critique.add_argument(
        "--unanswered",
        choices=["again", "drop"],
        default="again",
        help="a question without a retry in the last turn (its critique leaked, say): ask for a critique again "
        "(default), or drop it",
    )
    retry = commands.add_parser("retry-requests", allow_abbrev=False, help="what the student is asked in a turn")
    add_questions(retry)
    add_files(retry, verdicts=None, whose="the teacher")
    retry.add_argument("--prompts", required=True, help="TOML with a table [retry], or [retry_different]")
    retry.add_argument(
        "--wrong-again",
        choices=list(RETRY_TABLES),
        default="any",
        help="different: table [retry_different], which tells the student to choose another option",
    )
    retry.add_argument(
        "--history",
        choices=["all", "last"],
        default="all",
        help="the chat holds all turns before (default), or the first prompt and the last answer",
    )
    building = commands.add_parser("pairs", allow_abbrev=False, help="pairs of all turns")
    add_questions(building)
    _add_turns(building)
    add_choice_of_wrong(building)
    add_phrases(building)
    building.add_argument("--round", type=int, default=0, help="of an iterated method (default 0)")
    return parser


def _add_turns(parser: argparse.ArgumentParser) -> None:
    for name in ("requests", "samples", "verdicts"):
        parser.add_argument(f"--{name}", nargs="+", required=True, help=f"the student's {name}, a file a turn from 0")
    parser.add_argument("--out", required=True, help="JSON Lines, written anew and whole")


if __name__ == "__main__":
    sys.exit(main())

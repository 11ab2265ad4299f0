"""Pairs by AI feedback: judges compare two answers of one prompt, in both orders, and several of them must agree.

Every pair of a prompt's answers is a candidate, at most --pairs-per-question of them, drawn by --seed. Each is asked
about twice, with the answers swapped; only a judge that prefers the same answer both times has a vote. A reply ends
with the line `Verdict: A`, `Verdict: B` or `Verdict: tie`, or is that letter or word alone; anything else is not read.

    ... judge requests --questions Q --kind option --requests R --samples S --prompts P.toml --pairs-per-question 3 \\
        --out JR                                 # table [judge]: {first}, {second} and the question's columns
    ... judge pairs --requests JR --samples JS1 JS2 JS3 --agree 2 --out pairs.jsonl      # a file a judge

Each (file, sample number) is a judge of its own. No model is called here.
"""

import argparse
import itertools
import random
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.command import counted, positive, run
from data_tools.errors import UserError
from data_tools.pairs.carried import (
    Carried,
    FirstAnswer,
    add_questions,
    first_from,
    first_of,
    read_by_id,
    read_carried,
    values_of,
    with_questions,
)
from data_tools.pairs.exchange import PromptText, RequestRow, read_answers, read_prompt_texts, write_requests
from data_tools.pairs.judge_votes import Choice, Decision, JudgeTally, ReplyForm, Vote, decide, vote_of
from data_tools.pairs.record import PairRecord, write_pairs
from data_tools.questions import Question

SOURCE = "judge"
STRAIGHT, SWAPPED = "#12", "#21"
Judge = tuple[str, int]
"""A samples file and the number of the sample."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code: 0, or 2 with one line a fault of the input."""
    return run(_parser(), argv, {"requests": write_judge_requests, "pairs": write_judge_pairs})


def write_judge_requests(args: argparse.Namespace) -> None:
    """Two requests, one an order, for each candidate pair."""
    questions = read_by_id(args)
    text = read_prompt_texts(args.prompts, [SOURCE])[SOURCE]
    answers = read_answers(args.requests, args.samples, args.verdicts)
    dropped: Counter[str] = Counter()
    by_question: dict[str, list[tuple[FirstAnswer, FirstAnswer]]] = {}
    own_answers: dict[str, dict[str, list[FirstAnswer]]] = defaultdict(lambda: defaultdict(list))
    for answer, question in with_questions(answers, questions, args.requests):
        if answer.sample.text.strip():
            own_answers[question.id][answer.id].append(first_of(answer))
        else:
            dropped["empty answers"] += 1
    for name, by_prompt in own_answers.items():
        by_question[name] = candidates(by_prompt, args.pairs_per_question, f"{args.seed}:{name}", dropped)
    requests = [
        request
        for name, pairs in by_question.items()
        for one, two in pairs
        for request in _requests(one, two, questions[name], text)
    ]
    write_requests(args.out, requests)
    pairs = sum(map(len, by_question.values()))
    head = f"{len(questions)} questions, {len(answers)} answers: {pairs} candidate pairs, {len(requests)} requests"
    print(f"{head} in {args.out}{counted(dropped)}")


def candidates(
    by_prompt: Mapping[str, Sequence[FirstAnswer]], most: int, seed: str, dropped: Counter[str]
) -> list[tuple[FirstAnswer, FirstAnswer]]:
    """Pairs of different answers to one prompt, at most `most`, drawn by the seed, in the order of the answers."""
    found = []
    for answers in by_prompt.values():
        for one, two in itertools.combinations(answers, 2):
            if one.text == two.text:
                dropped["pairs of equal answers"] += 1
            else:
                found.append((one, two))
    if len(found) <= most:
        return found
    dropped["pairs over --pairs-per-question"] += len(found) - most
    kept = sorted(random.Random(seed).sample(range(len(found)), most))
    return [found[index] for index in kept]


def _requests(one: FirstAnswer, two: FirstAnswer, question: Question, text: PromptText) -> Iterator[RequestRow]:
    """The straight row carries both answers, the swapped one only its order."""
    for order, first, second in ((STRAIGHT, one, two), (SWAPPED, two, one)):
        more: dict[str, Any] = {"question_id": question.id, "student": one.row()}
        if order == STRAIGHT:
            more["other"] = two.row()
        prompt = text.messages(values_of(question, first=first.text, second=second.text))
        yield RequestRow(id=f"{one.id}#{one.sample}-{two.sample}{order}", prompt=prompt, more=more)


@dataclass(frozen=True, slots=True)
class _Candidate:
    name: str
    one: FirstAnswer
    two: FirstAnswer
    question_id: str


def write_judge_pairs(args: argparse.Namespace) -> None:
    """A pair of each candidate that enough judges agree on."""
    candidates_ = _read_candidates(args.requests)
    replies, tallies = _read_replies(args)
    agree = len(tallies) if args.agree is None else args.agree
    if agree > len(tallies):
        raise UserError(f"--agree {agree}: there are {len(tallies)} judges in {', '.join(args.samples)}")
    dropped: Counter[str] = Counter()
    pairs, against = [], 0
    for own in candidates_:
        votes = []
        for judge, tally in tallies.items():
            vote = vote_of(replies.get((judge, own.name + STRAIGHT)), replies.get((judge, own.name + SWAPPED)))
            tally.votes[vote] += 1
            votes.append(vote)
        decision = decide(votes, judges=len(tallies), agree=agree)
        if decision.winner is None:
            dropped[decision.why] += 1
        else:
            pairs.append(_pair(own, decision, votes, tallies, args.round))
            against += pairs[-1].verified == {"chosen": "wrong", "rejected": "correct"}
    write_pairs(args.out, pairs)
    for tally in tallies.values():
        print(tally.line())
    known = (
        f" ({against} prefer a wrong answer to a correct one)" if any(own.one.verdict for own in candidates_) else ""
    )
    head = f"{len(candidates_)} candidate pairs, {len(tallies)} judges, {agree} must agree: {len(pairs)} pairs"
    print(f"{head} in {args.out}{known}{counted(dropped)}")


def _read_candidates(path: str) -> list[_Candidate]:
    found = []
    for name, carried in read_carried(path).items():
        if name.endswith(STRAIGHT):
            found.append(
                _Candidate(name[: -len(STRAIGHT)], carried.student, _other(carried, path), carried.question_id)
            )
    return found


def _other(carried: Carried, path: str) -> FirstAnswer:
    if not isinstance(carried.row.get("other"), dict):
        raise UserError(f"{path}: '{carried.id}' holds no second answer: these are no requests to a judge")
    return first_from(carried.row["other"], path, None, "other")


def _read_replies(
    args: argparse.Namespace,
) -> tuple[dict[tuple[Judge, str], Choice | None], dict[Judge, JudgeTally]]:
    """What each judge said to each request, and a tally for each judge."""
    form = ReplyForm(args.word, args.tie)
    replies: dict[tuple[Judge, str], Choice | None] = {}
    tallies: dict[Judge, JudgeTally] = {}
    for path in args.samples:
        for answer in read_answers(args.requests, path):
            judge = (path, answer.sample.sample)
            if judge not in tallies:
                tallies[judge] = JudgeTally(f"{answer.sample.model} ({Path(path).name}, sample {judge[1]})")
            choice = form.read(answer.sample.text)
            replies[judge, answer.id] = choice
            tallies[judge].add(choice)
    return replies, dict(sorted(tallies.items(), key=lambda own: (args.samples.index(own[0][0]), own[0][1])))


def _pair(
    own: _Candidate, decision: Decision, votes: Sequence[Vote], tallies: Mapping[Judge, JudgeTally], round_: int
) -> PairRecord:
    chosen, rejected = (own.one, own.two) if decision.winner == 1 else (own.two, own.one)
    one, two = decision.shares
    shares = (one, two) if decision.winner == 1 else (two, one)
    wanted = "one" if decision.winner == 1 else "two"
    judges = [tally.name for tally, vote in zip(tallies.values(), votes, strict=True) if vote == wanted]
    return PairRecord(
        id=own.name,
        prompt=own.one.prompt,
        chosen=chosen.text,
        rejected=rejected.text,
        source=SOURCE,
        question_id=own.question_id,
        verified={"chosen": chosen.verdict, "rejected": rejected.verdict},
        scores={"chosen": shares[0], "rejected": shares[1]},
        round=round_,
        made_by={"chosen": {**chosen.made_by, "preferred_by": judges}, "rejected": rejected.made_by},
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.pairs.judge",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    asking = commands.add_parser("requests", allow_abbrev=False, help="what the judges are asked")
    add_questions(asking)
    asking.add_argument("--requests", required=True, help="JSON Lines of prompts that were answered")
    asking.add_argument("--samples", required=True, help="JSON Lines of the answers, several a prompt")
    asking.add_argument("--verdicts", help="JSON Lines of verdicts on the answers, noted in the pairs")
    asking.add_argument("--prompts", required=True, help="TOML with a table [judge]")
    asking.add_argument(
        "--pairs-per-question", type=positive, default=3, help="candidates of a question, at most (default 3)"
    )
    asking.add_argument("--seed", type=int, default=0, help="which candidates are drawn (default 0)")
    asking.add_argument("--out", required=True, help="JSON Lines, written anew and whole")
    building = commands.add_parser("pairs", allow_abbrev=False, help="pairs of what the judges said")
    building.add_argument("--requests", required=True, help="JSON Lines that the step before wrote")
    building.add_argument("--samples", nargs="+", required=True, help="JSON Lines of replies, a file a judge")
    building.add_argument("--agree", type=positive, help="judges that must prefer the same answer (default: all)")
    building.add_argument("--word", default="Verdict", help="before the colon of a reply's last line")
    building.add_argument("--tie", default="tie", help="what a reply says for neither (default tie)")
    building.add_argument("--round", type=int, default=0, help="of an iterated method (default 0)")
    building.add_argument("--out", required=True, help="JSON Lines, written anew and whole")
    return parser


if __name__ == "__main__":
    sys.exit(main())

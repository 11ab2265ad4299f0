"""Pairs of a model's own error and its correction, written by the model itself or by a teacher, and verified.

The corrector sees the question and the wrong answer, with or without the known answer, as the template has it (what it
had is written into the rows), and has N tries; only fixes that a verifier calls correct count. In rounds, each round
samples, corrects and trains anew (MedCritical; before it, with a teacher, SuperCorrect). Units of a pair:

    trajectory         the whole fix against the whole error
    answer             only what says the answer, of both, after the prompt alone: no reasoning
    first_wrong_step   from the first wrong step on. Its place is known from --labels on the error's steps (the
                       corrector is then asked to go on from the correct ones), or is where error and fix, cut into
                       steps, first differ. --carry answer: both texts begin with the correct steps, which are the same
                       tokens after the same prompt and so cancel in a difference of log-ratios. --carry user: they
                       stand in the prompt's last message, as table [so_far] has it ({prompt}, {correct_steps}), and
                       only what differs is scored.

    ... self_correct requests --questions Q --kind number --requests R --samples S --verdicts V --source self \\
        --tries 4 --prompts P.toml --out CR      # table [self_correct], with --labels [self_correct_step]
    ... self_correct pairs --requests CR --samples CS --verdicts CV --unit trajectory --out pairs.jsonl

No model is called here, and nothing is judged.
"""

import argparse
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from data_tools.command import counted, positive, run
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
from data_tools.pairs.correction_units import (
    PAIR_UNITS,
    Parts,
    StepCut,
    after_shared_steps,
    after_wrong_step,
    answer_part,
    first_wrong_step,
    read_labels,
)
from data_tools.pairs.exchange import (
    Answer,
    PromptText,
    RequestRow,
    read_answers,
    read_prompt_texts,
    write_requests,
)
from data_tools.pairs.leaks import Phrases, add_phrases
from data_tools.pairs.record import PairRecord, made_by, write_pairs
from data_tools.placeholders import fill, names_in
from data_tools.schema import Message, Text
from data_tools.steps import UNITS, compiled

SOURCE = "self_correct"
HINTS = {"gold", "gold_text", "explanation", "answer", "final_answer", "reference", "solution"}
"""Placeholders by which a template gives the known answer away."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code: 0, or 2 with one line a fault of the input."""
    return run(_parser(), argv, {"requests": write_correction_requests, "pairs": write_correction_pairs})


def write_correction_requests(args: argparse.Namespace) -> None:
    """One request to the corrector for each wrong answer that is used."""
    questions = read_by_id(args)
    table = SOURCE if args.labels is None else f"{SOURCE}_step"
    text = read_prompt_texts(args.prompts, [table])[table]
    labels = None if args.labels is None else read_labels(args.labels)
    answers = list(with_questions(read_answers(args.requests, args.samples, args.verdicts), questions, args.requests))
    dropped: Counter[str] = Counter()
    common: dict[str, Any] = {"source": args.source, "hint": hint_of(text)}
    if args.tries is not None:
        common["settings"] = {"n": args.tries}
    requests = []
    wrong = wrong_answers(answers, invalid=args.invalid, per_question=args.per_question, dropped=dropped)
    for student, question in wrong:
        more = {"question_id": question.id, **common, "student": student.row()}
        values = values_of(question, student=student.text)
        if labels is not None:
            if student.name not in labels:
                dropped["without labels"] += 1
                continue
            place = first_wrong_step(student.text, student.name, labels, _cut(args))
            if place is None:
                dropped["without a wrong step"] += 1
                continue
            more["correct_steps"] = place.shared
            values |= {"correct_steps": place.shared, "wrong_step": place.step}
        requests.append(RequestRow(id=f"{student.name}#s", prompt=text.messages(values), more=more))
    write_requests(args.out, requests)
    head = f"{len(questions)} questions, {len(answers)} answers: {len(requests)} requests in {args.out}"
    print(f"{head} (source {args.source}, hint {common['hint']}){counted(dropped)}")


def hint_of(text: PromptText) -> str:
    """ "gold" where the template shows what is known to be right, else "none"."""
    return "gold" if HINTS & (names_in(text.text) | names_in(text.system or "")) else "none"


def write_correction_pairs(args: argparse.Namespace) -> None:
    """Pairs of each error and its first fixes that may be used."""
    unit = _Unit.of(args)
    carried = read_carried(args.requests)
    phrases = Phrases.read(args.phrases)
    dropped: Counter[str] = Counter()
    pairs: dict[str, list[PairRecord]] = defaultdict(list)
    answers = read_answers(args.requests, args.samples, args.verdicts)
    for answer in answers:
        own = carried[answer.id]
        _check_source(own, answer, args.samples)
        if len(pairs[answer.id]) == args.per_error:
            dropped["not needed"] += 1
            continue
        why = _refused(answer, own, phrases)
        parts = unit.parts(own, answer.sample.text) if why is None else why
        if isinstance(parts, str):
            dropped[parts] += 1
        else:
            pairs[answer.id].append(_pair(answer, own, unit, parts, args.round))
    found = [pair for some in pairs.values() for pair in some]
    write_pairs(args.out, found)
    for line in phrases.lines():
        print(line)
    solved = sum(bool(some) for some in pairs.values())
    head = f"{len(carried)} errors ({solved} with a pair), {len(answers)} fixes: {len(found)} pairs in {args.out}"
    print(head + counted(dropped))


def _refused(answer: Answer, carried: Carried, phrases: Phrases) -> str | None:
    if answer.verdict != "correct":
        return f"judged {answer.verdict}"
    if answer.sample.finish_reason == "length":
        return CUT
    if answer.sample.text == carried.student.text:
        return "the same text"
    return "reads as a correction" if phrases.found_in(answer.sample.text) else None


def _check_source(carried: Carried, answer: Answer, path: str) -> None:
    """A model that corrects itself is the model that erred."""
    erred, fixed = carried.student.made_by.get("model"), answer.sample.model
    if carried.row.get("source") == "self" and erred != fixed:
        problem = f"the fix of '{answer.id}' is by '{fixed}', the error by '{erred}'"
        raise UserError(f"{path}: {problem}; make the requests with --source teacher")


@dataclass(frozen=True, slots=True)
class _Unit:
    """What of error and fix is compared, and where shared steps go."""

    args: argparse.Namespace
    so_far: PromptText | None

    @classmethod
    def of(cls, args: argparse.Namespace) -> "_Unit":
        """Raises UserError for options that do not fit."""
        needs_table = args.unit == "first_wrong_step" and args.carry == "user"
        if needs_table and args.prompts is None:
            raise UserError("--carry user needs --prompts with a table [so_far]")
        so_far = read_prompt_texts(args.prompts, ["so_far"])["so_far"] if needs_table else None
        if so_far is not None and so_far.system is not None:
            raise UserError(f"{args.prompts}: [so_far]: the prompt has its own system message; remove this one")
        return cls(args, so_far)

    def parts(self, carried: Carried, fix: str) -> Parts | str:
        """What is compared, or why nothing is."""
        found = self._cut_out(carried, fix)
        if found is None:
            return "without an answer part" if self.args.unit == "answer" else "without a shared first step"
        if not found.chosen.strip() or not found.rejected.strip() or found.chosen == found.rejected:
            return "equal or empty parts"
        return found

    def _cut_out(self, carried: Carried, fix: str) -> Parts | None:
        error = carried.student.text
        if self.args.unit == "trajectory":
            return Parts(fix, error)
        if self.args.unit == "answer":
            closing = None if self.args.closing is None else compiled(self.args.closing, "--closing")
            chosen, rejected = answer_part(fix, closing), answer_part(error, closing)
            return None if chosen is None or rejected is None else Parts(chosen, rejected)
        shared = carried.row.get("correct_steps")
        if isinstance(shared, str):
            return after_wrong_step(error, fix, shared)
        return after_shared_steps(error, fix, _cut(self.args))

    def prompt(self, carried: Carried, parts: Parts) -> Text:
        """The student's prompt, with the correct steps in its last message where they go there."""
        prompt = carried.student.prompt
        if self.so_far is None or not parts.shared:
            return prompt
        asked = prompt if isinstance(prompt, str) else prompt[-1].content
        try:
            text = fill(self.so_far.text, {"prompt": asked, "correct_steps": parts.shared})
        except KeyError as error:
            raise UserError(f"[so_far] asks for {{{error.args[0]}}}: it has prompt and correct_steps") from None
        return text if isinstance(prompt, str) else (*prompt[:-1], Message("user", text))


def _pair(answer: Answer, carried: Carried, unit: _Unit, parts: Parts, round_: int) -> PairRecord:
    student = carried.student
    before = parts.shared if unit.so_far is None else ""
    how = {name: carried.row.get(name) for name in ("source", "hint")}
    return PairRecord(
        id=f"{answer.id}#{answer.sample.sample}",
        prompt=unit.prompt(carried, parts),
        chosen=before + parts.chosen,
        rejected=before + parts.rejected,
        source=SOURCE,
        question_id=carried.question_id,
        verified={"chosen": answer.verdict, "rejected": student.verdict},
        round=round_,
        made_by={"chosen": {**made_by(answer.sample), **how, "unit": unit.args.unit}, "rejected": student.made_by},
    )


def _cut(args: argparse.Namespace) -> StepCut:
    pattern = None if args.step_pattern is None else compiled(args.step_pattern, "--step-pattern")
    return StepCut(args.steps, pattern)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.pairs.self_correct",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    asking = commands.add_parser("requests", allow_abbrev=False, help="what the corrector is asked")
    add_questions(asking)
    add_files(asking, verdicts=True, whose="the model")
    add_choice_of_wrong(asking)
    asking.add_argument("--prompts", required=True, help="TOML with a table [self_correct] or [self_correct_step]")
    asking.add_argument(
        "--source", choices=["self", "teacher"], required=True, help="who will answer: the same model, or another"
    )
    asking.add_argument("--tries", type=positive, help="fixes to draw for each error (default: the sampler's --n)")
    asking.add_argument("--labels", help="JSON Lines of labels on the errors' steps: ask about the first wrong one")
    building = commands.add_parser("pairs", allow_abbrev=False, help="pairs of what came back")
    add_files(building, verdicts=True, whose="the corrector")
    building.add_argument("--unit", choices=PAIR_UNITS, default="trajectory", help="see above (default trajectory)")
    building.add_argument("--per-error", type=positive, default=1, help="pairs of an error, at most (default 1)")
    building.add_argument("--closing", help="answer: a regular expression whose last match begins the answer's part")
    building.add_argument(
        "--carry", choices=["answer", "user"], default="answer", help="first_wrong_step: see above (default answer)"
    )
    building.add_argument("--prompts", help="TOML with a table [so_far], for --carry user")
    add_phrases(building)
    building.add_argument("--round", type=int, default=0, help="of an iterated method (default 0)")
    for command in (asking, building):
        command.add_argument("--steps", choices=UNITS, default="line", help="how texts are cut (default line)")
        command.add_argument("--step-pattern", help="--steps regex: each match ends a step")
    return parser


if __name__ == "__main__":
    sys.exit(main())

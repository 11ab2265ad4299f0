"""A pool of judged answers that grows over rounds: what was asked, what came and the verdict, in one file.

    python -m data_tools.pool add --requests R.jsonl --samples S.jsonl --verdicts V.jsonl --questions Q.jsonl \\
        --round 1 --earlier pool_0.jsonl --out pool_1.jsonl
    python -m data_tools.pool files --pool pool_1.jsonl --requests R.jsonl --samples S.jsonl --verdicts V.jsonl

A row is an answer: `id` and `sample` as in the samples file (from round 1 on the id has `#r<round>` behind it, so that
an answer keeps its name when later rounds ask the same again), `question_id`, `prompt`, `text`, `verdict` (correct,
wrong, invalid), `round`, and who made it. Commands that choose among answers read a pool by --pool, or the three files
as they are by --requests, --samples and --verdicts, which is a pool of one round. `files` turns a pool back into such
files, under the pool's ids, for commands that read these: a new reward model's scores of all rounds, say. Nothing is
chosen or left out here.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.command import run
from data_tools.errors import DataError, UserError, check_each
from data_tools.jsonl import iter_jsonl, write_rows
from data_tools.pairs.carried import CUT
from data_tools.pairs.exchange import (
    VERDICTS,
    Answer,
    RequestRow,
    prompt_json,
    read_answers,
    write_requests,
)
from data_tools.questions import id_of, question_id
from data_tools.samples import prompt_digest
from data_tools.schema import Text, check_prompt

SOURCE_FILES = ("requests", "samples", "verdicts")


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One judged answer; the fields are explained above. completion_tokens: None where nobody counted them."""

    id: str
    sample: int
    question_id: str
    prompt: Text
    text: str
    verdict: str
    round: int
    finish_reason: str
    model: str
    settings_digest: str
    completion_tokens: int | None = None

    @property
    def key(self) -> tuple[str, int]:
        """(id, sample): once in a pool."""
        return self.id, self.sample

    @property
    def tag(self) -> str:
        """What tells it from others of its question, for the ids of what is made of it: "3", or "r1.3" of round 1."""
        inner = self.id.removeprefix(self.question_id).strip("#").replace("#", ".")
        return f"{inner}.{self.sample}" if inner else str(self.sample)

    @property
    def made_by(self) -> dict[str, Any]:
        """As pairs hold it."""
        sample = f"{self.id}:{self.sample}"
        return {"model": self.model, "settings_digest": self.settings_digest, "sample": sample}

    def row(self) -> dict[str, Any]:
        """As a row of JSON."""
        names = ("verdict", "round", "finish_reason", "model", "settings_digest", "completion_tokens")
        first = {"id": self.id, "sample": self.sample, "question_id": self.question_id}
        text = {"prompt": prompt_json(self.prompt), "text": self.text}
        return {**first, **text, **{name: getattr(self, name) for name in names}}

    def sample_row(self) -> dict[str, Any]:
        """As a row of samples."""
        names = ("id", "sample", "text", "finish_reason", "model", "settings_digest", "completion_tokens")
        return {name: getattr(self, name) for name in names} | {"prompt_digest": prompt_digest(self.prompt)}


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code: 0, or 2 with one line a fault of the input."""
    return run(_parser(), argv, {"add": _add, "files": _files})


def add_source(parser: argparse.ArgumentParser) -> None:
    """`--pool`, or `--requests`, `--samples`, `--verdicts` and `--questions`: for `attempts_of`."""
    group = parser.add_argument_group("answers", "a pool, or the files that it is made of")
    group.add_argument("--pool", help="JSON Lines that data_tools.pool, .dedup or .balance wrote")
    group.add_argument("--requests", help="JSON Lines of prompts")
    group.add_argument("--samples", help="JSON Lines of samples of them")
    group.add_argument("--verdicts", help="JSON Lines of verdicts on the samples")
    group.add_argument("--questions", help="JSON Lines with the questions' ids (default: a request is a question)")


def attempts_of(args: argparse.Namespace, *, round_: int = 0) -> list[Attempt]:
    """The answers that the options name, in the files' order. Raises UserError."""
    given = [name for name in SOURCE_FILES if getattr(args, name) is not None]
    if getattr(args, "pool", None) is not None:
        if given:
            raise UserError(f"--pool and --{given[0]}: name a pool, or the files that one is made of")
        return read_pool(args.pool)
    if len(given) < len(SOURCE_FILES):
        raise UserError("answers: give --pool, or --requests, --samples and --verdicts")
    known = read_names(args.questions) if args.questions is not None else None
    return [
        _attempt(answer, args.requests, known, round_)
        for answer in read_answers(args.requests, args.samples, args.verdicts)
    ]


def read_names(path: str | Path) -> dict[str, Mapping[str, Any]]:
    """Each row of questions by its id, in order. Raises DataErrors; an id may stand once."""
    found: dict[str, Mapping[str, Any]] = {}

    def check(row: tuple[int, object]) -> None:
        line, value = row
        if not isinstance(value, dict):
            raise DataError(path, line, field=None, problem=f"expected an object, got {type(value).__name__}")
        name = id_of(value, path, line)
        if name in found:
            raise DataError(path, line, field="id", problem=f"'{name}' stands twice")
        found[name] = value

    check_each(iter_jsonl(path), check)
    return found


def read_pool(path: str | Path) -> list[Attempt]:
    """Every row, checked. Raises DataErrors; a file of no bytes is an empty pool."""
    seen: set[tuple[str, int]] = set()
    wanted = {
        "id": str, "sample": int, "question_id": str, "text": str, "round": int, "finish_reason": str, "model": str,
        "settings_digest": str,
    }  # fmt: skip

    def check(row: tuple[int, object]) -> Attempt:
        line, value = row
        if not isinstance(value, dict):
            raise DataError(path, line, field=None, problem=f"expected an object, got {type(value).__name__}")
        for name, kind in wanted.items():
            if not isinstance(value.get(name), kind) or isinstance(value[name], bool):
                raise DataError(path, line, field=name, problem="is missing or of another kind: this is no pool")
        if value.get("verdict") not in VERDICTS:
            raise DataError(path, line, field="verdict", problem=f"expected one of {', '.join(VERDICTS)}")
        tokens = value.get("completion_tokens")
        if tokens is not None and (isinstance(tokens, bool) or not isinstance(tokens, int)):
            raise DataError(path, line, field="completion_tokens", problem="expected a whole number or null")
        prompt = check_prompt({"prompt": value.get("prompt")}, path=path, line=line).prompt
        kept = {name: value[name] for name in wanted}
        found = Attempt(prompt=prompt, verdict=value["verdict"], completion_tokens=tokens, **kept)
        if found.key in seen:
            raise DataError(path, line, field="sample", problem=f"answer {found.sample} of '{found.id}' stands twice")
        seen.add(found.key)
        return found

    return check_each(iter_jsonl(path, may_be_empty=True), check)


def write_pool(path: str | Path, attempts: Sequence[Attempt]) -> None:
    """All of them or no file. Raises UserError."""
    write_rows(path, (attempt.row() for attempt in attempts))


def by_question(attempts: Sequence[Attempt]) -> dict[str, list[Attempt]]:
    """The answers to each question, in their order."""
    found: dict[str, list[Attempt]] = {}
    for attempt in attempts:
        found.setdefault(attempt.question_id, []).append(attempt)
    return found


def without(attempts: Sequence[Attempt], earlier: Sequence[Attempt]) -> list[Attempt]:
    """The answers that an earlier pool does not hold."""
    there = {attempt.key for attempt in earlier}
    return [attempt for attempt in attempts if attempt.key not in there]


def usable(attempts: Sequence[Attempt], *, invalid: str, dropped: Counter[str]) -> list[Attempt]:
    """Those that are right or wrong, whole and not empty; the others are counted by reason.

    invalid: "drop" leaves out what could not be read, "wrong" takes it for wrong.
    """
    kept = []
    for attempt in attempts:
        if attempt.finish_reason == "length":
            dropped[CUT] += 1
        elif not attempt.text.strip():
            dropped["empty"] += 1
        elif attempt.verdict == "invalid" and invalid == "drop":
            dropped["invalid"] += 1
        else:
            kept.append(attempt)
    return kept


def _attempt(answer: Answer, requests: str, known: Mapping[str, Any] | None, round_: int) -> Attempt:
    name = answer.id if known is None else question_id(answer.id, known)
    if name is None:
        raise UserError(f"{requests}: id '{answer.id}' belongs to no question of the questions file")
    sample = answer.sample
    assert answer.verdict is not None
    return Attempt(
        id=f"{answer.id}#r{round_}" if round_ else answer.id,
        sample=sample.sample,
        question_id=name,
        prompt=answer.prompt,
        text=answer.prefix + sample.text,
        verdict=answer.verdict,
        round=round_,
        finish_reason=sample.finish_reason,
        model=sample.model,
        settings_digest=sample.settings_digest,
        completion_tokens=None if answer.prefix else sample.completion_tokens,
    )


def _add(args: argparse.Namespace) -> None:
    earlier = read_pool(args.earlier) if args.earlier else []
    args.pool = None
    new = attempts_of(args, round_=args.round)
    if len(without(new, earlier)) < len(new):
        raise UserError(
            f"{args.earlier}: holds answers of round {args.round} already; give the new ones another --round"
        )
    pool = [*earlier, *new]
    write_pool(args.out, pool)
    counts = Counter(attempt.verdict for attempt in pool)
    verdicts = ", ".join(f"{counts[name]} {name}" for name in VERDICTS)
    questions = len(by_question(pool))
    print(f"{len(earlier)} answers and {len(new)} of round {args.round}: {verdicts}, {questions} questions; {args.out}")


def _files(args: argparse.Namespace) -> None:
    pool = read_pool(args.pool)
    prompts: dict[str, Text] = {}
    for attempt in pool:
        if prompts.setdefault(attempt.id, attempt.prompt) != attempt.prompt:
            raise UserError(f"{args.pool}: '{attempt.id}' has several prompts; its rows are of no one file of requests")
    write_requests(args.requests, (RequestRow(id=name, prompt=prompt) for name, prompt in prompts.items()))
    write_rows(args.samples, (attempt.sample_row() for attempt in pool))
    if args.verdicts is not None:
        verdicts = ({"id": own.id, "sample": own.sample, "verdict": own.verdict} for own in pool)
        write_rows(args.verdicts, verdicts)
    print(f"{len(prompts)} requests in {args.requests}, {len(pool)} samples in {args.samples}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.pool",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    adding = commands.add_parser("add", help="a pool with the answers of one more round", allow_abbrev=False)
    files = commands.add_parser("files", help="the files that a pool could be made of", allow_abbrev=False)
    for each, verb in ((adding, "read"), (files, "written")):
        each.add_argument("--requests", required=True, help=f"JSON Lines of prompts, {verb}")
        each.add_argument("--samples", required=True, help=f"JSON Lines of samples of them, {verb}")
        each.add_argument("--verdicts", required=each is adding, help=f"JSON Lines of verdicts on these, {verb}")
    adding.add_argument("--questions", help="JSON Lines with the questions' ids (default: a request is a question)")
    adding.add_argument("--round", type=int, default=0, help="0 (default), 1, ...: of an iterated method")
    adding.add_argument("--earlier", help="the pool that these answers are added to")
    adding.add_argument("--out", required=True, help="JSON Lines of a pool, written anew and whole")
    files.add_argument("--pool", required=True, help="JSON Lines of a pool")
    return parser


if __name__ == "__main__":
    sys.exit(main())

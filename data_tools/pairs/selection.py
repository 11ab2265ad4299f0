"""Which candidate pairs of a question are taken, and the supervised rows that hold the same answers.

A candidate is two answers to one question, the better first. Both ways of finding them (`outcome`, `process`) share
what keeps pairs from teaching something else: no pair of equal texts, no answer used too often, no pair whose lengths
differ too much. Nothing is judged here.
"""

import argparse
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from data_tools.command import positive
from data_tools.errors import UserError
from data_tools.jsonl import write_rows
from data_tools.pairs.exchange import prompt_json
from data_tools.pairs.record import PairRecord
from data_tools.pool import Attempt

Candidate = tuple[Attempt, Attempt]
Measure = Literal["chars", "tokens"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """per_question: pairs. chosen_uses, rejected_uses: pairs that one answer may be in; None: any number.
    max_length_ratio: of the longer text to the shorter one, in `length` (characters or tokens); None: any."""

    per_question: int = 4
    chosen_uses: int | None = 1
    rejected_uses: int | None = 1
    max_length_ratio: float | None = None
    length: Measure = "chars"

    def __post_init__(self) -> None:
        if self.max_length_ratio is not None and not self.max_length_ratio >= 1:
            raise UserError(f"--max-length-ratio {self.max_length_ratio}: must be at least 1")


def length_of(attempt: Attempt, measure: Measure) -> int:
    """Characters, or the tokens that the sampler counted. Raises UserError where it counted none."""
    if measure == "chars":
        return len(attempt.text)
    if attempt.completion_tokens is None:
        raise UserError(f"answer {attempt.sample} of '{attempt.id}' has no count of tokens; use --length chars")
    return attempt.completion_tokens


def unique_texts(attempts: Iterable[Attempt], dropped: Counter[str]) -> list[Attempt]:
    """The first answer of each text; white space at the ends does not make two."""
    found: dict[str, Attempt] = {}
    for attempt in attempts:
        if found.setdefault(attempt.text.strip(), attempt) is not attempt:
            dropped["the same text"] += 1
    return list(found.values())


def take(candidates: Iterable[Candidate], limits: Limits, dropped: Counter[str]) -> list[Candidate]:
    """The first candidates of one question that the limits allow; `dropped` counts the others by reason."""
    taken: list[Candidate] = []
    uses: tuple[Counter[tuple[str, int]], Counter[tuple[str, int]]] = (Counter(), Counter())
    for pair in candidates:
        lengths = [max(length_of(side, limits.length), 1) for side in pair]
        if pair[0].text.strip() == pair[1].text.strip():
            dropped["pairs of equal texts"] += 1
        elif limits.max_length_ratio is not None and max(lengths) > limits.max_length_ratio * min(lengths):
            dropped["pairs of unequal length"] += 1
        elif len(taken) == limits.per_question:
            dropped["pairs over --per-question"] += 1
        elif any(
            most is not None and uses[side][pair[side].key] >= most
            for side, most in enumerate((limits.chosen_uses, limits.rejected_uses))
        ):
            dropped["pairs of an answer used up"] += 1
        else:
            taken.append(pair)
            for side in (0, 1):
                uses[side][pair[side].key] += 1
    return taken


def record_of(
    pair: Candidate, source: str, round_: int, scores: Callable[[Attempt], float] | None = None
) -> PairRecord:
    """The pair as a record; its id is the question's, then the tags of chosen and rejected. round_ below 0: the later
    round of the two answers."""
    chosen, rejected = pair
    return PairRecord(
        id=f"{chosen.question_id}#{chosen.tag}#{rejected.tag}",
        prompt=chosen.prompt,
        chosen=chosen.text,
        rejected=rejected.text,
        source=source,
        question_id=chosen.question_id,
        verified={"chosen": chosen.verdict, "rejected": rejected.verdict},
        scores={} if scores is None else {"chosen": scores(chosen), "rejected": scores(rejected)},
        round=max(chosen.round, rejected.round) if round_ < 0 else round_,
        made_by={"chosen": chosen.made_by, "rejected": rejected.made_by},
    )


def write_sft(path: str, pairs: Sequence[Candidate], source: str, per: str) -> int:
    """The chosen answers as supervised rows, one each ("text") or one for each pair that they are in ("pair"), so that
    controls train on the same questions and texts as the pairs. Returns how many."""
    rows: dict[str, Mapping[str, Any]] = {}
    for pair in pairs:
        chosen = pair[0]
        name = f"{chosen.question_id}#{chosen.tag}"
        name += f"#{pair[1].tag}" if per == "pair" else ""
        shown = {"question_id": chosen.question_id, "source": source, "made_by": chosen.made_by}
        if isinstance(chosen.prompt, str):
            rows[name] = {"id": name, "prompt": chosen.prompt, "completion": chosen.text, **shown}
        else:
            prompt = prompt_json(chosen.prompt)
            assert isinstance(prompt, list)
            messages = [*prompt, {"role": "assistant", "content": chosen.text}]
            rows[name] = {"id": name, "messages": messages, **shown}
    write_rows(path, rows.values())
    return len(rows)


def summary_of_lengths(pairs: Sequence[Candidate], measure: Measure) -> str:
    """How much the length alone tells: a clause for the last line."""
    if not pairs:
        return ""
    longer = sum(length_of(better, measure) > length_of(worse, measure) for better, worse in pairs)
    return f"; chosen is the longer text in {longer / len(pairs):.0%}"


def add_limits(parser: argparse.ArgumentParser) -> None:
    """The options of Limits, `--sft`, `--sft-per`, `--round` and `--out`."""
    parser.add_argument("--per-question", type=positive, default=4, help="pairs of a question (default 4)")
    parser.add_argument("--uses", type=positive, default=1, help="pairs that a chosen answer may be in (default 1)")
    parser.add_argument("--rejected-uses", type=positive, help="the same of a rejected one (default: as --uses)")
    parser.add_argument("--max-length-ratio", type=float, help="of the longer text to the shorter (default: any)")
    parser.add_argument("--length", choices=["chars", "tokens"], default="chars", help="(default chars)")
    parser.add_argument("--sft", metavar="F", help="JSON Lines: the chosen answers as supervised rows too")
    parser.add_argument(
        "--sft-per", choices=["text", "pair"], default="text", help="a row for each answer (default), or for each pair"
    )
    parser.add_argument("--round", type=int, default=-1, help="of the pairs (default: the later of the answers')")
    parser.add_argument("--out", required=True, help="JSON Lines of pairs, written anew and whole")


def limits_of(args: argparse.Namespace) -> Limits:
    """The options as Limits. Raises UserError."""
    return Limits(
        per_question=args.per_question,
        chosen_uses=args.uses,
        rejected_uses=args.uses if args.rejected_uses is None else args.rejected_uses,
        max_length_ratio=args.max_length_ratio,
        length=args.length,
    )

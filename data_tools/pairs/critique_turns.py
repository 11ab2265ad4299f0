"""Where each question of `critique_retry` stands: the first wrong answer, the retries after it, and what is still open.

A chain is one wrong first answer and what followed. All that is known of it stands in the files of its turns: the
requests, samples and verdicts of the student, turn 0 being the first answers and turn t the retries after critique t.
A retry's request is named `<chain>#r<t>`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from data_tools.errors import UserError
from data_tools.jsonl import iter_jsonl
from data_tools.pairs.carried import FirstAnswer, first_of
from data_tools.pairs.exchange import Answer, read_answers
from data_tools.questions import Question, id_of


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnFiles:
    """Of one turn of the student."""

    requests: str
    samples: str
    verdicts: str


@dataclass(slots=True)
class Chain:
    """first: the first wrong answer. retries: (turn, answer) in order. tried: labels chosen so far, all wrong."""

    first: FirstAnswer
    question: Question
    retries: list[tuple[int, Answer]] = field(default_factory=list)
    tried: list[str] = field(default_factory=list)
    repeated: bool = False
    """Whether the last retry chose what an earlier answer had chosen."""

    @property
    def name(self) -> str:
        return self.first.name

    @property
    def solved(self) -> tuple[int, Answer] | None:
        """The first correct retry, with its turn."""
        return next(((turn, answer) for turn, answer in self.retries if answer.verdict == "correct"), None)

    @property
    def latest(self) -> Answer | None:
        """The last wrong retry that says something; None: it is still the first answer."""
        said = [answer for _, answer in self.retries if answer.sample.text.strip()]
        return said[-1] if said else None

    def answered(self, turn: int) -> bool:
        """Whether there is an answer in this turn."""
        return turn == 0 or any(own == turn for own, _ in self.retries)


def turn_files(requests: Sequence[str], samples: Sequence[str], verdicts: Sequence[str]) -> list[TurnFiles]:
    """The three lists of a command as turns. Raises UserError for lists of unequal length."""
    if not len(requests) == len(samples) == len(verdicts):
        counts = f"{len(requests)} files of requests, {len(samples)} of samples, {len(verdicts)} of verdicts"
        raise UserError(f"{counts}: each turn has one of each, the first answers being turn 0")
    return [TurnFiles(requests=r, samples=s, verdicts=v) for r, s, v in zip(requests, samples, verdicts, strict=True)]


def add_retries(chains: Mapping[str, Chain], turns: Sequence[TurnFiles], first_files: TurnFiles) -> None:
    """Puts the retries of turns 1, 2, ... into their chains. Raises UserError for a retry of no chain."""
    chosen = read_chosen(first_files.verdicts)
    for chain in chains.values():
        _note(chain, chosen.get((chain.first.id, chain.first.sample)))
    for turn, files in enumerate(turns, start=1):
        chosen = read_chosen(files.verdicts)
        for answer in read_answers(files.requests, files.samples, files.verdicts):
            name, mark, told = answer.id.rpartition("#r")
            if not mark or told != str(turn):
                problem = f"'{answer.id}' is no retry of turn {turn}: give the turns' files in their order"
                raise UserError(f"{files.requests}: {problem}")
            if name not in chains:
                continue  # left out by --invalid or --per-question
            chain = chains[name]
            chain.retries.append((turn, answer))
            if answer.verdict != "correct":
                _note(chain, chosen.get(answer.sample.key))


def _note(chain: Chain, label: str | None) -> None:
    chain.repeated = label is not None and label in chain.tried
    if label is not None and not chain.repeated:
        chain.tried.append(label)


def read_chosen(path: str) -> dict[tuple[str, int], str]:
    """(id, sample) to what a verifier has read as the answer, where it has."""
    found = {}
    for line, row in iter_jsonl(path, may_be_empty=True):
        if isinstance(row, dict) and isinstance(row.get("extracted"), str):
            found[id_of(row, path, line), int(row.get("sample", 0))] = row["extracted"]
    return found


def latest_of(chain: Chain) -> FirstAnswer:
    """The answer that the next critique is about."""
    return chain.first if chain.latest is None else first_of(chain.latest)


def read_rows(path: str) -> dict[str, Mapping[str, Any]]:
    """The rows of a file of requests, by id, with the columns that samplers pass over."""
    rows = iter_jsonl(path, may_be_empty=True)
    return {id_of(row, path, line): row for line, row in rows if isinstance(row, dict)}

"""A second model decides where the vote did not: it sees all samples of the item and names the one it trusts most.

Asked are the items of kinds `choice` and `numeric` that the vote abstained from. The answer read from the sample that
it names becomes the item's. It names none, or one without a readable answer: the item stays abstained. What was decided
so is marked in the log, and the result of the vote alone stands beside the result with it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from data_tools.placeholders import fill
from data_tools.samples import Sample
from data_tools.verify_option import verify_option
from eval.items import Item
from eval.task import Task
from trainer.errors import UserError

Row = dict[str, Any]
MOST = 10
"""Samples that can be told apart by number."""


def undecided(rows: Sequence[Row]) -> list[str]:
    """Ids of the items that the verifier is asked about."""
    return [row["id"] for row in rows if row["outcome"] == "abstained"]


def verifier_prompts(
    task: Task, items: Sequence[Item], samples: Mapping[str, Sequence[Sample]], ids: Sequence[str]
) -> list[Row]:
    """Rows of a prompts file: one greedy question an item (`[verifier]` of the task). Raises UserError."""
    n, own = task.sampling.n, task.verifier
    if not 2 <= n <= MOST:
        raise UserError(f"--verifier: chooses among 2 to {MOST} samples, sampling.n is {n}")
    settings = {"temperature": own.temperature, "max_tokens": own.max_tokens, "seed": own.seed, "n": 1}
    wanted, rows = set(ids), []
    for item in items:
        if item.id in wanted:
            shown = [f"Answer {k + 1}:\n{sample.text.strip()}" for k, sample in enumerate(samples[item.id])]
            values = {**item.values, "answers": "\n\n".join(shown), "n": n}
            try:
                rows.append({"id": item.id, "prompt": fill(own.text, values), "settings": settings})
            except KeyError as error:
                raise UserError(f"verifier.text: id '{item.id}' has no {{{error.args[0]}}}") from None
    return rows


def decided(row: Row, said: Sample) -> Row:
    """The row with what the verifier said: `verifier` holds its pick (from 1; null where none was read) and why."""
    numbers = {str(k + 1): f"Answer {k + 1}" for k in range(row["n"])}
    read = verify_option(said.text, "1", numbers)
    pick = None if read.verdict == "invalid" or read.extracted is None else int(read.extracted)
    verifier = {"pick": pick, "why": read.why, "tokens": said.completion_tokens}
    chosen = None if pick is None else row["verdicts"][pick - 1]
    if chosen is None or chosen["verdict"] == "invalid":
        return {**row, "verifier": verifier}
    outcome = chosen["verdict"]
    score = float(outcome == "correct")
    return {**row, "answer": chosen["extracted"], "outcome": outcome, "score": score, "verifier": verifier}


def without_verifier(rows: Sequence[Mapping[str, Any]]) -> list[Row]:
    """The rows as the vote alone left them."""
    undone = {"answer": None, "outcome": "abstained", "score": 0.0}
    return [{**row, **undone} if "verifier" in row else dict(row) for row in rows]

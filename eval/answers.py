"""From the samples of items to their rows in the log: each sample judged, then the vote.

A row: id, subject, gold, answer (the vote's), outcome (correct, wrong, abstained, invalid), score (0..1), right and n
(samples), votes, verdicts (one a sample: verdict, extracted, why), tokens (drawn, all samples), cut (samples that ended
at max_tokens). Programs and free answers have no vote: with several samples their outcome is null and their score the
share that is right.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from data_tools.samples import Sample
from data_tools.verify_code import Limits, check_programs, extract_program
from data_tools.verify_number import verify_number
from data_tools.verify_option import verify_option
from data_tools.verify_result import Verdict, invalid
from eval.items import Item
from eval.task import Task
from eval.vote import majority_vote
from trainer.errors import UserError

ITEMS_AT_A_TIME = 8
"""Programs of so many items are run before their rows are written."""


def samples_by_item(task: Task, items: Sequence[Item], samples: Sequence[Sample]) -> dict[str, list[Sample]]:
    """The samples 0 to n - 1 of every item. Raises UserError where one is missing."""
    there = {sample.key: sample for sample in samples}
    found = {}
    for item in items:
        missing = [number for number in range(task.sampling.n) if (item.id, number) not in there]
        if missing:
            raise UserError(f"id '{item.id}': its sample {missing[0]} is missing; draw {task.sampling.n} an item")
        found[item.id] = [there[item.id, number] for number in range(task.sampling.n)]
    return found


def judged_rows(
    task: Task,
    items: Sequence[Item],
    samples: Mapping[str, Sequence[Sample]],
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[dict[str, Any]]:
    """One row an item, in order. stopped: asked between items, true ends it."""
    for start in range(0, len(items), ITEMS_AT_A_TIME):
        if stopped():
            return
        some = items[start : start + ITEMS_AT_A_TIME]
        if task.kind == "code":
            verdicts = _programs(task, some, samples)
        else:
            verdicts = [[_verdict(task, item, sample.text) for sample in samples[item.id]] for item in some]
        for item, own in zip(some, verdicts, strict=True):
            yield item_row(task, item, samples[item.id], own)


def _verdict(task: Task, item: Item, text: str) -> Verdict:
    assert item.gold is not None
    if task.kind == "choice":
        return verify_option(text, item.gold, item.options)
    return verify_number(text, item.gold, rel_tol=task.score.rel_tol)


def _programs(task: Task, items: Sequence[Item], samples: Mapping[str, Sequence[Sample]]) -> list[list[Verdict]]:
    score = task.score
    limits = Limits(wall_s=score.timeout_s, cpu_s=max(1, round(score.timeout_s)), memory_bytes=score.memory_mib << 20)
    jobs = []
    for item in items:
        assert item.code is not None
        jobs += [(extract_program(sample.text, item.code), item.code) for sample in samples[item.id]]
    there = [(program, code) for program, code in jobs if program is not None]
    judged = check_programs(there, limits, workers=score.workers)
    verdicts = [invalid("no program found") if program is None else next(judged) for program, _ in jobs]
    n = task.sampling.n
    return [verdicts[start : start + n] for start in range(0, len(verdicts), n)]


def item_row(task: Task, item: Item, samples: Sequence[Sample], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """The row of an item from its samples and their verdicts."""
    right, n = sum(verdict.verdict == "correct" for verdict in verdicts), len(verdicts)
    row: dict[str, Any] = {"id": item.id, "subject": item.subject, "gold": item.gold}
    if task.kind in ("code", "free"):
        row |= {"answer": None, "outcome": verdicts[0].verdict if n == 1 else None, "score": right / n}
    else:
        answers = [None if verdict.verdict == "invalid" else verdict.extracted for verdict in verdicts]
        vote = majority_vote(answers, threshold=task.vote.threshold, ties=task.vote.ties)
        outcome = "abstained" if vote.votes else "invalid"
        if vote.answer is not None:
            outcome = next(v.verdict for v, answer in zip(verdicts, answers, strict=True) if answer == vote.answer)
        row |= {"answer": vote.answer, "outcome": outcome, "score": float(outcome == "correct"), "votes": vote.votes}
    counts = [sample.completion_tokens for sample in samples]
    row |= {
        "options": len(item.options),
        "right": right,
        "n": n,
        "tokens": None if None in counts else sum(count or 0 for count in counts),
        "cut": sum(sample.finish_reason == "length" for sample in samples),
        "verdicts": [_said(task, verdict) for verdict in verdicts],
    }
    return row


def _said(task: Task, verdict: Verdict) -> dict[str, Any]:
    said = {"verdict": verdict.verdict, "extracted": verdict.extracted, "why": verdict.why}
    return {**said, **verdict.details} if task.kind == "code" else said

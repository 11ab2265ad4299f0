"""From a model's log-probs to the rows of the log: options, texts, pairs. Nothing is drawn.

choice_logprob  id, subject, gold, answer, outcome, score, options (how many), answers (label by rule), likelihoods
                (by label: nats, tokens, bytes)
perplexity      id, subject, nats (minus the log-prob), tokens, bytes
preference      id, subject, outcome, score, margin (nats: chosen - rejected, as the rule compares them), chosen and
                rejected (nats, tokens), and reference_chosen, reference_rejected (nats) under rule `reward`
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from data_tools.encode import Group
from eval.items import Item
from eval.loglikelihood import RULES, Likelihood, best, likelihoods
from eval.task import Task
from trainer.loader import length_sorted_batches
from trainer.models.decoder import Decoder
from trainer.score import PairScore, score_pairs

TOKENS_PER_BATCH = 8192


def likelihood_rows(
    task: Task,
    items: Sequence[Item],
    groups: Sequence[Group],
    model: Decoder,
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[dict[str, Any]]:
    """One row an item of choice_logprob or perplexity, longest first."""
    texts = [item.completions for item in items]
    for index, scores in likelihoods(model, groups, texts, tokens_per_batch=TOKENS_PER_BATCH, stopped=stopped):
        item = items[index]
        row: dict[str, Any] = {"id": item.id, "subject": item.subject}
        if task.kind == "perplexity":
            yield {**row, "nats": -scores[0].logps, "tokens": scores[0].tokens, "bytes": scores[0].bytes}
        else:
            yield {**row, **_choice(task, item, scores)}


def _choice(task: Task, item: Item, scores: Sequence[Likelihood]) -> dict[str, Any]:
    labels = list(item.options)
    answers = {rule: labels[best(scores, rule)] for rule in RULES}
    answer = answers[task.score.rule]
    outcome = "correct" if answer == item.gold else "wrong"
    return {
        "gold": item.gold,
        "answer": answer,
        "outcome": outcome,
        "score": float(outcome == "correct"),
        "options": len(labels),
        "answers": answers,
        "likelihoods": {label: [own.logps, own.tokens, own.bytes] for label, own in zip(labels, scores, strict=True)},
    }


def pair_rows(
    groups: Sequence[Group], model: Decoder, stopped: Callable[[], bool] = lambda: False
) -> Iterator[dict[str, Any]]:
    """id, chosen and rejected (nats, tokens) of pairs under one model, longest first."""
    for batch in length_sorted_batches(groups, TOKENS_PER_BATCH):
        if stopped():
            return
        for score in score_pairs(model, [groups[index] for index in batch], tokens_per_batch=TOKENS_PER_BATCH):
            yield _pair(score)


def _pair(score: PairScore) -> dict[str, Any]:
    chosen, rejected = [score.chosen_logps, len(score.chosen_ids)], [score.rejected_logps, len(score.rejected_ids)]
    return {"id": score.record_id, "chosen": chosen, "rejected": rejected}


def preference_row(
    task: Task, subject: str, own: Mapping[str, Any], reference: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The row of a pair from its `pair_rows` under the model and, for rule `reward`, under the reference.

    A tie is wrong: nothing was preferred.
    """
    chosen, rejected = own["chosen"][0], own["rejected"][0]
    row = {"id": own["id"], "subject": subject, "chosen": own["chosen"], "rejected": own["rejected"]}
    if task.score.rule == "reward":
        assert reference is not None
        row |= {"reference_chosen": reference["chosen"][0], "reference_rejected": reference["rejected"][0]}
        chosen, rejected = chosen - reference["chosen"][0], rejected - reference["rejected"][0]
    elif task.score.rule == "per_token":
        chosen, rejected = chosen / own["chosen"][1], rejected / own["rejected"][1]
    outcome = "correct" if chosen > rejected else "wrong"
    return {**row, "margin": chosen - rejected, "outcome": outcome, "score": float(outcome == "correct")}

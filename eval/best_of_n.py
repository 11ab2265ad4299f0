"""Best of n: beside the vote, the sample that a reward likes best: a trained model's implicit one, or process rewards.

The implicit reward of a sample is its log-prob after the item's prompt under --reward-model minus that under
--reward-reference, the model that training began from (DPO's implicit reward over beta, which does not change the
order; Rafailov et al. 2023). The end-of-turn token is not scored, since a sample may have been cut off. A sample
without text has no reward.
The item's answer and outcome stay the vote's: `best` and `best_score` stand beside them. With --prm they are
`prm_best` and `prm_best_score`, and the answer of a vote weighted by the scores is `prm_answer`, its score
`prm_vote_score`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from data_tools.encode import Group
from data_tools.samples import Sample
from eval.items import Item
from eval.loglikelihood import likelihoods
from eval.step_scores import Answers, RewardModel, Splitter, answer_records
from trainer.models.decoder import Decoder
from trainer.prm import aggregate

Row = dict[str, Any]


def answered_items(items: Sequence[Item], samples: Mapping[str, Sequence[Sample]]) -> list[Item]:
    """Each item with its samples' texts as completions; without the empty ones, and without items that have none."""
    found = []
    for item in items:
        texts = tuple(sample.text for sample in samples[item.id] if sample.text.strip())
        if texts:
            found.append(replace(item, completions=texts))
    return found


def logps_rows(
    items: Sequence[Item], groups: Sequence[Group], model: Decoder, stopped: Callable[[], bool] = lambda: False
) -> Iterator[Row]:
    """id and the nats of every text of an item under one model, longest first."""
    for index, scores in likelihoods(model, groups, [item.completions for item in items], stopped=stopped):
        yield {"id": items[index].id, "logps": [score.logps for score in scores]}


def with_best(
    row: Row, samples: Sequence[Sample], policy: Mapping[str, Any] | None, reference: Mapping[str, Any] | None
) -> Row:
    """The row with `rewards` (one a sample, null where there is no text), `best` (its number) and `best_score`.

    policy, reference: the item's `logps_rows`; None where no sample has text. Of equal rewards the first counts.
    """
    if policy is None or reference is None:
        return {**row, "rewards": [None] * len(samples), "best": None, "best_score": 0.0}
    gains = iter([a - b for a, b in zip(policy["logps"], reference["logps"], strict=True)])
    rewards = [next(gains) if sample.text.strip() else None for sample in samples]
    best = _first_best(rewards)
    return {**row, "rewards": rewards, "best": best, "best_score": _is_right(row, best)}


def _first_best(rewards: Sequence[float | None]) -> int:
    """The number of the sample with the highest reward; of equal ones the first."""
    return max((k for k, reward in enumerate(rewards) if reward is not None), key=lambda k: (rewards[k], -k))


def _is_right(row: Row, number: int) -> float:
    return float(row["verdicts"][number]["verdict"] == "correct")


def prm_rows(
    items: Sequence[Item],
    path: str,
    reward: RewardModel,
    split: Splitter,
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[Row]:
    """id and the scores of the steps of every text of an item (`answered_items`). path: of the items, for messages."""
    answers = [Answers(item.id, item.prompt, item.completions, path, item.line) for item in items]
    for index, scores in reward.scores(reward.encode(answer_records(answers, split)), stopped=stopped):
        yield {"id": items[index].id, "step_scores": scores}


def with_prm(row: Row, samples: Sequence[Sample], scored: Mapping[str, Any] | None, how: str) -> Row:
    """The row with `prm_scores` (one a sample, null where there is no text), the best sample and the weighted vote.

    scored: the item's `prm_rows`; None where no sample has text. how: from steps to answers. An answer's weight in the
    vote is the sum of its samples' scores; of equal weights the answer drawn first. Where nothing has a vote (programs,
    free answers) there is none.
    """
    votes = "votes" in row
    if scored is None:
        row = {**row, "prm_scores": [None] * len(samples), "prm_best": None, "prm_best_score": 0.0}
        return {**row, "prm_answer": None, "prm_vote_score": 0.0} if votes else row
    found = iter([aggregate(steps, how) for steps in scored["step_scores"]])
    scores = [next(found) if sample.text.strip() else None for sample in samples]
    best = _first_best(scores)
    row = {**row, "prm_scores": scores, "prm_best": best, "prm_best_score": _is_right(row, best)}
    if not votes:
        return row
    weights: dict[str, float] = {}
    first: dict[str, int] = {}
    for number, (verdict, score) in enumerate(zip(row["verdicts"], scores, strict=True)):
        if verdict["verdict"] != "invalid" and score is not None:
            answer = verdict["extracted"]
            weights[answer] = weights.get(answer, 0.0) + score
            first.setdefault(answer, number)
    answer = max(weights, key=lambda name: (weights[name], -first[name]), default=None)
    right = 0.0 if answer is None else _is_right(row, first[answer])
    return {**row, "prm_answer": answer, "prm_vote_score": right}

"""Best of n: beside the vote, the sample that a trained model's implicit reward likes best.

The reward of a sample is its log-prob after the item's prompt under --reward-model minus that under --reward-reference,
the model that training began from (DPO's implicit reward over beta, which does not change the order; Rafailov et al.
2023). The end-of-turn token is not scored, since a sample may have been cut off. A sample without text has no reward.
The item's answer and outcome stay the vote's: `best` and `best_score` stand beside them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from data_tools.encode import Group
from data_tools.samples import Sample
from eval.items import Item
from eval.loglikelihood import likelihoods
from trainer.models.decoder import Decoder

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
    best = max((k for k, reward in enumerate(rewards) if reward is not None), key=lambda k: (rewards[k], -k))
    score = float(row["verdicts"][best]["verdict"] == "correct")
    return {**row, "rewards": rewards, "best": best, "best_score": score}

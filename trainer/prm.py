"""The objective of process reward models, the numbers that say how good one is, and what a saved one says of itself.

A linear head on the last hidden state says, at the last token of each step, the log-odds that the step is right. The
loss is the mean over the labelled steps of the global batch. Scores of a whole answer are made from those of its steps.
Which steps are right is always told by the hard labels, whatever labels are trained on: so a run on outcomes can be
compared with one on steps.

Letters: N labelled steps of a micro-batch, n steps of one answer.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from data_tools.encode import Group
from data_tools.step_rows import StepLabel
from trainer import losses
from trainer.batch import Stream, build_stream
from trainer.config_sections import PrmConfig
from trainer.errors import ModelError
from trainer.objective import Counts, Terms

TABLE = "logratio_prm"
"""Key of config.json, and name of the file beside an adapter, that say how a reward head was trained."""
AGGREGATIONS = ("mean", "min", "last", "product")


class ProcessObjective:
    """`train.objective = prm`, with the interface of `objective.Objective`."""

    name = "prm"
    output: Literal["rewards"] = "rewards"
    needs_reference = is_pairwise = scores_prompt = False
    compares_steps = True

    def __init__(self, config: PrmConfig) -> None:
        self.config = config
        self.column = label_column(config)

    def stream(self, groups: Sequence[Group]) -> Stream:
        """The micro-batch; its scored tokens are the last ones of the steps."""
        return build_stream(groups, at_tokens=True)

    def count(self, groups: Iterable[Group]) -> Counts:
        """Counts of a global batch: the weight of the steps that are trained, the number of right and wrong steps."""
        weight, right, wrong = 0.0, 0, 0
        for group in groups:
            for label in (label for own in group.labels for label in own):
                weight += group.weight * (not math.isnan(label[self.column]))
                right += label.hard == 1
                wrong += label.hard == 0
        weight = weight or 1.0  # no label is known in this batch: its loss is 0, not 0 / 0
        weight = weight or 1.0  # no label is known in this batch: its loss is 0, not 0 / 0
        return Counts(weight, weight, right + wrong, right=right, wrong=wrong)

    def terms(
        self, logits: Tensor, ref_token_logps: Tensor | None, stream: Stream, weights: Tensor, counts: Counts
    ) -> Terms:
        """Loss and metric sums of one micro-batch. logits: (N,) float32, the head's at the labelled tokens.

        A step whose label is not known (NaN) is not trained, but it counts in the metrics.
        """
        assert stream.labels is not None
        labels = stream.labels[:, self.column]
        known = ~labels.isnan()
        per_step = losses.step_loss(logits, labels.where(known, 0.5), loss=self.config.loss)
        per_step = (per_step * weights.index_select(0, groups_of_steps(stream))).where(known, 0.0)
        loss = (per_step.double().sum() / counts.weight).float()
        hard, said = stream.labels[:, StepLabel._fields.index("hard")], logits.detach().double().sigmoid()
        agrees = ((said > 0.5) == (hard > 0.5)).double()
        sums = {"loss": loss.detach().double(), "step_accuracy": agrees.sum() / counts.groups}
        for name, chosen, count in (("right", hard == 1, counts.right), ("wrong", hard == 0, counts.wrong)):
            if count:  # else there is nothing to be the share of
                sums[f"step_accuracy_{name}"] = agrees[chosen].sum() / count
                sums[f"step_rewards/{name}"] = said[chosen].sum() / count
        return Terms(loss, sums, steps=torch.stack([said, hard.double()], dim=1))


def label_column(config: PrmConfig) -> int:
    """Which field of a StepLabel is trained on."""
    name = "final" if config.labels == "outcome" and config.outcome == "last" else config.labels
    return StepLabel._fields.index(name)


def groups_of_steps(stream: Stream) -> Tensor:
    """(N,) int64, the group that owns each labelled token."""
    segments = torch.tensor([len(group.lengths) for group in stream.layout])
    owners = torch.arange(len(segments)).repeat_interleave(segments)
    return owners.to(stream.score_segments.device).index_select(0, stream.score_segments)


def area_under_curve(scores: Sequence[float], right: Sequence[bool]) -> float | None:
    """Share of the pairs of a right and a wrong step in which the right one scores higher; ties count half. None where
    there is no such pair. (Mann and Whitney 1947, by ranks.)"""
    positive = sum(right)
    negative = len(right) - positive
    if not positive or not negative:
        return None
    wins = below = 0.0
    order = sorted(range(len(scores)), key=lambda k: scores[k])
    start = 0
    while start < len(order):
        end = start
        while end < len(order) and scores[order[end]] == scores[order[start]]:
            end += 1
        tied_right = sum(right[order[k]] for k in range(start, end))
        tied_wrong = end - start - tied_right
        wins += tied_right * (below + tied_wrong / 2)
        below += tied_wrong
        start = end
    return wins / (positive * negative)


def step_auc(parts: Iterable[Sequence[tuple[float, float]]]) -> dict[str, float]:
    """{"step_auc": ...} of all ranks' (score, hard label) of steps; empty where it is not defined."""
    steps = [step for part in parts for step in part]
    auc = area_under_curve([score for score, _ in steps], [hard == 1 for _, hard in steps])
    return {} if auc is None else {"step_auc": auc}


def aggregate(scores: Sequence[float], how: str) -> float:
    """The score of an answer from those of its n >= 1 steps: mean, min, last or product."""
    if how == "mean":
        return math.fsum(scores) / len(scores)
    return {"min": min, "last": lambda values: values[-1], "product": math.prod}[how](scores)


@dataclass(frozen=True, kw_only=True)
class PrmTable:
    """What a saved reward model says of itself, so that it is used as it was trained."""

    labels: str = "hard"
    loss: str = "bce"
    aggregation: str = "mean"
    separator: str | None = None
    format: int = 1

    @classmethod
    def of(cls, config: PrmConfig) -> "PrmTable":
        labels = f"outcome ({config.outcome})" if config.labels == "outcome" else config.labels
        return cls(labels=labels, loss=config.loss, aggregation=config.aggregation, separator=config.separator)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def read(cls, path: Path, content: object) -> "PrmTable":
        """From the object in a file. Raises ModelError."""
        known = {field.name for field in fields(cls)}
        good = isinstance(content, dict) and content.keys() <= known and content.get("format") == 1
        if not good or content.get("aggregation") not in AGGREGATIONS:
            raise ModelError(path, f"{TABLE!r} is not what this version writes; train the reward model again")
        return cls(**content)


def read_table(folder: str | Path) -> PrmTable | None:
    """Of a model's folder (in config.json) or an adapter's (a file of its own); None: it has no reward head's."""
    for path, inside in ((Path(folder) / f"{TABLE}.json", False), (Path(folder) / "config.json", True)):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise ModelError(path, f"cannot be read as JSON ({error}); copy the file again") from None
        if inside:
            content = content.get(TABLE) if isinstance(content, dict) else None
        if content is not None:
            return PrmTable.read(path, content)
    return None

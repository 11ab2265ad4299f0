"""Free answers judged by a model that can only say right or wrong; and a sample of its verdicts for a person to check.

The judge reads question, reference and answer, and its two verdicts are scored as branches of that prompt: the likelier
one counts (a tie is wrong). So it cannot evade, no text of it is parsed, and nothing is drawn. An empty answer is
invalid and is not shown to it.

A judge behind a server cannot be scored so: it is asked for the word itself (`judge_prompts`), and its text, spaces
around it aside, must be exactly `judge.right` or `judge.wrong`; anything else is invalid. Either judge is a model and
errs: `audit.jsonl` is for finding out how often.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_tools.encode import Group
from data_tools.errors import DataError
from data_tools.jsonl import iter_jsonl
from data_tools.placeholders import fill
from data_tools.samples import Sample
from data_tools.schema import Message
from data_tools.verify_result import Verdict, invalid
from eval.elsewhere import answers_to
from eval.items import Item
from eval.loglikelihood import likelihoods
from eval.stats import cohen_kappa, wilson_interval
from eval.task import Task
from trainer.errors import UserError
from trainer.models.decoder import Decoder
from trainer.run_folder import write_file

Row = dict[str, Any]
HUMAN = ("correct", "wrong")
NO_TEXT = invalid("the answer is empty")
"""The verdict on a sample that the judge is not shown."""
UNREAD = "the judge wrote"
"""How the reason begins where the judge's own text was no verdict."""


def judge_items(task: Task, items: Sequence[Item], samples: Mapping[str, Sequence[Sample]]) -> list[Item]:
    """What the judge is asked: an item a sample that has text, its id `ID#NUMBER`. Raises UserError."""
    asked = []
    for item in items:
        for sample in samples[item.id]:
            if sample.text.strip():
                try:
                    text = fill(task.judge.text, {**item.values, "gold": item.gold, "response": sample.text.strip()})
                except KeyError as error:
                    raise UserError(f"judge.text: id '{item.id}' has no {{{error.args[0]}}}") from None
                asked.append(
                    Item(
                        id=f"{item.id}#{sample.sample}",
                        subject=item.subject,
                        line=item.line,
                        prompt=(Message("user", text),),
                        options={},
                        gold=None,
                        completions=(task.judge.right, task.judge.wrong),
                    )
                )
    return asked


def judge_rows(
    asked: Sequence[Item], groups: Sequence[Group], judge: Decoder, stopped: Callable[[], bool] = lambda: False
) -> Iterator[Row]:
    """id, right, wrong: nats of both verdicts."""
    texts = [item.completions for item in asked]
    for index, (right, wrong) in likelihoods(judge, groups, texts, stopped=stopped):
        yield {"id": asked[index].id, "right": right.logps, "wrong": wrong.logps}


def judge_prompts(task: Task, asked: Sequence[Item]) -> list[Row]:
    """Rows of a prompts file: one greedy question an answer."""
    settings = {"temperature": 0.0, "max_tokens": task.judge.max_tokens, "seed": 0, "n": 1}
    return [{"id": item.id, "prompt": item.prompt[-1].content, "settings": settings} for item in asked]  # type: ignore[union-attr]


def written_verdicts(task: Task, asked: Sequence[Item], path: str) -> dict[str, Verdict]:
    """By id of `asked`: what the judge wrote, in a file of samples for `judge_prompts`. Raises UserError."""
    said = answers_to(judge_prompts(task, asked), path, "judge")
    return {name: written_verdict(task, sample.text) for name, sample in said.items()}


def written_verdict(task: Task, text: str) -> Verdict:
    """Strict: a judge that says more than the word has not been held to it."""
    names = {task.judge.right.strip(): "correct", task.judge.wrong.strip(): "wrong"}
    found = names.get(text.strip())
    if found is None:
        return invalid(f"{UNREAD} {text.strip()[:40]!r}")
    return Verdict(found, None, "as the judge wrote")  # type: ignore[arg-type]


def judge_verdict(row: Mapping[str, Any]) -> Verdict:
    """The verdict of a sample from its `judge_rows`."""
    share = 1 / (1 + math.exp(min(700.0, row["wrong"] - row["right"])))
    name = "correct" if row["right"] > row["wrong"] else "wrong"
    return Verdict(name, None, f"right against wrong: {share:.3f}")  # type: ignore[arg-type]


def write_audit(
    task: Task, path: Path, items: Sequence[Item], samples: Mapping[str, Sequence[Sample]], rows: Sequence[Row]
) -> None:
    """`judge.audit` judged samples with an empty `human` column, chosen by digest: the same ones in every run.

    A file that is there is left alone: a person may have written into it.
    """
    if path.exists() or not task.judge.audit:
        return
    verdicts = {row["id"]: row["verdicts"] for row in rows}
    found = []
    for item in items:
        for sample, said in zip(samples[item.id], verdicts[item.id], strict=True):
            key = hashlib.sha256(f"{item.id}#{sample.sample}".encode("utf-8", "surrogatepass")).hexdigest()
            shown = {"question": item.values.get("question"), "reference": item.gold, "response": sample.text}
            if said["verdict"] != "invalid":
                found.append((key, {"id": item.id, "sample": sample.sample, **shown, "human": None}))
    chosen = [row for _, row in sorted(found, key=lambda pair: pair[0])[: task.judge.audit]]
    write_file(path, "".join(json.dumps(row) + "\n" for row in chosen))


def audit_result(path: Path, rows: Sequence[Row]) -> dict[str, Any]:
    """How often a person agrees with the judge, over the rows of audit.jsonl whose `human` is filled in.

    Shares with Wilson's interval, and Cohen's kappa. The judge's verdicts are not in the file, so as not to sway.
    """
    verdicts = {row["id"]: row["verdicts"] for row in rows}
    judge, human = [], []
    count = 0
    if not path.exists() or not path.stat().st_size:
        return {"rows": 0, "checked": 0}
    for line, row in iter_jsonl(path):
        count += 1
        if not isinstance(row, dict) or row.get("id") not in verdicts:
            raise DataError(path, line, field="id", problem="is no item of this run")
        if (said := row.get("human")) is None:
            continue
        if said not in HUMAN:
            raise DataError(path, line, field="human", problem=f"expected correct or wrong, got {said!r}")
        human.append(said)
        judge.append(verdicts[row["id"]][row["sample"]]["verdict"])
    if not human:
        return {"rows": count, "checked": 0}
    same = sum(a == b for a, b in zip(judge, human, strict=True))
    low, high = wilson_interval(same, len(human))
    agreement = {"value": same / len(human), "low": low, "high": high}
    return {"rows": count, "checked": len(human), "agreement": agreement, "kappa": cohen_kappa(judge, human)}

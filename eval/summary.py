"""From the rows of a run's log to its result: shares with intervals, by subject, by sample. Pure functions of rows.

Every share says what it is a share of. `invalid` (no answer could be read) and `abstained` (answers were read, none won
the vote) are counted apart from `wrong`; over all items they count as not right. Micro: every item weighs the same.
Macro: every subject does. What rows hold is in eval.answers and eval.scoring.
"""

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from eval.loglikelihood import RULES
from eval.stats import (
    Interval,
    bootstrap_mean,
    macro_average,
    macro_interval,
    macro_wilson,
    micro_average,
    paired_bootstrap,
    pass_at_k,
    wilson_interval,
)
from eval.task import WITH_OPTIONS, Task
from eval.verifier import without_verifier
from eval.vote import OUTCOMES, negative_marking

Row = Mapping[str, Any]
SEED = 0
"""Of every bootstrap."""


def summarise(task: Task, rows: Sequence[Row]) -> dict[str, Any]:
    """The result of a run. rows: at least one."""
    if task.kind == "perplexity":
        return _perplexity(rows)
    by_subject = group_rows(rows)
    scores = {subject: [row["score"] for row in own] for subject, own in by_subject.items()}
    result: dict[str, Any] = {
        "items": len(rows),
        "metric": _metric(task),
        "micro": _share([row["score"] for row in rows]),
        "macro": None,
        "subjects": {name: _subject(own) for name, own in by_subject.items()},
        **_outcomes(rows),
    }  # fmt: skip
    if len(by_subject) > 1:
        sums = {subject: (sum(own), len(own)) for subject, own in scores.items()}
        assert math.isclose(micro_average(sums), result["micro"]["value"], abs_tol=1e-9)
        low, high = _macro(scores)
        result["macro"] = {"value": macro_average(sums), "low": low, "high": high, "subjects": len(sums)}
    if result["outcomes"] is not None:
        result["answered"] = _answered(result["outcomes"])
        result |= _marks(task, rows, result["outcomes"])
    if asked := [row["verifier"] for row in rows if "verifier" in row]:
        alone = without_verifier(rows)
        tokens = [own["tokens"] for own in asked]
        result["verifier"] = {
            "asked": len(asked),
            "decided": sum(row["outcome"] != "abstained" for row in rows if "verifier" in row),
            "tokens": None if None in tokens else sum(tokens),
            "vote_alone": _share([row["score"] for row in alone]),
        }
    if "best_score" in rows[0]:
        result["best_of_n"] = _share([row["best_score"] for row in rows])
    if "prm_best_score" in rows[0]:
        result["prm"] = _prm(rows)
    if task.kind in WITH_OPTIONS:
        result["chance"] = sum(1 / row["options"] for row in rows) / len(rows)
    if task.kind == "choice_logprob":
        result["rules"] = {rule: _rule(rows, rule) for rule in RULES}
    if task.kind == "preference":
        margin = bootstrap_mean([row["margin"] for row in rows], seed=SEED)
        result["margin_nats"] = _interval(margin)
    return result | (_samples(task, rows) if "verdicts" in rows[0] else {})


def _prm(rows: Sequence[Row]) -> dict[str, Any]:
    """Best of n by a process reward model and the vote weighted by it, where there is a vote; each beside the vote."""
    found: dict[str, Any] = {}
    for name, column in (("best_of_n", "prm_best_score"), ("weighted_vote", "prm_vote_score")):
        if column in rows[0]:
            own = [row[column] for row in rows]
            over = paired_bootstrap([row["score"] for row in rows], own, seed=SEED)
            found[name] = _share(own) | {"over_vote": _interval(over)}
    return found


def group_rows(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by subject, subjects in alphabetical order."""
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        found[row["subject"]].append(row)
    return dict(sorted(found.items()))


def _metric(task: Task) -> str:
    if task.kind == "preference":
        return "reward accuracy" if task.score.rule == "reward" else f"chosen likelier ({task.score.rule})"
    return {"code": "pass@1", "free": "judged right"}.get(task.kind, "accuracy")


def _share(scores: Sequence[float]) -> dict[str, float]:
    """Mean score: Wilson's interval where scores are 0 or 1, else a bootstrap over items."""
    if all(score in (0, 1) for score in scores):
        low, high = wilson_interval(int(sum(scores)), len(scores))
        return {"value": sum(scores) / len(scores), "low": low, "high": high}
    return _interval(bootstrap_mean(scores, seed=SEED))


def _subject(rows: Sequence[Row]) -> dict[str, Any]:
    return {"items": len(rows), **_share([row["score"] for row in rows]), **_outcomes(rows)}


def _macro(scores: Mapping[str, Sequence[float]]) -> tuple[float, float]:
    if all(score in (0, 1) for own in scores.values() for score in own):
        return macro_wilson({name: (int(sum(own)), len(own)) for name, own in scores.items()})
    return macro_interval(scores, seed=SEED)


def _interval(interval: Interval) -> dict[str, float]:
    return {"value": interval.value, "low": interval.low, "high": interval.high}


def _outcomes(rows: Sequence[Row]) -> dict[str, Any]:
    if any(row["outcome"] is None for row in rows):
        return {"outcomes": None}
    counts = Counter(row["outcome"] for row in rows)
    return {"outcomes": {name: counts[name] for name in OUTCOMES}}


def _answered(outcomes: Mapping[str, int]) -> dict[str, Any]:
    """Accuracy over the items that got an answer."""
    count = outcomes["correct"] + outcomes["wrong"]
    low, high = wilson_interval(outcomes["correct"], count)
    return {"items": count, "value": outcomes["correct"] / count if count else None, "low": low, "high": high}


def _marks(task: Task, rows: Sequence[Row], outcomes: Mapping[str, int]) -> dict[str, Any]:
    """Negative marking, where the task has a penalty or its items have options."""
    penalty = task.score.penalty
    if penalty is None and task.kind not in WITH_OPTIONS:
        return {}
    if penalty is not None:
        marks = negative_marking(outcomes["correct"], outcomes["wrong"], len(rows), penalty=penalty)
        return {"negative_marking": {"value": marks, "penalty": penalty}}
    costs = [1 / (row["options"] - 1) for row in rows if row["outcome"] == "wrong"]
    marks = (outcomes["correct"] - sum(costs)) / len(rows)
    return {"negative_marking": {"value": marks, "penalty": "1 / (options - 1)"}}


def _rule(rows: Sequence[Row], rule: str) -> dict[str, float]:
    right = [float(row["answers"][rule] == row["gold"]) for row in rows]
    return _share(right)


def _samples(task: Task, rows: Sequence[Row]) -> dict[str, Any]:
    """What the single samples are, beside the vote: accuracy by sample number, invalid ones, cut ones, pass@k."""
    n = task.sampling.n
    verdicts = [[said["verdict"] for said in row["verdicts"]] for row in rows]
    by_number = [sum(own[number] == "correct" for own in verdicts) / len(rows) for number in range(n)]
    counts = Counter(verdict for own in verdicts for verdict in own)
    tokens = [row["tokens"] for row in rows]
    samples: dict[str, Any] = {
        "n": n,
        "samples": n * len(rows),
        "accuracy_mean": statistics.fmean(by_number),
        "accuracy_sd": statistics.stdev(by_number) if n > 1 else None,
        "verdicts": {name: counts[name] for name in ("correct", "wrong", "invalid")},
        "cut": sum(row["cut"] for row in rows),
        "tokens": None if None in tokens else sum(tokens),
    }
    chances = {k: [pass_at_k(row["n"], row["right"], k) for row in rows] for k in task.score.k}
    return {
        "samples": samples,
        "pass_at_k": {str(k): _share(own) for k, own in chances.items()},
    }


def _perplexity(rows: Sequence[Row]) -> dict[str, Any]:
    """Nats a token over all tokens, its exponential, and nats a byte, which models of other tokenizers share."""
    by_subject = group_rows(rows)
    result: dict[str, Any] = {"items": len(rows), "metric": "nats a token", **_nats(rows), "macro": None}
    result["subjects"] = {subject: {"items": len(own), **_nats(own)["micro"]} for subject, own in by_subject.items()}
    if len(by_subject) > 1:
        means = [own["value"] for own in result["subjects"].values()]
        result["macro"] = {"value": statistics.fmean(means), "low": None, "high": None, "subjects": len(means)}
    return result


def _nats(rows: Sequence[Row]) -> dict[str, Any]:
    nats = [row["nats"] for row in rows]
    tokens, size = [row["tokens"] for row in rows], [row["bytes"] for row in rows]
    micro = _interval(bootstrap_mean(nats, weights=tokens, seed=SEED))
    return {
        "micro": micro,
        "perplexity": {name: math.exp(value) for name, value in micro.items()},
        "nats_per_byte": _interval(bootstrap_mean(nats, weights=size, seed=SEED)),
        "nats": sum(nats),
        "tokens": sum(tokens),
        "bytes": sum(size),
    }

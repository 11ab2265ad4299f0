"""One run of a task: draw or score what is missing, judge, log every item, report. The commands are in eval.main.

    OUT/settings.json   what the run was made from; a second start with something else is refused
        prompts.jsonl   what the model is asked, samples.jsonl what it wrote (kinds that draw; eval.sample)
        verifier_prompts.jsonl, verifier_samples.jsonl   the same of the verifier
        judge_scores.jsonl   log-probs of the judge's verdicts (not with --judge-samples)
        audit.jsonl     some judged samples for a person to judge too (free)
        programs.jsonl   verdicts of programs (code), reward_scores.jsonl, reward_reference_scores.jsonl,
        prm_scores.jsonl   best of n
        scores.jsonl, reference_scores.jsonl   log-probs of pairs (preference)
        items.jsonl     a row an item: answer, verdicts, log-probs
        report.json, report.md, report.html

A killed run goes on with the same command: samples and scores that are there stay.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_tools.chat_template import load_chat_template
from data_tools.encode import Group
from data_tools.jsonl import iter_jsonl
from data_tools.samples import Sample, digest_of, messages_of, read_samples
from data_tools.tokenizer import load_tokenizer
from eval import sample
from eval.answers import item_row, judged_rows, samples_by_item
from eval.best_of_n import answered_items, logps_rows, prm_rows, with_best, with_prm
from eval.compare import budget_line, check_same_items, compare_rows
from eval.elsewhere import answers_to
from eval.item_log import ItemLog, Row, read_rows
from eval.items import Item, read_items, subject_of
from eval.judge import (
    NO_TEXT,
    UNREAD,
    audit_result,
    judge_items,
    judge_prompts,
    judge_rows,
    judge_verdict,
    write_audit,
    written_verdicts,
)
from eval.loglikelihood import option_groups
from eval.report import write_report
from eval.run_settings import (
    RunOptions,
    check_options,
    dtype_of,
    prm_aggregation,
    prm_splitter,
    settings_of,
    take_up,
)
from eval.sampling import SamplingOptions
from eval.scoring import likelihood_rows, pair_rows, preference_row
from eval.step_scores import load_reward_model
from eval.summary import SEED, summarise
from eval.task import GENERATED, Task, load_task, with_few_shot
from eval.verifier import decided, undecided, verifier_prompts
from trainer.errors import RunError, TrainingStopped, UserError
from trainer.models.config import ModelConfig
from trainer.run_folder import RunLock, write_file
from trainer.score import load_for_scoring, read_pairs
from trainer.startup import check_vocabulary
from trainer.stop import StopRequest

SETTINGS_OF_SERVERS = ("temperature", "top_p", "max_tokens", "stop", "seed", "n")
NO_BASELINE = "none was run: this number says nothing about what another model reaches with the same budget"


def run(options: RunOptions) -> dict[str, Any]:
    """Run a task and write its folder; returns the report. Raises UserError, and TrainingStopped where it was asked."""
    task = with_few_shot(load_task(options.task), options.few_shot, options.shots)
    check_options(task, options)
    out = Path(options.out)
    items = [] if task.kind == "preference" else read_items(task, options.data, limit=options.limit)
    baseline = None if options.baseline is None else read_run(options.baseline)
    if baseline is not None and items:  # before the work, not after it
        check_same_items(
            [item.id for item in items], [row["id"] for row in baseline[1]], ("this run", options.baseline)
        )
    with RunLock(out, wait_s=5.0):
        settings = settings_of(task, options)
        take_up(out / "settings.json", settings)
        rows = _rows(task, options, items)
        report = {
            "format": "logratio-eval-1",
            "task": task.name,
            "kind": task.kind,
            "result": summarise(task, rows) | _audit(task, out, rows),
            "comparison": None,
            "baseline": NO_BASELINE,
            "settings": {**settings["settings"], "task": _plain(task), "bootstrap_seed": SEED},
            "digests": {**settings["identity"], "code": settings["code"]},
        }
        if baseline is not None:
            report |= _against(options.baseline, baseline, rows, report["result"])
        write_report(out, report)
    return report


def _audit(task: Task, out: Path, rows: Sequence[Row]) -> dict[str, Any]:
    if task.kind != "free":
        return {}
    unread = sum(verdict["why"].startswith(UNREAD) for row in rows for verdict in row["verdicts"])
    return {"audit": audit_result(out / "audit.jsonl", rows), "judge_unreadable": unread}


def read_run(folder: str | Path) -> tuple[dict[str, Any], list[Row]]:
    """The report and the rows of a finished run. Raises RunError."""
    try:
        report = json.loads((Path(folder) / "report.json").read_text(encoding="utf-8"))
        result = report["result"]
    except (OSError, ValueError, KeyError, TypeError):
        problem = "has no readable report.json; name the --out of a finished `python -m eval.main run`"
        raise RunError(folder, problem) from None
    rows = read_rows(Path(folder) / "items.jsonl")
    if len(rows) < result["items"]:
        raise RunError(folder, f"items.jsonl has {len(rows)} rows, the report is over {result['items']}; run it again")
    return report, rows


def prompt_rows(task: Task, items: Sequence[Item]) -> Iterator[dict[str, Any]]:
    """Rows of a prompts file (data_tools/samples.py) with the task's sampling settings in them.

    What servers have no setting for (top_k, min_p, ...) is left out where it changes nothing: both take the file then.
    """
    default = asdict(SamplingOptions())
    settings = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in asdict(task.sampling).items()
        if name in SETTINGS_OF_SERVERS or value != default[name]
    }
    for item in items:
        prompt = item.prompt if isinstance(item.prompt, str) else messages_of(item.prompt)
        yield {"id": item.id, "prompt": prompt, "settings": settings}


def second_prompt_rows(who: str, task: Task, items: Sequence[Item], samples: str) -> list[dict[str, Any]]:
    """What the judge or the verifier (`who`) is asked about a file of samples of the task. Raises UserError."""
    there = samples_of(task, items, samples)
    if who == "judge":
        return judge_prompts(task, judge_items(task, items, there))
    return verifier_prompts(task, items, there, undecided(list(judged_rows(task, items, there))))


def samples_of(task: Task, items: Sequence[Item], path: str | Path) -> dict[str, list[Sample]]:
    """The samples of every item. Raises UserError where one is missing, or was drawn without the task's examples."""
    found = samples_by_item(task, items, read_samples(path).samples)
    for item in items if task.prompt.few_shot is not None else ():
        if any(sample.prompt_digest != digest_of(item.prompt) for sample in found[item.id]):
            problem = f"id '{item.id}' was not drawn for this prompt with its examples"
            raise UserError(f"{path}: {problem}; write the prompts with the same --few-shot and --shots")
    return found


def write_prompt_rows(rows: Iterable[Mapping[str, Any]], path: str | Path) -> None:
    """A file for `python -m eval.sample`. Raises RunError."""
    write_file(path, "".join(json.dumps(row, ensure_ascii=True) + "\n" for row in rows))


def _rows(task: Task, options: RunOptions, items: Sequence[Item]) -> list[Row]:
    """Every item's row, in the order of the data."""
    if task.kind == "preference":
        return _preference_rows(task, options)
    if task.kind in GENERATED:
        return _generated_rows(task, options, items)
    assert options.model is not None

    def rows_of(missing: Sequence[Item], *rest: Any) -> Iterator[Row]:
        return likelihood_rows(task, missing, *rest)

    log = _score(task, options, Path(options.out) / "items.jsonl", items, options.model, rows_of, options.chat_template)
    return [log[item.id] for item in items]


def _generated_rows(task: Task, options: RunOptions, items: Sequence[Item]) -> list[Row]:
    out = Path(options.out)
    samples = samples_of(task, items, _samples_file(task, options, items))
    if task.kind == "code":  # programs take long: what was run is kept
        with ItemLog(out / "programs.jsonl") as log, StopRequest() as stop:
            missing = [item for item in items if item.id not in log.rows]
            _fill(log, judged_rows(task, missing, samples, stop.asked), [item.id for item in items], stop)
        rows = [log.rows[item.id] for item in items]
    elif task.kind == "free":
        rows = _judged(task, options, items, samples)
    else:
        rows = list(judged_rows(task, items, samples))
        rows = _verified(task, options, items, rows, samples)
    if options.reward_model is not None:
        rows = _rewarded(task, options, items, rows, samples)
    if options.prm is not None:
        rows = _with_steps_scored(task, options, items, rows, samples)
    with ItemLog(out / "items.jsonl", fresh=True) as log:
        for row in rows:
            log.append(row)
    return rows


def _score(
    task: Task,
    options: RunOptions,
    path: Path,
    items: Sequence[Item],
    folder: str,
    rows_of: Callable[..., Iterator[Row]],
    template: str | None = None,
) -> dict[str, Row]:
    """Rows by id of a log that is filled by `rows_of(items, groups, model, stopped)` with the model in `folder`."""
    with ItemLog(path) as log, StopRequest() as stop:
        missing = [item for item in items if item.id not in log.rows]
        if missing:
            groups = option_groups(missing, load_tokenizer(folder), load_chat_template(folder, template), options.data)
            check_vocabulary(groups, ModelConfig.from_folder(folder), folder)
            model = load_for_scoring(folder, dtype_of(task, options))
            _fill(log, rows_of(missing, groups, model, stop.asked), [item.id for item in items], stop)
        return log.rows


def _rewarded(
    task: Task,
    options: RunOptions,
    items: Sequence[Item],
    rows: Sequence[Row],
    samples: Mapping[str, Sequence[Sample]],
) -> list[Row]:
    """The rows with the samples' implicit rewards and the best one's verdict."""
    out = Path(options.out)
    assert options.reward_model is not None and options.reward_reference is not None
    texts = answered_items(items, samples)
    policy = _score(task, options, out / "reward_scores.jsonl", texts, options.reward_model, logps_rows)
    path = out / "reward_reference_scores.jsonl"
    reference = _score(task, options, path, texts, options.reward_reference, logps_rows)
    return [with_best(row, samples[row["id"]], policy.get(row["id"]), reference.get(row["id"])) for row in rows]


def _with_steps_scored(
    task: Task,
    options: RunOptions,
    items: Sequence[Item],
    rows: Sequence[Row],
    samples: Mapping[str, Sequence[Sample]],
) -> list[Row]:
    """The rows with what a process reward model says of the samples."""
    assert options.prm is not None
    texts, split = answered_items(items, samples), prm_splitter(options)
    with ItemLog(Path(options.out) / "prm_scores.jsonl") as log, StopRequest() as stop:
        missing = [item for item in texts if item.id not in log.rows]
        if missing:
            reward = load_reward_model(options.prm, dtype=dtype_of(task, options))
            _fill(log, prm_rows(missing, options.data, reward, split, stop.asked), [item.id for item in texts], stop)
        scored = log.rows
    how = prm_aggregation(options)
    return [with_prm(row, samples[row["id"]], scored.get(row["id"]), how) for row in rows]


def _samples_file(task: Task, options: RunOptions, items: Sequence[Item]) -> Path:
    """The file of samples, drawn here unless --samples names one."""
    if options.samples is not None:
        return Path(options.samples)
    assert options.model is not None
    out = Path(options.out)
    write_prompt_rows(prompt_rows(task, items), out / "prompts.jsonl")
    more = [] if options.chat_template is None else ["--chat-template", options.chat_template]
    return _draw(options.model, out, "", ["--api", task.prompt.api, *more], task, options)


def _draw(model: str, out: Path, prefix: str, more: Sequence[str], task: Task, options: RunOptions) -> Path:
    """Samples for the prompts in out/PREFIXprompts.jsonl; returns their file."""
    prompts, samples = out / f"{prefix}prompts.jsonl", out / f"{prefix}samples.jsonl"
    argv = ["--model", model, "--prompts", str(prompts), "--out", str(samples), *more]
    argv += ["--dtype", dtype_of(task, options), "--slots", str(options.slots)]
    sample.main(argv)
    return samples


def _verified(
    task: Task,
    options: RunOptions,
    items: Sequence[Item],
    rows: Sequence[Row],
    samples: Mapping[str, Sequence[Sample]],
) -> list[Row]:
    """The rows with the verifier's decisions on items without majority, if there is one."""
    out = Path(options.out)
    if options.verifier is None and options.verifier_samples is None:
        return list(rows)
    prompts = verifier_prompts(task, items, samples, undecided(rows))
    if not prompts:
        return list(rows)
    path = options.verifier_samples
    if options.verifier is not None:
        write_prompt_rows(prompts, out / "verifier_prompts.jsonl")
        path = str(_draw(options.verifier, out, "verifier_", (), task, options))
    said = answers_to(prompts, str(path), "verifier")
    return [decided(row, said[row["id"]]) if row["id"] in said else row for row in rows]


def _judged(
    task: Task, options: RunOptions, items: Sequence[Item], samples: Mapping[str, Sequence[Sample]]
) -> list[Row]:
    """Rows of free answers with the judge's verdicts, and the file for a person's."""
    out = Path(options.out)
    asked = judge_items(task, items, samples)
    if options.judge_samples is not None:
        found = written_verdicts(task, asked, options.judge_samples)
    else:
        assert options.judge is not None
        scores = _score(task, options, out / "judge_scores.jsonl", asked, options.judge, judge_rows)
        found = {own.id: judge_verdict(scores[own.id]) for own in asked}
    rows = []
    for item in items:
        own = samples[item.id]
        verdicts = [found.get(f"{item.id}#{sample.sample}", NO_TEXT) for sample in own]
        rows.append(item_row(task, item, own, verdicts))
    write_audit(task, out / "audit.jsonl", items, samples, rows)
    return rows


def _preference_rows(task: Task, options: RunOptions) -> list[Row]:
    out = Path(options.out)
    assert options.model is not None
    groups = read_pairs(options.data, options.model, options.chat_template)[: options.limit]
    subjects = [subject_of(row, task) for _, row in iter_jsonl(options.data) if isinstance(row, dict)]
    own = _scored_pairs(out / "scores.jsonl", groups, options.model, dtype_of(task, options))
    reference: Mapping[str, Row] = {}
    if options.reference is not None:
        check_vocabulary(groups, ModelConfig.from_folder(options.reference), options.reference)
        reference = _scored_pairs(out / "reference_scores.jsonl", groups, options.reference, dtype_of(task, options))
    with ItemLog(out / "items.jsonl", fresh=True) as log:
        for group, subject in zip(groups, subjects, strict=False):
            log.append(preference_row(task, subject, own[group.record_id], reference.get(group.record_id)))
        return list(log.rows.values())


def _scored_pairs(path: Path, groups: Sequence[Group], model: str, dtype: str) -> dict[str, Row]:
    with ItemLog(path) as log, StopRequest() as stop:
        missing = [group for group in groups if group.record_id not in log.rows]
        if missing:
            rows = pair_rows(missing, load_for_scoring(model, dtype), stop.asked)
            _fill(log, rows, [group.record_id for group in groups], stop)
        return log.rows


def _fill(log: ItemLog, rows: Iterable[Row], order: Sequence[str], stop: StopRequest) -> None:
    """Log rows as they come. Raises TrainingStopped where the run was asked to end before the last."""
    done = sum(name in log.rows for name in order)
    bar = tqdm(rows, total=len(order), initial=done, unit="item", dynamic_ncols=True, disable=None)
    for row in bar:
        log.append(row)
    missing = sum(name not in log.rows for name in order)
    if missing:
        raise TrainingStopped(f"{log.path}: {missing} items are missing, start the same command again to go on")


def _against(
    folder: str | None, baseline: tuple[Mapping[str, Any], list[Row]], rows: Sequence[Row], result: Mapping[str, Any]
) -> dict[str, Any]:
    """The comparison with a baseline's run (A) and whether both had the same budget."""
    report, theirs = baseline
    found = compare_rows(theirs, rows, (str(folder), "this run"))
    line = budget_line(report["result"], result)
    return {"comparison": found, "baseline": f"A is {folder} ({report['settings'].get('model', 'samples')}): {line}"}


def _plain(task: Task) -> dict[str, Any]:
    """The task as JSON would hold it."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(task)))
    return plain

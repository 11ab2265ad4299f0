"""One run of a task: draw or score what is missing, judge, log every item, report. The commands are in eval.main.

    OUT/settings.json   what the run was made from; a second start with something else is refused
        prompts.jsonl   what the model is asked, samples.jsonl what it wrote (kinds that draw; eval.sample)
        verifier_prompts.jsonl, verifier_samples.jsonl   the same of the verifier
        scores.jsonl, reference_scores.jsonl   log-probs of pairs (preference)
        items.jsonl     a row an item: answer, verdicts, log-probs
        report.json, report.md, report.html

A killed run goes on with the same command: samples and scores that are there stay.
"""

import hashlib
import json
import platform
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from data_tools.chat_template import load_chat_template
from data_tools.disk import user_cache
from data_tools.encode import Group
from data_tools.file_digests import FileDigests, hash_file
from data_tools.jsonl import iter_jsonl
from data_tools.samples import Sample, messages_of, read_samples
from data_tools.tokenizer import load_tokenizer
from eval import sample
from eval.answers import judged_rows, samples_by_item
from eval.compare import budget_line, compare_rows
from eval.item_log import ItemLog, Row, read_rows
from eval.items import Item, read_items, subject_of
from eval.loglikelihood import option_groups
from eval.report import write_report
from eval.sampling import SamplingOptions
from eval.scoring import likelihood_rows, pair_rows, preference_row
from eval.summary import SEED, summarise
from eval.task import GENERATED, Task, load_task
from eval.verifier import decided, undecided, verifier_prompts
from trainer.errors import RunError, TrainingStopped, UserError
from trainer.models.config import ModelConfig
from trainer.reference_cache import weights_digest
from trainer.run_folder import RunLock, write_file
from trainer.score import load_for_scoring, read_pairs
from trainer.startup import check_vocabulary
from trainer.stop import StopRequest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("kernels", "data_tools", "trainer", "eval")
SETTINGS_OF_SERVERS = ("temperature", "top_p", "max_tokens", "stop", "seed", "n")
NO_BASELINE = "none was run: this number says nothing about what another model reaches with the same budget"


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The options of `python -m eval.main run`. model may be None where `samples` names a file drawn elsewhere."""

    task: str
    data: str
    out: str
    model: str | None = None
    samples: str | None = None
    reference: str | None = None
    verifier: str | None = None
    baseline: str | None = None
    limit: int | None = None
    dtype: str | None = None
    """None: bf16 where samples are drawn, float32 where texts are scored."""
    chat_template: str | None = None
    few_shot: str | None = None
    slots: int = 16


def run(options: RunOptions) -> dict[str, Any]:
    """Run a task and write its folder; returns the report. Raises UserError, and TrainingStopped where it was asked."""
    task = load_task(options.task)
    _check(task, options)
    out = Path(options.out)
    items = [] if task.kind == "preference" else read_items(task, options.data, limit=options.limit)
    with RunLock(out, wait_s=5.0):
        settings = _settings(task, options)
        _take_up(out / "settings.json", settings)
        rows = _rows(task, options, items)
        report = {
            "format": "logratio-eval-1",
            "task": task.name,
            "kind": task.kind,
            "result": summarise(task, rows),
            "comparison": None,
            "baseline": NO_BASELINE,
            "settings": {**settings["settings"], "task": _plain(task), "bootstrap_seed": SEED},
            "digests": {**settings["identity"], "code": settings["code"]},
        }
        if options.baseline is not None:
            report |= _against(options.baseline, rows, report["result"])
        write_report(out, report)
    return report


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


def write_prompts(task: Task, items: Sequence[Item], path: str | Path) -> None:
    """The prompts of a task as a file for `python -m eval.sample`. Raises RunError."""
    write_file(path, "".join(json.dumps(row, ensure_ascii=True) + "\n" for row in prompt_rows(task, items)))


def _check(task: Task, options: RunOptions) -> None:
    drawn = task.kind in GENERATED
    for wrong, problem in (
        (options.samples and not drawn, f"--samples: kind {task.kind} draws no samples"),
        (options.few_shot and not drawn, "--few-shot: is for kinds that draw; write the examples into prompt.text"),
        (not options.model and not options.samples, "--model: required (or --samples with a file drawn elsewhere)"),
        (options.model and options.samples, "--samples were drawn elsewhere: --model would not be used; leave it out"),
        (task.score.rule == "reward" and not options.reference, "--reference: score.rule = reward needs it"),
        (options.reference and task.score.rule != "reward", "--reference: only score.rule = reward uses it"),
        (options.verifier and task.kind not in ("choice", "numeric"), f"--verifier: kind {task.kind} has no vote"),
        (options.limit is not None and options.limit < 1, "--limit: must be 1 or more"),
    ):
        if wrong:
            raise UserError(problem)


def _rows(task: Task, options: RunOptions, items: Sequence[Item]) -> list[Row]:
    """Every item's row, in the order of the data."""
    out = Path(options.out)
    if task.kind == "preference":
        return _preference_rows(task, options)
    order = [item.id for item in items]
    if task.kind in GENERATED:
        samples = samples_by_item(task, items, read_samples(_samples_file(task, options, items)).samples)
        if task.kind != "code":  # reading letters and numbers takes no time and is done anew
            rows = list(judged_rows(task, items, samples))
            rows = rows if options.verifier is None else _verified(task, options, items, rows, samples)
            with ItemLog(out / "items.jsonl", fresh=True) as log:
                for row in rows:
                    log.append(row)
            return rows
        with ItemLog(out / "items.jsonl") as log, StopRequest() as stop:
            missing = [item for item in items if item.id not in log.rows]
            _fill(log, judged_rows(task, missing, samples, stop.asked), order, stop)
            return [log.rows[name] for name in order]
    assert options.model is not None
    with ItemLog(out / "items.jsonl") as log, StopRequest() as stop:
        missing = [item for item in items if item.id not in log.rows]
        if missing:
            template = load_chat_template(options.model, options.chat_template)
            groups = option_groups(missing, load_tokenizer(options.model), template, options.data)
            check_vocabulary(groups, ModelConfig.from_folder(options.model), options.model)
            model = load_for_scoring(options.model, _dtype(task, options))
            _fill(log, likelihood_rows(task, missing, groups, model, stop.asked), order, stop)
        return [log.rows[name] for name in order]


def _samples_file(task: Task, options: RunOptions, items: Sequence[Item]) -> Path:
    """The file of samples, drawn here unless --samples names one."""
    if options.samples is not None:
        return Path(options.samples)
    assert options.model is not None
    out = Path(options.out)
    write_prompts(task, items, out / "prompts.jsonl")
    more = ["--few-shot", options.few_shot] if options.few_shot is not None else []
    return _draw(options.model, out, "", ["--api", task.prompt.api, *more], task, options)


def _draw(model: str, out: Path, prefix: str, more: Sequence[str], task: Task, options: RunOptions) -> Path:
    """Samples for the prompts in out/PREFIXprompts.jsonl; returns their file."""
    prompts, samples = out / f"{prefix}prompts.jsonl", out / f"{prefix}samples.jsonl"
    argv = ["--model", model, "--prompts", str(prompts), "--out", str(samples), *more]
    argv += ["--dtype", _dtype(task, options), "--slots", str(options.slots)]
    argv += ["--chat-template", options.chat_template] if options.chat_template is not None else []
    sample.main(argv)
    return samples


def _verified(
    task: Task,
    options: RunOptions,
    items: Sequence[Item],
    rows: Sequence[Row],
    samples: Mapping[str, Sequence[Sample]],
) -> list[Row]:
    """The rows with the verifier's decisions on items without majority."""
    out = Path(options.out)
    assert options.verifier is not None
    prompts = verifier_prompts(task, items, samples, undecided(rows))
    if not prompts:
        return list(rows)
    write_file(out / "verifier_prompts.jsonl", "".join(json.dumps(row) + "\n" for row in prompts))
    said = read_samples(_draw(options.verifier, out, "verifier_", (), task, options)).samples
    by_id = {own.id: own for own in said}
    asked = {row["id"] for row in prompts}
    return [decided(row, by_id[row["id"]]) if row["id"] in asked else row for row in rows]


def _preference_rows(task: Task, options: RunOptions) -> list[Row]:
    out = Path(options.out)
    assert options.model is not None
    groups = read_pairs(options.data, options.model, options.chat_template)[: options.limit]
    subjects = [subject_of(row, task) for _, row in iter_jsonl(options.data) if isinstance(row, dict)]
    own = _scored_pairs(out / "scores.jsonl", groups, options.model, _dtype(task, options))
    reference: Mapping[str, Row] = {}
    if options.reference is not None:
        check_vocabulary(groups, ModelConfig.from_folder(options.reference), options.reference)
        reference = _scored_pairs(out / "reference_scores.jsonl", groups, options.reference, _dtype(task, options))
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


def _dtype(task: Task, options: RunOptions) -> str:
    return options.dtype or ("bf16" if task.kind in GENERATED else "float32")


def _settings(task: Task, options: RunOptions) -> dict[str, Any]:
    """What the run is made from: paths and numbers for a reader, digests for a comparison, the state of the code."""
    digests = FileDigests(user_cache("reference") / "digests.json")
    identity: dict[str, Any] = {
        "task": task.digest,
        "prompt_template": task.template_digest,
        "data_sha256": hash_file(options.data) if Path(options.data).is_file() else None,
        "dtype": _dtype(task, options),
    }
    for name, folder in (("model", options.model), ("reference", options.reference), ("verifier", options.verifier)):
        if folder is not None:
            template = load_chat_template(folder, options.chat_template)
            identity[f"{name}_weights"] = weights_digest(folder, digests)
            identity[f"{name}_tokenizer"] = load_tokenizer(folder).digest
            identity[f"{name}_chat_template"] = None if template is None else template.digest
    for name, path in (("samples_sha256", options.samples), ("few_shot_sha256", options.few_shot)):
        if path is not None:
            if not Path(path).is_file():
                raise UserError(f"{path}: no such file")
            identity[name] = hash_file(path)
    digests.save()
    shown = {
        name: value for name, value in asdict(options).items() if value is not None and name not in ("out", "task")
    }
    shown["task_file"] = options.task
    machine = {"torch": torch.__version__, "python": platform.python_version(), "gpu": torch.cuda.is_available()}
    return {"identity": identity, "settings": {**shown, **machine}, "code": code_state()}


def _take_up(path: Path, settings: dict[str, Any]) -> None:
    """Write settings.json, or see that the one there says the same. Raises RunError."""
    if path.exists():
        try:
            there = json.loads(path.read_text(encoding="utf-8"))["identity"]
        except (OSError, ValueError, KeyError, TypeError):
            raise RunError(path, "is not a file of settings; name another --out") from None
        if other := [name for name, value in settings["identity"].items() if there.get(name) != value]:
            raise RunError(path.parent, f"holds a run with another {', '.join(other)}; name another --out")
    write_file(path, json.dumps(settings, indent=1) + "\n")


def code_state() -> dict[str, str]:
    """The git commit where this is a checkout, and a digest of all source files in any case."""
    total = hashlib.sha256()
    for path in sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        total.update(f"{path.relative_to(ROOT)} {hash_file(path)}\n".encode())
    return {"git": _git_state(), "sources": total.hexdigest()}


def _git_state() -> str:
    command = ["git", "-C", str(ROOT)]
    try:
        commit = subprocess.run([*command, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
        changed = subprocess.run(
            [*command, "status", "--porcelain", "--", *PACKAGES], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return "not a git checkout"
    count = len(changed.splitlines())
    return commit.strip() + (f", {count} files changed since" if count else "")


def _against(folder: str, rows: Sequence[Row], result: Mapping[str, Any]) -> dict[str, Any]:
    """The comparison with a baseline's run (A) and whether both had the same budget."""
    report, theirs = read_run(folder)
    line = budget_line(report["result"], result)
    found = compare_rows(theirs, rows, (folder, "this run"))
    return {"comparison": found, "baseline": f"A is {folder} ({report['settings'].get('model', 'samples')}): {line}"}


def _plain(task: Task) -> dict[str, Any]:
    """The task as JSON would hold it."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(task)))
    return plain

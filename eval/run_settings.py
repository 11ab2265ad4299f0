"""What a run of a task is made from: its options, and the settings and digests by which a second start is the same one.

Nothing is run here; see eval.run.
"""

import hashlib
import json
import platform
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from data_tools.chat_template import load_chat_template
from data_tools.disk import user_cache
from data_tools.file_digests import FileDigests, hash_file
from data_tools.samples import read_samples
from data_tools.steps import Unit
from data_tools.tokenizer import load_tokenizer
from eval.prm import splitter
from eval.step_scores import Splitter, table_of
from eval.task import GENERATED, WITH_VOTE, Task
from trainer.errors import RunError, UserError
from trainer.reference_cache import weights_digest
from trainer.run_folder import write_file

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("kernels", "data_tools", "trainer", "eval")
ELSEWHERE = ("samples", "judge_samples", "verifier_samples")
"""Options that name files of samples."""
PRM_OPTIONS = ("prm_split", "prm_pattern", "prm_answer_line", "prm_aggregate")
RESULTS = (
    "samples.jsonl",
    "items.jsonl",
    "programs.jsonl",
    "verifier_samples.jsonl",
    "judge_scores.jsonl",
    "audit.jsonl",
    "reward_scores.jsonl",
    "reward_reference_scores.jsonl",
    "prm_scores.jsonl",
    "scores.jsonl",
    "reference_scores.jsonl",
)
"""Files of a run that hold work."""


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
    judge: str | None = None
    judge_samples: str | None = None
    """Verdicts written elsewhere, in place of `judge`; `verifier_samples` likewise."""
    verifier_samples: str | None = None
    reward_model: str | None = None
    reward_reference: str | None = None
    prm: str | None = None
    """Folder of a process reward model; how it is used, as eval.prm has it: None is its default."""
    prm_split: Unit | None = None
    prm_pattern: str | None = None
    prm_answer_line: str | None = None
    prm_aggregate: str | None = None
    baseline: str | None = None
    limit: int | None = None
    dtype: str | None = None
    """None: bf16 where samples are drawn, float32 where texts are scored."""
    chat_template: str | None = None
    few_shot: str | None = None
    """Examples in place of the task's `prompt.few_shot`, and `shots` of them; see eval.task."""
    shots: int | None = None
    slots: int = 16


def check_options(task: Task, options: RunOptions) -> None:
    """Raises UserError for options that do not go together, or not with the task."""
    drawn = task.kind in GENERATED
    of_prm = [name for name in PRM_OPTIONS if getattr(options, name) is not None]
    judge, verifier = options.judge or options.judge_samples, options.verifier or options.verifier_samples
    for wrong, problem in (
        (options.samples and not drawn, f"--samples: kind {task.kind} draws no samples"),
        (not options.model and not options.samples, "--model: required (or --samples with a file drawn elsewhere)"),
        (options.model and options.samples, "--samples were drawn elsewhere: --model would not be used; leave it out"),
        (task.score.rule == "reward" and not options.reference, "--reference: score.rule = reward needs it"),
        (options.reference and task.score.rule != "reward", "--reference: only score.rule = reward uses it"),
        (task.kind == "free" and not judge, "--judge: kind free needs a model that judges (or --judge-samples)"),
        (judge and task.kind != "free", f"--judge: kind {task.kind} is not judged by a model"),
        (options.judge and options.judge_samples, "--judge-samples: is in place of --judge; leave one out"),
        (verifier and task.kind not in WITH_VOTE, f"--verifier: kind {task.kind} has no vote"),
        (options.verifier and options.verifier_samples, "--verifier-samples: is in place of --verifier; leave one out"),
        (bool(options.reward_model) != bool(options.reward_reference), "--reward-model needs --reward-reference"),
        (options.reward_model and not drawn, f"--reward-model: kind {task.kind} draws no samples"),
        (options.prm and not drawn, f"--prm: kind {task.kind} draws no samples"),
        (of_prm and not options.prm, f"--{of_prm[0].replace('_', '-')}: only with --prm" if of_prm else ""),
        (options.limit is not None and options.limit < 1, "--limit: must be 1 or more"),
    ):
        if wrong:
            raise UserError(problem)
    prm_splitter(options)


def prm_splitter(options: RunOptions) -> Splitter:
    """How answers are cut for --prm. Raises UserError."""
    return splitter(options.prm_split, options.prm_pattern, options.prm_answer_line, "prm-")


def prm_aggregation(options: RunOptions) -> str:
    """How the scores of steps become one of an answer. Raises ModelError where --prm has no reward head."""
    assert options.prm is not None
    return options.prm_aggregate or table_of(options.prm).aggregation


def dtype_of(task: Task, options: RunOptions) -> str:
    """The arithmetic of a run: bf16 or float32."""
    return options.dtype or ("bf16" if task.kind in GENERATED else "float32")


def settings_of(task: Task, options: RunOptions) -> dict[str, Any]:
    """What the run is made from: paths and numbers for a reader, digests for a comparison, the state of the code."""
    digests = FileDigests(user_cache("reference") / "digests.json")
    identity: dict[str, Any] = {
        "task": task.digest,
        "prompt_template": task.template_digest,
        "data_sha256": hash_file(options.data) if Path(options.data).is_file() else None,
        "dtype": dtype_of(task, options),
    }
    for name in ("model", "reference", "verifier", "judge", "reward_model", "reward_reference", "prm"):
        folder = getattr(options, name)
        if folder is not None:
            template = load_chat_template(folder, options.chat_template if name in ("model", "reference") else None)
            identity[f"{name}_weights"] = weights_digest(folder, digests)
            identity[f"{name}_tokenizer"] = load_tokenizer(folder).digest
            identity[f"{name}_chat_template"] = None if template is None else template.digest
    files = {name: path for name in ELSEWHERE if (path := getattr(options, name)) is not None}
    for name, path in {**files, "few_shot": task.prompt.few_shot}.items():
        if path is not None:
            if not Path(path).is_file():
                raise UserError(f"{path}: no such file")
            identity[f"{name}_sha256"] = hash_file(path)
    if options.prm is not None:
        own = {name: getattr(options, name) for name in PRM_OPTIONS}
        identity["prm"] = own | {"prm_aggregate": prm_aggregation(options)}
    digests.save()
    shown = {
        name: value for name, value in asdict(options).items() if value is not None and name not in ("out", "task")
    }
    shown["task_file"] = options.task
    shown |= {f"{name}_made_by": _made_by(path) for name, path in files.items()}
    machine = {"torch": torch.__version__, "python": platform.python_version(), "gpu": torch.cuda.is_available()}
    return {"identity": identity, "settings": {**shown, **machine}, "code": code_state()}


def _made_by(path: str) -> list[str]:
    """The models of a file of samples, as they were named, and the digests of their settings."""
    return sorted({f"{sample.model}, settings {sample.settings_digest}" for sample in read_samples(path).samples})


def take_up(path: Path, settings: dict[str, Any]) -> None:
    """Write settings.json, or see that the one there says the same. Raises RunError.

    A folder without results, of a start that failed, is taken as new. Other code is no reason to refuse, but the
    digests of what began the run stay in `code.earlier`.
    """
    results = [own for name in RESULTS if (own := path.parent / name).exists() and own.stat().st_size]
    if results and not path.exists():
        raise RunError(path.parent, f"has {results[0].name} but no {path.name}: not a run's folder; name another --out")
    if results:
        try:
            there = json.loads(path.read_text(encoding="utf-8"))
            identity, code = there["identity"], there["code"]
            earlier = [*code.get("earlier", []), code["sources"]]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise RunError(path, "is not a file of settings; name another --out") from None
        names = dict.fromkeys([*settings["identity"], *identity])
        if other := [name for name in names if identity.get(name) != settings["identity"].get(name)]:
            raise RunError(path.parent, f"holds a run with another {', '.join(other)}; name another --out")
        if others := [own for own in dict.fromkeys(earlier) if own != settings["code"]["sources"]]:
            settings["code"]["earlier"] = others
    write_file(path, json.dumps(settings, indent=1) + "\n")


def code_state() -> dict[str, Any]:
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

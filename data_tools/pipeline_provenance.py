"""Who made each file of a work folder, and each sentence in it: `provenance.json`, and for a person `provenance.md`.

It is put together from the records of the stages, so that it says the same whenever it is written. What a record says
of a stage: command, inputs with sha256, outputs with sha256 and who made their rows (columns `model`,
`settings_digest`, `made_by`), turns of loops, dates, the code's git commit, versions of packages. Environment
variables and keys are nowhere in it; of an address in a command, user and password are left out.
"""

import collections
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_tools.errors import UserError
from data_tools.jsonl import iter_jsonl
from data_tools.pipeline_recipe import Recipe
from data_tools.pipeline_stages import Step, label, makers, masked, plain_text
from data_tools.pipeline_state import Record, WorkFolder, write_file

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("logratio", "torch", "triton", "numpy", "safetensors", "tokenizers", "sentencepiece", "jinja2", "httpx")
ROW_FILES = (".jsonl", ".jsonl.gz")
MAKERS_SHOWN = 8

Maker = tuple[str, str, str]
"""(side of a pair or "", model, settings digest)"""


def code_state() -> dict[str, Any]:
    """The git commit of the code, whether files differ from it, Python's version and those of packages."""
    found: dict[str, Any] = {"git": _git("rev-parse", "HEAD")}
    if found["git"]:
        found["changed"] = bool(_git("status", "--porcelain", "--untracked-files=no"))
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {**found, "packages": versions}


def describe_output(path: str, folder: WorkFolder) -> dict[str, Any]:
    """sha256 and size of an output; of a file of rows also their number and who made them; of a folder its files."""
    if os.path.isdir(path):
        files = folder.files(path)
        size = sum(os.path.getsize(own) for name in files if os.path.isfile(own := os.path.join(path, name)))
        return {"sha256": folder.sha256(path), "bytes": size, "files": files}
    found: dict[str, Any] = {"sha256": folder.sha256(path), "bytes": os.path.getsize(path)}
    if path.endswith(ROW_FILES):
        found |= _describe_rows(path)
    return found


def write_provenance(recipe: Recipe, folder: WorkFolder, steps: Sequence[Step]) -> None:
    """Both files, of the steps that are done; one that would say the same stays. Raises UserError."""
    made = {path: step for step in steps for path in step.outputs}
    stages = []
    for step in steps:
        record = folder.record(step.key)
        if record and record["state"] == "done":
            stages.append(_stage_entry(recipe, step, record, made))
    content = {
        "recipe": str(recipe.path),
        "name": recipe.name,
        "settings": {key: _masked_setting(value) for key, value in recipe.settings.items()},
        "stages": stages,
    }
    _write_changed(recipe.work / "provenance.json", json.dumps(content, ensure_ascii=False, indent=1) + "\n")
    _write_changed(recipe.work / "provenance.md", "\n".join(_page(content)) + "\n")


def _masked_setting(value: Any) -> Any:
    if isinstance(value, list):
        return [masked(own) for own in value]
    return masked(value) if isinstance(value, str) else value


def _stage_entry(recipe: Recipe, step: Step, record: Record, made: Mapping[str, Step]) -> dict[str, Any]:
    inputs = {}
    for path in step.inputs:
        by = [own.key for own in makers(made, path)]
        inputs[path] = {"sha256": record["inputs"].get(plain_text(path, recipe)), "made_by_stages": by}
    return {
        "stage": step.key,
        "label": label(step),
        "about": step.stage.about,
        "turns": dict(step.turns),
        "command": record["command"],
        "inputs": inputs,
        "outputs": {path: record["outputs"].get(plain_text(path, recipe), {}) for path in step.outputs},
        **{name: record.get(name) for name in ("started", "finished", "code")},
        "seconds": record.get("run", {}).get("seconds"),
    }


def _describe_rows(path: str) -> dict[str, Any]:
    """Rows and their makers; a file that cannot be read to its end says so."""
    rows, counts = 0, collections.Counter[Maker]()
    try:
        for _, row in iter_jsonl(path):
            rows += 1
            if isinstance(row, dict):
                counts.update((side, masked(model), digest) for side, model, digest in _makers_of(row))
    except UserError as error:
        if os.path.getsize(path):
            return {"rows": rows, "unread": str(error)}
    names = ("side", "model", "settings_digest", "rows")
    listed = [dict(zip(names, (*maker, count), strict=True)) for maker, count in sorted(counts.items())]
    return {"rows": rows, "made_by": [{name: value for name, value in own.items() if value != ""} for own in listed]}


def _makers_of(row: Mapping[str, Any]) -> Iterator[Maker]:
    """Of a sample its model; of a pair each side's `made_by`; of another row `made_by` itself."""
    said = row.get("made_by")
    if isinstance(said, str):
        yield "", said, ""
    elif isinstance(said, dict) and any(isinstance(own, dict) for own in said.values()):
        for side, own in said.items():
            if isinstance(own, dict) and own:
                yield str(side), str(own.get("model", "?")), str(own.get("settings_digest", ""))
    elif isinstance(said, dict) and said:
        yield "", str(said.get("model", "?")), str(said.get("settings_digest", ""))
    elif isinstance(row.get("model"), str):
        yield "", row["model"], str(row.get("settings_digest", ""))


def _page(content: Mapping[str, Any]) -> Iterator[str]:
    yield f"# Where the files of {content['name']} come from"
    yield ""
    yield f"Made by `python -m data_tools.pipeline {content['recipe']}`, stage by stage."
    yield "Every sha256 in full, and the versions of packages, are in `provenance.json`."
    yield ""
    for key, value in content["settings"].items():
        yield f"- {key} = `{json.dumps(value, ensure_ascii=False)}`"
    for stage in content["stages"]:
        yield from ("", f"## {stage['label']}", "")
        if stage["about"]:
            yield from (stage["about"], "")
        yield f"    {shlex.join(stage['command'])}"
        code = stage["code"] or {}
        commit = (code.get("git") or "")[:12]
        state = f", code {commit}{' with changes' if code.get('changed') else ''}" if commit else ""
        yield ""
        yield f"{stage['started']} to {stage['finished']}{state}"
        yield ""
        for path, own in stage["inputs"].items():
            by = f"by {', '.join(own['made_by_stages'])}" if own["made_by_stages"] else "given"
            yield f"- read `{path}` ({by}; sha256 {(own['sha256'] or '?')[:12]})"
        for path, own in stage["outputs"].items():
            yield f"- wrote `{path}` ({_size(own)}; sha256 {own.get('sha256', '?')[:12]})"
            yield from (f"    - {line}" for line in _maker_lines(own.get("made_by", [])))


def _size(output: Mapping[str, Any]) -> str:
    if "files" in output:
        return f"{len(output['files'])} files, {output.get('bytes', 0):,} bytes"
    return f"{output['rows']} rows" if "rows" in output else f"{output.get('bytes', 0):,} bytes"


def _maker_lines(listed: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for own in listed[:MAKERS_SHOWN]:
        side = f"{own['side']}: " if own.get("side") else ""
        digest = f", settings {own['settings_digest']}" if own.get("settings_digest") else ""
        yield f"{side}{own['rows']} by `{own['model']}`{digest}"
    if len(listed) > MAKERS_SHOWN:
        yield f"and {len(listed) - MAKERS_SHOWN} more"


def _write_changed(path: Path, text: str) -> None:
    try:
        if path.read_text(encoding="utf-8") == text:
            return
    except (OSError, ValueError):
        pass
    write_file(path, text)


def _git(*command: str) -> str | None:
    """What git says about the folder of the code, or None."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *command], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()

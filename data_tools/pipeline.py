"""Run a recipe: `python -m data_tools.pipeline recipes/<name>/small.toml [--plan] [--set key=value ...]`.

A recipe is a TOML list of stages, which are commands over files; its form is in data_tools/pipeline_recipe.py. A stage
whose command and inputs have not changed is passed over; the same command again goes on after a stop, a failure or a
kill. What each stage said is in `logs/` of the work folder, who made which file in `provenance.md` and
`provenance.json`. docs/pipeline.md tells more.

Exit codes: 0 done, 2 what the user can mend (or a stage's command exited 2), 1 a stage failed, 128 + n stopped by
signal n (130: Ctrl-C).
"""

import argparse
import io
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from data_tools.errors import UserError
from data_tools.pipeline_guard import StopSignals, run_guarded
from data_tools.pipeline_plan import count_samples, plan, samples_path, says_stop, table
from data_tools.pipeline_provenance import code_state, describe_output, write_provenance
from data_tools.pipeline_recipe import Loop, Recipe, read_recipe
from data_tools.pipeline_stages import Step, check, label, makers, masked, plain_text, shown, walk
from data_tools.pipeline_state import Record, Status, WorkFolder, WorkLock
from data_tools.pipeline_tables import nearest

TAIL_BYTES = 1 << 16
TAIL_LINES = 20


class _Ended(Exception):
    """A stage failed or was stopped; what there is to say is said."""

    def __init__(self, code: int) -> None:
        self.code = code


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    args = _parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        recipe = read_recipe(args.recipe, args.set)
        steps = check(recipe)
        chosen = _chosen(steps, args.start, args.only)
        if args.plan:
            print(table(plan(recipe, WorkFolder(recipe), chosen)))
            return 0
        with WorkLock(recipe.work / "pipeline"), StopSignals() as stop:
            _Run(recipe, stop).run(chosen)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except _Ended as ended:
        return ended.code
    except KeyboardInterrupt:  # before the first stage or after the last
        print("stopped: SIGINT; start the same command again to go on", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away, e.g. `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


class _Run:
    """One run of a recipe, with the lock held."""

    def __init__(self, recipe: Recipe, stop: StopSignals) -> None:
        self._recipe, self._stop = recipe, stop
        self._folder = WorkFolder(recipe)
        self._steps: list[Step] = []
        self._code: dict[str, Any] | None = None
        self._ran, self._up_to_date, self._began = 0, 0, time.monotonic()

    def run(self, chosen: Callable[[Step], bool]) -> None:
        """All steps in order. Raises UserError, and _Ended where a stage does not end well."""
        try:
            for step in walk(self._recipe, self._stopped):
                self._steps.append(step)
                if not chosen(step):
                    continue
                if self._stop.asked:
                    self._say_stopped(f"before stage '{step.key}'")
                self._step(step)
        finally:
            self._folder.save_digests()
        write_provenance(self._recipe, self._folder, self._steps)
        seconds = time.monotonic() - self._began
        counts = f"{self._ran} stages run in {seconds:.1f} s, {self._up_to_date} up to date"
        print(f"{self._recipe.name}: {counts}; {self._recipe.work / 'provenance.md'}", flush=True)

    def _stopped(self, loop: Loop, turn: int, path: str) -> bool:
        made = {own: step for step in self._steps for own in step.outputs}
        return bool(makers(made, path)) and says_stop(path)

    def _step(self, step: Step) -> None:
        status = self._folder.status(step)
        if status.state == "lacks":
            raise UserError(f"stage '{step.key}': {status.why}; run the stage that makes it, or name another file")
        if status.state == "done":
            self._up_to_date += 1
            print(f"{label(step)}: up to date", flush=True)
            return
        log = self._folder.logs / f"{step.key}.log"
        print(f"{label(step)}: {status.why}; runs, output in {log}", flush=True)
        for line in self._folder.move_aside(step, status):
            print(f"{label(step)}: {line}", flush=True)
        record = self._begin(step, status)
        size = _begin_log(log, step)
        drawn_before = _drawn(step)
        began = time.monotonic()
        code = run_guarded(step.command, log, self._stop)
        seconds = time.monotonic() - began
        lines = _last_lines(log, size)
        self._judge(step, code, lines, log)
        run = {"seconds": round(seconds, 3), "resumed": status.goes_on, **_measured(step, drawn_before, seconds)}
        self._finish(step, record, run)
        self._ran += 1
        print(f"{label(step)}: done in {seconds:.1f} s" + (f"; {lines[-1].strip()}" if lines else ""), flush=True)
        write_provenance(self._recipe, self._folder, self._steps)

    def _begin(self, step: Step, status: Status) -> Record:
        """Write down that the step starts, and from what, before anything of it is there."""
        if self._code is None:
            self._code = code_state()
        before = self._folder.record(step.key) or {}
        record = {
            "state": "started",
            "stage": step.stage.name,
            "key": step.key,
            "turns": dict(step.turns),
            "digest": status.digest,
            "command": shown(step.command),
            "plain": shown(step.plain),
            "inputs": {plain_text(path, self._recipe): sha256 for path, sha256 in status.inputs.items()},
            "started": _now(),
            "code": self._code,
            "run": before.get("run", {}),
        }
        for path in step.outputs:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        self._folder.write_record(step.key, record)
        return record

    def _finish(self, step: Step, record: Record, run: Record) -> None:
        outputs = {plain_text(path, self._recipe): describe_output(path, self._folder) for path in step.outputs}
        done = {**record, "state": "done", "finished": _now(), "outputs": outputs, "run": run}
        self._folder.write_record(step.key, done)
        self._folder.save_digests()

    def _judge(self, step: Step, code: int, lines: Sequence[str], log: Path) -> None:
        """Raises _Ended where the command did not do its work."""
        missing = [path for path in step.outputs if not os.path.exists(path)]
        # A command that is told to stop may end with 0 though rows are missing; asked again it knows better.
        if self._stop.asked and (code or missing or step.stage.appends):
            self._say_stopped(f"in stage '{step.key}'")
        if code == 0 and not missing:
            return
        why = f"exit code {code}" if code else f"it ended well, but {missing[0]} is not there"
        said = "".join(f"  | {line}\n" for line in lines[-TAIL_LINES:]) or "  | (it said nothing)\n"
        command = shlex.join(shown(step.command))
        print(f"error: stage '{step.key}' failed: {why}\n  {command}\n{said}  all of it: {log}", file=sys.stderr)
        raise _Ended(2 if code == 2 else 1)

    def _say_stopped(self, where: str) -> None:
        assert self._stop.asked is not None
        text = f"stopped: {self._stop.asked.name} {where}; start the same command again to go on"
        print(text, file=sys.stderr, flush=True)
        raise _Ended(128 + self._stop.asked)


def _chosen(steps: Sequence[Step], start: str | None, only: str | None) -> Callable[[Step], bool]:
    """Which steps take part, by --from and --only: a stage's name, or its name in a turn (`sample.round2`)."""
    wanted = start or only
    if wanted is None:
        return lambda step: True
    names = dict.fromkeys(name for step in steps for name in (step.stage.name, step.key))
    if wanted not in names:
        option = "--from" if start else "--only"
        known = ", ".join(dict.fromkeys(step.stage.name for step in steps))
        raise UserError(f"{option} {wanted}: no such stage{nearest(wanted, names)}; stages: {known}")
    if only:
        return lambda step: wanted in (step.stage.name, step.key)
    begun = False

    def from_start(step: Step) -> bool:
        nonlocal begun
        begun = begun or wanted in (step.stage.name, step.key)
        return begun

    return from_start


def _drawn(step: Step) -> int:
    """Tokens in the samples file of a stage that samples; 0 where nobody knows."""
    return 0 if step.calls is None else count_samples(samples_path(step))[1] or 0


def _measured(step: Step, drawn_before: int, seconds: float) -> dict[str, Any]:
    """What a stage that samples has in all, and how fast it was this time."""
    if step.calls is None:
        return {}
    counts, tokens = count_samples(samples_path(step))
    drawn = (tokens or 0) - drawn_before
    rate = round(drawn / seconds, 3) if drawn > 0 and seconds > 0 else None
    model = masked(step.calls.model or "")
    return {"calls": counts.total(), "completion_tokens": tokens, "tokens_per_s": rate, "model": model}


def _begin_log(log: Path, step: Step) -> int:
    """A line that says what starts; returns where the command's own output begins."""
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as file:
            file.write(f"== {_now()} {shlex.join(shown(step.command))}\n".encode(errors="backslashreplace"))
            return file.tell()
    except OSError as error:
        raise UserError(f"{log}: cannot be written: {error.strerror or error}") from error


def _last_lines(log: Path, begin: int) -> list[str]:
    """What a terminal would show in the end: of a line that was overwritten, the last state."""
    with open(log, "rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(begin, end - TAIL_BYTES))
        text = file.read().decode("utf-8", "replace")
    lines = [line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")]
    return ["".join(c if c.isprintable() else " " for c in line) for line in lines if line.strip()]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.pipeline",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("recipe", help="TOML file of the recipe")
    parser.add_argument("--plan", action="store_true", help="show stages, model calls, tokens and time; run nothing")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting, or work=FOLDER")
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--from", dest="start", metavar="STAGE", help="take what comes before as it is, without a look")
    one.add_argument("--only", metavar="STAGE", help="this stage alone")
    return parser


if __name__ == "__main__":
    sys.exit(main())

"""After a round of training: go on, or stop because the development set fell; and which round's model was the best.

    python -m data_tools.rounds state --reports start/report.json round1/report.json round2/report.json --out state
    python -m data_tools.rounds best --reports start/report.json round1/report.json \\
        --folders start/export round1/export --out best

    python -m data_tools.rounds table --reports base/report.json best/report.json --out results.md

Reports are `report.json` of `python -m eval.main run` on the same task and data, in the order of the rounds; the first
one is of the model that the rounds began from. `state` writes a file for a loop's `stop_when`: its first line is
"stop" where the last score is more than --tolerance below the best one before it, else "go on"; a line each round
stands below. Equal scores go on. `best` makes a folder with the files of the round that scored highest, the earliest of
equals: hard links where the file system has them, so it takes no room. The development set chooses: the score of the
chosen round on it is too good, and only a test set that nothing was chosen by says how good the model is. `table` puts
reports, of any tasks, into one Markdown table: scores with intervals, and where an evaluation had a baseline the paired
difference from it.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_tools.command import run
from data_tools.errors import UserError

NOTE = "best.json"
"""File in the chosen folder that says which one it is."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code: 0, or 2 with one line a fault of the input."""
    return run(_parser(), argv, {"state": _state, "best": _best, "table": _table})


def read_scores(paths: Sequence[str]) -> list[float]:
    """The micro-averaged metric of each report. Raises UserError for reports that do not compare."""
    found, first = [], None
    for path in paths:
        result = _read(path)["result"]
        own = (result["metric"], result["items"])
        found.append(float(result["micro"]["value"]))
        first = first or own
        if own != first:
            problem = f"{own[0]} over {own[1]} items, {paths[0]} has {first[0]} over {first[1]}"
            raise UserError(f"{path}: {problem}; give reports of one task on the same items")
    return found


def has_fallen(scores: Sequence[float], tolerance: float) -> bool:
    """Is the last score more than `tolerance` below the best before it?"""
    return len(scores) > 1 and scores[-1] < max(scores[:-1]) - tolerance


def best_of(scores: Sequence[float]) -> int:
    """The place of the highest score, the earliest of equals."""
    return max(range(len(scores)), key=lambda place: (scores[place], -place))


def _state(args: argparse.Namespace) -> None:
    scores = read_scores(args.reports)
    falls, best = has_fallen(scores, args.tolerance), best_of(scores)
    lines = [
        f"{place} {score:.4f} {path}" for place, (score, path) in enumerate(zip(scores, args.reports, strict=True))
    ]
    said = f"{'the last score fell' if falls else 'no fall'}; best is {best}"
    write_state(args.out, stops=falls, because="\n".join([said, *lines]))
    shown = ", ".join(f"{score:.4f}" for score in scores)
    print(f"{'stop' if falls else 'go on'}: {said}; scores {shown}; {args.out}")


def _best(args: argparse.Namespace) -> None:
    if len(args.folders) != len(args.reports):
        raise UserError(f"--folders: {len(args.folders)} for {len(args.reports)} reports; give one for each")
    scores = read_scores(args.reports)
    best = best_of(scores)
    note = json.dumps({"files_of": args.folders[best]}) + "\n"  # not the scores: the same choice is the same folder
    _link_folder(Path(args.folders[best]), Path(args.out), note)
    print(f"{args.out}: the files of {args.folders[best]} (score {scores[best]:.4f}, place {best} of {len(scores)})")


def _table(args: argparse.Namespace) -> None:
    lines = ["| run | metric | items | score | 95% | against its baseline |", "|---|---|---|---|---|---|"]
    for path in args.reports:
        report = _read(path)
        result, change = report["result"], ""
        if comparison := report.get("comparison"):
            own = comparison["difference"]
            change = f"{own['value']:+.3f} ({own['low']:+.3f} to {own['high']:+.3f})"
        name = Path(path).parent
        shown = [(str(name), result["metric"], result["micro"])]
        shown += [(f"{name}, by reward: {kind.replace('_', ' ')}", result["metric"], own)
                  for kind, own in result.get("prm", {}).items()]  # fmt: skip
        for label, metric, own in shown:
            interval = f"{own['low']:.3f} to {own['high']:.3f}"
            cells = (label, metric, str(result["items"]), f"{own['value']:.3f}", interval, change)
            lines.append(f"| {' | '.join(cells)} |")
            change = ""
    write_text(args.out, "\n".join(lines) + "\n")
    print(f"{len(args.reports)} reports: {args.out}")


def _read(path: str) -> Any:
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
        float(report["result"]["micro"]["value"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path}: is no report.json of a finished `python -m eval.main run`") from None
    return report


def write_state(path: str, *, stops: bool, because: str) -> None:
    """A file for `stop_when` of a loop: a line "stop" or "go on", and below what it follows from. Raises UserError."""
    write_text(path, f"{'stop' if stops else 'go on'}\n{because}\n")


def write_text(path: str, text: str) -> None:
    """The text, or no file: written beside it, then renamed. Raises UserError."""
    part = Path(f"{path}.part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error


def _link_folder(source: Path, target: Path, note: str) -> None:
    """The folder under another name, whole or not at all, with a note in it. Replaces an earlier choice only."""
    part = target.with_name(f"{target.name}.part")
    if target.exists() and not (target / NOTE).is_file():
        raise UserError(f"{target}: is there and is no folder of this command (it has no {NOTE}); name another --out")
    try:
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(source, part, copy_function=_link)
        (part / NOTE).unlink(missing_ok=True)
        (part / NOTE).write_text(note, encoding="utf-8")
        if target.exists():
            shutil.rmtree(target)
        os.rename(part, target)
    except OSError as error:
        raise UserError(f"{target}: cannot be made of {source}: {error.strerror or error}") from error


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copy2(source, target)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.rounds",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    deciding = commands.add_parser("state", help="whether rounds go on", allow_abbrev=False)
    deciding.add_argument("--tolerance", type=float, default=0.0, help="a fall that is let pass (default 0)")
    choosing = commands.add_parser("best", help="the best round's folder", allow_abbrev=False)
    choosing.add_argument("--folders", nargs="+", required=True, help="model folders, in the order of --reports")
    for each in (deciding, choosing):
        each.add_argument("--reports", nargs="+", required=True, help="report.json of the start and of each round")
    telling = commands.add_parser("table", help="reports in one table", allow_abbrev=False)
    telling.add_argument("--reports", nargs="+", required=True, help="report.json of any runs")
    telling.add_argument("--out", required=True, help="Markdown, written anew and whole")
    deciding.add_argument("--out", required=True, help="text file, written anew and whole")
    choosing.add_argument("--out", required=True, help="folder; one that is there is replaced")
    return parser


if __name__ == "__main__":
    sys.exit(main())

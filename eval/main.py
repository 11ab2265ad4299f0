"""Evaluate a model: `python -m eval.main run --task T --model DIR --data F.jsonl --out DIR`, and compare two runs.

    run            a task over a file: every item logged, report as JSON, Markdown and HTML; goes on after a kill
    compare A B    two runs on the same items: McNemar's test, paired bootstrap, by subject
    prompts        a task's prompts as a file for `python -m eval.sample` (a server: --url), then `run --samples`;
                   with --for judge or verifier theirs, then `run --judge-samples` or `--verifier-samples`
    contamination  are the evaluation's texts in the training data? exit code 2 above a share that you choose

Task files: eval/task.py; eval/tasks has some, by name. Exit codes: 0 done, 2 what the user can mend, 1 stopped.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from eval import contamination
from eval.compare import budget_line, compare_rows
from eval.items import read_items
from eval.prm import add_score_options
from eval.report import comparison_table, headline, markdown_table
from eval.run import prompt_rows, read_run, run, second_prompt_rows, write_prompt_rows
from eval.run_settings import RunOptions
from eval.task import GENERATED, WITH_VOTE, load_task, with_few_shot
from trainer.entry import run_command
from trainer.errors import UserError
from trainer.run_folder import ensure_file_writable, write_file


def main(argv: list[str]) -> None:
    """The command; see the module's text."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.main", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, words, fill, command in (
        ("run", "run a task", _run_options, _run),
        ("compare", "compare two runs on the same items", _compare_options, _compare),
        ("prompts", "write a task's prompts", _prompts_options, _prompts),
        ("contamination", "look for evaluation texts in training data", contamination.add_options, contamination.run),
    ):
        own = commands.add_parser(name, help=words, description=words, allow_abbrev=False)
        fill(own)
        own.set_defaults(command=command)
    args = parser.parse_args(argv)
    command: Callable[[argparse.Namespace], None] = args.command
    command(args)


def _run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", required=True, help="a task file, or one of eval/tasks by its name")
    parser.add_argument("--data", required=True, help="JSON Lines of items")
    parser.add_argument("--out", required=True, help="folder of the run; the same command again goes on there")
    parser.add_argument("--model", help="Hugging Face model folder")
    parser.add_argument("--samples", help="samples drawn elsewhere (`eval.main prompts`, then `eval.sample --url`)")
    parser.add_argument("--reference", help="preference with rule reward: the model that training began from")
    parser.add_argument("--verifier", help="a model that decides where the vote abstains (`[verifier]` of the task)")
    parser.add_argument("--judge", help="free answers: the model that judges them (`[judge]` of the task)")
    parser.add_argument("--judge-samples", help="verdicts written elsewhere (`eval.main prompts --for judge`)")
    parser.add_argument("--verifier-samples", help="decisions written elsewhere (`eval.main prompts --for verifier`)")
    parser.add_argument("--reward-model", help="best of n: the sample whose log-prob this model has raised most ...")
    parser.add_argument("--reward-reference", help="... over this one, that its training began from")
    parser.add_argument("--prm", help="best of n and a weighted vote by this process reward model; as for eval.prm:")
    add_score_options(parser, "prm-")
    parser.add_argument("--baseline", help="folder of another run on the same items, compared in the report")
    parser.add_argument("--limit", type=int, help="only the first N items")
    parser.add_argument("--dtype", choices=["bf16", "float32"], help="default: bf16 to draw, float32 to score texts")
    parser.add_argument("--chat-template", help="a jinja file used instead of the model's own template")
    _few_shot_options(parser)
    parser.add_argument("--slots", type=int, default=16, help="sequences drawn at a time (default 16)")


def _few_shot_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--few-shot", help="JSON Lines of rows like the data's, shown before each prompt")
    parser.add_argument("--shots", type=int, help="how many of them (default: all); an item is never its own example")


def _run(args: argparse.Namespace) -> None:
    options = RunOptions(**{name: value for name, value in vars(args).items() if name != "command"})
    report = run(options)
    print(headline(report))
    print(f"baseline: {report['baseline']}")
    print(f"report: {Path(options.out) / 'report.html'} (and .md, .json)")


def _compare_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", metavar="A", help="folder of a run")
    parser.add_argument("b", metavar="B", help="folder of another run on the same items")
    parser.add_argument("--json", help="write the numbers to this file too")


def _compare(args: argparse.Namespace) -> None:
    if args.json:
        ensure_file_writable(args.json)
    (first, mine), (second, theirs) = read_run(args.a), read_run(args.b)
    found = compare_rows(mine, theirs, (args.a, args.b))
    found["budget"] = budget_line(first["result"], second["result"])
    print(f"A: {args.a} ({first['task']})\nB: {args.b} ({second['task']})\nbudget: {found['budget']}\n")
    print("\n".join(markdown_table(comparison_table(found))))
    if args.json:
        write_file(args.json, json.dumps(found, indent=1) + "\n")


def _prompts_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", required=True, help="a task file, or one of eval/tasks by its name")
    parser.add_argument("--data", required=True, help="JSON Lines of items")
    parser.add_argument("--out", required=True, help="JSON Lines of prompts to write")
    parser.add_argument("--limit", type=int, help="only the first N items")
    _few_shot_options(parser)
    parser.add_argument("--for", dest="asked", choices=["judge", "verifier"], help="what it is asked about --samples")
    parser.add_argument("--samples", help="with --for: the task's samples")


def _prompts(args: argparse.Namespace) -> None:
    task = with_few_shot(load_task(args.task), args.few_shot, args.shots)
    if task.kind not in GENERATED:
        raise UserError(f"{args.task}: kind {task.kind} asks nothing; `run` scores it")
    kinds = {"judge": ("free",), "verifier": WITH_VOTE, None: GENERATED}[args.asked]
    for wrong, problem in (
        (task.kind not in kinds, f"--for {args.asked}: not of kind {task.kind}"),
        (bool(args.asked) != bool(args.samples), "--for and --samples go together"),
    ):
        if wrong:
            raise UserError(problem)
    items = read_items(task, args.data, limit=args.limit)
    if args.asked is None:
        write_prompt_rows(prompt_rows(task, items), args.out)
        print(f"{len(items)} prompts, {task.sampling.n} samples each: {args.out}")
        return
    rows = second_prompt_rows(args.asked, task, items, args.samples)
    write_prompt_rows(rows, args.out)
    nothing = "" if rows else f": nothing to ask, leave --{args.asked}-samples out"
    print(f"{len(rows)} prompts for the {args.asked}: {args.out}{nothing}")


if __name__ == "__main__":
    run_command(main, sys.argv[1:])

"""Score answers with a process reward model, or say how good one is: `python -m eval.prm --model DIR [--adapter DIR]`.

    --prompts P.jsonl --samples S.jsonl --out F.jsonl   scores samples: id, sample, score, step_scores (null and []
                                                        for one without text), in the order of the samples
    --data STEPS.jsonl [--control DIR]                  rows with hard labels: accuracy of steps, AUC, and the same of
                                                        a control on the same steps; --out: id, score, step_scores, hard

Answers are cut into steps as those were that the model learnt from (--split). A score is a probability, 0 to 1.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from data_tools.errors import UserError
from data_tools.jsonl import iter_jsonl, read_records, write_rows
from data_tools.samples import Prompt, Sample, read_prompts, read_samples
from data_tools.schema import Record
from data_tools.steps import UNITS, Unit, compiled
from eval.prm_numbers import differences, numbers
from eval.step_scores import Answers, RewardModel, Splitter, answer_records, load_reward_model
from trainer.entry import run_command
from trainer.prm import AGGREGATIONS, PrmTable, aggregate
from trainer.run_folder import ensure_file_writable, write_file


def main(argv: list[str]) -> None:
    """The command; see the module's text."""
    args = _parser().parse_args(argv)
    _check(args)
    for path in filter(None, (args.out, args.json)):
        ensure_file_writable(path)
    if args.data:
        _judge_model(args)
    else:
        _score_samples(args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m eval.prm",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="folder of the reward model, or the base of --adapter")
    parser.add_argument("--adapter", help="folder of an adapter with a reward head (run.dir/adapter)")
    parser.add_argument("--prompts", help="JSON Lines of prompts, as they were given to eval.sample")
    parser.add_argument("--samples", help="JSON Lines of samples for them")
    parser.add_argument("--data", help="JSON Lines of labelled steps (docs/prm.md)")
    parser.add_argument("--control", help="another reward model's folder, compared on --data, such as one of outcomes")
    parser.add_argument("--control-adapter", help="an adapter on --control (on --model without it)")
    parser.add_argument("--out", help="JSON Lines of scores to write")
    parser.add_argument("--json", help="with --data: write the numbers to this file too")
    add_score_options(parser)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bf16"], help="arithmetic (default float32)")
    parser.add_argument("--chat-template", help="a jinja file used instead of the model's own template")
    return parser


def add_score_options(parser: argparse.ArgumentParser, prefix: str = "") -> None:
    """How answers are cut and their steps' scores put together; the names begin with `prefix`. None where not given."""
    parser.add_argument(f"--{prefix}split", choices=UNITS, help="what a step is (default line)")
    parser.add_argument(f"--{prefix}pattern", help="with split regex: each match ends a step")
    words = "pieces at the end that begin like this are no steps: auto (default), step (all are), or a pattern"
    parser.add_argument(f"--{prefix}answer-line", help=words)
    words = "from steps to answers (default: as the model was trained)"
    parser.add_argument(f"--{prefix}aggregate", choices=AGGREGATIONS, help=words)


def splitter(unit: Unit | None, pattern: str | None, answer_line: str | None, prefix: str = "") -> Splitter:
    """From the options. Raises UserError for a pattern that is none, or that is not used."""
    if (pattern is not None) != (unit == "regex"):
        raise UserError(f"--{prefix}pattern: goes with --{prefix}split regex, and only with it")
    found = None if pattern is None else compiled(pattern, f"--{prefix}pattern")
    if answer_line in (None, "auto"):
        return Splitter(unit or "line", found)
    rest = None if answer_line == "step" else compiled(str(answer_line), f"--{prefix}answer-line")
    return Splitter(unit or "line", found, rest)


def _check(args: argparse.Namespace) -> None:
    control = args.control or args.control_adapter
    for wrong, problem in (
        (bool(args.prompts) != bool(args.samples), "--prompts and --samples go together"),
        (bool(args.data) == bool(args.samples), "give either --prompts and --samples, or --data"),
        (args.samples and not args.out, "--out: needed with --samples"),
        (args.samples and (control or args.json), "--control, --json: only with --data"),
    ):
        if wrong:
            raise UserError(problem)


def _score_samples(args: argparse.Namespace) -> None:
    split = splitter(args.split, args.pattern, args.answer_line)
    samples = read_samples(args.samples).samples
    answers = collect_answers(read_prompts(args.prompts), samples, args.samples)
    reward = load_reward_model(args.model, adapter=args.adapter, dtype=args.dtype, chat_template=args.chat_template)
    how = args.aggregate or reward.table.aggregation
    scores = score_answers(reward, [own for own, _ in answers], split)
    by_key: dict[tuple[str, int], list[float]] = {}
    for (own, sample_numbers), of_texts in zip(answers, scores, strict=True):
        by_key |= {(own.id, number): steps for number, steps in zip(sample_numbers, of_texts, strict=True)}
    rows = []
    for sample in samples:
        steps = by_key.get(sample.key, [])
        score = aggregate(steps, how) if steps else None
        rows.append({"id": sample.id, "sample": sample.sample, "score": score, "step_scores": steps})
    write_rows(args.out, rows)
    scored = [row["score"] for row in rows if row["score"] is not None]
    mean = f", mean score {sum(scored) / len(scored):.3f}" if scored else ""
    blank = f", {len(rows) - len(scored)} without text" if len(scored) < len(rows) else ""
    print(f"{len(rows)} samples of {len(answers)} prompts scored ({how} of steps){mean}{blank}: {args.out}")


def collect_answers(
    prompts: Sequence[Prompt], samples: Sequence[Sample], path: str
) -> list[tuple[Answers, tuple[int, ...]]]:
    """Each prompt with its samples' texts (after its prefix) and their numbers. Raises UserError for a sample of an
    unknown prompt, or of another one than the file has."""
    by_id = {prompt.id: prompt for prompt in prompts}
    found: dict[str, list[Sample]] = {}
    for sample in samples:
        prompt = by_id.get(sample.id)
        if prompt is None:
            raise UserError(f"{path}: id '{sample.id}' is not in the file of prompts; give the one it was drawn from")
        if sample.prompt_digest != prompt.digest:
            raise UserError(f"{path}: id '{sample.id}' was drawn for another prompt; give the file it was drawn from")
        if (prompt.prefix + sample.text).strip():
            found.setdefault(sample.id, []).append(sample)
    collected = []
    for name, own in found.items():
        prompt = by_id[name]
        texts = tuple(prompt.prefix + one.text for one in own)
        answers = Answers(name, prompt.prompt, texts, prompt.path, prompt.line)
        collected.append((answers, tuple(one.sample for one in own)))
    return collected


def score_answers(reward: RewardModel, answers: Sequence[Answers], split: Splitter) -> list[list[list[float]]]:
    """Scores of the steps of every text of every prompt, in order."""
    return _all_scores(reward, answer_records(answers, split)) if answers else []


def _all_scores(reward: RewardModel, records: Sequence[Record]) -> list[list[list[float]]]:
    groups = reward.encode(records)
    done = tqdm(reward.scores(groups), total=len(groups), unit="row", dynamic_ncols=True, disable=None)
    by_index = dict(done)
    return [by_index[index] for index in range(len(groups))]


def _judge_model(args: argparse.Namespace) -> None:
    records = read_records([args.data], kind="prm")
    rows = [row for _, row in iter_jsonl(args.data) if isinstance(row, dict)]
    questions = [str(row.get("question_id", record.id)) for row, record in zip(rows, records, strict=True)]
    hard = [[label.hard for label in record.steps[0].labels] for record in records]
    truth = by_question(questions, hard)
    scores, said = _scores_of(args, args.model, args.adapter, records)
    mine = by_question(questions, scores)
    report: dict[str, Any] = {"data": args.data, "labels": said.labels} | numbers(mine, truth)
    if args.control or args.control_adapter:
        others, said_other = _scores_of(args, args.control or args.model, args.control_adapter, records)
        theirs = by_question(questions, others)
        report["control"] = {"labels": said_other.labels} | numbers(theirs, truth)
        report["difference"] = differences(mine, theirs, truth)
    if args.out:
        how = args.aggregate or said.aggregation
        write_rows(
            args.out,
            (
                {"id": record.id, "score": aggregate(steps, how), "step_scores": steps, "hard": labels}
                for record, steps, labels in zip(records, scores, hard, strict=True)
            ),
        )
    if args.json:
        write_file(args.json, json.dumps(report, indent=1) + "\n")
    print("\n".join(table(report)))


def _scores_of(
    args: argparse.Namespace, folder: str, adapter: str | None, records: Sequence[Record]
) -> tuple[list[list[float]], PrmTable]:
    """Scores of the steps of every record under one model, and what the model says of itself."""
    reward = load_reward_model(folder, adapter=adapter, dtype=args.dtype, chat_template=args.chat_template)
    return [own[0] for own in _all_scores(reward, records)], reward.table


def by_question(questions: Sequence[str], values: Sequence[Sequence[float]]) -> list[np.ndarray]:
    """The steps of each question's answers in one array; questions in the order in which they first stand."""
    found: dict[str, list[float]] = {}
    for question, own in zip(questions, values, strict=True):
        found.setdefault(question, []).extend(own)
    return [np.asarray(own) for own in found.values()]


def table(report: dict[str, Any]) -> list[str]:
    """The numbers as lines: model, and control and difference where there is one."""
    columns = [("model", report)]
    if "control" in report:
        columns += [("control", report["control"]), ("model - control", report["difference"])]
    share = report["right"]
    lines = [
        f"{report['steps']} steps of {report['questions']} questions, {share:.3f} of them right; "
        f"always saying the same would be {max(share, 1 - share):.3f} accurate. 95% intervals over questions.",
        f"{'trained on':<24}" + "".join(f"{own.get('labels', ''):>26}" for _, own in columns),
        f"{'':<24}" + "".join(f"{name:>26}" for name, _ in columns),
    ]
    for name in (name for name in report if name.startswith("step_")):
        lines.append(f"{name:<24}" + "".join(f"{_ranged(own[name]):>26}" for _, own in columns))
    return lines


def _ranged(own: dict[str, float] | None) -> str:
    return "not defined" if own is None else f"{own['value']:.3f} [{own['low']:.3f}, {own['high']:.3f}]"


if __name__ == "__main__":
    run_command(main, sys.argv[1:])

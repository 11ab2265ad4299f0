"""Preference pairs whose right answer is known: word problems with a right working and one with a slip.

Both sides of a pair are the same text but for the numbers, every number keeps its count of digits, and slips that make
the answer too large are as many as those that make it too small. So length, words, operators and layout tell nothing;
only checking the calculation does. Which instances (template and numbers) are held out is a function of the instance
alone: no seed and no size of either part ever puts a held-out question into training.

    python -m data_tools.pairs.arithmetic --out-dir data/quickstart --train 512 --eval 256 --seed 0
"""

import argparse
import random
import sys
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.errors import UserError
from data_tools.jsonl import write_rows
from data_tools.pairs.arithmetic_templates import NAMES, NUMBER_RANGES, TEMPLATES, THINGS, Template

# Share of each slip among the rejected answers.
SLIP_MIX = {"last_line": 0.35, "operation": 0.25, "carry": 0.20, "skipped_step": 0.20}
# Every number shown lies in this range, inclusive.
VALUE_RANGE = (2, 99)
# How far a wrong last line may lie from the result it should repeat.
LAST_LINE_OFFSETS = (1, 2, 3, 10, 20)
# What a calculation is mistaken for. Products are left out: their two-digit mistakes are sums below 20, and many a 1
# would give the rejected side away.
MISTAKEN_OPERATIONS = {"+": "-", "-": "+"}
# One instance in so many is held out.
HELD_OUT_ONE_IN = 4
# Draws before another template is tried: enough that a template which seldom allows a slip comes up as often as others.
DRAWS_PER_TEMPLATE = 200
# Draws for one row before giving up: far more than needed until the instances run out.
MAX_DRAWS = 20_000


@dataclass(frozen=True, slots=True)
class Calculation:
    """`left op right = result` as it is shown, which a slip may have made wrong."""

    left: int
    op: str
    right: int
    result: int

    def __str__(self) -> str:
        return f"{self.left} {self.op} {self.right} = {self.result}"


@dataclass(frozen=True, slots=True)
class Slip:
    """One wrong number: where it stands (`slot` is left, right or result of a step, or the answer) and its value."""

    kind: str
    step: int
    slot: str
    value: int


@dataclass(frozen=True, slots=True)
class Working:
    """The steps of an answer and the number of its last line."""

    steps: tuple[Calculation, ...]
    answer: int

    def widths(self) -> list[int]:
        """How many digits each number has, in the order shown."""
        shown = [number for step in self.steps for number in (step.left, step.right, step.result)]
        return [len(str(number)) for number in [*shown, self.answer]]


def calculate(op: str, left: int, right: int) -> int | None:
    """The result, or None when it is not a whole number within VALUE_RANGE."""
    if op == "/":
        result, rest = divmod(left, right)
        if rest:
            return None
    else:
        result = {"+": left + right, "-": left - right, "*": left * right}[op]
    return result if VALUE_RANGE[0] <= result <= VALUE_RANGE[1] else None


def work(template: Template, numbers: dict[str, int], slip: Slip | None = None) -> Working | None:
    """Work the problem out, with the slip's number in its place and all that follows computed from it.

    None when a number falls outside VALUE_RANGE or a division leaves a rest.
    """
    if slip is not None and not VALUE_RANGE[0] <= slip.value <= VALUE_RANGE[1]:
        return None
    values = dict(numbers)
    steps: list[Calculation] = []
    for index, step in enumerate(template.steps):
        shown = {"left": values[step.left], "right": values[step.right]}
        slipped = slip if slip is not None and slip.step == index else None
        if slipped is not None and slipped.slot in shown:
            shown[slipped.slot] = slipped.value
        if slipped is not None and slipped.slot == "result":
            result: int | None = slipped.value
        else:
            result = calculate(step.op, shown["left"], shown["right"])
        if result is None:
            return None
        values[f"r{index + 1}"] = result
        steps.append(Calculation(shown["left"], step.op, shown["right"], result))
    answer = slip.value if slip is not None and slip.slot == "answer" else steps[-1].result
    return Working(tuple(steps), answer)


def possible_slips(template: Template, right: Working, kind: str) -> Iterator[Slip]:
    """Every slip of one kind that this working offers."""
    if kind == "last_line":
        earlier = {step.result for step in right.steps[:-1]}
        near = {right.answer + sign * offset for offset in LAST_LINE_OFFSETS for sign in (-1, 1)}
        for value in sorted(earlier | near):
            yield Slip(kind, len(right.steps), "answer", value)
        return
    for index, step in enumerate(right.steps):
        if kind == "operation":
            if step.op in MISTAKEN_OPERATIONS:
                wrong = calculate(MISTAKEN_OPERATIONS[step.op], step.left, step.right)
                if wrong is not None:
                    yield Slip(kind, index, "result", wrong)
        elif kind == "carry" and step.op in "+-":
            # A carry or borrow that is due is lost; one that is not due is made. Both: no sign is the rule.
            due = step.left % 10 + step.right % 10 >= 10 if step.op == "+" else step.left % 10 < step.right % 10
            yield Slip(kind, index, "result", step.result + (10 if due == (step.op == "-") else -10))
        elif kind == "skipped_step":
            # The result of an earlier step is not used: one of the numbers it was made from stands in its place.
            for slot, operand in (("left", template.steps[index].left), ("right", template.steps[index].right)):
                if operand.startswith("r"):
                    skipped = right.steps[int(operand[1:]) - 1]
                    yield from (Slip(kind, index, slot, value) for value in (skipped.left, skipped.right))


def wrong_workings(template: Template, numbers: dict[str, int], right: Working, kind: str) -> list[Working]:
    """The workings with one slip of this kind: another answer, every number with as many digits as the right one."""
    found = []
    for slip in possible_slips(template, right, kind):
        wrong = work(template, numbers, slip)
        if wrong is not None and wrong.widths() == right.widths() and wrong.answer != right.answer:
            found.append(wrong)
    return found


class Turns:
    """Keeps right and wrong answers equally large: for every two decades, they take turns at which side is the larger.

    Without it the wrong answers would be spread more widely than the right ones, and size alone would tell.
    """

    def __init__(self) -> None:
        self._taken: Counter[tuple[str, int, int]] = Counter()

    def allows(self, kind: str, right: int, wrong: int) -> bool:
        """Whether it is the turn of this order of the two answers."""
        cell = self._cell(kind, right, wrong)
        return (wrong > right) == ((self._taken[cell] + sum(cell[1:])) % 2 == 0)

    def take(self, kind: str, right: int, wrong: int) -> None:
        """Count a pair that was allowed."""
        self._taken[self._cell(kind, right, wrong)] += 1

    @staticmethod
    def _cell(kind: str, right: int, wrong: int) -> tuple[str, int, int]:
        low, high = sorted((right // 10, wrong // 10))
        return kind, low, high


def is_held_out(template: Template, numbers: dict[str, int]) -> bool:
    """Whether this instance belongs to evaluation: a function of the instance alone."""
    return zlib.crc32(f"{template.key} {sorted(numbers.items())}".encode()) % HELD_OUT_ONE_IN == 0


def write_out(template: Template, working: Working, words: dict[str, str]) -> str:
    """The answer's text: one sentence a step, one a line, and "The answer is N."."""
    lines = [step.sentence.format(x=shown, **words) for step, shown in zip(template.steps, working.steps, strict=True)]
    return "\n".join([*lines, f"The answer is {working.answer}."])


def generate(count: int, *, held_out: bool, seed: int) -> Iterator[dict[str, Any]]:
    """Yield `count` rows of one part, all of different instances; a longer run starts with the rows of a shorter one.

    Rows: id, prompt, chosen, rejected (message lists), reference_answer (text), template, slip. Raises UserError when
    the templates have no more instances.
    """
    part = "eval" if held_out else "train"
    rng = random.Random(f"arithmetic {part} {seed}")
    seen: set[tuple[str, tuple[int, ...]]] = set()
    turns = Turns()
    for index in range(count):
        kind = rng.choices(list(SLIP_MIX), weights=list(SLIP_MIX.values()))[0]
        for draw in range(MAX_DRAWS):
            if draw % DRAWS_PER_TEMPLATE == 0:
                template = rng.choice(TEMPLATES)
            numbers = {name: rng.randint(*NUMBER_RANGES[size]) for name, size in template.numbers.items()}
            instance = (template.key, tuple(numbers.values()))
            if instance in seen or is_held_out(template, numbers) != held_out:
                continue
            right = work(template, numbers)
            if right is None:
                continue
            wrongs = wrong_workings(template, numbers, right, kind)
            wrongs = [wrong for wrong in wrongs if turns.allows(kind, right.answer, wrong.answer)]
            if wrongs:
                break
        else:
            raise UserError(f"no new problem after {index} rows of the {part} part; ask for fewer rows")
        wrong = rng.choice(wrongs)
        seen.add(instance)
        turns.take(kind, right.answer, wrong.answer)
        yield make_row(f"arithmetic-{seed}-{part}-{index:05d}", template, numbers, right, wrong, rng) | {"slip": kind}


def make_row(
    row_id: str, template: Template, numbers: dict[str, int], right: Working, wrong: Working, rng: random.Random
) -> dict[str, Any]:
    """The pair as a row, with people and things drawn."""
    name, other = rng.sample(NAMES, 2)
    words = {"name": name, "other": other, "thing": rng.choice(THINGS)}
    return {
        "id": row_id,
        "prompt": [{"role": "user", "content": template.question.format(**numbers, **words)}],
        "chosen": [{"role": "assistant", "content": write_out(template, right, words)}],
        "rejected": [{"role": "assistant", "content": write_out(template, wrong, words)}],
        "reference_answer": str(right.answer),
        "template": template.key,
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m data_tools.pairs.arithmetic", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out-dir", required=True, help="folder for train.jsonl and eval.jsonl")
    parser.add_argument("--train", type=int, default=512, help="pairs to train on (default: 512)")
    parser.add_argument("--eval", type=int, default=256, help="held-out pairs (default: 256)")
    parser.add_argument("--seed", type=int, default=0, help="seed of both parts (default: 0)")
    options = parser.parse_args(argv)
    try:
        # The training file last: a build that stopped midway has none, and is done again.
        for part, count in (("eval", options.eval), ("train", options.train)):
            if count < 1:
                raise UserError(f"--{part} = {count}: must be at least 1")
            path = Path(options.out_dir) / f"{part}.jsonl"
            written = write_rows(path, generate(count, held_out=part == "eval", seed=options.seed))
            print(f"{path}: {written} pairs")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

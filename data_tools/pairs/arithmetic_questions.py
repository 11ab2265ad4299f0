"""Word problems with a number as the answer, for rounds on a model's own samples: questions only, no pairs.

One file a part, rows {"id", "question", "answer", "solution", "steps", "template"}; `steps` counts the calculations
it takes, `solution` is a worked answer. Which part an instance (template and numbers) is in is a function of the
instance alone: of eight, five are for training, one for development and two for the test, whatever the seed and sizes.

    python -m data_tools.pairs.arithmetic_questions --out-dir data/selfplay --steps 1 --train 256 --dev 64 --test 256
"""

import argparse
import random
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_tools.errors import UserError
from data_tools.jsonl import write_rows
from data_tools.pairs.arithmetic import work, write_out
from data_tools.pairs.arithmetic_templates import NAMES, NUMBER_RANGES, ONE_STEP, TEMPLATES, THINGS, Template

PARTS = {"train": range(0, 5), "dev": range(5, 6), "test": range(6, 8)}
"""Which of eight hash values belong to a part."""

DRAWS = 5_000
"""Of one template before it counts as used up."""

ALL_TEMPLATES = (*ONE_STEP, *TEMPLATES)


def part_of(template: Template, numbers: dict[str, int]) -> str:
    """The part of an instance."""
    value = zlib.crc32(f"questions {template.key} {sorted(numbers.items())}".encode()) % 8
    return next(part for part, values in PARTS.items() if value in values)


def questions(part: str, count: int, steps: Sequence[int], *, seed: int) -> Iterator[dict[str, Any]]:
    """`count` rows of a part, all of different instances, of problems with so many steps, templates in turn.

    Raises UserError when the templates have no more instances.
    """
    templates = [template for template in ALL_TEMPLATES if len(template.steps) in steps]
    if not templates:
        known = sorted({len(template.steps) for template in ALL_TEMPLATES})
        raise UserError(f"--steps {' '.join(map(str, steps))}: no such problems; there are {known}")
    rng = random.Random(f"questions {part} {seed} {sorted(steps)}")
    seen: set[tuple[str, tuple[int, ...]]] = set()
    for index in range(count):
        instance = None
        while instance is None:  # a template that has no more instances gives way to the next
            if not templates:
                raise UserError(f"no new problem after {index} rows of the {part} part; ask for fewer rows")
            template = templates[index % len(templates)]
            instance = _new_instance(template, part, seen, rng)
            if instance is None:
                templates.remove(template)
        numbers = dict(zip(template.numbers, instance[1], strict=True))
        right = work(template, numbers)
        assert right is not None
        seen.add(instance)
        name, other = rng.sample(NAMES, 2)
        words = {"name": name, "other": other, "thing": rng.choice(THINGS)}
        yield {
            "id": f"sum-{seed}-{part}-{index:05d}",
            "question": template.question.format(**numbers, **words),
            "answer": str(right.answer),
            "solution": write_out(template, right, words),
            "steps": len(template.steps),
            "template": template.key,
        }


def _new_instance(
    template: Template, part: str, seen: set[tuple[str, tuple[int, ...]]], rng: random.Random
) -> tuple[str, tuple[int, ...]] | None:
    for _ in range(DRAWS):
        numbers = {name: rng.randint(*NUMBER_RANGES[size]) for name, size in template.numbers.items()}
        instance = (template.key, tuple(numbers.values()))
        if instance not in seen and part_of(template, numbers) == part and work(template, numbers) is not None:
            return instance
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code: 0, or 2 with one line."""
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.pairs.arithmetic_questions",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--out-dir", required=True, type=Path, help="folder for train.jsonl, dev.jsonl and test.jsonl")
    parser.add_argument("--steps", type=int, nargs="+", default=[1], help="calculations of a problem (default: 1)")
    for part, default in (("train", 256), ("dev", 64), ("test", 256)):
        parser.add_argument(f"--{part}", type=int, default=default, help=f"questions (default: {default})")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (default: 0)")
    options = parser.parse_args(argv)
    try:
        for part in PARTS:
            count = getattr(options, part)
            if count < 1:
                raise UserError(f"--{part} = {count}: must be at least 1")
            path = options.out_dir / f"{part}.jsonl"
            written = write_rows(path, questions(part, count, options.steps, seed=options.seed))
            print(f"{path}: {written} questions")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

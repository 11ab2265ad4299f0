"""Arithmetic pairs: the right side is right, the wrong side has one slip, and nothing on the surface tells which."""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data_tools.errors import UserError
from data_tools.pairs import arithmetic
from data_tools.pairs.arithmetic_templates import TEMPLATES

ROWS = list(arithmetic.generate(1000, held_out=False, seed=0))
EQUATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")
COMPUTE = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b, "/": lambda a, b: a / b}


def text(row: dict, side: str) -> str:
    (message,) = row[side]
    assert message["role"] == "assistant"
    return message["content"]


def equations(content: str) -> list[tuple[int, str, int, int]]:
    return [(int(a), op, int(b), int(result)) for a, op, b, result in EQUATION.findall(content)]


def last_number(content: str) -> int:
    return int(re.search(r"\nThe answer is (\d+)\.$", content).group(1))


def wrong_equations(content: str) -> list[tuple[int, str, int, int]]:
    return [e for e in equations(content) if COMPUTE[e[1]](e[0], e[2]) != e[3]]


def numbers_in(content: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", content)))


@pytest.mark.parametrize(
    ("key", "numbers", "results"),
    [
        ("packs_then_gift", {"a": 24, "b": 3, "c": 6, "d": 10}, [18, 42, 32]),
        ("change_from_a_note", {"a": 4, "b": 3, "c": 15, "d": 50}, [12, 27, 23]),
        ("shared_after_finding", {"a": 20, "b": 16, "c": 4}, [36, 9]),
        ("three_rounds", {"a": 20, "b": 5, "c": 8}, [15, 23, 35, 58]),
    ],
)
def test_working_by_hand(key: str, numbers: dict[str, int], results: list[int]) -> None:
    (template,) = [template for template in TEMPLATES if template.key == key]
    working = arithmetic.work(template, numbers)
    assert [step.result for step in working.steps] == results
    assert working.answer == results[-1]


def test_at_least_twenty_structures() -> None:
    structures = {tuple((step.left, step.op, step.right) for step in template.steps) for template in TEMPLATES}
    assert len({template.key for template in TEMPLATES}) == len(TEMPLATES) == len(structures)
    assert len(TEMPLATES) >= 20
    assert {len(structure) for structure in structures} == {2, 3, 4}
    assert {row["template"] for row in ROWS} == {template.key for template in TEMPLATES}


def test_chosen_is_right_in_every_line() -> None:
    for row in ROWS:
        chosen = text(row, "chosen")
        known = set(numbers_in(row["prompt"][0]["content"]))
        steps = equations(chosen)
        assert len(steps) == chosen.count("\n")  # one a line, and the last line
        assert wrong_equations(chosen) == []
        for left, _, right, result in steps:
            assert {left, right} <= known, row
            known.add(result)
        assert last_number(chosen) == steps[-1][3] == int(row["reference_answer"])


def test_rejected_differs_in_digits_only_and_is_wrong() -> None:
    for row in ROWS:
        chosen, rejected = text(row, "chosen"), text(row, "rejected")
        assert re.sub(r"\d", "0", chosen) == re.sub(r"\d", "0", rejected)  # same words, same number of digits
        assert last_number(rejected) != int(row["reference_answer"])


def test_what_follows_a_slip_is_worked_out_from_it() -> None:
    for row in ROWS:
        known = set(numbers_in(row["prompt"][0]["content"]))
        for left, _, right, result in equations(text(row, "rejected")):
            assert {left, right} <= known, row
            known.add(result)
    early = [row for row in ROWS if wrong_equations("\n".join(text(row, "rejected").splitlines()[:-2]))]
    assert len(early) > 50  # not only last steps go wrong


def test_numbers_stay_in_range() -> None:
    shown = {number for row in ROWS for side in ("chosen", "rejected") for number in numbers_in(text(row, side))}
    assert min(shown) >= 2 and max(shown) <= 99
    assert not any("-" in re.sub(r"\d - \d", "", text(row, "rejected")) for row in ROWS)  # no negative number


def test_each_slip_is_what_it_says() -> None:
    for row in ROWS:
        chosen, rejected = text(row, "chosen"), text(row, "rejected")
        wrong, copied = wrong_equations(rejected), last_number(rejected) == equations(rejected)[-1][3]
        if row["slip"] == "last_line":
            assert wrong == [] and not copied
            assert equations(rejected) == equations(chosen)
            continue
        assert copied
        if row["slip"] == "skipped_step":
            first = next(i for i, e in enumerate(equations(chosen)) if e != equations(rejected)[i])
            used = {equations(rejected)[first][0], equations(rejected)[first][2]}
            earlier = {number for e in equations(chosen)[:first] for number in (e[0], e[2])}
            assert wrong == [] and used & earlier
            continue
        ((left, op, right, result),) = wrong
        expected = COMPUTE[op](left, right)
        if row["slip"] == "carry":
            assert abs(result - expected) == 10
        else:
            assert result == COMPUTE[{"+": "-", "-": "+"}[op]](left, right)


def test_mix_of_slips() -> None:
    shares = {kind: n / len(ROWS) for kind, n in Counter(row["slip"] for row in ROWS).items()}
    # 1,000 draws: a share of 0.35 has a standard error of 0.015
    assert shares == pytest.approx(arithmetic.SLIP_MIX, abs=0.05)


def surface(content: str) -> list[float]:
    """What can be seen of an answer without checking it."""
    digits, numbers, answer = re.findall(r"\d", content), numbers_in(content), last_number(content)
    return [
        len(content),
        len(content.split()),
        len(re.findall(r"\d|\w+|[^\w\s]", content)),  # tokens, each digit one
        len(digits),
        content.count("\n"),
        content.count("."),
        answer,
        answer**2,
        len(str(answer)),
        float(np.mean(numbers)),
        sum(number % 5 == 0 for number in numbers),
        sum(number % 10 == 0 for number in numbers),
        answer % 10 == 0,
        *(content.count(op) for op in "+-*/"),
        *(digits.count(str(digit)) for digit in range(10)),
        *(answer % 10 == digit for digit in range(10)),
    ]


def cross_validated_auc(chosen: list[str], rejected: list[str], folds: int = 5) -> float:
    """AUC of a ridge logistic regression on `surface`, both sides of a pair always in the same fold."""
    x = np.array([surface(content) for content in chosen + rejected], dtype=np.float64)
    deviation = x.std(axis=0)
    x = np.column_stack([(x - x.mean(axis=0)) / np.where(deviation > 0, deviation, 1.0), np.ones(len(x))])
    y = np.repeat([1.0, 0.0], len(chosen))
    fold = np.tile(np.arange(len(chosen)) % folds, 2)
    scores = np.empty(len(y))
    for held_out in range(folds):
        train = fold != held_out
        scores[~train] = x[~train] @ fit_logistic(x[train], y[train])
    above = scores[y == 1][:, None] - scores[y == 0][None, :]
    return float((above > 0).mean() + 0.5 * (above == 0).mean())


def fit_logistic(x: np.ndarray, y: np.ndarray, ridge: float = 1.0, rounds: int = 15) -> np.ndarray:
    """Newton's method; converged well before 15 rounds on standardised features."""
    w = np.zeros(x.shape[1])
    for _ in range(rounds):
        p = 1 / (1 + np.exp(-x @ w))
        hessian = (x * (p * (1 - p))[:, None]).T @ x + ridge * np.eye(len(w))
        w -= np.linalg.solve(hessian, x.T @ (p - y) + ridge * w)
    return w


@pytest.mark.parametrize(("held_out", "seed"), [(False, 0), (True, 0), (False, 1)])
def test_surface_features_do_not_separate(held_out: bool, seed: int) -> None:
    rows = ROWS if (held_out, seed) == (False, 0) else list(arithmetic.generate(1000, held_out=held_out, seed=seed))
    auc = cross_validated_auc([text(row, "chosen") for row in rows], [text(row, "rejected") for row in rows])
    assert 0.4 < auc < 0.6  # 0.5 is chance; its standard error on 1,000 pairs is about 0.013


@pytest.mark.parametrize("leak", [lambda t: t.replace(".\n", "..\n", 1), lambda t: re.sub(r"is \d+\.$", "is 97.", t)])
def test_the_classifier_would_see_a_leak(leak) -> None:
    chosen, rejected = [text(row, "chosen") for row in ROWS[:400]], [leak(text(row, "rejected")) for row in ROWS[:400]]
    assert cross_validated_auc(chosen, rejected) > 0.95


def test_right_and_wrong_answers_are_equally_large() -> None:
    right = Counter(int(row["reference_answer"]) // 10 for row in ROWS)
    wrong = Counter(last_number(text(row, "rejected")) // 10 for row in ROWS)
    # Turns leave at most one pair over in each of about 45 cells a kind; 9 of them touch a decade.
    assert all(abs(right[decade] - wrong[decade]) <= 4 * 9 / 2 for decade in range(10))


def test_held_out_instances_never_appear_in_training() -> None:
    train = ROWS + list(arithmetic.generate(1000, held_out=False, seed=7))
    held_out = list(arithmetic.generate(1000, held_out=True, seed=0))

    def instances(rows: list[dict]) -> set:
        return {(row["template"], numbers_in(row["prompt"][0]["content"])) for row in rows}

    def questions(rows: list[dict]) -> set[str]:
        return {row["prompt"][0]["content"] for row in rows}

    assert not questions(train) & questions(held_out)
    assert not instances(train) & instances(held_out)
    assert len(instances(held_out)) == len(instances(ROWS)) == 1000


def test_rows_depend_on_seed_and_part_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, train in (("first", 40), ("second", 20)):
        arguments = ["--out-dir", str(tmp_path / name), "--train", str(train), "--eval", "30", "--seed", "3"]
        assert arithmetic.main(arguments) == 0
    first, second = tmp_path / "first", tmp_path / "second"
    assert (first / "eval.jsonl").read_bytes() == (second / "eval.jsonl").read_bytes()
    long = (first / "train.jsonl").read_text(encoding="utf-8").splitlines()
    assert long[:20] == (second / "train.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(long) == len({json.loads(line)["id"] for line in long}) == 40
    assert long != [json.dumps(row, ensure_ascii=False) for row in arithmetic.generate(40, held_out=False, seed=4)]
    assert "train.jsonl: 40 pairs" in capsys.readouterr().out
    row = json.loads(long[0])
    assert list(row) == ["id", "prompt", "chosen", "rejected", "reference_answer", "template", "slip"]


def test_running_out_of_problems_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arithmetic, "NUMBER_RANGES", {"few": (6, 6), "some": (11, 12), "many": (60, 61)})
    with pytest.raises(UserError, match="no new problem after .* rows of the train part; ask for fewer rows"):
        list(arithmetic.generate(5000, held_out=False, seed=0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out-dir", "{tmp}", "--train", "0"], "error: --train = 0: must be at least 1"),
        (["--out-dir", "{tmp}/file/below"], "cannot be written"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, tmp_path: Path, capsys) -> None:
    (tmp_path / "file").write_text("not a folder")
    assert arithmetic.main([argument.format(tmp=tmp_path) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "train.jsonl").exists()

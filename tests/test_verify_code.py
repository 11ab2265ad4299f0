"""Programs in models' texts, and the tasks of HumanEval and MBPP: reference solutions pass, broken ones fail."""

import ast
from pathlib import Path

import pytest

from data_tools.errors import UserError
from data_tools.jsonl import iter_jsonl
from data_tools.verify_code import (
    CodeTask,
    check_program,
    check_programs,
    extract_program,
    humaneval_task,
    mbpp_task,
    plain_task,
    verify_code,
)

SOURCES = ("humaneval/test", "mbpp/test", "mbpp/sanitized", "mbpp/train")
WORKERS = 2

OFF_BY_ONE = """
def _off(value):
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float, complex)):
        return value + 1
    if isinstance(value, str):
        return value + "x"
    if isinstance(value, dict):
        return {**value, "one more": 1}
    if isinstance(value, (set, frozenset)):
        return value | {"one more"}
    if value is None:
        return 1
    return [*value, "one more"]

_right = NAME
def NAME(*arguments, **named):
    return _off(_right(*arguments, **named))
"""
WRONG_RETURN = "\ndef NAME(*arguments, **named):\n    return 'wrong'\n"


pytestmark = pytest.mark.filterwarnings("ignore:invalid escape sequence")  # in the data sets' own code


def tasks_of(shared_dir: Path, source: str) -> list[CodeTask]:
    make = humaneval_task if source.startswith("humaneval") else mbpp_task
    return [make(row) for _, row in iter_jsonl(shared_dir / "data" / f"{source}.jsonl")]


def broken(task: CodeTask, ending: str) -> str:
    """The reference with its tested functions replaced; classes stay as they are."""
    functions = {n.name for n in ast.walk(ast.parse(task.reference)) if isinstance(n, ast.FunctionDef)}
    return task.reference + "".join(ending.replace("NAME", name) for name in task.names if name in functions)


def check_references(tasks: list[CodeTask]) -> None:
    for task, verdict in zip(tasks, check_programs([(t.reference, t) for t in tasks], workers=WORKERS), strict=True):
        assert verdict.verdict == "correct", (task.id, verdict.why)


def check_broken(tasks: list[CodeTask], ending: str) -> None:
    jobs = [(broken(task, ending), task) for task in tasks]
    for task, verdict in zip(tasks, check_programs(jobs, workers=WORKERS), strict=True):
        assert verdict.verdict == "wrong", (task.id, verdict.why)


@pytest.mark.parametrize("source", ("humaneval/test", "mbpp/test"))
def test_twenty_references_pass_and_broken_ones_fail(shared_dir: Path, source: str) -> None:
    tasks = tasks_of(shared_dir, source)
    some = tasks[:: len(tasks) // 20][:20]
    check_references(some)
    check_broken(some[::2], OFF_BY_ONE)
    check_broken(some[1::2], WRONG_RETURN)


@pytest.mark.long
@pytest.mark.parametrize("source", SOURCES)
def test_every_reference_passes(shared_dir: Path, source: str) -> None:
    check_references(tasks_of(shared_dir, source))


@pytest.mark.long
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("ending", [OFF_BY_ONE, WRONG_RETURN], ids=["off by one", "wrong return"])
def test_every_broken_reference_fails(shared_dir: Path, source: str, ending: str) -> None:
    check_broken(tasks_of(shared_dir, source), ending)


ADD = {
    "task_id": "t/1",
    "prompt": "from typing import List\n\n\ndef add(a: int, b: int) -> int:\n    '''Add.'''\n",
    "entry_point": "add",
    "canonical_solution": "    return a + b\n",
    "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
}
DOUBLE = {"task_id": 7, "code": "", "test_list": ["assert double(2) == 4", "assert math.isclose(double(0.5), 1)"]}


@pytest.mark.parametrize(
    ("row", "text", "verdict"),
    [
        (ADD, "    return a + b\n", "correct"),
        (ADD, "    return a + b\n\nThis adds the numbers.", "correct"),
        (ADD, "    return a - b\n", "wrong"),
        (ADD, "```python\ndef add(a, b):\n    return a + b\n```", "correct"),
        (ADD, "Here:\n\n```python\ndef add(a: int, b: List[int]) -> int:\n    return a + b\n```\nIt adds.", "correct"),
        (ADD, "First:\n```py\ndef add(a, b):\n    return a\n```\nBetter:\n```py\ndef add(a, b):\n    return a + b\n```",
         "correct"),
        (ADD, "```python\ndef add(a, b):\n    return a + b\n```\nUse it:\n```python\nprint(add(1, 2))\n```", "correct"),
        (ADD, "```python\n    return a + b\n```", "correct"),
        (ADD, "```\ndef add(a, b):\n    return a + b", "correct"),  # cut off before the fence ends
        (ADD, "def add(a, b):\n    return a + b", "correct"),
        (ADD, "```python\ndef add(a, b)\n    return a + b\n```", "wrong"),
        (ADD, "I cannot help with that.", "invalid"),
        (ADD, "```bash\necho 3\n```", "invalid"),
        (ADD, "", "invalid"),
        (DOUBLE, "```python\ndef double(x):\n    return 2 * x\n```", "correct"),
        (DOUBLE, "def double(x):\n    return 2 * x", "correct"),
        (DOUBLE, "double = lambda x: x + x", "correct"),
        (DOUBLE, "```python\ndef twice(x):\n    return 2 * x\n```", "wrong"),
        (DOUBLE, "x = 1", "invalid"),
    ],
)  # fmt: skip
def test_programs_are_found_in_texts(row: dict, text: str, verdict: str) -> None:
    task = humaneval_task(row) if "entry_point" in row else mbpp_task(row)
    result = verify_code(text, task)
    assert result.verdict == verdict, (result.why, extract_program(text, task))


def test_a_plain_task_may_name_what_shadows_a_builtin() -> None:
    program = "def sum(x): return 'three'\ndef f(x): return x"
    tests = ["assert sum(f([1, 2])) == 'three'"]
    assert check_program(program, plain_task({"tests": tests, "entry_points": ["sum"]}, "x")).verdict == "correct"
    assert check_program(program, plain_task({"tests": tests}, "x")).verdict == "wrong"


def test_tests_that_check_nothing_are_refused() -> None:
    with pytest.raises(UserError, match="task x: its tests use nothing of the program"):
        plain_task({"tests": "assert True"}, "x")

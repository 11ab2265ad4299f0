"""What counts as the same path: calculations in their order, words, a program's tokens; and calculations checked."""

import json
from pathlib import Path

import pytest

from data_tools.signatures import calculations, code_tokens, signature, words, wrong_calculations


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("She has 2*3=<<2*3=6>>6 eggs, 6+1,000 = <<6+1,000=1006.0>>1006", ("2*3=6", "6+1000=1006")),
        ("6 eggs because 2 x 3 = 6", ("2*3=6",)),
        ("3 pages * 2 hours per page = 6 hours. Then 6 - 1 = 5", ("3*2=6", "6-1=5")),
        ("$12/pizza * 5 pizzas = $60", ("12*5=60",)),
        ("- 3 + 4 = 7\n1. 7 - 2 = 5\n(5 + 5 = 10)", ("3+4=7", "7-2=5", "5+5=10")),
        (r"\frac{6}{3} \times 2 = 4", ("(6)/(3)*2=4",)),
        ("2 + 3 = 5 = 10 / 2", ("2+3=5=10/2",)),
        ("۳ × ۲ = ۶ تومان، پس ۶ + ۱ = ۷", ("3*2=6", "6+1=7")),
        ("每人3个，3*2＝6个", ("3*2=6",)),
        ("x = 5, total = 2 + 3, no sum at all", ()),
        ("3\n= 4", ()),
    ],
)
def test_calculations(text: str, expected: tuple[str, ...]) -> None:
    assert calculations(text) == expected


def test_same_and_other_paths() -> None:
    assert signature("First 2 * 3 = 6.\nThe answer is 6", "math") == signature("2 x 3 = 6 eggs, so it is 6", "math")
    assert signature("2 * 3 = 6", "math") != signature("3 * 2 = 6", "math")
    assert signature("It is six.", "math") == signature("it is  SIX", "math") != signature("it was six", "math")
    assert signature("A b, C!", "text") == ("text", "a", "b", "c")
    assert words("كتاب۳") == ["کتاب3"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<<2*3=6>> <<10/3=3.33>> <<10/3=3.34>> <<20%*50=10>> <<(1+2)^2-2**3=1>> <<7//2=3>> <<-2+5=3=9/3>>", []),
        ("<<$1,200/12=100>> <<.5*4=2>> <<2/3=66.7%>>", []),
        ("2*3=7 is not looked at", []),
        ("<<2*3=7>> <<10/3=3>> <<10/3=3.2>>", ["2*3=7", "10/3=3", "10/3=3.2"]),
        ("<<2/0=0>> <<9^9^9^9=1>> <<x=3>> <<4>> <<2+=2>> <<(2=2>>", ["2/0=0", "9^9^9^9=1", "x=3", "4", "2+=2", "(2=2"]),
    ],
)
def test_calculations_that_are_wrong(text: str, expected: list[str]) -> None:
    assert wrong_calculations(text) == expected


def test_programs_without_what_python_does_not_see() -> None:
    plain = "def f(x):\n    return x+1\n"
    dressed = 'def f( x ):  # adds one\n\n  """Adds."""\n  # here\n  return x + 1'
    assert code_tokens(plain) == code_tokens(dressed) == code_tokens(f"So:\n```python\n{dressed}\n```\nDone.")
    assert code_tokens(plain) == "def f ( x ) : NEWLINE INDENT return x + 1 NEWLINE DEDENT".split()
    assert code_tokens("if a:\n  b()\nc()") != code_tokens("if a:\n  b()\n  c()")
    assert code_tokens("s = 'a string'\n") == ["s", "=", "'a string'", "NEWLINE"]
    assert code_tokens("def f(:\n  'x # y\n") == ["def", "f", "(", ":", "'", "x"]


def test_real_solutions(shared_dir: Path) -> None:
    """Every calculation in GSM8K's own solutions holds; the programs of MBPP that are one are few."""
    for part in ("train", "test"):
        for line in (shared_dir / f"data/gsm8k/{part}.jsonl").read_text(encoding="utf-8").splitlines():
            assert wrong_calculations(json.loads(line)["answer"]) == []
    rows = [json.loads(line) for line in (shared_dir / "data/mbpp/test.jsonl").read_text(encoding="utf-8").splitlines()]
    found = {signature(row["code"], "code") for row in rows}
    assert len(rows) - 3 <= len(found) < len(rows)

"""Two runs beside each other, from folders made by hand, with numbers worked out by hand; and reports as pages."""

import html.parser
import json
import re
from pathlib import Path
from typing import Any

import pytest
from eval_fixtures import evaluate, read_json, run, write_rows, write_samples

from eval.compare import budget_line, compare_rows
from eval.report import markdown, page, write_report
from eval.summary import summarise
from eval.task import parse_task
from trainer.errors import UserError

A = [1, 1, 1, 0, 0, 0, 0, 0, 1, 0]
B = [1, 1, 0, 1, 1, 1, 1, 1, 1, 0]
"""Only A right: item 2. Only B right: items 3 to 7. The first five are of subject s, the others of t."""

TASK = parse_task({"name": "by <hand> | 'x'", "kind": "choice_logprob", "prompt": {"completion": "{label}"}})


def row(number: int, right: int) -> dict[str, Any]:
    answer = "A" if right else "B"
    return {
        "id": f"q{number}",
        "subject": "s" if number < 5 else "t",
        "gold": "A",
        "answer": answer,
        "outcome": "correct" if right else "wrong",
        "score": float(right),
        "options": 4,
        "answers": dict.fromkeys(("sum", "per_token", "per_byte"), answer),
    }


def report_of(rows: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {
        "task": TASK.name,
        "kind": TASK.kind,
        "result": summarise(TASK, rows),
        "comparison": None,
        "baseline": "none was run",
        "settings": {"model": "m"},
        "digests": {"code": {"git": "x"}},
        **more,
    }


def folder(path: Path, scores: list[int]) -> Path:
    path.mkdir()
    rows = [row(number, right) for number, right in enumerate(scores)]
    write_rows(path / "items.jsonl", reversed(rows))
    write_report(path, report_of(rows))
    return path


def test_compare_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """1 item against 5: p = 2 (1 + 6) / 64; 4 of 10 right against 8. In s 1 against 2, in t 0 against 3."""
    a, b = folder(tmp_path / "a", A), folder(tmp_path / "b", B)
    assert evaluate("compare", a, b, "--json", tmp_path / "c.json") == 0
    found = read_json(tmp_path / "c.json")
    assert found["mcnemar"] == {"both": 3, "only_a": 1, "only_b": 5, "neither": 1, "p": pytest.approx(14 / 64)}
    assert (found["a"], found["b"]) == pytest.approx((0.4, 0.8))
    difference = found["difference"]
    assert difference["value"] == pytest.approx(0.4)
    # ten differences -1, 1 x 5, 0 x 4: their standard error is sqrt(0.44 / 10) = 0.21, and means are tenths
    assert (difference["low"], difference["high"]) == pytest.approx((0.0, 0.8), abs=0.101)
    of_s, of_t = found["subjects"]["s"], found["subjects"]["t"]
    assert of_s["mcnemar"]["p"] == 1.0 and of_s["difference"]["value"] == pytest.approx(0.2)
    assert of_t["mcnemar"]["p"] == pytest.approx(2 / 8) and of_t["difference"]["value"] == pytest.approx(0.6)
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "budget: nothing is drawn: both runs score the same texts"
    assert lines[-3].startswith("| all items | 10 | 0.400 | 0.800 | +0.400 [") and lines[-3].endswith(
        "| 1 | 5 | 0.2188 |"
    )
    back = compare_rows([row(n, x) for n, x in enumerate(B)], [row(n, x) for n, x in enumerate(A)])
    assert back["difference"]["value"] == pytest.approx(-0.4)


def test_other_items_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = folder(tmp_path / "a", A), folder(tmp_path / "b", B[:9])
    assert evaluate("compare", a, b) == 2
    assert f"1 items of {a} are not in {b} (first: q9); run both on one file" in capsys.readouterr().err
    assert evaluate("compare", a, tmp_path / "none") == 2
    assert "has no readable report.json" in capsys.readouterr().err
    with pytest.raises(UserError, match="item 'q0' is not the same in A and B"):
        compare_rows([row(0, 1)], [{**row(0, 1), "gold": "B"}])


def test_a_log_cut_short_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = folder(tmp_path / "a", A), folder(tmp_path / "b", B)
    write_rows(a / "items.jsonl", [row(0, 1)])
    assert evaluate("compare", a, b) == 2
    assert "items.jsonl has 1 rows, the report is over 10" in capsys.readouterr().err


def test_shares_of_samples_have_no_mcnemar() -> None:
    rows = [[{**row(number, 1), "score": score} for number, score in enumerate(own)] for own in ([0.5, 1], [0.25, 0])]
    found = compare_rows(*rows)
    assert "mcnemar" not in found and found["difference"]["value"] == pytest.approx(-0.625)


def test_nats_are_compared_by_byte_where_tokens_differ() -> None:
    """10 and 20 nats against 8 and 10 over 4 + 6 tokens, or over 10 + 20 bytes."""
    shared = {"subject": "all"}
    a = [
        {"id": "x", "nats": 10, "tokens": 4, "bytes": 10, **shared},
        {"id": "y", "nats": 20, "tokens": 6, "bytes": 20, **shared},
    ]
    b = [{**own, "nats": nats} for own, nats in zip(a, (8, 10), strict=True)]
    found = compare_rows(a, b)
    assert (found["unit"], found["a"], found["b"]) == ("nats a token", 3.0, 1.8)
    assert found["difference"]["value"] == pytest.approx(-1.2)
    found = compare_rows(a, [{**own, "tokens": 5} for own in b])
    assert (found["unit"], found["a"], found["b"]) == ("nats a byte", 1.0, 0.6)


def test_budgets_are_named() -> None:
    one, five, none = (
        {"samples": {"n": n, "tokens": tokens}} if n else {} for n, tokens in ((1, 10), (5, None), (0, 0))
    )
    assert budget_line(one, one) == "the same number of samples an item: A 1 (10 tokens), B 1 (10 tokens)"
    assert budget_line(one, five) == "NOT the same number of samples an item: A 1 (10 tokens), B 5 (tokens not known)"
    assert budget_line(none, one) == "NOT the same number of samples an item: A draws none, B 1 (10 tokens)"


def test_a_baseline_is_in_the_report(tmp_path: Path) -> None:
    task = tmp_path / "t.toml"
    task.write_text('name = "t"\nkind = "numeric"', encoding="utf-8")
    data = write_rows(tmp_path / "d.jsonl", [{"id": name, "question": "?", "answer": 4} for name in "abc"])
    for name, texts in (("base", ("4", "5", "6")), ("own", ("4", "4", "5"))):
        said = {i: [f"The answer is {x}."] for i, x in zip("abc", texts, strict=True)}
        samples = write_samples(tmp_path / f"{name}.jsonl", said)
        more = ("--baseline", tmp_path / "base") if name == "own" else ()
        assert run(task, data, tmp_path / name, "--samples", samples, *more) == 0
    report = read_json(tmp_path / "own" / "report.json")
    assert report["comparison"]["mcnemar"]["only_b"] == 1
    assert report["baseline"].endswith("the same number of samples an item: A 1 (30 tokens), B 1 (30 tokens)")
    more = ("--samples", tmp_path / "own.jsonl", "--baseline", tmp_path / "base", "--limit", 2)
    assert run(task, data, tmp_path / "less", *more) == 2  # said before the work, not after it
    assert not (tmp_path / "less").exists()
    assert "| all items | 3 | 0.333 | 0.667 | +0.333 [" in (tmp_path / "own" / "report.md").read_text(encoding="utf-8")


class Page(html.parser.HTMLParser):
    """Tags with their attributes, and the bars' widths."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_the_page_needs_nothing_else() -> None:
    """No script, link, image or address; what data say is text, not markup; a bar is as long as its value."""
    rows = [{**row(number, right), "subject": f"<script src='http://x'>{number % 2}"} for number, right in enumerate(A)]
    text = page(report_of(rows, settings={"model": "<img src=x onerror=alert(1)>"}))
    parsed = Page()
    parsed.feed(text)
    names = {tag for tag, _ in parsed.tags}
    assert names <= set("html meta title style h1 h2 p table tr th td svg text rect path".split())
    assert not any(name in ("src", "href", "srcset", "onerror") for _, attrs in parsed.tags for name in attrs)
    assert not re.search(r"url\(|@import", text)
    widths = [float(attrs["width"] or 0) for tag, attrs in parsed.tags if tag == "rect"]
    assert widths == pytest.approx([420 * 0.4, 420 * 3 / 5, 420 * 1 / 5])


def test_markdown_holds_what_json_holds() -> None:
    report = report_of([row(number, right) for number, right in enumerate(A)])
    text = markdown(report)
    assert json.loads(json.dumps(report)) == report
    assert "accuracy 0.400 [0.168, 0.687] over 10 items: 4 correct, 6 wrong, 0 invalid" in text
    assert (
        "| by chance | 0.250 |" in text
        and "| negative marking, a wrong answer costs 1 / (options - 1) | 0.200 |" in text
    )
    assert text.startswith("# by \\<hand\\> \\| 'x'\n")
    for line in text.splitlines():
        assert not line.startswith("|") or line.endswith("|")

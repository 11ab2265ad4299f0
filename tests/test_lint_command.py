"""The lint command: planted cues are refused by name, clean pairs pass, and what it says of real sets is true."""

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from eval_fixtures import write_rows
from lint_fixtures import arithmetic_rows, check, persian_questions, rows_of, run_lint, said, with_text

from data_tools import lint
from data_tools.overlap import find_overlaps

SURFACE = ("length", "case", "punctuation", "language", "format", "answer", "phrase", "ending", "all")


@pytest.fixture(scope="module")
def clean() -> list[dict[str, Any]]:
    return arithmetic_rows(300)


def test_a_clean_set_passes(clean: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both sides are the same text but for numbers, so that only the last number can differ; and that tells nothing."""
    code, report = run_lint(tmp_path, clean)
    assert code == 0 and report["refused"] == []
    assert list(report["surface"]) == list(SURFACE)
    for name, own in report["surface"].items():
        assert own["auc"] == 0.5 or (name in ("answer", "all") and own["low"] < 0.5 < own["high"])
    assert capsys.readouterr().out.splitlines()[-1] == "300 pairs; 300 looked at for surface features; refused: nothing"


MORE_LENGTH = {"length", "ending", "all"}  # the last line is longer, too


def instead(new: str) -> Any:
    return lambda text: text.replace("The answer", new)


@pytest.mark.parametrize(
    ("side", "change", "refused"),
    [
        ("chosen", str.lower, {"case", "all"}),
        ("chosen", lambda t: t.replace("\n", ", let us see,\n", 1), {"length", "punctuation", "phrase", "all"}),
        ("chosen", instead("12 12 12 12 The answer"), MORE_LENGTH | {"format", "phrase"}),
        ("rejected", lambda t: t[:-1], {"length", "punctuation", "ending", "all"}),
        ("chosen", lambda t: t + "<|im_end|>", {"ending", "all"}),
        ("rejected", lambda t: t.translate(str.maketrans("0123456789", "۰۱۲۳۴۵۶۷۸۹")), {"language", "all"}),
        ("rejected", instead("**The** answer"), MORE_LENGTH | {"punctuation", "format"}),
        ("rejected", instead("答案"), MORE_LENGTH | {"case", "language", "phrase"}),
    ],
    ids=["lower case", "phrase", "length", "end of sentence", "end token", "digits", "markdown", "language"],
)
def test_planted_cues_are_refused_by_name(
    clean: list[dict[str, Any]], tmp_path: Path, side: str, change: Any, refused: set[str]
) -> None:
    code, report = run_lint(tmp_path, [with_text(row, side, change) for row in clean])
    assert code == 2 and set(report["refused"]) == refused


def test_the_refusal_says_what_where_and_what_to_do(
    clean: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [with_text(row, "chosen", str.lower) for row in clean]
    pairs = write_rows(tmp_path / "p.jsonl", rows)
    assert lint.main([str(pairs)]) == 2
    line = capsys.readouterr().err.splitlines()[0]
    assert line.startswith(
        f"error: {pairs}: case: AUC 1.000 [0.987, 1.000] on 300 pairs of 300 prompts; "
        "upper-case letters for each letter: less in chosen in 100% of pairs; "
    )
    assert re.search(r"\(for example arithmetic-0-train-\d+(, arithmetic-0-train-\d+){4}\): 1.000 is above 0.9; ", line)
    assert line.endswith("make the two sides alike in it, or balance the pairs, or let it through with --allow case")


def test_what_is_allowed_is_left_out_of_all(clean: list[dict[str, Any]], tmp_path: Path) -> None:
    rows = [with_text(row, "chosen", str.lower) for row in clean]
    assert run_lint(tmp_path, rows, "--allow", "case")[0] == 0
    code, report = run_lint(tmp_path, rows, "--allow", "length,all")
    assert code == 2 and report["refused"] == ["case"]
    assert run_lint(tmp_path, rows, "--refuse-above", "1")[0] == 0
    code, report = run_lint(tmp_path, rows, "--allow", ",".join(SURFACE))
    assert code == 0 and list(report["surface"]) == list(SURFACE[:-1])  # nothing is left to be judged together


def test_small_sets_are_not_over_read(clean: list[dict[str, Any]], tmp_path: Path) -> None:
    """All of 12 pairs: [0.76, 1]. Nine prompts give no AUC. Twelve pairs of one prompt are no twelve observations."""
    lower = [with_text(row, "chosen", str.lower) for row in clean[:12]]
    code, report = run_lint(tmp_path, lower)
    assert code == 2 and check(report, "case")["interval"] == [0.7575, 1.0]
    code, report = run_lint(tmp_path, lower[:9])
    assert code == 0 and report["surface"] == {}
    twice = [row | {"id": f"{row['id']}#{i}", "question_id": row["id"]} for row in lower[:10] for i in range(5)]
    code, report = run_lint(tmp_path, twice, "--allow", "duplicate,all")
    assert code == 0 and check(report, "case")["interval"][0] == pytest.approx(0.7225, abs=1e-4)  # 10 of 10


def test_a_cue_in_half_of_the_pairs_is_shown_and_passes(clean: list[dict[str, Any]], tmp_path: Path) -> None:
    rows = [with_text(row, "chosen", str.lower) if i % 2 else row for i, row in enumerate(clean)]
    code, report = run_lint(tmp_path, rows)
    assert code == 0
    assert check(report, "case")["value"] == 0.75  # won in one half, a tie in the other
    cue = report["surface"]["case"]["cues"][0]
    assert (cue["chosen_has_more"], cue["chosen_has_less"]) == (0, 0.5)


def test_verdicts_sources_and_equal_sides(clean: list[dict[str, Any]], tmp_path: Path) -> None:
    judged = [("correct", "wrong")] * 54 + [("wrong", "wrong")] * 3 + [("correct", "correct")] * 2 + [(None, None)]
    rows = [
        row | {"verified": dict(zip(("chosen", "rejected"), verdicts, strict=True)), "source": "ab"[i % 3 == 0]}
        for i, (row, verdicts) in enumerate(zip(clean, judged, strict=False))
    ]
    rows.append({"id": "same", "prompt": "p", "chosen": "x", "rejected": "x"})
    code, report = run_lint(tmp_path, rows)
    assert code == 2 and report["refused"] == ["equal", "chosen_wrong", "rejected_correct"]
    assert check(report, "chosen_wrong")["text"].startswith("3 of 59 judged pairs")
    assert check(report, "rejected_correct")["ids"] == [rows[57]["id"], rows[58]["id"]]
    assert [(row["source"], row["pairs"], row["chosen_wrong"]) for row in report["sources"]] == [
        ("a", 40, 2),
        ("b", 20, 1),
        ("", 1, 0),
    ]
    table = {(row["chosen"], row["rejected"]): row["pairs"] for row in check(report, "chosen_wrong")["table"]}
    assert table == {
        ("correct", "wrong"): 54,
        ("wrong", "wrong"): 3,
        ("correct", "correct"): 2,
        ("unjudged", "unjudged"): 2,
    }


def test_contamination_passes_over_what_all_prompts_share(tmp_path: Path) -> None:
    """40 items begin with the same 20 words. Only the one whose own words stand in a pair is found."""
    header = " ".join(f"h{i}" for i in range(20))
    items = [{"id": f"e{i}", "prompt": f"{header} " + " ".join(f"w{i}_{j}" for j in range(9))} for i in range(40)]
    pairs = [
        {"id": "a", "prompt": f"{header} w3_0 something else", "chosen": "x", "rejected": "y"},
        {"id": "b", "prompt": items[7]["prompt"], "chosen": "x", "rejected": "y"},
    ]
    train, evaluation = write_rows(tmp_path / "p.jsonl", pairs), write_rows(tmp_path / "e.jsonl", items)
    assert find_overlaps([train], evaluation).contaminated == 40
    assert [own.id for own in find_overlaps([train], evaluation, skip_common=True).overlaps] == ["e7"]
    code, report = run_lint(tmp_path, pairs, "--eval", evaluation)
    assert code == 2 and check(report, "contamination")["ids"] == ["e7 in b"]


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [str(value) for name, value in attrs if name in ("src", "href", "srcset")]
        if tag not in ("meta", "br", "path", "rect", "circle"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("path", "rect", "circle"):
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_needs_nothing_and_escapes_everything(clean: list[dict[str, Any]], tmp_path: Path) -> None:
    rows = [
        with_text(row, "chosen", lambda t: t + " <script>alert('x')</script> سلام")
        | {"id": f"<b>{i}</b>", "source": "<i>"}
        for i, row in enumerate(clean[:60])
    ]
    pairs, out = write_rows(tmp_path / "<p>.jsonl", rows), tmp_path / "page.html"
    assert lint.main([str(pairs), "--html", str(out)]) == 2
    content = out.read_text(encoding="utf-8")
    page = _Page()
    page.feed(content)
    assert page.open == [] and page.links == []
    assert not page.tags & {"script", "link", "img", "iframe", "b><i"} and "http" not in content
    assert "<script>alert('x')</script> سلام" in page.text and "<b>0</b>" not in content
    assert {"svg", "table", "bdi"} <= page.tags and 'class="text" dir="auto"' in content


def test_the_same_bytes_again(clean: list[dict[str, Any]], tmp_path: Path) -> None:
    pairs = write_rows(tmp_path / "p.jsonl", clean)
    outs = [(tmp_path / f"{i}.json", tmp_path / f"{i}.html") for i in range(2)]
    for json_file, html_file in outs:
        assert lint.main([str(pairs), "--sample", "100", "--json", str(json_file), "--html", str(html_file)]) == 0
    assert outs[0][0].read_bytes() == outs[1][0].read_bytes() and outs[0][1].read_bytes() == outs[1][1].read_bytes()


def test_wrong_options_and_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = write_rows(tmp_path / "p.jsonl", [{"id": "a", "prompt": "p", "chosen": "x", "rejected": ""}])
    for options, problem in (
        (["--allow", "size"], "--allow size: is not known; known: length, case,"),
        (["--refuse-above", "0.4"], "--refuse-above must be from 0.5 to 1"),
        (["--questions", "q.jsonl"], "--questions and --kind go together"),
        ([], "p.jsonl:1: field 'rejected': is empty"),
    ):
        assert lint.main([str(pairs), *options]) == 2
        assert problem in capsys.readouterr().err


def counted(rows: list[dict[str, Any]], side: str, pattern: str) -> int:
    return sum(bool(re.search(pattern, said(row, side))) for row in rows)


def test_real_persian_medical_pairs(shared_dir: Path, tmp_path: Path) -> None:
    """What is wrong with this set, in numbers counted here without the lint, and what the lint says of it."""
    rows = rows_of(shared_dir / "data" / "pref_fa_med" / "train.jsonl")
    upper = [counted(rows, side, r"[A-Z]") for side in ("chosen", "rejected")]
    letters = [counted(rows, side, r"(?<!\w)[A-E](?!\w)") for side in ("chosen", "rejected")]
    assert upper == [0, 398] and letters == [0, 396] and len(rows) == 399
    questions = write_rows(tmp_path / "q.jsonl", persian_questions(rows))
    held_out = shared_dir / "data" / "pref_fa_med" / "test.jsonl"
    code, report = run_lint(tmp_path, rows, "--questions", questions, "--kind", "option", "--eval", held_out)
    assert code == 2
    assert report["refused"] == ["length", "case", "format", "answer", "phrase", "all", "chosen_wrong"]
    surface = {name: own["auc"] for name, own in report["surface"].items()}
    expected = {"length": 0.965, "case": 0.999, "format": 0.935, "answer": 0.996, "phrase": 0.987, "all": 1.0}
    # A hundredth is four pairs: other versions of numpy may round a tie another way.
    assert {name: surface[name] for name in expected} == pytest.approx(expected, abs=0.01)
    cues = {cue["name"]: cue for own in report["surface"].values() for cue in own["cues"]}
    assert cues["any upper-case letter"]["mean_chosen"] == 0
    assert cues["any upper-case letter"]["mean_rejected"] == pytest.approx(398 / 399, abs=1e-4)
    assert cues["capital option letters for each character"]["chosen_has_less"] == pytest.approx(396 / 399, abs=1e-4)
    # Read by the rule: the rejected text ends on a wrong option in 367 pairs of 399, the chosen one in 10.
    table = {(row["chosen"], row["rejected"]): row["pairs"] for row in check(report, "chosen_wrong")["table"]}
    assert sum(count for (_, rejected), count in table.items() if rejected == "wrong") == 367
    assert check(report, "chosen_wrong")["text"].startswith("10 of 399 ")
    assert check(report, "rejected_correct")["text"].startswith("1 of 399 ")
    assert check(report, "leak")["value"] == 0 and check(report, "contamination")["value"] == 0


def test_real_maths_pairs(shared_dir: Path, tmp_path: Path) -> None:
    """Correctness was the only criterion, yet not the only difference: wrong workings are more often a line shorter,
    and 9% of them end in a decimal number, none of the right ones. Too little to refuse."""
    rows = rows_of(shared_dir / "data" / "pref_gsm8k" / "train.jsonl")
    decimal = [counted(rows, side, r"\d\.\d{1,300}\s*$") for side in ("chosen", "rejected")]
    lines = [said(row, "chosen").count("\n") - said(row, "rejected").count("\n") for row in rows]
    assert decimal == [0, 46] and (sum(n > 0 for n in lines), sum(n < 0 for n in lines)) == (195, 115)
    tested = shared_dir / "data" / "gsm8k" / "test.jsonl"
    code, report = run_lint(tmp_path, rows, "--eval", tested)
    assert code == 0 and report["refused"] == []
    assert report["surface"]["length"]["auc"] == pytest.approx(0.63, abs=0.02)
    assert report["surface"]["all"]["high"] < 0.7 and report["surface"]["all"]["low"] > 0.5
    assert report["surface"]["all"]["prompts"] == 285
    cues = {cue["name"]: cue for cue in report["surface"]["answer"]["cues"]}
    assert cues["a decimal point in the last number"]["chosen_has_less"] == pytest.approx(46 / 488, abs=1e-4)
    # The set's own test part is made of questions of that file, and says so.
    rows = rows_of(shared_dir / "data" / "pref_gsm8k" / "test.jsonl")
    code, report = run_lint(tmp_path, rows, "--questions", tested, "--kind", "number", "--eval", tested)
    assert code == 2 and report["refused"] == ["contamination"]
    assert check(report, "contamination")["text"].startswith("286 of 500 items")
    assert check(report, "chosen_wrong")["table"] == [{"chosen": "correct", "rejected": "wrong", "pairs": 494}]


def test_real_general_pairs(shared_dir: Path, tmp_path: Path) -> None:
    """A mixture of six sources that nothing tells apart as a whole; one of them by itself is told by its style."""
    code, report = run_lint(tmp_path, rows_of(shared_dir / "data" / "pref" / "train.jsonl"))
    assert code == 0
    assert check(report, "equal")["text"].startswith("1 of 1504") and check(report, "conflict")["value"] > 0
    auc = {row["source"]: row["auc"] for row in report["sources"]}
    assert report["surface"]["all"]["auc"] < 0.62 and auc["style_rasbt"] > 0.72 and len(auc) == 6

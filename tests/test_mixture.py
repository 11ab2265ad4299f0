"""Several sources as one training file: shares and caps by hand, system prompts, duplicates, an order that stays."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from data_tools.jsonl import read_records
from data_tools.mixture import Mixture, Source, main, shares
from data_tools.tokenizer import load_tokenizer


def write(path: Path, rows: Any) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def call(toml: str, folder: Path, *more: object) -> int:
    (folder / "m.toml").write_text(toml, encoding="utf-8")
    return main([str(own) for own in (folder / "m.toml", "--out", folder / "out.jsonl", *more)])


def sft(name: str, question: str, answer: str = "yes", system: str | None = None) -> dict[str, Any]:
    head = [] if system is None else [{"role": "system", "content": system}]
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"id": name, "messages": [*head, *turns], "source": "builder", "question_id": name}


@pytest.mark.parametrize(
    ("rows", "sources", "expected"),
    [
        (10, [(1, None), (1, None), (1, None)], [4, 3, 3]),  # 3.33 each: the first of equals gets what is left
        (10, [(3, None), (1, None)], [8, 2]),  # 7.5 and 2.5
        (10, [(3, 5), (1, None)], [5, 2]),  # a cap is not made up by others
        (None, [(1, None), (1, 7)], [None, 7]),
    ],
)
def test_shares_by_hand(rows: int | None, sources: list[Any], expected: list[int | None]) -> None:
    own = tuple(Source(name=str(k), path=Path("x"), weight=w, cap=cap) for k, (w, cap) in enumerate(sources))
    assert shares(Mixture(kind="sft", sources=own, rows=rows)) == expected


TWO = """
[[source]]
name = "one"
path = "one.jsonl"
system = "Be brief."
[[source]]
name = "two"
path = "two.jsonl"
"""


def test_systems_duplicates_and_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """one: 3 rows, of which the third asks what the first does; two: 2 rows, of which one asks what `one` asks."""
    rows = [sft("a", "1?"), sft("b", "2?", system="Old."), sft("c", " 1?\n", "no")]
    write(tmp_path / "one.jsonl", rows)
    write(
        tmp_path / "two.jsonl",
        [sft("a", "2?", system="X."), {"id": 7, "prompt": "3?", "completion": "four", "kept": 1}],
    )
    assert call(TWO, tmp_path) == 0
    said = capsys.readouterr().out.splitlines()
    # "Be brief." 9 bytes: 3 tokens guessed; "1?" 1; "yes" 1: 5 a row of one; "3?" and "four": 2
    assert said == [
        "one: 2 of 3 rows, about 10 tokens, 1 left out as there already, 1 system messages replaced",
        "two: 1 of 2 rows, about 2 tokens, 1 left out as there already",
        f"3 rows of 2 sources, about 12 tokens, in {tmp_path / 'out.jsonl'}",
    ]
    found = {row["id"]: row for row in read(tmp_path / "out.jsonl")}
    assert set(found) == {"one/a", "one/b", "two/7"}
    for name, question in (("a", "1?"), ("b", "2?")):
        row = found[f"one/{name}"]
        assert [turn["content"] for turn in row["messages"]] == ["Be brief.", question, "yes"]
        assert (row["source"], row["question_id"]) == ("one", name)
    assert found["two/7"]["messages"] == [{"role": "user", "content": "3?"}, {"role": "assistant", "content": "four"}]
    assert found["two/7"]["kept"] == 1 and "prompt" not in found["two/7"]
    assert len(read_records([tmp_path / "out.jsonl"], kind="sft")) == 3
    assert call('dedup = "row"\n' + TWO, tmp_path) == 0
    assert len(read(tmp_path / "out.jsonl")) == 4  # another answer is another row; the same row of two sources is one
    assert call('dedup = "none"\n' + TWO, tmp_path) == 0
    assert len(read(tmp_path / "out.jsonl")) == 5


def test_an_order_that_the_seed_decides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same bytes again; another seed, another choice; a row or a source more moves none of those that are there."""
    one, two = [sft(str(k), f"one {k}?") for k in range(40)], [sft(str(k), f"two {k}?") for k in range(40)]
    write(tmp_path / "one.jsonl", one)
    write(tmp_path / "two.jsonl", two[:5])
    assert call("rows = 20\n" + TWO, tmp_path) == 0
    assert "two: 5 of 5 rows" in (said := capsys.readouterr().out) and "; short of its 10" in said
    first = (tmp_path / "out.jsonl").read_bytes()
    names = [row["id"] for row in read(tmp_path / "out.jsonl")]
    assert Counter(name.split("/")[0] for name in names) == {"one": 10, "two": 5}
    assert names != sorted(names)
    assert call("rows = 20\n" + TWO, tmp_path) == 0 and (tmp_path / "out.jsonl").read_bytes() == first
    assert call("rows = 20\nseed = 1\n" + TWO, tmp_path) == 0
    assert [row["id"] for row in read(tmp_path / "out.jsonl")] != names
    write(tmp_path / "two.jsonl", two[:8])
    assert call("rows = 20\n" + TWO, tmp_path) == 0
    longer = [row["id"] for row in read(tmp_path / "out.jsonl")]
    assert [name for name in longer if name in names] == names


def test_pairs_keep_their_columns(
    shared_dir: Path, tmp_path: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Real pairs of two sources, 3 to 1; tokens are the tokenizer's own."""
    data = shared_dir / "data"
    toml = f"""kind = "pair"
rows = 40
[[source]]
name = "maths"
path = "{data / "pref_gsm8k" / "train.jsonl"}"
weight = 3
system = "Work step by step."
[[source]]
name = "general"
path = "{data / "pref" / "test.jsonl"}"
"""
    assert call(toml, tmp_path, "--tokenizer", tiny_model_dir) == 0
    rows = read(tmp_path / "out.jsonl")
    assert Counter(row["source"] for row in rows) == {"maths": 30, "general": 10}
    source = {row["id"]: row for row in read(data / "pref_gsm8k" / "train.jsonl")}
    tokenizer, count = load_tokenizer(tiny_model_dir), 0
    for row in rows:
        if row["source"] == "maths":
            own = source[row["id"].removeprefix("maths/")]
            assert row["prompt"] == [{"role": "system", "content": "Work step by step."}, *own["prompt"]]
            assert (row["chosen"], row["reference_answer"]) == (own["chosen"], own["reference_answer"])
        turns = [*row["prompt"], *row["chosen"], *row["rejected"]]
        count += sum(len(tokenizer.encode_plain_batch([turn["content"]])[0]) for turn in turns)
    assert f"40 rows of 2 sources, {count} tokens" in capsys.readouterr().out
    assert len(read_records([tmp_path / "out.jsonl"], kind="pair")) == 40


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("", "has no [[source]]"),
        ("row = 3\n" + TWO, "row: no such key; known: kind, rows, seed, dedup, source"),
        ("rows = true\n" + TWO, "rows = True: is of another kind than it must be"),
        (TWO + "weight = 2", "weight needs rows, the number in all"),
        (TWO.replace("two", "one"), "two sources have one name"),
        ("kind = 'prm'\n" + TWO, "kind = 'prm': must be sft or pair"),
        (TWO + "cap = 0", "cap must be 1 or more"),
        (TWO.replace('path = "two.jsonl"', ""), "a [[source]] has no 'path'"),
        (TWO, "one.jsonl: no such file"),
        ("source = [1]", "source must be tables [[source]]"),
    ],
)
def test_what_is_refused(toml: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(toml, tmp_path) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out.jsonl").exists()


def test_rows_that_training_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(
        tmp_path / "one.jsonl", [sft("a", "1?"), {"id": "b", "messages": []}, sft("a", "2?"), {"id": "t", "text": "x"}]
    )
    assert call(TWO, tmp_path) == 2
    errors = capsys.readouterr().err
    for words in (
        "one.jsonl:2: field 'messages'",
        "one.jsonl:3: field 'id': 'a' already",
        "one.jsonl:4: has no prompt",
    ):
        assert words in errors


def test_paths_in_another_folder_and_a_source_that_a_step_left_empty(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A recipe's mixture stands beside the recipe, the rows in the work folder."""
    work = tmp_path / "work"
    work.mkdir()
    write(work / "one.jsonl", [sft("a", "1?"), sft("b", "2?")])
    write(work / "two.jsonl", [])
    assert call("rows = 10\n" + TWO, tmp_path, "--folder", work) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in said] == ["one: 2 of 2 rows", "two: 0 of 0 rows", "2 rows of 2 sources"]
    assert said[1].endswith("short of its 5")
    assert call(TWO, tmp_path) == 2
    assert "one.jsonl" in capsys.readouterr().err

"""Evaluation texts in training data: planted ones are found, near ones by a share counted by hand, clean ones not."""

import json
from pathlib import Path
from typing import Any

import pytest
from eval_fixtures import evaluate, head, read_json, write_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.overlap import find_overlaps, grams_of, units_of
from trainer.errors import UserError

LONG = "a b c d e f g h i j k l m n o p"  # 16 words


def words(*numbers: int) -> str:
    return " ".join(f"w{number}" for number in numbers)


def found(tmp_path: Path, train: list[Any], items: list[Any], **options: Any) -> Any:
    return find_overlaps(
        [write_rows(tmp_path / "train.jsonl", train)], write_rows(tmp_path / "eval.jsonl", items), **options
    )


def test_units() -> None:
    assert units_of("Don't PANIC: ２.5 mg!") == (["don", "t", "panic", "2", "5", "mg"], "word")
    assert units_of("发热3天。") == (["发", "热", "3", "天"], "char")
    assert units_of("تب و سرفه") == (["تب", "و", "سرفه"], "word")
    assert units_of("发热 fever", "word") == (["发热", "fever"], "word")
    assert list(grams_of(["a", "b", "c"], 2)) == [("a", "b"), ("b", "c")]


def test_a_run_of_thirteen_is_found_and_one_of_twelve_is_not(tmp_path: Path) -> None:
    """The item has 16 words; training rows share 13 (with other case and signs), or 12, or 12 and 4 apart."""
    item = {"id": "x", "question": LONG}
    thirteen = {"prompt": "Say: A, B, C. D e f g h i j k l m and so on", "chosen": "yes", "rejected": "no"}
    got = found(tmp_path, [{"text": "nothing"}, thirteen], [item])
    assert [(one.id, one.why, one.line) for one in got.overlaps] == [("x", "ngram", 1)]
    assert (got.overlaps[0].run, got.overlaps[0].units) == (13, 16)
    assert got.overlaps[0].train == f"{tmp_path / 'train.jsonl'}:2" and got.overlaps[0].train_id == "train.jsonl:2"
    twelve = {"text": "z b c d e f g h i j k l m z"}
    assert found(tmp_path, [twelve], [item]).contaminated == 0
    assert found(tmp_path, [twelve], [item], n=12).ngram == 1
    rows = [thirteen, {"text": f"{LONG} {LONG}"}]
    for train in (rows, rows[::-1]):
        assert [one.run for one in found(tmp_path, train, [item]).overlaps] == [16]


def test_near_duplicates_by_a_share_counted_by_hand(tmp_path: Path) -> None:
    """20 words have 18 runs of three; two changed words, 9 apart, spoil three runs each: 12 of 18 are left."""
    item = {"id": "x", "question": words(*range(20))}
    changed = words(*(99 if number in (5, 14) else number for number in range(20)))
    row = {"messages": [{"role": "user", "content": changed}, {"role": "assistant", "content": "long " * 50}]}
    assert found(tmp_path, [row], [item], near=2 / 3).overlaps[0].share == pytest.approx(12 / 18)
    assert found(tmp_path, [row], [item], near=0.67).contaminated == 0
    # the same share spread over two rows is no near-duplicate
    halves = [{"text": words(*range(10))}, {"text": words(*range(10, 20))}]
    assert found(tmp_path, halves, [item]).near == 0


def test_chinese_by_characters(tmp_path: Path) -> None:
    text = "六个月女婴发热三天体温三十九度一般情况良好"
    items = [{"id": "x", "question": text}, {"id": "y", "question": "完全不同的问题在这里没有任何相同的内容"}]
    got = found(tmp_path, [{"prompt": f"病例：{text[:13]}，然后", "chosen": "a", "rejected": "b"}], items)
    assert [(one.id, one.why) for one in got.overlaps] == [("x", "ngram")]


def test_short_items_are_compared_whole_or_counted(tmp_path: Path) -> None:
    items = [
        {"question": "is the sky always blue here"},
        {"question": "is it so"},
        {"question": "no such words in there"},
    ]
    got = found(tmp_path, [{"text": "Tell me: is the sky always blue here?"}], items)
    assert (got.items, got.too_short, got.contaminated, got.share) == (3, 1, 1, 0.5)


def test_named_fields(tmp_path: Path) -> None:
    item = {"id": "x", "question": "short one", "options": {"A": LONG, "B": "y"}}
    train = [{"note": LONG, "prompt": "p"}]
    assert found(tmp_path, train, [item]).contaminated == 0
    assert found(tmp_path, train, [item], eval_fields=["question", "options"]).ngram == 1
    assert found(tmp_path, train, [item], eval_fields=["options"], train_fields=["prompt"]).contaminated == 0
    with pytest.raises(UserError, match=r"eval.jsonl:1: field 'stem': missing"):
        found(tmp_path, train, [item], eval_fields=["stem"])
    with pytest.raises(UserError, match=r"eval.jsonl:1: has none of question, prompt, messages, text"):
        found(tmp_path, train, [{"stem": "x"}])


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 3), max_size=12), max_size=4), st.lists(st.integers(0, 3), min_size=5, max_size=10)
)
def test_equal_to_a_plain_search(
    tmp_path_factory: pytest.TempPathFactory, train: list[list[int]], item: list[int]
) -> None:
    """The index says what a search of every row for every run says."""
    folder = tmp_path_factory.mktemp("h")
    rows = [{"text": words(*row) or "none"} for row in train] or [{"text": "none"}]
    got = found(folder, rows, [{"id": "x", "question": words(*item)}], n=6, near=0.5)
    length = min(6, len(item))
    runs = [item[i : i + length] for i in range(len(item) - length + 1)]
    hit = any(row[i : i + length] in runs for row in train for i in range(len(row) - length + 1))
    threes = {tuple(item[i : i + 3]) for i in range(len(item) - 2)}
    shares = [len(threes & {tuple(row[i : i + 3]) for i in range(len(row) - 2)}) / len(threes) for row in train]
    assert (got.ngram, got.near) == (int(hit), int(max(shares, default=0) >= 0.5))


def test_the_command_refuses_above_a_share(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = write_rows(tmp_path / "train.jsonl", [{"text": LONG}])
    items = write_rows(
        tmp_path / "eval.jsonl", [{"id": "x", "question": LONG}, {"id": "y", "question": words(*range(9))}]
    )
    argv = ["contamination", "--train", train, "--eval", items, "--json", tmp_path / "out.json"]
    assert evaluate(*argv) == 0
    assert capsys.readouterr().out.endswith(
        "1 of 2 items found in 1 training rows (50.0%): 1 by 13-grams, 1 near-duplicates; 0 too short to judge\n"
    )
    said = read_json(tmp_path / "out.json")
    assert said["share"] == 0.5 and [one["id"] for one in said["overlaps"]] == ["x"]
    assert evaluate(*argv, "--fail-above", 0.5) == 0
    assert evaluate(*argv, "--fail-above", 0.4) == 2
    assert "50.0% of its items are in the training data" in capsys.readouterr().err
    assert evaluate(*argv, "--fail-above", 2) == 2
    assert evaluate("contamination", "--train", train, "--eval", tmp_path / "none.jsonl") == 2


def test_published_sets(shared_dir: Path, tmp_path: Path) -> None:
    """Pairs made of questions of gsm8k's test file are found there; its own training file does not hold them."""
    data = shared_dir / "data"
    pairs = head(data / "pref_gsm8k" / "test.jsonl", tmp_path / "pairs.jsonl", 100)
    asked = {json.loads(line)["prompt"][-1]["content"] for line in pairs.read_text(encoding="utf-8").splitlines()}
    rows = [json.loads(line) for line in (data / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    same = {row["id"] for row in rows if any(row["question"] in text for text in asked)}
    got = find_overlaps([pairs], data / "gsm8k" / "test.jsonl")
    assert len(same) >= 50 and same <= {one.id for one in got.overlaps}
    assert find_overlaps([data / "gsm8k" / "train.jsonl"], data / "gsm8k" / "test.jsonl").share < 0.02

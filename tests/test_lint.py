"""Each shortcut is found where it was planted, and data without one is left in peace."""

import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.encode import Group
from data_tools.lint import Finding, auc, lint_groups, lint_pairs
from data_tools.pairs import arithmetic
from data_tools.schema import Message, Record, check_record

WORDS = "the patient walks home after lunch and reads about small rivers in old towns near green hills".split()


def pair(number: int, chosen: str, rejected: str, prompt: str | None = None) -> Record:
    prompt = f"question {number}" if prompt is None else prompt
    return Record(
        id=f"row-{number}", prompt=prompt, completions=(chosen, rejected), path="pairs.jsonl", line=number + 1
    )


def plain_pairs(count: int = 60, seed: int = 0) -> list[Record]:
    """Pairs whose two sides come from one distribution."""
    rng = random.Random(seed)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(5, 30))).capitalize() + "." for _ in range(2 * count)]
    return [pair(i, *texts[2 * i : 2 * i + 2]) for i in range(count)]


def changed(records: list[Record], change_chosen=str, change_rejected=str) -> list[Record]:
    """The records with each side's text passed through a function."""
    return [pair(i, change_chosen(r.completions[0]), change_rejected(r.completions[1])) for i, r in enumerate(records)]


def texts_of(findings: list[Finding]) -> str:
    return "\n".join(finding.text for finding in findings)


def test_auc_by_hand():
    """Of the nine comparisons of 3, 5, 5 with 1, 5, 7: won 3>1, 5>1, 5>1; half each 5=5, 5=5. 4 of 9."""
    assert auc(np.array([3.0, 5.0, 5.0]), np.array([1.0, 5.0, 7.0])) == pytest.approx(4 / 9)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=30), st.lists(st.integers(0, 6), min_size=1, max_size=30))
@settings(max_examples=60, deadline=None)
def test_auc_is_the_share_of_comparisons_won(chosen, rejected):
    scores = [1.0 if c > r else 0.5 if c == r else 0.0 for c, r in itertools.product(chosen, rejected)]
    assert auc(np.array(chosen), np.array(rejected)) == pytest.approx(np.mean(scores))


def test_pairs_of_one_distribution_get_no_finding():
    assert lint_pairs(plain_pairs()) == []


@pytest.mark.parametrize(
    ("change_chosen", "change_rejected", "expected"),
    [
        (lambda t: t + " and so on" * 20, str, "chosen is longer in 100% of pairs (AUC 1.00)"),
        (str, str.upper, "chosen has less upper case in 100% of pairs"),
        (lambda t: t + " 12 and 47", str, "chosen has more digits"),
        (lambda t: "- " + t + "\n- more", str, "chosen has more list items"),
        (str, lambda t: f"**{t}**", "chosen has less Markdown"),
        (lambda t: t[:9] + "\n" + t[9:], str, "chosen has more line breaks"),
        (str, lambda t: t + "!", "chosen has fewer exclamation marks"),
        (str, lambda t: t + "؟", "chosen has fewer question marks"),
        (str, lambda t: t + " So [B].", "chosen names fewer option letters (A to E)"),
        (str, lambda t: t[:-1], "chosen ends a sentence at its end more often"),
        (str, lambda t: " " + t, "chosen begins without white space more often"),
        (str, lambda t: t + "\n", "chosen ends without white space more often"),
    ],
)
def test_a_planted_feature_is_named_with_the_side_that_has_it(change_chosen, change_rejected, expected):
    findings = lint_pairs(changed(plain_pairs(), change_chosen, change_rejected))
    assert expected in texts_of(findings)
    assert all(finding.severity == "warning" for finding in findings)


def test_the_message_says_what_and_what_to_do():
    found = lint_pairs(changed(plain_pairs(), lambda t: t + " and so on" * 20))
    assert found[0].text == (
        "chosen is longer in 100% of pairs (AUC 1.00): a model can win by length alone; balance the pairs, or check "
        "that this is what you want to teach"
    )


def test_a_feature_that_only_separates_within_pairs_is_found():
    """One word more than the other side, but lengths from 1 to 60 words: over all texts AUC is near 0.5."""
    pairs = [pair(i, "word " * (i + 2), "word " * (i + 1)) for i in range(60)]
    assert "chosen is longer in 100% of pairs (AUC 0.52)" in texts_of(lint_pairs(pairs))


def test_a_feature_below_the_threshold_is_not_reported():
    """Longer in 54 of 60 pairs is a taste; in 58 of 60 a shortcut."""
    plain = [pair(i, "word " * 20, "word " * 10) for i in range(60)]
    for turned, reported in ((6, False), (2, True)):
        pairs = [pair(i, *(r.completions[::-1] if i < turned else r.completions)) for i, r in enumerate(plain)]
        assert ("chosen is longer in 97% of pairs" in texts_of(lint_pairs(pairs))) == reported


def test_phrases_openings_and_closings_are_found():
    findings = lint_pairs(changed(plain_pairs(), str, lambda t: "As an AI, " + t))
    assert 'the phrase "<start> As an" is in 0% of the chosen and 100% of the rejected texts' in texts_of(findings)
    assert sum("the phrase" in finding.text for finding in findings) == 2  # that, and its rest: "AI ,"
    inside = lint_pairs(changed(plain_pairs(), lambda t: t[: len(t) // 2] + " verily " + t[len(t) // 2 :]))
    assert 'the phrase "verily" is in 100% of the chosen and 0% of the rejected texts (AUC 1.00)' in texts_of(inside)


def test_too_few_pairs_say_nothing_about_features():
    assert lint_pairs(changed(plain_pairs(19), str, str.upper)) == []
    assert lint_pairs(changed(plain_pairs(20), str, str.upper)) != []


def test_copies_are_counted():
    records = plain_pairs(50)
    again = pair(90, *records[3].completions, prompt=records[3].prompt)
    turned = pair(91, *records[4].completions[::-1], prompt=records[4].prompt)
    equal = pair(92, "Same.", "Same.")
    text = texts_of(lint_pairs([*records, again, turned, equal]))
    assert "1 of 53 rows repeat another row (first: row-3): they weigh double; remove them" in text
    assert "2 pairs stand in another row with chosen and rejected exchanged (first: row-4)" in text
    assert "1 pairs have equal chosen and rejected texts (first: row-92)" in text
    assert len(text.splitlines()) == 3


def test_few_copies_are_a_note_and_many_a_warning():
    records = plain_pairs(200)
    assert [f.severity for f in lint_pairs([*records, records[0]])] == ["note"]
    assert [f.severity for f in lint_pairs([*records, *records[:20]])] == ["warning"]


def test_an_evaluation_prompt_seen_in_training_is_found_whatever_its_shape():
    as_messages = (Message("user", "Question  7"),)
    leaked = Record("eval-1", as_messages, ((Message("assistant", "x"),), (Message("assistant", "y"),)), "e.jsonl", 1)
    new = pair(2, "a", "b", prompt="a new question")
    found = lint_pairs(plain_pairs(), [leaked, new])
    assert [f.text.split(":")[0] for f in found] == [
        "1 of 2 evaluation rows have a prompt that is in the training data (first"
    ]
    assert "eval-1" in found[0].text
    assert lint_pairs(plain_pairs(), [new]) == []


def test_rows_without_a_prompt_or_a_pair_are_no_leak_and_no_error():
    texts = [Record(f"t{i}", "", (f"text number {i}",), "t.jsonl", i) for i in range(30)]
    assert lint_pairs(texts, texts[:3]) == []
    assert lint_pairs([]) == []


def group(chosen: list[int], rejected: list[int]) -> Group:
    ids = np.array([1, 2, *chosen, *rejected], dtype=np.int32)
    lengths = (2, len(chosen), len(rejected))
    return Group("g", ids, lengths, ((), ((0, len(chosen)),), ((0, len(rejected)),)))


def test_a_missing_end_token_is_found_in_groups():
    rng = random.Random(0)
    sides = [[rng.choices(range(10, 99), k=rng.randint(5, 30)) for _ in range(2)] for _ in range(60)]
    assert lint_groups([group([*c, 7], [*r, 7]) for c, r in sides]) == []
    found = lint_groups([group([*c, 7], r) for c, r in sides])
    assert "chosen ends with the usual last token (7) more often in 100% of pairs (AUC 1.00)" in texts_of(found)
    longer = lint_groups([group([*c, *[5] * 40, 7], [*r, 7]) for c, r in sides])
    assert "chosen has more tokens in 100% of pairs" in texts_of(longer)
    assert lint_groups([group([9, 7], [9])] * 19) == []


def test_groups_that_are_no_pairs_are_passed_over():
    alone = Group("g", np.array([1, 2, 3], dtype=np.int32), (1, 2), ((), ((0, 2),)))
    assert lint_groups([alone] * 50) == []


def test_the_arithmetic_pairs_have_no_shortcut():
    rows = [*arithmetic.generate(400, held_out=False, seed=0)]
    records = [check_record(row, kind="pair", path="train.jsonl", line=i) for i, row in enumerate(rows, 1)]
    held_out = [*arithmetic.generate(100, held_out=True, seed=0)]
    eval_records = [check_record(row, kind="pair", path="eval.jsonl", line=i) for i, row in enumerate(held_out, 1)]
    assert lint_pairs(records, eval_records) == []


def real_records(shared_dir: Path, name: str) -> list[Record]:
    lines = (shared_dir / "data" / name).read_text(encoding="utf-8").splitlines()
    return [check_record(json.loads(line), kind="pair", path=name, line=i) for i, line in enumerate(lines, 1)]


def test_real_medical_pairs_give_themselves_away_by_option_letters(shared_dir):
    """In this set the chosen side writes [a], the rejected side [A]: the data's own README warns of it."""
    train, held_out = (real_records(shared_dir, f"pref_fa_med/{part}.jsonl") for part in ("train", "test"))
    text = texts_of(lint_pairs(train, held_out))
    assert "chosen names fewer option letters (A to E) in 99% of pairs" in text
    assert "chosen has less upper case in 100% of pairs" in text
    assert len(text.splitlines()) == 2


def test_real_general_pairs_get_no_finding(shared_dir):
    """Polite against rude, human votes, better against worse answers: nothing trivial separates these."""
    train, held_out = (real_records(shared_dir, f"pref/{part}.jsonl") for part in ("train", "test"))
    assert lint_pairs(train, held_out) == []
    style = [record for record in train if record.id.startswith("style_rasbt")]
    assert len(style) == 206
    assert lint_pairs(style) == []

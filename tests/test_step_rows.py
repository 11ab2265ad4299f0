"""Rows of labelled steps: what is refused, and that every label stands at the last token of its own step."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_fixtures import CHATML, byte_level_folder, sentencepiece_folder, smollm2_folder

from data_tools.chat_template import ChatTemplate
from data_tools.encode import EncodeOptions, Group, encode_records
from data_tools.errors import DataError, DataErrors, UserError
from data_tools.jsonl import read_records
from data_tools.schema import Record, check_record
from data_tools.shards import open_or_build
from data_tools.show import describe_group
from data_tools.step_rows import StepLabel
from data_tools.tokenizer import Tokenizer, load_tokenizer

STEPS = ["First, 9 - 2 = 7.", " The answer is 7."]
TRIMMED = CHATML.replace("message['content']", "message['content'] | trim")
THINKING = CHATML.replace("message['role'] + '\n'", "message['role'] + '\n' + ('<think>\n\n</think>\n\n' "
                          "if message['role'] == 'assistant' else '')")  # fmt: skip


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(byte_level_folder(tmp_path_factory.mktemp("chatml")))


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = sentencepiece_folder(tmp_path_factory.mktemp("pieces"), bos_token="<s>", eos_token="</s>")
    return load_tokenizer(folder)


def row(steps: list[str] | None = None, *, messages: bool = True, **changes: object) -> dict[str, object]:
    steps = STEPS if steps is None else steps
    prompt = [{"role": "user", "content": "How many?"}] if messages else "How many? "
    labels = {"hard": [1] * len(steps), "soft": [0.5] * len(steps), "correct": True}
    found = {"id": "q#0", "question_id": "q", "prompt": prompt, "steps": steps, **labels, **changes}
    return {name: value for name, value in found.items() if value != "absent"}


def check(value: object) -> Record:
    return check_record(value, kind="prm", path="rows.jsonl", line=3)


def encode(value: object, tokenizer: Tokenizer, source: str = CHATML, **options: object) -> Group:
    template = ChatTemplate(source, path=Path("template.jinja"), tokens={})
    chosen = EncodeOptions(kind="prm", **{"max_length": None, **options})  # type: ignore[arg-type]
    ((group,), _) = encode_records([check(value)], tokenizer, template, chosen)
    return group


def step_texts(group: Group, tokenizer: Tokenizer) -> list[str]:
    """The text of the completion up to each labelled token, less what the label before had: the steps again."""
    ids = group.ids[group.lengths[0] :].tolist()
    ends = [end for _, end in group.spans[1]]
    assert all(end - start == 1 for start, end in group.spans[1]) and len(group.labels[1]) == len(ends)
    whole = [tokenizer.decode(ids[:end]) for end in ends]
    return [text[len(before) :] for before, text in zip(["", *whole], whole, strict=False)]


# --- rows ------------------------------------------------------------------------------------------------------------


def test_a_row_by_hand() -> None:
    record = check(row(hard=[1, 0], soft=[0.75, 0], correct=False))
    assert record.completions[0][0].content == "First, 9 - 2 = 7. The answer is 7."  # type: ignore[union-attr]
    (steps,) = record.steps
    assert steps.ends == (17, 34)
    assert steps.labels[0][:3] == (1.0, 0.75, 0.0) and math.isnan(steps.labels[0].final)
    assert steps.labels[1] == StepLabel(hard=0.0, soft=0.0, outcome=0.0, final=0.0)


def test_labels_that_a_row_lacks_are_unknown() -> None:
    (steps,) = check(row(soft="absent", correct="absent", messages=False)).steps
    assert all(label.hard == 1 and np.isnan(label[1:]).all() for label in steps.labels)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"steps": "absent"}, "field 'steps': missing; the row's columns are: id, question_id, prompt, hard"),
        ({"steps": []}, "field 'steps': expected a list of texts like"),
        ({"steps": ["a", 3]}, r"field 'steps\[1\]': expected a text, got 3"),
        ({"steps": ["a", "\n"]}, r"field 'steps\[1\]': is blank: join it"),
        ({"steps": ["a", "\ud800"]}, r"field 'steps\[1\]': half of a surrogate pair"),
        ({"hard": "absent"}, "field 'hard': missing: one value a step"),
        ({"hard": [1]}, "field 'hard': has 1 values for 2 steps"),
        ({"hard": [1, 2]}, r"field 'hard\[1\]': must be 0 or 1, got 2"),
        ({"hard": [True, 0]}, r"field 'hard\[0\]': must be 0 or 1, got True"),
        ({"soft": [0.5, 1.5]}, r"field 'soft\[1\]': must be a number from 0 to 1, got 1.5"),
        ({"soft": [0.5, "x"]}, r"field 'soft\[1\]': must be a number from 0 to 1, got 'x'"),
        ({"soft": 0.5}, "field 'soft': expected a list, one value a step"),
        ({"correct": 1}, "field 'correct': expected true or false, got 1"),
        (
            {"prompt": [{"role": "assistant", "content": "x"}]},
            "field 'prompt': the last message must be of role 'user'",
        ),
    ],
)
def test_what_is_refused(changes: dict[str, object], problem: str) -> None:
    with pytest.raises(DataError, match=f"^rows.jsonl:3: {problem}"):
        check(row(**changes))  # type: ignore[arg-type]


# --- tokens ----------------------------------------------------------------------------------------------------------

WRITTEN = {
    "lines": ["9 - 2 = 7\n", "7 + 1 = 8\n", "The answer is 8"],
    "persian": ["سیب‌ها نُه تا بودند.", " دو تا را داد؛ هفت تا ماند.\n", "پاسخ: ۷"],
    "chinese": ["首先，九减二等于七。", "所以答案是七。", "🍎🍎"],
    "emoji at step ends": ["one 🍎", " two 👩‍🔬", " three é🧑🏽‍🚀\n", "四"],
    "one character each": ["a", "b", "é", "𝄞", " c"],
}


@pytest.mark.parametrize("source", [CHATML, TRIMMED, THINKING], ids=["chatml", "trimmed", "thinking"])
@pytest.mark.parametrize("steps", WRITTEN.values(), ids=WRITTEN)
def test_labels_stand_at_the_last_token_of_their_step(steps: list[str], source: str, byte_level: Tokenizer) -> None:
    hard = [k % 2 for k in range(len(steps))]
    for messages in (True, False):
        group = encode(row(steps, messages=messages, hard=hard), byte_level, source)
        expected = list(steps)
        if messages and source == THINKING:
            expected[0] = "<think>\n\n</think>\n\n" + steps[0]
        assert step_texts(group, byte_level) == expected
        assert [label.hard for label in group.labels[1]] == hard
        assert group.spans[1][-1][1] == group.lengths[1], "nothing behind the last step"


def test_with_sentencepiece(pieces: Tokenizer) -> None:
    group = encode(row(WRITTEN["persian"], messages=False), pieces)
    assert step_texts(group, pieces) == WRITTEN["persian"]


def test_white_space_at_the_ends(byte_level: Tokenizer) -> None:
    """Spaces go to the next step, those of the last one nowhere; line feeds stay; a template may take them off."""
    steps = ["  one.  ", "two.\n", "three. \n"]
    group = encode(row(steps, messages=False), byte_level)
    assert step_texts(group, byte_level) == ["  one.", "  two.\n", "three. \n"]
    assert step_texts(encode(row(["one. ", "two. "], messages=False), byte_level), byte_level) == ["one.", " two."]
    assert step_texts(encode(row(steps), byte_level, TRIMMED), byte_level) == ["one.", "  two.\n", "three."]


def test_tokens_are_those_of_the_whole_text_where_steps_end_as_they_should(shared_dir: Path, tmp_path: Path) -> None:
    """SmolLM2's tokenizer: steps cut at line feeds and before spaces make no other tokens than the whole text."""
    tokenizer = load_tokenizer(smollm2_folder(tmp_path / "model", shared_dir / "data" / "tokenizers" / "smollm2"))
    for name in ("lines", "persian", "chinese"):
        whole = tokenizer.encode_batch(["".join(WRITTEN[name])])[0]
        group = encode(row(WRITTEN[name], messages=False), tokenizer)
        assert group.ids[group.lengths[0] :].tolist() == whole, name


@settings(max_examples=150, deadline=None)
@given(
    steps=st.lists(
        st.text(st.characters(codec="utf-8"), min_size=1, max_size=8).filter(lambda text: text.strip()),
        min_size=1,
        max_size=5,
    ),
    messages=st.booleans(),
)
def test_any_text_round_trips(steps: list[str], messages: bool, byte_level: Tokenizer) -> None:
    group = encode(row(steps, messages=messages), byte_level)
    text = "".join(step_texts(group, byte_level))
    assert text == "".join(steps).rstrip(" ") and len(group.labels[1]) == len(steps)


def test_control_tokens_in_the_text_stay_text(byte_level: Tokenizer) -> None:
    steps = ["say <|im_end|>", " and <|im_", "end|> now", " done"]
    group = encode(row(steps), byte_level)
    assert step_texts(group, byte_level) == steps
    inside = group.ids[group.lengths[0] :].tolist()
    assert not any(byte_level.is_special(token) for token in inside)
    tokens = encode(row(steps[:1]), byte_level, special_tokens="control")
    assert byte_level.is_special(tokens.ids[-1])


def test_a_separator_is_what_is_read(byte_level: Tokenizer) -> None:
    """A special token of the vocabulary, or any text; it stands behind the step and before its trailing spaces."""
    group = encode(row(["one. ", "two"]), byte_level, step_separator="<|endoftext|>")
    ids = group.ids[group.lengths[0] :].tolist()
    end = byte_level.encode("<|endoftext|>")[0]
    assert [ids[place] for place, _ in group.spans[1]] == [end, end] and ids.count(end) == 2
    assert byte_level.decode(ids) == "one.<|endoftext|> two<|endoftext|>"
    group = encode(row(["one", "two"]), byte_level, step_separator=" ки")
    assert step_texts(group, byte_level) == ["one ки", "two ки"]


def test_a_template_that_changes_the_answer_is_refused(byte_level: Tokenizer) -> None:
    with pytest.raises(DataErrors, match="rows.jsonl:3: field 'steps': the chat template does not print the answer as"):
        encode(row(), byte_level, CHATML.replace("message['content']", "message['content'] | upper"))


def test_over_long_rows(byte_level: Tokenizer) -> None:
    """Cut rows keep the labels of the steps that are whole; the last step's outcome goes with it."""
    whole = encode(row(["one.", " two.", " three."], hard=[1, 0, 1]), byte_level)
    limit = whole.lengths[0] + whole.spans[1][1][1]
    cut = encode(row(["one.", " two.", " three."], hard=[1, 0, 1]), byte_level, max_length=limit,
                 overlong="truncate_completion")  # fmt: skip
    assert cut.spans[1] == whole.spans[1][:2] and cut.labels[1] == whole.labels[1][:2]
    assert all(math.isnan(label.final) for label in cut.labels[1])
    with pytest.raises(UserError, match="all 1 rows are longer"):
        encode(row(["one.", " two."]), byte_level, max_length=whole.lengths[0] + 1)


# --- shards ----------------------------------------------------------------------------------------------------------


def test_a_shard_holds_the_labels(tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "rows.jsonl"
    rows = [row(WRITTEN["emoji at step ends"], id="a", soft=[0.125, 0, 1, 0.5], hard=[1, 0, 1, 1], correct=False),
            row(id="b", soft="absent", weight=2)]  # fmt: skip
    data.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    options = EncodeOptions(kind="prm")
    tokenizer = load_tokenizer(tiny_model_dir)
    template = ChatTemplate(CHATML, path=Path("t"), tokens={})
    direct, _ = encode_records(read_records([data], kind="prm"), tokenizer, template, options)
    for _ in range(2):
        shard = open_or_build((str(data),), model_dir=tiny_model_dir, options=options, cache_dir=tmp_path / "cache")
        for ours, theirs in zip(shard, direct, strict=True):
            assert (ours.ids.tolist(), ours.spans, ours.weight) == (theirs.ids.tolist(), theirs.spans, theirs.weight)
            np.testing.assert_array_equal(ours.labels[1], theirs.labels[1])
    assert shard.reused and shard.labels is not None and shard.labels.shape == (6, 4)
    assert shard[0].labels[1][0] == pytest.approx((1, 0.125, 0, math.nan), nan_ok=True)
    damaged = shard.folder / "labels.npy"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x01")
    again = open_or_build((str(data),), model_dir=tiny_model_dir, options=options, cache_dir=tmp_path / "cache")
    assert not again.reused and again.digest == shard.digest
    assert "labels.npy has not the content that was written" in capsys.readouterr().err
    shown = describe_group(again[1], tokenizer, color=False)
    assert "[[.]]" in shown and shown.endswith("labels at the marked tokens: 1 1")

"""The command that shows rows: scored text marked, the end of a turn judged, input errors as exit code 2."""

import json
from pathlib import Path

import numpy as np
import pytest
from text_fixtures import CHATML, byte_level_folder

from data_tools.chat_template import load_chat_template
from data_tools.encode import EncodeOptions, Group, encode_records
from data_tools.jsonl import read_records
from data_tools.show import describe_group, main
from data_tools.tokenizer import load_tokenizer

PAIR = {
    "id": "ice",
    "prompt": [{"role": "user", "content": "Why?"}],
    "chosen": [{"role": "assistant", "content": "Ice is light."}],
    "rejected": [{"role": "assistant", "content": "It is cold."}],
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return byte_level_folder(tmp_path / "model")


def write(folder: Path, *rows: object) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def show(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    code = main([str(word) for word in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_pair_by_hand(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = show(capsys, "--data", write(tmp_path, PAIR), "--model", model)
    tokenizer = load_tokenizer(model)
    lengths = [
        len(tokenizer.encode(text))
        for text in (
            "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
            "Ice is light.<|im_end|>\n",
            "It is cold.<|im_end|>\n",
        )
    ]
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        f"ice: prompt {lengths[0]} tokens; chosen {lengths[1]} tokens, {lengths[1]} scored; "
        f"rejected {lengths[2]} tokens, {lengths[2]} scored",
        "--- prompt",
        "<|im_start|>user",
        "Why?<|im_end|>",
        "<|im_start|>assistant",
        "",
        "--- chosen",
        "[[Ice is light.<|im_end|>",
        "]]",
        "--- rejected",
        "[[It is cold.<|im_end|>",
        "]]",
        "end-of-turn token trained: yes (<|im_end|>)",
        "",
        "template: prompt and answer make the whole text: yes",
        "template: longer conversations begin with the shorter one's text and tokens: yes",
        "template: end-of-turn token trained: yes (<|im_end|>)",
        "template: BOS: none",
        "template: a system message is printed",
        f"1 of 1 rows kept, longest {lengths[0] + max(lengths[1:])} tokens",
    ]


def test_turns_of_the_user_are_not_marked(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    turns = ["Why?", "So.", "How?", "Thus."]
    roles = ["user", "assistant"] * 2
    row = {"messages": [{"role": role, "content": text} for role, text in zip(roles, turns, strict=True)]}
    _, out, _ = show(capsys, "--data", write(tmp_path, row), "--model", model, "--kind", "sft")
    assert "--- completion\n[[So.<|im_end|>\n]]<|im_start|>user\nHow?<|im_end|>\n<|im_start|>assistant\n[[Thus." in out


def groups_of(model: Path, *rows: object, **options: object) -> list[Group]:
    records = read_records([write(model, *rows)], kind="pair")
    chosen = EncodeOptions(**options)  # type: ignore[arg-type]
    return encode_records(records, load_tokenizer(model), load_chat_template(model), chosen)[0]


def test_colors_mark_the_same_text(model: Path) -> None:
    (group,) = groups_of(model, PAIR)
    colored = describe_group(group, load_tokenizer(model), color=True)
    assert "\x1b[32mIce is light.<|im_end|>\n\x1b[0m" in colored and "\x1b[2m<|im_start|>user" in colored
    for mark in ("\x1b[32m", "\x1b[2m", "\x1b[0m"):
        colored = colored.replace(mark, "")
    assert colored == describe_group(group, load_tokenizer(model), color=False).replace("[[", "").replace("]]", "")


def test_data_does_not_steer_the_terminal(model: Path) -> None:
    (group,) = groups_of(model, PAIR | {"chosen": [{"role": "assistant", "content": "\x1b[31mred\x07"}]})
    assert "[[\\x1b[31mred\\x07<|im_end|>" in describe_group(group, load_tokenizer(model), color=False)


def test_a_missing_end_of_turn_is_said(model: Path) -> None:
    tokenizer = load_tokenizer(model)
    (group,) = groups_of(model, {"prompt": "q: ", "chosen": "a", "rejected": "bb"})
    assert describe_group(group, tokenizer, False).endswith("end-of-turn token trained: yes (<|im_end|>)")
    # cut to two tokens a completion, the longer answer loses its end
    limit = group.lengths[0] + 2
    row = {"prompt": "q: ", "chosen": "a", "rejected": "a cold glass of water"}
    (cut,) = groups_of(model, row, max_length=limit, overlong="truncate_completion")
    said = describe_group(cut, tokenizer, False).splitlines()[-1]
    assert said == "end-of-turn token trained: no (missing in completion 2 of 2)"
    # the end token is there but not scored
    unscored = Group("x", group.ids, group.lengths, ((), ((0, 1),), ((0, group.lengths[2]),)))
    assert "missing in completion 1 of 2" in describe_group(unscored, tokenizer, False)


def test_a_template_without_end_token_is_caught(tmp_path: Path) -> None:
    model = byte_level_folder(tmp_path / "model", chat_template=CHATML.replace("<|im_end|>", ""))
    (group,) = groups_of(model, PAIR)
    assert "trained: no (missing in completion 1 and 2 of 2)" in describe_group(group, load_tokenizer(model), False)


def test_many_branches_are_numbered(model: Path) -> None:
    spans = ((), ((0, 1),), ((0, 1),), ((0, 1),))
    group = Group("k", np.array([40, 41, 42, 43], dtype=np.int32), (1, 1, 1, 1), spans)
    assert "branch 3 1 tokens, 1 scored" in describe_group(group, load_tokenizer(model), False)


def test_only_the_rows_asked_for_are_read(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path, PAIR, PAIR | {"id": "two"}, {"broken": 1})
    code, out, _ = show(capsys, "--data", data, "--model", model, "-n", 2)
    assert (code, out.count("--- chosen")) == (0, 2)
    code, _, err = show(capsys, "--data", data, "--model", model, "-n", 3)
    assert (code, err) == (2, f"error: {data}:3: field 'chosen': missing; the row's columns are: broken\n")


def test_faults_of_the_input_exit_with_two(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path, PAIR)
    for argv, words in (
        (["--data", tmp_path / "none.jsonl", "--model", model], "none.jsonl: no such file"),
        (["--data", data, "--model", tmp_path / "none"], "none: no such model folder"),
        (["--data", data, "--model", model, "-n", 0], "-n 0: must be at least 1"),
        (["--data", data, "--model", model, "--max-length", 9], "all 1 rows are longer than data.max_length = 9"),
        (["--data", data, "--model", model, "--chat-template", "none.jinja"], "none.jinja: cannot be read"),
    ):
        code, out, err = show(capsys, *argv)
        assert (code, out, len(err.splitlines())) == (2, "", 1) and words in err, err

"""`python -m eval.sample`: prompts to samples, resumed after a kill, refused in one line."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from run_fixtures import ROOT

from data_tools.samples import read_samples
from eval import sample
from trainer.entry import exit_code

PROMPTS = [
    {"id": "a", "prompt": "What is 2 + 3?"},
    {"id": "b", "messages": [{"role": "system", "content": "Short."}, {"role": "user", "content": "为什么？"}]},
    {"id": "c", "prompt": "چرا؟", "settings": {"n": 1, "temperature": 0, "max_tokens": 3}},
]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS), encoding="utf-8")
    return path


def arguments(model: Path, prompts: Path, *more: str) -> list[str]:
    out = prompts.with_name("samples.jsonl")
    common = ["--n", "3", "--max-tokens", "12", "--dtype", "float32", "--slots", "4"]
    return ["--model", str(model), "--prompts", str(prompts), "--out", str(out), *common, *more]


def contents(prompts: Path) -> dict[tuple[str, int], object]:
    return {each.key: each for each in read_samples(prompts.with_name("samples.jsonl")).samples}


def test_rows_of_all_samples(prompts: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(sample.main, arguments(tiny_model_dir, prompts, "--logprobs")) == 0
    found = contents(prompts)
    assert set(found) == {(name, number) for name in "ab" for number in range(3)} | {("c", 0)}
    for each in found.values():
        assert each.model == str(tiny_model_dir)
        assert each.completion_tokens == len(each.logprobs) <= (3 if each.id == "c" else 12)
    assert capsys.readouterr().out.endswith("0 were there, 7 drawn\n")
    assert exit_code(sample.main, arguments(tiny_model_dir, prompts, "--logprobs")) == 0
    assert capsys.readouterr().out.endswith("7 were there, 0 drawn\n")
    assert contents(prompts) == found


def test_a_killed_command_goes_on_and_ends_as_an_unbroken_one(prompts: Path, tiny_model_dir: Path) -> None:
    """Killed after the first rows, its last row torn on top; then the same samples as without a kill."""
    whole = prompts.with_name("whole.jsonl")
    rows = [{"id": f"q{number}", "prompt": f"Count to {number}."} for number in range(30)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    more = ("--max-tokens", "60", "--slots", "2")
    command = [sys.executable, "-m", "eval.sample", *arguments(tiny_model_dir, prompts, *more)]
    out = prompts.with_name("samples.jsonl")
    child = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and not (out.exists() and out.read_bytes().count(b"\n") >= 3):
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    content = out.read_bytes()
    assert 3 <= content.count(b"\n") < 90
    out.write_bytes(content[: content.rindex(b"\n", 0, len(content) - 1) + 20])  # a row cut in its middle
    assert exit_code(sample.main, arguments(tiny_model_dir, prompts, *more)) == 0
    broken = contents(prompts)
    out.rename(whole)
    assert exit_code(sample.main, arguments(tiny_model_dir, prompts, *more)) == 0
    assert contents(prompts) == broken and len(broken) == 90


def test_a_signal_ends_it_in_good_order(prompts: Path, tiny_model_dir: Path) -> None:
    rows = [{"id": f"q{number}", "prompt": f"Count to {number}."} for number in range(60)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    out = prompts.with_name("samples.jsonl")
    more = ("--max-tokens", "200", "--slots", "1")
    command = [sys.executable, "-m", "eval.sample", *arguments(tiny_model_dir, prompts, *more)]
    child = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and not (out.exists() and out.stat().st_size):
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGTERM)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 1
    (line,) = (line for line in errors.splitlines() if line.startswith("stopped: "))
    assert line.endswith("samples are missing, start the same command again to go on")
    assert read_samples(out).torn == 0


def test_examples_stand_before_each_prompt(prompts: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    """With examples the prompts are longer by the same number of tokens, and other samples are drawn."""
    shots = tmp_path / "shots.jsonl"
    row = {"messages": [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]}
    shots.write_text(json.dumps(row) + "\n", encoding="utf-8")
    assert exit_code(sample.main, arguments(tiny_model_dir, prompts)) == 0
    plain = contents(prompts)
    prompts.with_name("samples.jsonl").unlink()
    assert exit_code(sample.main, arguments(tiny_model_dir, prompts, "--few-shot", str(shots))) == 0
    (more,) = {each.prompt_tokens - plain[key].prompt_tokens for key, each in contents(prompts).items()}
    assert more > 0
    assert contents(prompts)["a", 0].settings_digest != plain["a", 0].settings_digest


BAD = {
    "a bad option": (["--top-p", "2"], "top_p = 2.0: must be above 0 and at most 1"),
    "no model": (["--model", "/nowhere/at/all"], "/nowhere/at/all: no such model folder"),
    "no prompts": (["--prompts", "/nowhere.jsonl"], "/nowhere.jsonl"),
    "no examples": (["--few-shot", "/nowhere.jsonl"], "/nowhere.jsonl"),
    "messages as plain text": (["--api", "completions"], "prompts and examples must be strings"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_wrong_is_said_in_one_line(
    kind: str, prompts: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more, words = BAD[kind]
    assert exit_code(sample.main, arguments(tiny_model_dir, prompts, *more)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error and error.count("\n") == 1


def test_bad_rows_and_other_settings(prompts: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(sample.main, arguments(tiny_model_dir, prompts)) == 0
    before = prompts.with_name("samples.jsonl").read_bytes()
    assert exit_code(sample.main, arguments(tiny_model_dir, prompts, "--temperature", "0.5")) == 2
    assert "sample 0 of id 'a' was drawn with another settings; name another --out" in capsys.readouterr().err
    with prompts.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"id": "d", "prompt": "x", "settings": {"temprature": 1}}) + "\n")
        file.write(json.dumps({"id": "e", "prompt": "x", "settings": {"top_p": 7}}) + "\n")
    assert exit_code(sample.main, arguments(tiny_model_dir, prompts)) == 2
    error = capsys.readouterr().err
    assert f"{prompts}:4: field 'settings': 'temprature' is not known; known: max_tokens" in error
    assert f"{prompts}:5: field 'settings': top_p = 7: must be above 0" in error
    assert prompts.with_name("samples.jsonl").read_bytes() == before


def test_a_missing_file_begins_with_the_rows_of_an_earlier_turn(prompts: Path, tiny_model_dir: Path) -> None:
    """A loop's turn has a file of its own; what the turn before drew is not drawn again."""
    assert exit_code(sample.main, arguments(tiny_model_dir, prompts)) == 0
    first = prompts.with_name("samples.jsonl").rename(prompts.with_name("first.jsonl"))
    more = ["--n", "4", "--earlier", str(first)]
    assert exit_code(sample.main, arguments(tiny_model_dir, prompts, *more)) == 0
    out = prompts.with_name("samples.jsonl")
    rows = first.read_bytes()
    assert out.read_bytes().startswith(rows) and first.read_bytes() == rows
    assert sorted(contents(prompts)) == [*(("a", k) for k in range(4)), *(("b", k) for k in range(4)), ("c", 0)]
    # What is there counts, and not the earlier file: it is not even read.
    whole = out.read_bytes()
    first.unlink()
    assert exit_code(sample.main, arguments(tiny_model_dir, prompts, *more)) == 0 and out.read_bytes() == whole
    out.unlink()
    assert exit_code(sample.main, arguments(tiny_model_dir, prompts, *more)) == 2 and not out.exists()

"""Files of prompts and samples: rows come back as written, a torn last row is skipped and cut, all else is an error."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.errors import DataError, DataErrors, UserError
from data_tools.samples import (
    Sample,
    SampleWriter,
    canonical_json,
    digest_of,
    messages_of,
    read_prompts,
    read_samples,
    row_of,
)
from data_tools.schema import Message

ROOT = Path(__file__).resolve().parent.parent


def sample(id: str = "a", k: int = 0, text: str = "four", **more: object) -> Sample:
    fixed = {"finish_reason": "stop", "model": "m", "settings_digest": "s", "prompt_digest": "p"}
    return Sample(id=id, sample=k, text=text, **(fixed | more))  # type: ignore[arg-type]


texts = st.text() | st.just("half \ud83d of a pair") | st.just("line\u2028separator\r\nand more")
drawn = st.builds(
    Sample,
    id=st.text(min_size=1),
    sample=st.integers(0, 9),
    text=texts,
    finish_reason=st.sampled_from(["stop", "length"]),
    model=st.text(),
    settings_digest=st.text(),
    prompt_digest=st.text(),
    prompt_tokens=st.none() | st.integers(0, 9),
    completion_tokens=st.none() | st.integers(0, 9),
    logprobs=st.none() | st.lists(st.floats(-30, 0), max_size=3).map(tuple),
    reasoning=st.none() | texts,
)


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(drawn, max_size=4, unique_by=lambda row: row.key), cut=st.integers(0, 400))
def test_any_cut_leaves_the_whole_rows_and_a_count(
    rows: list[Sample], cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("samples") / "s.jsonl"
    with SampleWriter(path) as out:
        for row in rows:
            out.append(row)
    content = path.read_bytes()
    assert read_samples(path).samples == rows
    content = content[: min(cut, len(content))]
    path.write_bytes(content)
    # A row is whole with its last brace: the line end alone may be missing.
    ends = [len(b"".join(row_of(row) for row in rows[: i + 1])) - 1 for i in range(len(rows))]
    whole = [row for row, end in zip(rows, ends, strict=True) if end <= len(content)]
    torn = int(len(content) > (ends[len(whole) - 1] + 1 if whole else 0))
    found = read_samples(path)
    assert (found.samples, found.torn) == (whole, torn)
    with SampleWriter(path) as out:
        assert (out.samples, out.torn) == (whole, torn)
        for row in rows[len(whole) :]:
            out.append(row)
    assert read_samples(path).samples == rows and read_samples(path).torn == 0


@pytest.mark.parametrize(
    ("lines", "place", "words"),
    [
        (["{}"], ":1: field 'id'", "missing"),
        (["[1]"], ":1: ", "expected an object"),
        (["{", "{}"], ":1: ", "not a row of JSON"),
        (["OK", '{"id": "b"'], ":2: field 'sample'", "missing"),
        (["OK", "OK"], ":2: field 'sample'", "already stands in line 1"),
        (["OK:sample=-1"], ":1: field 'sample'", "expected a whole number from 0, got -1"),
        (["OK:sample=true"], ":1: field 'sample'", "got true"),
        (["OK:text=null"], ":1: field 'text'", "expected a string, got null"),
        (['OK:logprobs=["x"]'], ":1: field 'logprobs'", "expected a list of numbers"),
    ],
)
def test_a_row_that_is_no_sample_is_named(tmp_path: Path, lines: list[str], place: str, words: str) -> None:
    path = tmp_path / "s.jsonl"
    whole = []
    for line in lines:
        row = json.loads(row_of(sample()))
        if line.startswith("OK:"):
            field, _, value = line[3:].partition("=")
            row[field] = json.loads(value)
        whole.append(json.dumps(row) if line.startswith("OK") else line)
    if lines[-1] == '{"id": "b"':
        whole[-1] = '{"id": "b"}'
    path.write_text("\n".join(whole) + "\n", encoding="utf-8")
    for read in (read_samples, SampleWriter):
        with pytest.raises(DataError) as caught:
            read(path)
        assert str(caught.value).startswith(f"{path}{place}") and words in str(caught.value)


def test_one_writer_at_a_time_and_no_key_twice(tmp_path: Path) -> None:
    path = tmp_path / "new" / "s.jsonl"
    with SampleWriter(path) as out:
        out.append(sample())
        with pytest.raises(UserError, match="another process is writing it"):
            SampleWriter(path)
        with pytest.raises(ValueError, match="sample 0 of id 'a' is already there"):
            out.append(sample(text="five"))
        out.append(sample(k=1))
    with SampleWriter(path) as out, pytest.raises(ValueError, match="already there"):
        out.append(sample(k=1))
    assert [row.key for row in read_samples(path).samples] == [("a", 0), ("a", 1)]
    with pytest.raises(UserError, match="cannot be written"):
        SampleWriter(tmp_path)


def test_what_is_missing_and_what_is_of_another_kind(tmp_path: Path) -> None:
    kind = {"model": "m", "settings_digest": "s", "prompt_digest": "p"}
    with SampleWriter(tmp_path / "s.jsonl") as out:
        out.append(sample("a", 0))
        out.append(sample("a", 2))
        assert out.missing("a", range(4), **kind) == (1, 3)
        assert out.missing("b", (5,), **kind) == (5,)
    with SampleWriter(tmp_path / "s.jsonl") as out:
        assert out.missing("a", (2, 1), **kind) == (1,)
        assert out.missing("a", (1,), **{**kind, "model": "n"}) == (1,)  # of what is not there nothing can differ
        for key, words in (("model", r"model \('m'\)"), ("settings_digest", "settings"), ("prompt_digest", "prompt")):
            with pytest.raises(
                UserError, match=f"sample 0 of id 'a' was drawn with another {words}; name another --out"
            ):
                out.missing("a", range(1), **{**kind, key: "other"})


def test_a_killed_writer_loses_no_row_it_has_written(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    code = (
        "import os, signal, sys; sys.path[0] = sys.argv[1]\n"
        "from data_tools.samples import Sample, SampleWriter\n"
        "out = SampleWriter(sys.argv[2])\n"
        "for k in range(5):\n"
        "    out.append(Sample(id='a', sample=k, text='x', finish_reason='stop', model='m', settings_digest='s',"
        " prompt_digest='p'))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(ROOT), str(path)], check=False, env=dict(os.environ))
    assert ended.returncode == -signal.SIGKILL
    assert [row.sample for row in read_samples(path).samples] == [0, 1, 2, 3, 4]


def test_prompts_are_checked_and_named(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    turn = {"role": "user", "content": "why?"}
    rows = [{"id": 7, "prompt": "why?", "settings": {"n": 2}}, {"messages": [turn]}, {"prompt": [turn], "other": 1}]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    prompts = read_prompts(path)
    assert [(p.id, p.prompt, dict(p.settings), p.line) for p in prompts] == [
        ("7", "why?", {"n": 2}, 1),
        ("p.jsonl:2", (Message("user", "why?"),), {}, 2),
        ("p.jsonl:3", (Message("user", "why?"),), {}, 3),
    ]
    assert messages_of(prompts[0].prompt) == messages_of(prompts[1].prompt) == [turn]
    bad = [
        {"id": "a", "prompt": "x", "settings": 3},
        {"id": "b"},
        {"id": "c", "prompt": "x"},
        {"id": "c", "prompt": "y"},
        {"messages": "x"},
        {"prompt": [{"role": "assistant", "content": "x"}]},
    ]
    path.write_text("\n".join(map(json.dumps, bad)), encoding="utf-8")
    with pytest.raises(DataErrors) as caught:
        read_prompts(path)
    lines = str(caught.value).splitlines()
    words = ["field 'settings'", "field 'prompt': missing", "'c' already stands in line 3", "call the column 'prompt'"]
    words += ["must be of role 'user'", "5 errors"]
    assert len(lines) == len(words)
    assert all(word in line for word, line in zip(words, lines, strict=True)), lines


def test_digests_know_values_not_their_spelling() -> None:
    assert digest_of({"a": 1, "b": [1.5]}) == digest_of({"b": [1.5], "a": 1}) != digest_of({"a": 1, "b": [1]})
    assert digest_of("why?") != digest_of((Message("user", "why?"),))
    assert digest_of((Message("user", "why?"),)) == digest_of([{"role": "user", "content": "why?"}])
    # sha256 of the two bytes {} (sha256sum)
    assert digest_of({}) == "44136fa355b3678a" and canonical_json({}) == "{}"
    with pytest.raises(ValueError):
        digest_of({"temperature": float("nan")})

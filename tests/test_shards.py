"""Shards hold exactly what was encoded, are reused while nothing changed, and survive whatever happens to a builder."""

import gzip
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools import file_digests, shards
from data_tools.chat_template import load_chat_template
from data_tools.encode import EncodeOptions, EncodeReport, Group, encode_records
from data_tools.errors import UserError
from data_tools.file_digests import FileDigests, hash_file
from data_tools.jsonl import read_records
from data_tools.shards import Shard, open_or_build, read_shard, write_shard
from data_tools.tokenizer import load_tokenizer

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def as_tuple(group: Group) -> tuple:
    return group.record_id, group.ids.tolist(), group.lengths, group.spans, group.weight


def same_groups(left, right) -> bool:
    return [as_tuple(group) for group in left] == [as_tuple(group) for group in right]


def write_rows(path: Path, count: int = 30, word: str = "red") -> Path:
    rows = (
        {
            "id": f"سؤال-{i}",
            "prompt": [{"role": "user", "content": f"question {i} about {word}"}],
            "chosen": [{"role": "assistant", "content": f"answer {word} " * (i % 7 + 1)}],
            "rejected": [{"role": "assistant", "content": f"reply {word} {i} " * (i % 5 + 1)}],
            "weight": 1 + i / 7,
        }
        for i in range(count)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def trained_model_dir(tmp_path_factory) -> Path:
    """A model folder with a small real tokenizer and template, and no weights."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["question about red answer reply user assistant"] * 9, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture
def model_dir(trained_model_dir, tmp_path) -> Path:
    return Path(shutil.copytree(trained_model_dir, tmp_path / "model"))


@pytest.fixture
def data(tmp_path) -> Path:
    return write_rows(tmp_path / "pairs.jsonl")


@pytest.fixture
def open_shard(model_dir, data, tmp_path):
    """open_or_build on this test's files; keyword arguments change options."""

    def opened(*files: Path, **options) -> Shard:
        names = [str(file) for file in files or (data,)]
        cache = str(tmp_path / "cache")
        return open_or_build(names, model_dir=model_dir, options=EncodeOptions(**options), cache_dir=cache)

    return opened


@pytest.fixture
def no_grain(monkeypatch):
    """Files that were just written count as settled, so that a test need not wait for them to age."""
    monkeypatch.setattr(file_digests, "GRAIN_S", 0.0)


@st.composite
def made_groups(draw) -> Group:
    lengths = draw(st.lists(st.integers(0, 6), min_size=1, max_size=5))
    spans = []
    for length in lengths:
        ends = sorted(draw(st.sets(st.integers(0, length), max_size=4)))
        spans.append(tuple(zip(ends[::2], ends[1::2], strict=False)))
    ids = draw(st.lists(st.integers(0, 2**31 - 1), min_size=sum(lengths), max_size=sum(lengths)))
    weight = draw(st.floats(0.01, 1e6))
    name = draw(st.text(st.characters(exclude_categories=["Cs"]), max_size=8))
    return Group(name, np.array(ids, dtype=np.int32), tuple(lengths), tuple(spans), weight)


@given(groups=st.lists(made_groups(), max_size=8), kept=st.integers(0, 9), dropped=st.lists(st.text(max_size=3)))
@settings(max_examples=25, deadline=None)
def test_what_is_written_is_read_back(groups, kept, dropped, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shard")
    report = EncodeReport(rows=9, kept=kept, dropped_ids=tuple(dropped))
    write_shard(groups, report, folder, inputs={})
    shard = read_shard(folder, FileDigests(folder / "digests.json"))
    assert same_groups(shard, groups)
    assert [shard.branch_lengths(i) for i in range(len(shard))] == [group.lengths for group in groups]
    assert shard.group_tokens.dtype == np.int64
    assert shard.group_tokens.tolist() == [len(group.ids) for group in groups]
    assert shard.report == report


def test_numbers_beyond_16_bits_are_kept(tmp_path):
    lengths, spans = (40_000, 70_000), (((0, 39_999),), ((5, 6), (66_000, 70_000)))
    group = Group("long", np.arange(110_000, dtype=np.int32) * 19_000, lengths, spans, weight=1 / 3)
    write_shard([group], EncodeReport(), tmp_path, inputs={})
    assert same_groups(read_shard(tmp_path, FileDigests(tmp_path / "digests.json")), [group])


@pytest.mark.parametrize("kind", ["pair", "sft"])
def test_a_shard_is_what_encode_records_gives(kind, open_shard, data, model_dir):
    options = EncodeOptions(kind=kind, max_length=30)
    arguments = load_tokenizer(model_dir), load_chat_template(model_dir), options
    groups, report = encode_records(read_records([data], kind=kind), *arguments)
    assert 0 < len(groups) < 30, "some rows should be too long, so that the report says something"
    for reused in (False, True):
        shard = open_shard(kind=kind, max_length=30)
        assert shard.reused == reused
        assert same_groups(shard, groups)
        assert shard.report == report


def test_groups_are_indexed_like_a_list_and_cannot_be_written(open_shard):
    shard = open_shard()
    assert as_tuple(shard[-1]) == as_tuple(shard[np.int64(29)])
    assert shard[3].record_id == "سؤال-3"
    for outside in (30, -31):
        with pytest.raises(IndexError):
            shard[outside]
    with pytest.raises(ValueError, match="read-only"):
        shard[0].ids[0] = 1


def test_opening_an_unchanged_shard_reads_no_data_and_loads_no_tokenizer(open_shard, data, no_grain, monkeypatch):
    open_shard()
    read: list[str] = []
    monkeypatch.setattr(file_digests, "hash_file", lambda path: read.append(str(path)) or hash_file(path))
    monkeypatch.setattr(shards, "load_tokenizer", lambda path: read.append(str(path)))
    assert open_shard().reused
    assert read == []
    os.utime(data)  # the same bytes at another time: hashed again, and still the same shard
    assert open_shard().reused
    assert read == [str(data)]


def test_every_input_makes_another_shard(open_shard, data, model_dir, tmp_path):
    seen = [open_shard().folder]

    def is_new(*files, **options) -> None:
        shard = open_shard(*files, **options)
        assert not shard.reused
        assert shard.folder not in seen
        seen.append(shard.folder)

    is_new(max_length=50)
    is_new(overlong="truncate_completion")
    is_new(kind="sft")
    template = tmp_path / "other.jinja"
    template.write_text(TEMPLATE.replace("\n", " "))
    is_new(chat_template=str(template))
    template.write_text(TEMPLATE.replace("\n", "  "))
    is_new(chat_template=str(template))
    is_new(write_rows(tmp_path / "more.jsonl", word="blue"))
    is_new(Path(shutil.copy(data, tmp_path / "renamed.jsonl")))
    (model_dir / "chat_template.jinja").write_text(TEMPLATE.replace("\n", "   "))
    is_new()
    tokenizer = json.loads((model_dir / "tokenizer.json").read_text())
    tokenizer["model"]["merges"].pop()
    (model_dir / "tokenizer.json").write_text(json.dumps(tokenizer))
    is_new()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert open_shard(Path(shutil.copy(data, elsewhere))).reused


def test_the_digest_names_the_content(open_shard, data, tmp_path):
    """Other inputs that come to the same groups keep the order of work; other groups never do."""
    packed = tmp_path / "pairs.jsonl.gz"
    packed.write_bytes(gzip.compress(data.read_bytes()))
    assert open_shard(packed).folder != open_shard().folder
    assert open_shard(packed).digest == open_shard().digest == open_shard(max_length=None).digest
    changed = write_rows(tmp_path / "changed.jsonl", word="rad")
    assert open_shard(changed).digest != open_shard().digest


def test_a_changed_byte_under_the_same_size_and_time_is_noticed(open_shard, data, no_grain):
    before = open_shard()
    status = data.stat()
    data.write_bytes(data.read_bytes().replace(b"red", b"rod"))
    os.utime(data, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (data.stat().st_size, data.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    after = open_shard()
    assert not after.reused
    assert after.digest != before.digest


def shorten(folder: Path) -> None:
    (folder / "tokens.npy").write_bytes((folder / "tokens.npy").read_bytes()[:-4])


def flip_a_bit_and_hide_it(folder: Path) -> None:
    path = folder / "tokens.npy"
    status, content = path.stat(), bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


DAMAGES = {
    "shortened": shorten,
    "flipped bit": flip_a_bit_and_hide_it,
    "missing file": lambda folder: (folder / "weights.npy").unlink(),
    "missing manifest": lambda folder: (folder / "manifest.json").unlink(),
    "broken manifest": lambda folder: (folder / "manifest.json").write_text("{"),
    "empty manifest": lambda folder: (folder / "manifest.json").write_text("{}"),
    "empty folder": lambda folder: [path.unlink() for path in folder.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_shard_is_rebuilt_with_one_line(damage, open_shard, capsys):
    whole = open_shard()
    groups = [as_tuple(group) for group in whole]
    damage(whole.folder)
    again = open_shard()
    assert not again.reused
    assert [as_tuple(group) for group in again] == groups
    assert again.digest == whole.digest
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "the cached shard is damaged" in said
    assert open_shard().reused
    assert capsys.readouterr().err == ""


def test_data_that_changes_while_it_is_read_is_refused(open_shard, data, monkeypatch, tmp_path):
    def read_while_somebody_writes(*arguments, **options):
        records = read_records(*arguments, **options)
        write_rows(data, count=31)
        return records

    monkeypatch.setattr(shards, "read_records", read_while_somebody_writes)
    with pytest.raises(UserError, match=r"pairs\.jsonl: changed while it was read; start again"):
        open_shard()
    monkeypatch.undo()
    assert not list((tmp_path / "cache").glob("*.building"))
    assert len(open_shard()) == 31


def test_data_at_fault_is_told_as_by_the_reader(open_shard, data, tmp_path):
    with pytest.raises(UserError, match=r"missing\.jsonl: no such file$"):
        open_shard(tmp_path / "missing.jsonl")
    with pytest.raises(UserError, match="is a folder; name the .jsonl file in it"):
        open_shard(tmp_path)
    with data.open("a") as file:
        file.write('{"prompt": "a", "chosen": 3, "rejected": "b"}\n')
    with pytest.raises(UserError, match=r"pairs\.jsonl:31: field 'chosen'"):
        open_shard()
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_a_cache_that_cannot_be_made_names_folder_and_key(data, model_dir, tmp_path):
    folder = tmp_path / "a file" / "cache"
    folder.parent.write_text("")
    with pytest.raises(UserError) as caught:
        open_or_build([str(data)], model_dir=model_dir, options=EncodeOptions(), cache_dir=str(folder))
    text = str(caught.value)
    assert text.startswith(f"{folder}: cannot write the shard cache (")
    assert "data.cache_dir" in text
    assert "\n" not in text


def build_in_a_process(data: Path, model_dir: Path, cache: Path, before: str = "", after: str = "") -> subprocess.Popen:
    code = (
        "import resource, sys\n"
        "from data_tools.encode import EncodeOptions\n"
        "from data_tools.errors import UserError\n"
        "from data_tools.shards import open_or_build\n"
        f"{before}\n"
        "try:\n"
        f"    open_or_build([{str(data)!r}], model_dir={str(model_dir)!r},"
        f" options=EncodeOptions(), cache_dir={str(cache)!r})\n"
        "except UserError as error:\n"
        "    sys.exit(str(error))\n"
    )
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, cwd=Path(__file__).parents[1])


def test_a_disk_that_fills_up_gives_one_line_and_leaves_nothing(data, model_dir, tmp_path):
    """The kernel refuses files above 4,000 bytes in this process, as it refuses any on a full disk."""
    write_rows(data, count=300)
    cache = tmp_path / "cache"
    limit = f"resource.setrlimit(resource.RLIMIT_FSIZE, (4000, {resource.RLIM_INFINITY}))"
    process = build_in_a_process(data, model_dir, cache, before=limit)
    said = process.communicate()[1].decode()
    assert process.returncode == 1
    assert said.startswith(f"{cache}: cannot write the shard cache (")
    assert said.count("\n") == 1
    assert "data.cache_dir" in said
    assert [path.name for path in cache.iterdir() if path.is_dir()] == []


def test_a_killed_builder_leaves_no_shard_and_the_next_one_builds(data, model_dir, tmp_path, open_shard, capsys):
    write_rows(data, count=6000)
    cache = tmp_path / "cache"
    process = build_in_a_process(data, model_dir, cache)
    deadline = time.monotonic() + 60
    while not list(cache.glob("*.building")) and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert [path.name[64:] for path in cache.iterdir() if path.is_dir()] == [".building"]
    assert not open_shard().reused
    assert not list(cache.glob("*.building"))
    assert capsys.readouterr().err == ""


def report_shard(gate, answers, data: str, model_dir: str, cache: str) -> None:
    """One of several processes that open the same shard at the same moment."""
    gate.wait()
    shard = open_or_build([data], model_dir=model_dir, options=EncodeOptions(), cache_dir=cache)
    answers.put((shard.reused, shard.digest, [as_tuple(group) for group in shard]))


def test_processes_that_build_at_once_get_one_shard(data, model_dir, tmp_path, open_shard):
    write_rows(data, count=500)
    spawn = multiprocessing.get_context("spawn")
    gate, answers = spawn.Barrier(3), spawn.Queue()
    arguments = (gate, answers, str(data), str(model_dir), str(tmp_path / "cache"))
    processes = [spawn.Process(target=report_shard, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    results = [answers.get(timeout=30) for _ in processes]
    for process in processes:
        process.join(timeout=30)
    assert sorted(reused for reused, _, _ in results) == [False, True, True]
    assert all(result[1:] == results[0][1:] for result in results)
    assert same_groups(open_shard(), [Group(n, np.array(i), *rest) for n, i, *rest in results[0][2]])


def test_the_default_cache_is_the_users_cache_folder(data, model_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    shard = open_or_build([str(data)], model_dir=model_dir, options=EncodeOptions())
    assert shard.folder.parent == tmp_path / "xdg" / "logratio" / "shards"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    shard = open_or_build([str(data)], model_dir=model_dir, options=EncodeOptions())
    assert shard.folder.parent == tmp_path / "home" / ".cache" / "logratio" / "shards"

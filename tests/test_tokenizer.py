"""Tokenizers: ids as their own libraries and transformers give them, and completions that continue a prompt."""

import json
import shutil
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from text_fixtures import (
    SENTENCES,
    byte_level_folder,
    sentencepiece_folder,
    spaced_folder,
    write_config,
)
from tokenizer_parity import token_id_rows

from data_tools.errors import TokenizerError
from data_tools.tokenizer import Tokenizer, load_tokenizer

WORDS = sorted({word for sentence in SENTENCES for word in sentence.split()})


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(byte_level_folder(tmp_path_factory.mktemp("byte_level")))


@pytest.fixture(scope="module", params=["first", "always", "prepend", "sentencepiece", "sentencepiece legacy"])
def spaced(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("spaced")
    if request.param.startswith("sentencepiece"):
        tokens = {"bos_token": "<s>", "eos_token": "</s>"}
        return load_tokenizer(sentencepiece_folder(folder, legacy=request.param.endswith("legacy"), **tokens))
    return load_tokenizer(spaced_folder(folder, rule=request.param))


def test_reference_ids(shared_dir: Path) -> None:
    """20 texts in several scripts a file; the ids were made with each format's own library."""
    rows = list(token_id_rows(shared_dir / "data" / "tokenizers"))
    assert len(rows) == 11 and sum(row.compared for row in rows) == 220
    assert [row for row in rows if not row.all_equal] == []


@settings(max_examples=60, deadline=None)
@given(text=st.text())
def test_bytes_survive_the_round_trip(byte_level: Tokenizer, text: str) -> None:
    ids = byte_level.encode(text)
    assert byte_level.decode(ids) == text
    assert all(0 <= i < byte_level.vocab_size for i in ids)


def test_special_tokens_in_text_are_recognised_and_none_is_added(byte_level: Tokenizer, spaced: Tokenizer) -> None:
    for tokenizer in (byte_level, spaced):
        assert tokenizer.encode("") == []
        ids = tokenizer.encode("<s>The answer</s>")
        assert (ids[0], ids.count(tokenizer.bos_id)) == (tokenizer.bos_id, 1)
        assert tokenizer.is_special(ids[-1]) and not any(tokenizer.is_special(i) for i in ids[1:-1])
        assert tokenizer.encode("The answer")[-1] == ids[-2]
        assert tokenizer.decode(ids).replace(" ", "") == "<s>Theanswer</s>"


pieces = st.lists(st.sampled_from([*WORDS, "</s>", "<s>"]), min_size=1, max_size=6)


@settings(max_examples=40, deadline=None)
@given(before=pieces, after=pieces, space=st.booleans())
def test_a_completion_continues_its_prompt(spaced: Tokenizer, before: list[str], after: list[str], space: bool) -> None:
    """Cut at a word's start or at a special token, prompt and completion have the ids of the whole text."""
    prompt, completion = " ".join(before), " ".join(after)
    if space:
        completion = " " + completion
    elif not (before[-1] in ("<s>", "</s>") or after[0] in ("<s>", "</s>")):
        return  # the cut would run through a word, where ids may differ by right
    head = spaced.encode(prompt)
    (tail,) = spaced.encode_batch([completion], after=[head[-1]])
    assert head + tail == spaced.encode(prompt + completion)


def test_a_completion_gets_no_space_of_its_own(spaced: Tokenizer) -> None:
    (word,) = spaced.encode_batch(["answer"], after=[spaced.encode("the")[-1]])
    assert spaced.encode("answer") != word
    assert "".join(spaced.decode([i]) for i in word).strip() == "answer"


@pytest.mark.parametrize("legacy", [False, True])
def test_sentencepiece_sections_as_transformers_cuts_them(tmp_path: Path, legacy: bool) -> None:
    from transformers import LlamaTokenizer  # slow to import, needed here only

    folder = sentencepiece_folder(tmp_path, legacy=legacy, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    oracle, ours = LlamaTokenizer.from_pretrained(folder), load_tokenizer(folder)
    for text in ("<s>The answer is 7.</s>First, the answer", "The <s> answer", "naïve 7</s> two  apples\nش 漢"):
        assert ours.encode(text) == oracle(text, add_special_tokens=False)["input_ids"]


def test_bos_before_plain_text(tmp_path: Path) -> None:
    def adds_bos(name: str, **settings: object) -> bool:
        return load_tokenizer(byte_level_folder(tmp_path / name, **settings)).adds_bos  # type: ignore[arg-type]

    assert not adds_bos("plain")
    assert adds_bos("post", post_processor_bos=True)
    assert adds_bos("said", add_bos_token=True)
    assert not adds_bos("denied", post_processor_bos=True, add_bos_token=False)
    assert load_tokenizer(sentencepiece_folder(tmp_path / "bare")).adds_bos
    assert not load_tokenizer(sentencepiece_folder(tmp_path / "config", bos_token="<s>", add_bos_token=False)).adds_bos


def test_sentencepiece_without_config_knows_its_ends(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(sentencepiece_folder(tmp_path))
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.bos_id, tokenizer.eos_id) == ("<s>", "</s>", 1, 2)
    assert tokenizer.vocab_size == 340


def test_tokens_that_only_the_config_names_are_recognised(tmp_path: Path) -> None:
    added = {"340": {"content": "<|im_end|>", "special": True}}
    tokens = {"bos_token": {"content": "<s>"}, "eos_token": "<|im_end|>"}
    tokenizer = load_tokenizer(sentencepiece_folder(tmp_path / "model", added_tokens_decoder=added, **tokens))
    assert (tokenizer.eos_id, tokenizer.vocab_size, tokenizer.bos_token) == (340, 341, "<s>")
    assert tokenizer.encode("7<|im_end|>")[-1] == 340
    folder = byte_level_folder(tmp_path / "json")
    size = load_tokenizer(folder).vocab_size
    write_config(folder, added_tokens_decoder={str(size): {"content": "<|tool|>", "special": True}})
    assert load_tokenizer(folder).encode("a<|tool|>")[-1] == size


def test_named_tokens_of_the_vocabulary_are_recognised(tmp_path: Path) -> None:
    folder = byte_level_folder(tmp_path)
    spec = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    spec["added_tokens"] = []
    (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("a<|im_end|>")[-1] == tokenizer.eos_id and tokenizer.is_special(tokenizer.eos_id or 0)
    assert len(tokenizer.encode("<|endoftext|>")) > 1, "nobody names it"


def test_cutting_and_padding_in_the_file_are_switched_off(tmp_path: Path) -> None:
    folder = byte_level_folder(tmp_path)
    raw = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    raw.enable_truncation(max_length=3)
    raw.enable_padding(length=16)
    raw.save(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(folder)
    long = "How many apples are left?" * 3
    assert tokenizer.decode(tokenizer.encode(long)) == long


def test_digest_follows_what_decides_ids(tmp_path: Path) -> None:
    def digest(name: str, **settings: object) -> str:
        return load_tokenizer(byte_level_folder(tmp_path / name, **settings)).digest  # type: ignore[arg-type]

    same = digest("a")
    assert digest("b") == same
    assert digest("c", chat_template="{{ messages }}") == same, "the template has a digest of its own"
    assert len({same, digest("d", eos_token="</s>"), digest("e", add_bos_token=True)}) == 3


def broken(folder: Path, kind: str) -> None:
    """Spoil a good folder in one way."""
    if kind == "nothing":
        (folder / "tokenizer.json").unlink()
    elif kind == "vocab":
        (folder / "tokenizer.json").rename(folder / "vocab.json")
    elif kind == "json":
        (folder / "tokenizer.json").write_text("{")
    elif kind == "not a tokenizer":
        (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    elif kind == "config":
        (folder / "tokenizer_config.json").write_text("no")
    elif kind == "config list":
        (folder / "tokenizer_config.json").write_text("[]")
    elif kind == "eos":
        write_config(folder, eos_token="<|nowhere|>")
    elif kind == "bos":
        write_config(folder, add_bos_token=True)
    elif kind == "ids":
        write_config(folder, added_tokens_decoder={"7": {"content": "</s>"}})
    elif kind == "added":
        write_config(folder, added_tokens_decoder=["</s>"])
    elif kind == "model":
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer.model").write_bytes(b"\x00 no model")
    else:
        (folder / "tokenizer.json").rename(folder / "one.model")
        shutil.copy(folder / "one.model", folder / "two.model")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("nothing", "no tokenizer.json and no tokenizer.model"),
        ("vocab", "vocab.json alone has no merges.txt beside it, convert it"),
        ("json", "tokenizer.json: cannot be read as a tokenizer"),
        ("not a tokenizer", "tokenizer.json: cannot be read as a tokenizer"),
        ("config", "tokenizer_config.json: cannot be read as JSON"),
        ("config list", "tokenizer_config.json: expected a JSON object"),
        ("eos", "eos_token '<|nowhere|>' is not in the vocabulary"),
        ("bos", "'add_bos_token' is true but there is no 'bos_token'"),
        ("ids", "token '</s>' has id"),
        ("added", "'added_tokens_decoder' must map ids to objects"),
        ("model", "cannot be read as a sentencepiece model"),
        ("several", "several tokenizer files (one.model, two.model)"),
    ],
)
def test_broken_folders_are_named(tmp_path: Path, kind: str, words: str) -> None:
    folder = byte_level_folder(tmp_path)
    broken(folder, kind)
    with pytest.raises(TokenizerError) as caught:
        load_tokenizer(folder)
    assert str(caught.value).startswith(str(tmp_path)) and words in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="no such model folder"):
        load_tokenizer(tmp_path / "nowhere")

"""Vocabularies through a GGUF and back: ids equal to those of the library and the file they came from."""

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from data_tools.tokenizer import load_tokenizer
from data_tools.tokenizer_bytes import FAMILIES, from_ranks
from trainer.errors import ModelError
from trainer.models.gguf_file import open_gguf
from trainer.models.gguf_pre import ALIASES, GPT2, PRE_TOKENIZERS, name_of, pre_tokenizer_json
from trainer.models.gguf_sentencepiece import Pieces, read_model, tokenizer_json, write_model
from trainer.models.gguf_tokenizer import build_tokenizer
from trainer.models.gguf_vocab import vocabulary

TEXTS = [
    "Hello world! It's 12345 o'clock; WE'LL see.\n\n  two leading spaces\tand a tab\r\n",
    "def f(x):\n    return x**2  # naïve café ½ ٣ Ⅷ\n\n\n",
    "你好，世界。سلام دنیا! Ünïcödé é 👩‍🚀🙂   ",
    "camelCase XMLHttpRequest /usr/bin a/b\n/ HELLOworld's O'Neil  ",
]


def through_gguf(folder: Path, out: Path, rows: int) -> Path:
    """The tokenizer of a folder as a GGUF's metadata, read again as a folder. rows: of the embedding."""
    fields = vocabulary(folder, {"vocab_size": rows})
    writer = gguf.GGUFWriter(out.with_suffix(".gguf"), "llama")
    add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string}
    for key, value in fields.items():
        add.get(type(value), writer.add_array)(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    path = out.with_suffix(".gguf")
    files = build_tokenizer(open_gguf(path)[0], {"max_position_embeddings": 64})
    out.mkdir()
    (out / "tokenizer.json").write_text(json.dumps(files.tokenizer), encoding="utf-8")
    (out / "tokenizer_config.json").write_text(json.dumps(files.config), encoding="utf-8")
    if files.model is not None:
        (out / "tokenizer.model").write_bytes(files.model)
    return out


def folder_of(path: Path, tokenizer: dict[str, Any] | bytes, **config: Any) -> Path:
    """A folder with tokenizer.json (or tokenizer.model) and tokenizer_config.json."""
    path.mkdir()
    if isinstance(tokenizer, bytes):
        (path / "tokenizer.model").write_bytes(tokenizer)
    else:
        (path / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    (path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return path


def joining_everything(name: str) -> dict[str, Any]:
    """A tokenizer.json whose merges cross words, so that its ids show where the pre-tokenizer `name` cuts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS * 2, trainer)
    spec = json.loads(tokenizer.to_str())
    pre = PRE_TOKENIZERS[name]
    spec["pre_tokenizer"] = pre_tokenizer_json(pre)
    spec["normalizer"] = {"type": "NFC"} if pre.nfc else None
    spec["model"]["ignore_merges"] = pre.ignore_merges
    size = len(spec["model"]["vocab"])
    spec["added_tokens"] = [
        {"id": size, "content": "<s>", "special": True},
        {"id": size + 1, "content": "<tool>", "special": False},
    ]
    for token in spec["added_tokens"]:
        token |= {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    spec["decoder"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    return spec


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_each_pre_tokenizer_goes_through(name: str, tmp_path: Path) -> None:
    spec = joining_everything(name)
    source = folder_of(tmp_path / "in", spec, bos_token="<s>", eos_token="<s>", add_bos_token=False)
    out = through_gguf(source, tmp_path / "out", rows=len(spec["model"]["vocab"]) + 9)
    before, after = Tokenizer.from_str(json.dumps(spec)), Tokenizer.from_file(str(out / "tokenizer.json"))
    for text in [*TEXTS, "<s>a <tool>b", "a<s>"]:
        assert after.encode(text).ids == before.encode(text).ids
        assert after.decode(after.encode(text).ids, skip_special_tokens=False) == before.decode(
            before.encode(text).ids, skip_special_tokens=False
        )
    assert after.get_vocab() == before.get_vocab()  # the rows without a token are not in it
    written = json.loads((out / "tokenizer.json").read_text(encoding="utf-8"))
    assert name_of(written) == name_of(spec) == name


def test_patterns_cut_as_they_should() -> None:
    """By hand, on what tells them apart: three digits or one, contractions of any case, words of one case."""

    def cut(name: str, text: str) -> list[str]:
        spec = {"model": models.BPE().__getstate__(), "pre_tokenizer": pre_tokenizer_json(PRE_TOKENIZERS[name])}
        spec["model"] = {"type": "BPE", "vocab": {}, "merges": []}
        tokenizer = Tokenizer.from_str(json.dumps({"version": "1.0", "added_tokens": [], **spec}))
        return [text[start:end] for _, (start, end) in tokenizer.pre_tokenizer.pre_tokenize_str(text)]

    text = "I'LL 1234 aB/\n"
    assert cut("gpt-2", text) == ["I", "'", "LL", " 1234", " aB", "/", "\n"]
    assert cut("smollm", text) == ["I", "'", "LL", " ", "1", "2", "3", "4", " aB", "/", "\n"]
    assert cut("llama-bpe", text) == ["I", "'LL", " ", "123", "4", " aB", "/\n"]
    assert cut("qwen2", text) == ["I", "'LL", " ", "1", "2", "3", "4", " aB", "/\n"]
    assert cut("tekken", text) == ["I", "'LL", " ", "1", "2", "3", "4", " a", "B", "/\n"]
    assert cut("gpt-4o", text) == ["I'LL", " ", "123", "4", " a", "B", "/\n"]


def test_names_of_other_spellings() -> None:
    base = json.loads(json.dumps({"model": {"type": "BPE"}, "normalizer": None}))
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": GPT2}, "behavior": "Isolated", "invert": False}
    kept = {"type": "Split", "pattern": {"Regex": GPT2}, "behavior": "Removed", "invert": True}
    for step in (split, kept):
        assert name_of({**base, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [step, byte_level]}}) == "gpt-2"
    assert name_of({**base, "pre_tokenizer": {**byte_level, "use_regex": True}}) == "gpt-2"
    assert name_of({**base, "pre_tokenizer": {**byte_level, "use_regex": True, "add_prefix_space": True}}) is None
    assert name_of({**base, "pre_tokenizer": {"type": "Whitespace"}}) is None
    assert name_of({**base, "pre_tokenizer": byte_level}) is None
    lower = {**base, "normalizer": {"type": "Lowercase"}, "pre_tokenizer": {**byte_level, "use_regex": True}}
    assert name_of(lower) is None
    assert set(ALIASES.values()) <= set(PRE_TOKENIZERS)


def reference_ids(shared: Path, name: str) -> list[dict[str, Any]]:
    lines = (shared / "data" / "tokenizers" / "reference_ids.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["file"] == name]
    assert len(rows) == 20
    return rows


def check_ids(shared: Path, name: str, source: Path, pre: str, rows: int, out: Path) -> None:
    assert vocabulary(source, {"vocab_size": rows})["tokenizer.ggml.pre"] == pre
    tokenizer = load_tokenizer(through_gguf(source, out, rows))
    for row in reference_ids(shared, name):
        assert tokenizer.encode(row["text"]) == row["ids"], row["text"]


@pytest.mark.parametrize(
    ("file", "pre"),
    [("torchtune_tiny/tokenizer.json", "llama-bpe"), ("torchtune_tiny/tiny_bpe_tokenizer.json", "qwen2")],
)
def test_small_vocabularies_keep_their_ids(file: str, pre: str, shared_dir: Path, tmp_path: Path) -> None:
    """With Llama 3's and Qwen's patterns."""
    tokenizer = json.loads((shared_dir / "data" / "tokenizers" / file).read_text(encoding="utf-8"))
    check_ids(shared_dir, file, folder_of(tmp_path / "in", tokenizer), pre, 2100, tmp_path / "out")


@pytest.mark.long
def test_qwen_vocabulary_keeps_its_ids(shared_dir: Path, tmp_path: Path) -> None:
    """Qwen's ranks as merges: 151643 tokens."""
    name = "qwen/qwen.tiktoken"
    spec = json.loads(from_ranks(shared_dir / "data" / "tokenizers" / name, FAMILIES["qwen"])[0].to_str())
    spec["model"]["ignore_merges"] = False  # as Qwen's own tokenizer.json
    check_ids(shared_dir, name, folder_of(tmp_path / "in", spec), "qwen2", 151936, tmp_path / "out")


@pytest.fixture(scope="module")
def mistral(shared_dir: Path) -> Path:
    return shared_dir / "data" / "tokenizers" / "mistral" / "tokenizer.model.v1"


def test_sentencepiece_keeps_its_ids(mistral: Path, shared_dir: Path, tmp_path: Path) -> None:
    """Mistral's tokenizer.model -> GGUF -> tokenizer.json and tokenizer.model, with two tokens added behind it."""
    added = {"32000": {"content": "<|im_end|>", "special": True}, "32001": {"content": "<x> y", "special": False}}
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "added_tokens_decoder": added}
    source = folder_of(tmp_path / "in", mistral.read_bytes(), **config)
    out = through_gguf(source, tmp_path / "out", rows=32010)
    ours, theirs = load_tokenizer(out), AutoTokenizer.from_pretrained(out)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(out / "tokenizer.model"))
    assert (pieces.unk_id(), pieces.bos_id(), pieces.eos_id(), pieces.pad_id()) == (0, 1, 2, -1)
    for row in reference_ids(shared_dir, "mistral/tokenizer.model.v1"):
        assert pieces.encode(row["text"]) == row["ids"]
        assert ours.encode(row["text"]) == row["ids"]
        assert theirs(row["text"])["input_ids"] == [1, *row["ids"]]
        assert theirs.decode(row["ids"]) == pieces.decode(row["ids"])
    assert ours.encode("<|im_end|>")[0] == 32000 and 32001 in ours.encode("a<x> yb")
    assert ours.adds_bos and theirs.eos_token == "</s>"


def test_sentencepiece_from_a_tokenizer_json_alone(mistral: Path, shared_dir: Path, tmp_path: Path) -> None:
    spec = tokenizer_json(read_model(mistral), "<unk>")
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    spec["added_tokens"] = [{"id": i, "content": token, **flags} for i, token in enumerate(["<unk>", "<s>", "</s>"])]
    source = folder_of(tmp_path / "in", spec, bos_token="<s>", eos_token="</s>", add_bos_token=True)
    out = through_gguf(source, tmp_path / "out", rows=32000)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(out / "tokenizer.model"))
    for row in reference_ids(shared_dir, "mistral/tokenizer.model.v1"):
        assert pieces.encode(row["text"]) == row["ids"]
    assert read_model(out / "tokenizer.model").types == read_model(mistral).types
    # two words swap their ranks: no scores give such merges, as "▁t" + "he" and "▁th" + "e" would differ
    spec["model"]["merges"].remove(["▁t", "he"])
    (source / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    with pytest.raises(ModelError, match="not sentencepiece's BPE \\(its merges\\); put the tokenizer.model beside it"):
        vocabulary(source, {"vocab_size": 32000})


@given(
    st.lists(st.tuples(st.text(min_size=1, max_size=5), st.floats(-1e6, 1e6, width=32)), min_size=1, max_size=40),
    st.booleans(),
)
def test_a_model_file_reads_back(rows: list[tuple[str, float]], prefix: bool) -> None:
    """Any texts and scores; fields of more than 127 bytes and negative ids among them."""
    tokens = ["<unk>", "x" * 300, *(token.replace(" ", "▁") for token, _ in rows)]
    scores, types = [0.0, -1.5, *(score for _, score in rows)], [2, 3, *[1] * len(rows)]
    pieces = Pieces(tokens, scores, types, prefix)
    path = Path("unused.model")

    class InMemory(type(path)):
        def read_bytes(self) -> bytes:
            return write_model(pieces, {"unk": 0, "bos": 1, "eos": None, "pad": None})

    assert read_model(InMemory("unused.model")) == pieces


@pytest.mark.parametrize(
    ("name", "message"),
    [("t5/sentencepiece.model", "of another kind than BPE"), ("NOTICE.txt", "is not a sentencepiece model")],
)
def test_other_model_files_are_refused(name: str, message: str, shared_dir: Path) -> None:
    with pytest.raises(ModelError, match=message):
        read_model(shared_dir / "data" / "tokenizers" / name)


def test_real_vocabulary_goes_through(smollm2_dir: Path, shared_dir: Path, tmp_path: Path) -> None:
    out = through_gguf(smollm2_dir, tmp_path / "out", rows=49152)
    tokenizer, original = AutoTokenizer.from_pretrained(out), AutoTokenizer.from_pretrained(smollm2_dir)
    for row in reference_ids(shared_dir, "smollm2/vocab.json"):
        assert tokenizer(row["text"])["input_ids"] == row["ids"]
    assert tokenizer.get_vocab() == original.get_vocab()
    assert tokenizer.special_tokens_map == original.special_tokens_map
    messages = [{"role": "user", "content": "12 <|im_end|>"}]
    texts = [t.apply_chat_template(messages, tokenize=False) for t in (tokenizer, original)]
    assert texts[0] == texts[1]


BAD = [
    ({"added_tokens_decoder": {"900": {"content": "<far>"}}}, "token with id 900, the embedding only 720 rows"),
    ({"bos_token": "<nowhere>"}, "bos_token '<nowhere>' is not in the vocabulary"),
    ({"added_tokens_decoder": {"719": {"content": "<s>"}}}, "token '<s>' has two ids"),
]


@pytest.mark.parametrize(("config", "message"), BAD)
def test_tokenizers_that_do_not_fit(config: dict, message: str, tmp_path: Path) -> None:
    source = folder_of(tmp_path / "in", joining_everything("smollm"), **config)
    with pytest.raises(ModelError, match=message):
        vocabulary(source, {"vocab_size": 720})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"pre_tokenizer": {"type": "Whitespace"}},
            "have no name in llama.cpp that is known here; known: gpt-2, ",
        ),
        ({"normalizer": {"type": "Lowercase"}}, "have no name in llama.cpp"),
        (
            {"model": {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 0}},
            "kind 'Unigram' cannot be written",
        ),
    ],
)
def test_tokenizers_that_llama_cpp_has_not(change: dict, message: str, tmp_path: Path) -> None:
    source = folder_of(tmp_path / "in", {**joining_everything("gpt-2"), **change})
    with pytest.raises(ModelError, match=message):
        vocabulary(source, {"vocab_size": 720})

"""Byte-level BPE from rank files and from vocab.json with merges.txt: the merges, the pattern, the special tokens."""

import base64
import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from text_fixtures import SENTENCES, byte_level_folder, write_config
from tokenizer_parity import reference_folder

from data_tools.errors import TokenizerError
from data_tools.tokenizer import Tokenizer, load_tokenizer
from data_tools.tokenizer_bytes import FAMILIES, byte_alphabet

SIMPLE_PATTERN = r"\p{L}+|\P{L}"
# Not made by training: "abc" can be made from "ab" and from "bc", "xyz" from nothing, and "cd" ranks below its parts.
ODD_TOKENS = (b"cd", b"bc", b"ab", b"abc", b"abcd", b"xyz", "é".encode(), "漢".encode()[:2])


def rank_lines(tokens: tuple[bytes, ...] = ODD_TOKENS) -> bytes:
    every = [*(bytes([byte]) for byte in range(256)), *tokens]
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(every))


def rank_folder(folder: Path, raw: bytes | None = None, name: str = "tokenizer.model", **settings: object) -> Path:
    write_config(folder, **settings)
    (folder / name).write_bytes(rank_lines() if raw is None else raw)
    return folder


def ids_by_hand(piece: bytes, ranks: dict[bytes, int]) -> list[int]:
    """A rank file's rule, read literally: join, leftmost first, the neighbours whose joined bytes rank lowest."""
    if piece in ranks:
        return [ranks[piece]]
    parts = [piece[k : k + 1] for k in range(len(piece))]
    while True:
        joined = [(ranks[a + b], k) for k, (a, b) in enumerate(zip(parts, parts[1:], strict=False)) if a + b in ranks]
        if not joined:
            return [ranks[part] for part in parts]
        _, k = min(joined)
        parts[k : k + 2] = [parts[k] + parts[k + 1]]


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(rank_folder(tmp_path_factory.mktemp("odd"), pat_str=r"[^ ]+| "))


@settings(max_examples=200, deadline=None)
@given(text=st.text("abcdxyzé漢 ", max_size=16))
@example(text="xyz xyzx abcd")
def test_ranks_merge_as_the_format_says(odd: Tokenizer, text: str) -> None:
    ranks = {bytes([byte]): byte for byte in range(256)} | {t: 256 + k for k, t in enumerate(ODD_TOKENS)}
    pieces = [piece for word in text.split(" ") for piece in (" ", word)][1:]
    expected = [i for piece in pieces if piece for i in ids_by_hand(piece.encode(), ranks)]
    assert odd.encode(text) == expected
    assert odd.decode(expected) == text


def test_the_byte_alphabet_is_that_of_the_library() -> None:
    alphabet = byte_alphabet()
    assert sorted(alphabet.values()) == sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    assert (alphabet[0x41], alphabet[0x20], alphabet[0]) == ("A", "Ġ", "Ā")


def test_a_family_brings_its_special_tokens(shared_dir: Path, tmp_path: Path) -> None:
    root = shared_dir / "data" / "tokenizers"
    gpt2 = load_tokenizer(reference_folder(tmp_path, "gpt2/gpt2.tiktoken", root))
    assert (gpt2.eos_id, gpt2.encode("a<|endoftext|>")[-1], gpt2.vocab_size) == (50256, 50256, 50257)
    assert not gpt2.adds_bos
    control = FAMILIES["llama3"].control
    assert len(set(control)) == 256
    assert [control.index(f"<|{name}|>") for name in ("eot_id", "python_tag", "reserved_special_token_247")] == [
        9,
        10,
        255,
    ]


def test_special_tokens_of_the_config_follow_the_ranks(tmp_path: Path) -> None:
    size = 256 + len(ODD_TOKENS)
    added = {
        str(size): {"content": "<|end|>", "special": True},
        str(size + 1): {"content": "<think>", "special": False},
    }
    settings = {"added_tokens_decoder": added, "eos_token": "<|end|>", "pat_str": SIMPLE_PATTERN}
    tokenizer = load_tokenizer(rank_folder(tmp_path / "good", **settings))
    assert tokenizer.encode("abc<|end|><think>") == [259, size, size + 1]
    assert [tokenizer.is_special(i) for i in (259, size, size + 1)] == [False, True, False]
    with pytest.raises(TokenizerError, match=rf"'<\|end\|>' has id {size} here but {size + 5}"):
        moved = {str(size + 5): {"content": "<|end|>"}}
        load_tokenizer(rank_folder(tmp_path / "gap", **{**settings, "added_tokens_decoder": moved}))


@pytest.mark.parametrize(
    ("raw", "settings", "words"),
    [
        (None, {}, 'does not say how text is split before it is merged; add "pat_str" to tokenizer_config.json'),
        (None, {"pat_str": "("}, "tokenizer_config.json: 'pat_str' is not a regular expression"),
        (None, {"pat_str": r"\p{N}{1,3}+"}, "'{n,m}+' means something else"),
        (None, {"pat_str": 3}, "'pat_str' must be a regular expression or a family's name"),
        (b"IQ== 0\nIg== 1\n", {"pat_str": "gpt2"}, "has no token for 254 of the 256 bytes (first: 0)"),
        (rank_lines() + b"IQ== x\n", {"pat_str": "gpt2"}, "line 265 is not base64 bytes, a space and a rank"),
        (rank_lines() + b"enp6 7\n", {"pat_str": "gpt2"}, "gives one rank to several tokens"),
    ],
)
def test_rank_files_that_cannot_be_used_are_named(
    tmp_path: Path, raw: bytes | None, settings: dict[str, object], words: str
) -> None:
    with pytest.raises(TokenizerError) as caught:
        load_tokenizer(rank_folder(tmp_path, raw, **settings))
    assert str(caught.value).startswith(str(tmp_path)) and words in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def vocab_folder(folder: Path, **settings: object) -> Path:
    """The small byte-level tokenizer of the other tests as vocab.json and merges.txt."""
    byte_level_folder(folder)
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    merges = "".join(f"{left} {right}\n" for left, right in model["merges"])
    (folder / "merges.txt").write_text("#version: 0.2\n" + merges, encoding="utf-8")
    return write_config(folder, bos_token="<s>", eos_token="<|im_end|>", **settings)


def test_vocab_and_merges_are_the_tokenizer_they_came_from(tmp_path: Path) -> None:
    whole = load_tokenizer(byte_level_folder(tmp_path / "whole"))
    parts = load_tokenizer(vocab_folder(tmp_path / "parts", tokenizer_class="GPT2TokenizerFast"))
    for text in (*SENTENCES, "naïve  7\n漢 don't<|im_end|>\n"):
        assert parts.encode(text) == whole.encode(text)
    assert (parts.eos_id, parts.is_special(parts.eos_id or 0)) == (whole.eos_id, True)
    ids = load_tokenizer(vocab_folder(tmp_path / "space", tokenizer_class="GPT2Tokenizer", add_prefix_space=True))
    assert ids.encode("The answer") == whole.encode(" The answer")
    assert ids.encode_batch(["answer"], after=[7]) == [whole.encode("answer")]


def test_the_split_follows_class_model_type_or_pattern(tmp_path: Path) -> None:
    def ids(name: str, model_type: str | None = None, **settings: object) -> list[int]:
        folder = vocab_folder(tmp_path / name, **settings)
        if model_type is not None:
            (folder / "config.json").write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
        return load_tokenizer(folder).encode("x\n\ny 12 é")

    qwen = ids("class", tokenizer_class="Qwen2Tokenizer")
    assert qwen == ids("model type", "qwen3") == ids("name", pat_str="qwen")
    assert qwen == ids("pattern", pat_str=FAMILIES["qwen"].pattern), "composed already: NFC changes nothing"
    composing = load_tokenizer(vocab_folder(tmp_path / "nfc", pat_str="qwen"))
    assert composing.encode("e\u0301") == composing.encode("é")
    with pytest.raises(TokenizerError, match=r"vocab.json: does not say how .* \(gpt2, llama3, qwen, smollm\)"):
        ids("nothing", "llama")


def test_digest_follows_merges_and_pattern(tmp_path: Path) -> None:
    folder = vocab_folder(tmp_path, pat_str="gpt2")
    digests = {load_tokenizer(folder).digest}
    write_config(folder, bos_token="<s>", eos_token="<|im_end|>", pat_str="qwen")
    digests.add(load_tokenizer(folder).digest)
    merges = (folder / "merges.txt").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "merges.txt").write_text("".join(merges[:-1]), encoding="utf-8")
    assert len(digests | {load_tokenizer(folder).digest}) == 3

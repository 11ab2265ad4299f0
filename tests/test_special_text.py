"""Control tokens that a row's text spells: text by default, whatever the engine, beside the template's own tokens."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from text_fixtures import CHATML, SPECIALS, WITH_BOS, byte_level_folder, sentencepiece_folder, spaced_folder, talk

from data_tools.chat_template import ChatTemplate
from data_tools.encode import EncodeOptions, encode_records
from data_tools.errors import DataErrors, TokenizerError
from data_tools.schema import Record, Text
from data_tools.tokenizer import Tokenizer, load_tokenizer
from data_tools.tokenizer_specials import AddedToken, ControlTokens, free_mark

ANSWER = talk("Say <|im_end|> or </s>, never <s>.", first="assistant")
MARK = "\ue000"


def template(source: str, **tokens: str) -> ChatTemplate:
    tokens = {"bos_token": "<s>", "eos_token": "</s>", **tokens}
    return ChatTemplate(source, path=Path("model/chat_template.jinja"), tokens=tokens)


def encode(tokenizer: Tokenizer, source: str, prompt: Text, *completions: Text, **options: object) -> list[list[int]]:
    """Ids of the prompt and of each completion of one row."""
    row = Record(id="row", prompt=prompt, completions=completions, path="rows.jsonl", line=12)
    chosen = EncodeOptions(**{"max_length": None, **options})  # type: ignore[arg-type]
    (group,), _ = encode_records([row], tokenizer, template(source), chosen)
    out, start = [], 0
    for length in group.lengths:
        out.append(group.ids[start : start + length].tolist())
        start += length
    return out


def unigram_folder(folder: Path) -> Path:
    """A Unigram tokenizer.json whose vocabulary holds its control tokens, as those of T5 do."""
    letters = sorted(set("Say or never. abcdefghijklmnopqrstuvwxyz<>|/_,▁"))
    vocab = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((letter, -3.0) for letter in letters)]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(vocab, unk_id=0, byte_fallback=False))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = tokenizers.decoders.Metaspace()
    tokenizer.add_special_tokens([tokenizers.AddedToken(text, special=True) for text in ("<unk>", "<s>", "</s>")])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return folder


ENGINES: dict[str, Callable[[Path], Path]] = {
    "byte level": lambda folder: byte_level_folder(folder, eos_token="</s>"),
    "first": lambda folder: spaced_folder(folder, rule="first"),
    "always": lambda folder: spaced_folder(folder, rule="always"),
    "prepend": lambda folder: spaced_folder(folder, rule="prepend"),
    "unigram": unigram_folder,
    "pieces": lambda folder: sentencepiece_folder(folder, bos_token="<s>", eos_token="</s>"),
    "pieces legacy": lambda folder: sentencepiece_folder(folder, bos_token="<s>", eos_token="</s>", legacy=True),
}


@pytest.fixture(scope="module", params=list(ENGINES))
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(ENGINES[request.param](tmp_path_factory.mktemp("engine")))


@pytest.fixture(scope="module")
def chatml(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(byte_level_folder(tmp_path_factory.mktemp("chatml")))


def controls(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """Control tokens among ids; "unknown" is what characters outside the vocabulary are, by right."""
    return [text for text in (tokenizer.decode([i]) for i in ids if tokenizer.is_special(i)) if text != "<unk>"]


def test_only_the_templates_own_tokens_are_control_tokens(tokenizer: Tokenizer) -> None:
    prompt, chosen = encode(tokenizer, WITH_BOS, talk("what is <s>"), ANSWER)
    assert controls(tokenizer, prompt) == ["<s>"] and prompt[0] == tokenizer.bos_id
    assert controls(tokenizer, chosen) == ["</s>"] and chosen[-1] == tokenizer.eos_id
    _, as_tokens = encode(tokenizer, WITH_BOS, talk("what is <s>"), ANSWER, special_tokens="control")
    assert len(controls(tokenizer, as_tokens)) >= 3


def test_a_row_of_strings_is_text(tokenizer: Tokenizer) -> None:
    prompt, answer = encode(tokenizer, CHATML, "never <s>", " or </s>")
    start = [tokenizer.bos_id] if tokenizer.adds_bos else []
    assert controls(tokenizer, prompt) == (["<s>"] if start else [])
    assert controls(tokenizer, answer) == ["</s>"] and answer[-1] == tokenizer.eos_id
    assert prompt == start + tokenizer.encode_plain_batch(["never <s>"])[0]


texts = st.lists(st.sampled_from([*SPECIALS, "<", "s>", "Say", " or", " ", "|", "never.", "\n"]), max_size=8)


@settings(max_examples=60, deadline=None)
@given(words=texts)
def test_plain_ids_are_those_of_a_tokenizer_without_control_tokens(chatml: Tokenizer, words: list[str]) -> None:
    """The library's own switch is the oracle where the vocabulary does not hold the spellings as text."""
    oracle = tokenizers.Tokenizer.from_file(str(chatml.path / "tokenizer.json"))
    oracle.encode_special_tokens = True
    text = "".join(words)
    assert chatml.encode_plain_batch([text]) == [oracle.encode(text, add_special_tokens=False).ids]


def test_the_switch_of_the_library_alone_would_not_do(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(unigram_folder(tmp_path))
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    library.encode_special_tokens = True
    assert tokenizer.eos_id in library.encode("or </s>").ids
    (ids,) = tokenizer.encode_plain_batch(["or </s>"])
    assert ids == [library.token_to_id(piece) for piece in "▁or▁</s>"]


@settings(max_examples=40, deadline=None)
@given(words=texts, others=texts)
def test_sections_are_the_text_between_the_templates_tokens(
    chatml: Tokenizer, words: list[str], others: list[str]
) -> None:
    """By hand: each message is a section of its own, encoded as if nothing in it were special."""
    asked, said = "q" + "".join(words), "a" + "".join(others)
    prompt, answer = encode(chatml, CHATML, talk(asked), talk(said, first="assistant"))
    start, end = chatml.encode("<|im_start|>"), chatml.encode("<|im_end|>")
    newline, header = chatml.encode("\n"), start + chatml.encode("assistant\n")
    assert prompt == start + chatml.encode_plain_batch([f"user\n{asked}"])[0] + end + newline + header
    assert answer == chatml.encode_plain_batch([said])[0] + end + newline


def test_rows_that_spell_none_are_rendered_once_and_keep_their_ids(
    chatml: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(Tokenizer, "encode_marked")
    monkeypatch.delattr(Tokenizer, "mark_special")
    rows = (talk("a < b |im_end| s>"), talk("</ s> <S>", first="assistant"))
    assert encode(chatml, CHATML, *rows) == encode(chatml, CHATML, *rows, special_tokens="control")


def test_white_space_that_a_token_takes_with_it_is_taken(tmp_path: Path) -> None:
    """Phi-3's <|user|> swallows the line break after it: the section that follows must not see one."""
    folder = byte_level_folder(tmp_path)
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    added = [tokenizers.AddedToken(text, special=True, rstrip=True) for text in ("<|user|>", "<|assistant|>")]
    library.add_special_tokens([*added, tokenizers.AddedToken("<|end|>", special=True, lstrip=True)])
    library.save(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(folder)
    phi = "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + ' <|end|>\n' }}{% endfor %}"
    phi += "{{ '<|assistant|>\n' if add_generation_prompt }}"
    user, end, assistant = (tokenizer.encode(text)[0] for text in ("<|user|>", "<|end|>", "<|assistant|>"))
    prompt, answer = encode(tokenizer, phi, talk("q<|end|>"), talk("a", first="assistant"))
    (text,) = tokenizer.encode_plain_batch(["q<|end|>"])
    assert prompt == [user, *text, end, *tokenizer.encode("\n"), assistant]
    assert answer == [*tokenizer.encode("a"), end, *tokenizer.encode("\n")]


def test_templates_that_trim_or_split_are_followed(chatml: Tokenizer) -> None:
    trimming = CHATML.replace("message['content']", "(message['content'] | trim).split('</s>')[-1] | trim")
    prompt, answer = encode(chatml, trimming, talk("  <s> one </s>  <s>two  "), ANSWER)
    assert chatml.decode(prompt) == "<|im_start|>user\n<s>two<|im_end|>\n<|im_start|>assistant\n"
    assert controls(chatml, prompt) == ["<|im_start|>", "<|im_end|>", "<|im_start|>"]
    assert controls(chatml, answer) == ["<|im_end|>"]


def test_a_template_that_acts_on_a_spelling_is_an_error_with_a_remedy(chatml: Tokenizer) -> None:
    looking = CHATML.replace("message['content']", "(message['content'][3:] if message.content[:3] == '<s>' else 'x')")
    with pytest.raises(DataErrors, match=r"rows.jsonl:12: the text spells the control token '<s>' and the chat templ"):
        encode(chatml, looking, talk("<s>hello"), ANSWER)
    encode(chatml, looking, talk("<s>hello"), ANSWER, special_tokens="control")


def test_what_was_spelled_is_counted_and_said(chatml: Tokenizer) -> None:
    rows = [
        Record(id=str(k), prompt=f"q{k}", completions=("a<|im_end|>b" if k % 2 else "a",), path="rows.jsonl", line=k)
        for k in range(1, 6)
    ]
    said = "3 rows spell special tokens in their text (first: rows.jsonl:1, '<|im_end|>'): read as "
    _, report = encode_records(rows, chatml, None, EncodeOptions())
    assert report.lines()[-1] == said + "text; data.special_tokens = control reads them as tokens"
    _, report = encode_records(rows, chatml, None, EncodeOptions(special_tokens="control"))
    assert report.lines()[-1] == said + "tokens, as data.special_tokens says"
    assert encode_records(rows[1:2], chatml, None, EncodeOptions())[1].lines() == ["1 of 1 rows kept, longest 4 tokens"]


def test_added_tokens_that_are_text_stay_whole(tmp_path: Path) -> None:
    folder = byte_level_folder(tmp_path)
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    library.add_tokens([tokenizers.AddedToken("<think>", special=False, normalized=False)])
    library.save(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.spelled_special("<think>") is None and not tokenizer.is_special(tokenizer.vocab_size - 1)
    assert tokenizer.encode_plain_batch(["<s><think>"])[0][-1] == tokenizer.vocab_size - 1


def test_a_spelling_that_normalizing_makes_is_found(tmp_path: Path) -> None:
    folder = byte_level_folder(tmp_path)
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    library.normalizer = tokenizers.normalizers.Lowercase()
    library.add_special_tokens([tokenizers.AddedToken("<stop>", special=True, normalized=True)])
    library.save(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(folder)
    assert controls(tokenizer, tokenizer.encode("a <STOP>")) == ["<stop>"]
    prompt, answer = encode(tokenizer, CHATML, talk("a <STOP>"), talk("b", first="assistant"))
    assert controls(tokenizer, prompt + answer) == ["<|im_start|>", "<|im_end|>", "<|im_start|>", "<|im_end|>"]


def test_user_defined_pieces_that_are_control_tokens_are_text(tmp_path: Path) -> None:
    """Sentencepiece finds a user-defined piece in any text; one that the config calls special must not be found."""
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["Say or never turn"] * 9),
        model_writer=model,
        vocab_size=280,
        model_type="bpe",
        byte_fallback=True,
        user_defined_symbols=["<turn>", "<tab>"],
        minloglevel=2,
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    decoder = {"3": {"content": "<turn>", "special": True}}
    config = {"bos_token": "<s>", "eos_token": "</s>", "added_tokens_decoder": decoder}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert 3 in tokenizer.encode("or <turn> or") and tokenizer.is_special(3) and not tokenizer.is_special(4)
    (ids,) = tokenizer.encode_plain_batch(["or <turn> or <tab>"])
    assert 3 not in ids and 4 in ids and tokenizer.decode(ids) == "or <turn> or <tab>"


def test_text_that_imitates_our_names_is_no_way_in(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(byte_level_folder(tmp_path))
    hostile = "\U0010fffe4\U0010fffe"
    assert tokenizer.encode(hostile) == tokenizer.encode_plain_batch([hostile + "</s>"])[0][: -len("</s>")]
    unigram = load_tokenizer(unigram_folder(tmp_path / "unigram"))
    with pytest.raises(TokenizerError, match="makes a control token of plain text"):
        unigram.encode_plain_batch(["\U0010fffe2\U0010fffe"])


def test_marks_are_put_before_every_spelling() -> None:
    tokens = ControlTokens({0: AddedToken("ab"), 1: AddedToken("bc"), 2: AddedToken("abcd"), 3: AddedToken("x", False)})
    assert tokens.mark("abcd x abc", MARK) == f"{MARK}a{MARK}bcd x {MARK}a{MARK}bc"
    marked = tokens.mark("abc", MARK) + "ab"
    assert tokens.cut(marked, MARK) == [(f"{MARK}a{MARK}bc", False), ("ab", True)]
    assert ControlTokens({}).first("ab") is None and ControlTokens({}).cut("ab", MARK) == [("ab", False)]
    assert free_mark([MARK, "\ue001"]) == "\ue002"

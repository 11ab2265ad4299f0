"""What `check_template` says of each family's style, and of templates with one fault each."""

from pathlib import Path

import pytest
import tokenizers
from template_fixtures import FAMILIES
from text_fixtures import CHATML, byte_level_folder, write_config

from data_tools.chat_template import ChatTemplate
from data_tools.template_check import TemplateCheck, check_template
from data_tools.tokenizer import Tokenizer, load_tokenizer

MARKUP = (
    *(
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|eot_id|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<bos>",
        "<eos>",
    ),
    *("<start_of_turn>", "<end_of_turn>", "<|end|>", "<|user|>", "<|assistant|>", "<BOS_TOKEN>"),
    *("<|END_OF_TURN_TOKEN|>", "<|START_OF_TURN_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|USER_TOKEN|>"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer that has every family's control tokens."""
    folder = byte_level_folder(tmp_path_factory.mktemp("all"))
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    library.add_special_tokens([tokenizers.AddedToken(text, special=True, normalized=False) for text in MARKUP])
    library.save(str(folder / "tokenizer.json"))
    return folder


def check(folder: Path, source: str, **tokens: str) -> TemplateCheck:
    write_config(folder, **tokens)
    return check_template(ChatTemplate(source, path=Path("t.jinja"), tokens=tokens), load_tokenizer(folder))


@pytest.mark.parametrize("name", FAMILIES)
def test_families(folder: Path, name: str) -> None:
    family = FAMILIES[name]
    found = check(folder, family.template, **family.tokens)
    assert found.answer_continues and found.error is None
    assert (found.end_of_turn, found.grows, found.fits) == (family.end, family.grows, True)
    assert found.tokens_grow
    if family.bos_token is None:
        assert found.bos is None
    elif family.bos:
        assert (found.bos, found.starts_with_bos) == (1, True)
    assert found.system == ("refused" if name in ("Mistral v1", "Gemma, Gemma 2") else "printed")
    assert (found.date is not None) == (name in ("Llama 3", "SmolLM3"))


def test_lines_of_a_good_template(folder: Path) -> None:
    assert check(folder, "{{ bos_token }}" + CHATML, bos_token="<s>", eos_token="<|im_end|>").lines() == [
        "prompt and answer make the whole text: yes",
        "longer conversations begin with the shorter one's text and tokens: yes",
        "end-of-turn token trained: yes (<|im_end|>)",
        "BOS: once, at the start",
        "a system message is printed",
    ]


def test_thoughts_that_are_dropped_later_are_shown(folder: Path) -> None:
    found = check(folder, FAMILIES["Qwen3"].template, eos_token="<|im_end|>")
    first, second, *_ = found.lines()
    assert (
        first == "prompt and answer make the whole text: yes, with '<think>\\n\\n</think>' printed before each answer"
    )
    assert "text and tokens: no, rows can have one answer only: 'im_start|>assistant\\n<think>\\n\\n</think>" in second
    assert "becomes 'im_start|>assistant\\nProbing answers.<|im' as the conversation goes on" in second


def line(found: TemplateCheck, start: str) -> str:
    (match,) = [line for line in found.lines() if line.startswith(start)]
    return match


def test_one_fault_each(folder: Path) -> None:
    def of(source: str, **tokens: str) -> TemplateCheck:
        return check(folder, source, **{"eos_token": "<|im_end|>", **tokens})

    endless = of(CHATML.replace("<|im_end|>", ""))
    assert not endless.fits and line(endless, "end-of").startswith("end-of-turn token trained: no, the model would not")
    hidden = of(CHATML.replace("assistant\n'", "assistant\n<think>'"))
    assert not hidden.fits and line(hidden, "prompt and answer").startswith(
        "prompt and answer make the whole text: no, "
    )
    assert "<think>' becomes" in line(hidden, "prompt and answer")
    other = of(CHATML, eos_token="</s>")
    assert "(<|im_end|>, which is not eos_token: generation has to stop at it too)" in line(other, "end-of-turn")
    assert line(of(CHATML, bos_token="<s>"), "BOS") == "BOS: none"
    assert (
        line(of("{{ bos_token + bos_token }}" + CHATML, bos_token="<s>"), "BOS")
        == "BOS: 2 times, the first at the start"
    )
    assert line(of("x{{ bos_token }}" + CHATML, bos_token="<s>"), "BOS") == "BOS: once, not at the start"
    single = of("{% if messages | length > 2 %}{{ raise_exception('one') }}{% endif %}" + CHATML)
    assert single.fits and not single.grows and "refuses a second question" in line(single, "longer")
    deaf = of("{% set messages = messages | rejectattr('role', 'eq', 'system') | list %}" + CHATML)
    assert line(deaf, "a system") == "a system message is left out"
    assert "is told 2024-07-26" in line(of("{{ strftime_now('%Y') }}" + CHATML), "the date")
    broken = of("{{ raise_exception('no') }}")
    assert broken.lines() == ["cannot render a question and its answer: t.jinja: chat template: no"] and not broken.fits


def test_bos_that_plain_text_gets_is_missed(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(byte_level_folder(tmp_path, post_processor_bos=True))
    found = check_template(ChatTemplate(CHATML, path=Path("t"), tokens={}), tokenizer)
    assert line(found, "BOS") == "BOS: none, though plain text gets one"


def test_tokens_that_merge_over_the_cut_are_seen(tmp_path: Path) -> None:
    """Text grows, tokens do not: the prompt's last characters and the answer's first make one token."""
    tokenizer = _merging(tmp_path)
    source = "{% for m in messages %}{{ m.content + '</s>' if m.role == 'assistant' else m.content + ' ' }}{% endfor %}"
    found = check_template(ChatTemplate(source, path=Path("t"), tokens={}), tokenizer)
    assert found.answer_continues and found.grows and not found.tokens_grow and not found.fits
    assert line(found, "longer").endswith("the text, but not the tokens")


def _merging(folder: Path) -> Tokenizer:
    vocab = {chr(k): k for k in range(32, 127)} | {" P": 127, "</s>": 128}
    library = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[(" ", "P")]))
    library.add_special_tokens([tokenizers.AddedToken("</s>", special=True)])
    write_config(folder, eos_token="</s>")
    library.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)

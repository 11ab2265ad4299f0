"""Chat templates: text as transformers renders it, found in the right file, safe, and clear when they fail."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from template_fixtures import CONVERSATIONS, FAMILIES, FEATURES
from text_fixtures import CHATML, WITH_BOS, byte_level_folder, sentencepiece_folder, talk, write_config
from tokenizer_parity import template_rows
from transformers.utils.chat_template_utils import render_jinja_template

from data_tools.chat_template import TEMPLATE_DATE, ChatTemplate, load_chat_template
from data_tools.errors import TemplateError, UserError
from data_tools.schema import Message

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
BLOCKS = """{%- if messages[0].role == 'system' %}
    {{- messages[0].content | trim + '\\n' }}
    {%- set rest = messages[1:] %}
{%- else %}
    {%- set rest = messages %}
{%- endif %}
{% for message in rest %}
    {% if message.role == 'assistant' %}
        {% generation %}
        {{ message.content }}{{ eos_token }}
        {% endgeneration %}
        {% continue %}
    {% endif %}
    {% if loop.index > 9 %}{% break %}{% endif %}
user: {{ message | tojson }}
{% endfor %}
{% if tools %}never{% endif %}
{% if enable_thinking is defined and not enable_thinking %}never{% endif %}
{{ '>' if add_generation_prompt }}"""


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, path=Path("model/chat_template.jinja"), tokens=TOKENS)


turns = st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=4)


@pytest.mark.parametrize("source", [CHATML, WITH_BOS, BLOCKS], ids=["chatml", "with_bos", "blocks"])
@settings(max_examples=15, deadline=None)
@given(words=turns, system=st.none() | st.text(min_size=1, max_size=5), prompt=st.booleans())
def test_text_equals_transformers(source: str, words: list[str], system: str | None, prompt: bool) -> None:
    messages = talk(*words, system=system)
    rows = [{"role": message.role, "content": message.content} for message in messages]
    rendered, _ = render_jinja_template(
        conversations=[rows], chat_template=source, add_generation_prompt=prompt, **TOKENS
    )
    assert template(source).render(messages, add_generation_prompt=prompt) == rendered[0]


def test_text_by_hand() -> None:
    messages = talk("Hi", "Hello")
    assert template(CHATML).render(messages, add_generation_prompt=False) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
    )
    assert template(WITH_BOS).render(messages[:1], add_generation_prompt=True) == "<s>[INST] Hi [/INST]"


def test_non_ascii_and_html_characters_stay_as_they_are() -> None:
    text = template("{{ messages[0] | tojson }}").render([Message("user", "سلام <b> 'x'")], add_generation_prompt=True)
    assert text == '{"role": "user", "content": "سلام <b> \'x\'"}'


def test_the_date_is_the_same_on_every_day() -> None:
    dated = template("{{ strftime_now('%d %b %Y, %A %H:%M') }}")
    assert dated.render(talk("Hi"), add_generation_prompt=True) == "26 Jul 2024, Friday 00:00"
    assert dated.asks_date and not template(CHATML).asks_date
    assert template("{% if strftime_now is defined %}x{% endif %}").asks_date


def test_names_set_in_a_generation_block_stay_in_it() -> None:
    source = "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}"
    assert template(source).render(talk("Hi"), add_generation_prompt=True) == "21"


def test_where_a_template_is_found(tmp_path: Path) -> None:
    folder = byte_level_folder(tmp_path, chat_template="from config")

    def text(override: Path | None = None) -> str:
        found = load_chat_template(folder, override)
        assert found is not None
        return found.render(talk("Hi"), add_generation_prompt=True)

    assert text() == "from config"
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "named {{ bos_token }}"}]
    write_config(folder, chat_template=named, bos_token={"content": "<s>"})
    assert text() == "named <s>"
    (folder / "chat_template.jinja").write_text("from jinja", encoding="utf-8")
    assert text() == "from jinja"
    own = tmp_path / "own.jinja"
    own.write_text("own {{ messages[0].content }} {{ bos_token }}", encoding="utf-8")
    assert text(own) == "own Hi <s>"


def test_a_processors_file_is_read_last(tmp_path: Path) -> None:
    folder = byte_level_folder(tmp_path, chat_template=None)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "from json"}), encoding="utf-8")
    found = load_chat_template(folder)
    assert found is not None and found.path.name == "chat_template.json"
    assert found.render(talk("Hi"), add_generation_prompt=True) == "from json"
    write_config(folder, chat_template="from config")
    found = load_chat_template(folder)
    assert found is not None and found.path.name == "tokenizer_config.json"


@pytest.mark.parametrize("place", ["tokenizer_config.json", "a list of named templates", "chat_template.jinja"])
def test_a_folder_renders_as_transformers_loads_it(tmp_path: Path, place: str) -> None:
    from transformers import AutoTokenizer  # slow to import, needed here only

    family = FAMILIES["Llama 3"]
    named = [{"name": "default", "template": family.template}, {"name": "rag", "template": "no"}]
    settings = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    inside = {"tokenizer_config.json": family.template, "chat_template.jinja": "no"}.get(place, named)
    folder = byte_level_folder(tmp_path, chat_template=inside, **settings)
    if place == "chat_template.jinja":
        (folder / place).write_text(family.template, encoding="utf-8", newline="")
    ours, theirs = load_chat_template(folder), AutoTokenizer.from_pretrained(folder)
    messages = CONVERSATIONS["system"]
    rows = [{"role": message.role, "content": message.content} for message in messages]
    text = theirs.apply_chat_template(rows, tokenize=False, day=TEMPLATE_DATE.strftime("%d %b %Y"))
    assert ours is not None and ours.render(messages, add_generation_prompt=False) == text
    assert "Today Date: 26 Jul 2024" in text and text.startswith("<s>")


def test_every_row_of_the_template_table_is_equal() -> None:
    rows = list(template_rows())
    assert len(rows) == len(FAMILIES) + len(FEATURES)
    assert [row for row in rows if not row.all_equal] == []


def test_a_model_without_template_has_none(tmp_path: Path) -> None:
    assert load_chat_template(byte_level_folder(tmp_path / "json", chat_template=None)) is None
    assert load_chat_template(sentencepiece_folder(tmp_path / "bare")) is None


def test_a_bare_sentencepiece_model_lends_its_tokens(tmp_path: Path) -> None:
    folder = sentencepiece_folder(tmp_path)
    (folder / "chat_template.jinja").write_text(WITH_BOS, encoding="utf-8")
    found = load_chat_template(folder)
    assert found is not None
    assert found.render(talk("Hi", "Hello"), add_generation_prompt=False) == "<s>[INST] Hi [/INST] Hello</s>"


def test_digest_follows_text_and_tokens() -> None:
    other = ChatTemplate(CHATML, path=Path("elsewhere"), tokens={})
    assert template(CHATML).digest == template(CHATML).digest
    assert len({template(CHATML).digest, template(WITH_BOS).digest, other.digest}) == 3


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ raise_exception('only one turn') }}", "only one turn"),
        ("{{ messages[9].content }}", "has no element 9"),
        ("{{ nothing.content }}", "'nothing' is undefined"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe|not safely callable"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages | tojson(indent='x' * 3, sort_keys=1) + 3 }}", "concatenate"),
    ],
)
def test_failing_templates_are_one_clear_line(source: str, words: str) -> None:
    with pytest.raises(TemplateError) as caught:
        template(source).render(talk("Hi"), add_generation_prompt=True)
    message = str(caught.value)
    assert message.startswith("model/chat_template.jinja: chat template: ") and re.search(words, message), message
    assert len(message.splitlines()) == 1


def test_templates_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(TemplateError, match="chat template, line 2: .*endfor"):
        template("\n{% for m in messages %}{{ m }}{% endfro %}")
    with pytest.raises(TemplateError, match="own.jinja: cannot be read: No such file"):
        load_chat_template(tmp_path, tmp_path / "own.jinja")
    (tmp_path / "own.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(TemplateError, match="own.jinja: is not UTF-8"):
        load_chat_template(tmp_path, tmp_path / "own.jinja")
    write_config(tmp_path, chat_template=[{"name": "rag", "template": "x"}])
    with pytest.raises(TemplateError, match=r"no chat template named 'default' \(there are: rag\)"):
        load_chat_template(tmp_path)
    write_config(tmp_path, chat_template=3)
    with pytest.raises(UserError, match="'chat_template' must be a string"):
        load_chat_template(tmp_path)

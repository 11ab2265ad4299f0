"""Chat templates: from messages to the text a model was trained on, by jinja2 in a sandbox with limits.

The surroundings are those templates are written for on the Hugging Face hub: `messages`, `add_generation_prompt`, the
special tokens of the tokenizer by name, `raise_exception`, `strftime_now`, a `tojson` that keeps non-ASCII text, and
`{% generation %}` blocks, whose content is rendered as it is. A template that asks for the date is always told the same
one. Which text is scored is decided in `encode`, not here; what a template may not do, in `template_sandbox`.
"""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

from data_tools.errors import TemplateError
from data_tools.schema import Message
from data_tools.template_filters import counted_json
from data_tools.template_sandbox import MAX_SOURCE, Sandbox
from data_tools.tokenizer import read_json, special_tokens

TEMPLATE_DATE = datetime(2024, 7, 26)
"""The day that a template which asks for the date is told, always: the one that Llama 3's fall back to.

A row would otherwise have other tokens on another day, and a model would learn today's date.
"""
MAX_MESSAGE = 300


class ChatTemplate:
    """A compiled template with the special tokens it may print.

    path: the file it came from. asks_date: it calls `strftime_now`. digest: sha256 over its text and those tokens.
    """

    def __init__(self, source: str, *, path: Path, tokens: dict[str, str]) -> None:
        self.path = path
        self.digest = hashlib.sha256(json.dumps([source, tokens], sort_keys=True).encode()).hexdigest()
        self._tokens = tokens
        self._environment = _environment()
        if len(source) > MAX_SOURCE:
            raise TemplateError(path, f"chat template of {len(source)} characters; {MAX_SOURCE} is the most")
        try:
            tree = self._environment.parse(source)
            self.asks_date = any(name.name == "strftime_now" for name in tree.find_all(nodes.Name))
            self._template = self._environment.from_string(tree)
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(path, f"chat template, line {error.lineno}: {_one_line(error)}") from None
        except Exception as error:  # deeper nesting than jinja2 or Python can compile
            raise TemplateError(path, f"chat template: cannot be compiled: {_one_line(error)}") from None

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """The messages as text; with `add_generation_prompt` up to where the assistant begins to write.

        Raises TemplateError with what the template said, or with what went wrong in it.
        """
        rows = [{"role": message.role, "content": message.content} for message in messages]
        names = {"messages": rows, "tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
        self._environment.start(sum(len(message.content) for message in messages))
        try:
            return self._template.render(**self._tokens, **names)
        except Exception as error:  # a template is a program of the user's: whatever it raises is a fault in it
            raise TemplateError(self.path, f"chat template: {_one_line(error)}") from error


def load_chat_template(model_dir: str | Path, override: str | Path | None = None) -> ChatTemplate | None:
    """The template in file `override`, else the model's, None where it has none.

    That is the first of `chat_template.jinja`, `tokenizer_config.json` and `chat_template.json`; of named templates the
    one called `default`. Raises TemplateError for files that cannot be read or templates that do not parse.
    """
    folder = Path(model_dir)
    found = _read_template(Path(override)) if override is not None else _find_template(folder)
    if found is None:
        return None
    source, path = found
    return ChatTemplate(source, path=path, tokens=special_tokens(folder))


def _find_template(folder: Path) -> tuple[str, Path] | None:
    if (folder / "chat_template.jinja").exists():
        return _read_template(folder / "chat_template.jinja")
    for path in (folder / "tokenizer_config.json", folder / "chat_template.json"):
        template = read_json(path).get("chat_template")
        if isinstance(template, list):
            template = _default_of(template, path)
        if template is not None and not isinstance(template, str):
            raise TemplateError(path, "'chat_template' must be a string or a list of named templates")
        if template is not None:
            return template, path
    return None


def _default_of(templates: list[object], path: Path) -> object:
    named = {row.get("name"): row.get("template") for row in templates if isinstance(row, dict)}
    if "default" not in named:
        have = ", ".join(map(str, named)) or "none"
        raise TemplateError(
            path, f"no chat template named 'default' (there are: {have}); give data.chat_template a file"
        )
    return named["default"]


def _read_template(path: Path) -> tuple[str, Path]:
    try:
        return path.read_text(encoding="utf-8"), path
    except UnicodeDecodeError:
        raise TemplateError(path, "is not UTF-8 text; a chat template is a jinja file") from None
    except OSError as error:
        raise TemplateError(path, f"cannot be read: {error.strerror}") from None


def _one_line(error: Exception) -> str:
    text = " ".join(str(error)[: 10 * MAX_MESSAGE].split())
    return (text if len(text) <= MAX_MESSAGE else text[:MAX_MESSAGE] + "...") or type(error).__name__


def _environment() -> Sandbox:
    environment = Sandbox(extensions=["jinja2.ext.loopcontrols", _GenerationBlock])
    environment.filters["tojson"] = counted_json(environment)
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class _GenerationBlock(Extension):
    """`{% generation %} ... {% endgeneration %}`: marks the assistant's words for other tools; here only content.

    A call block, as elsewhere: names that are set in it are not seen outside.
    """

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("content"), [], [], body).set_lineno(line)

    def content(self, caller: Callable[[], str]) -> str:
        """What the block renders to."""
        return caller()


def _raise_exception(message: object) -> NoReturn:
    raise jinja2.TemplateError(str(message))


def _strftime_now(pattern: str) -> str:
    """The date as `datetime.strftime` writes it, of the fixed day; a width would pad it to any length."""
    if len(pattern) > 200 or re.search(r"%[-_0^#]*\d", pattern):
        raise jinja2.TemplateError("strftime_now: too long a format, or one with a width")
    return TEMPLATE_DATE.strftime(pattern)

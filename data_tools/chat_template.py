"""Chat templates: from messages to the text a model was trained on, by jinja2 in a sandbox.

The surroundings are those templates are written for on the Hugging Face hub: `messages`, `add_generation_prompt`, the
special tokens of the tokenizer by name, `raise_exception`, `strftime_now`, a `tojson` that keeps non-ASCII text, and
`{% generation %}` blocks, whose content is rendered as it is. A template that prints the date gives other text on
another day. Which text is scored is decided in `encode`, not here.
"""

import hashlib
import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from data_tools.errors import TemplateError
from data_tools.schema import Message
from data_tools.tokenizer import read_json, special_tokens


class ChatTemplate:
    """A compiled template with the special tokens it may print.

    path: the file it came from. digest: sha256 over its text and those tokens.
    """

    def __init__(self, source: str, *, path: Path, tokens: dict[str, str]) -> None:
        self.path = path
        self.digest = hashlib.sha256(json.dumps([source, tokens], sort_keys=True).encode()).hexdigest()
        self._tokens = tokens
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(path, f"chat template, line {error.lineno}: {_one_line(error)}") from None

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """The messages as text; with `add_generation_prompt` up to where the assistant begins to write.

        Raises TemplateError with what the template said, or with what went wrong in it.
        """
        rows = [{"role": message.role, "content": message.content} for message in messages]
        names = {"messages": rows, "tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
        try:
            return self._template.render(**self._tokens, **names)
        except Exception as error:  # a template is a program of the user's: whatever it raises is a fault in it
            raise TemplateError(self.path, f"chat template: {_one_line(error)}") from error


def load_chat_template(model_dir: str | Path, override: str | Path | None = None) -> ChatTemplate | None:
    """The template in file `override`, else the model's: `chat_template.jinja`, then `tokenizer_config.json`.

    None where the model has none. Raises TemplateError for files that cannot be read or templates that do not parse.
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
    path = folder / "tokenizer_config.json"
    template = read_json(path).get("chat_template")
    if isinstance(template, list):
        template = _default_of(template, path)
    if template is not None and not isinstance(template, str):
        raise TemplateError(path, "'chat_template' must be a string or a list of named templates")
    return None if template is None else (template, path)


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
    text = " ".join(str(error).split())
    return text or type(error).__name__


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationBlock]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class _GenerationBlock(Extension):
    """`{% generation %} ... {% endgeneration %}`: marks the assistant's words for other tools; here only content."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own filter escapes characters for HTML, which a prompt must not."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)

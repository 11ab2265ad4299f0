"""A checked row as text: the prompt once, and what each completion adds to it, in parts that are scored or not.

Text that spells a control token ("<|im_end|>") is marked here where it has to stay text; what the marks mean for tokens
is the business of `tokenizer_specials`. No token is made here.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

from data_tools.chat_template import ChatTemplate
from data_tools.errors import DataError, TemplateError, TokenizerError
from data_tools.schema import Message, Record, Text
from data_tools.tokenizer import Tokenizer
from data_tools.tokenizer_specials import free_mark


@dataclass(frozen=True, slots=True)
class Rendered:
    """A record as text. Each completion is (text, is it scored) parts that follow one another."""

    record: Record
    prompt: str
    completions: tuple[tuple[tuple[str, bool], ...], ...]
    plain: bool
    """A row of strings: BOS and EOS are ours to add."""
    mark: str | None = None
    """The character that stands in the texts before what only spells a control token."""


def texts_of(record: Record) -> Iterator[str]:
    """Every string of a row that a user wrote."""
    for text in (record.prompt, *record.completions):
        yield from (text,) if isinstance(text, str) else (message.content for message in text)


def render(record: Record, tokenizer: Tokenizer, template: ChatTemplate | None) -> Rendered:
    """The row as text. Raises DataError for a row that the template refuses or changes as it grows.

    Raises TokenizerError, TemplateError where the model lacks what the row's kind needs: an EOS, a chat template.
    """
    if isinstance(record.prompt, str):
        if tokenizer.eos_id is None:
            problem = f"no eos_token, which rows of strings must end with (first: {record.path}:{record.line})"
            raise TokenizerError(tokenizer.path, f"{problem}; set it in tokenizer_config.json")
        completions = tuple(_one_part(text) for text in record.completions)
        return Rendered(record, record.prompt, completions, plain=True)
    if template is None:
        problem = f"the model has no chat template, which rows of messages need (first: {record.path}:{record.line})"
        raise TemplateError(tokenizer.path, f"{problem}; name one with data.chat_template, or give strings")
    try:
        prompt = template.render(record.prompt, add_generation_prompt=True)
        completions = tuple(_render_turns(record, prompt, _turns(text), template) for text in record.completions)
    except TemplateError as error:
        raise DataError(record.path, record.line, field=None, problem=str(error)) from None
    return Rendered(record, prompt, completions, plain=False)


def render_marked(row: Rendered, spelled: str, tokenizer: Tokenizer, template: ChatTemplate | None) -> Rendered:
    """The row with every spelling of a control token marked; the text is the same but for the marks.

    Raises DataError where it is not: the template looks at the spellings or cuts through them.
    """
    record = row.record
    mark = free_mark([*texts_of(record), row.prompt, *(part for parts in row.completions for part, _ in parts)])

    def marked(text: Text) -> Text:
        if isinstance(text, str):
            return tokenizer.mark_special(text, mark)
        return tuple(Message(message.role, tokenizer.mark_special(message.content, mark)) for message in text)

    new = replace(record, prompt=marked(record.prompt), completions=tuple(map(marked, record.completions)))
    try:
        found = replace(render(new, tokenizer, template), record=record, mark=mark)
    except DataError:
        found = None
    if found is None or _without(found, mark) != (row.prompt, row.completions):
        problem = f"the text spells the control token '{spelled}' and the chat template acts on that"
        remedy = "take it out of the row, or set data.special_tokens = control"
        raise DataError(record.path, record.line, field=None, problem=f"{problem}; {remedy}")
    return found


def _without(row: Rendered, mark: str) -> tuple[str, tuple[tuple[tuple[str, bool], ...], ...]]:
    parts = tuple(tuple((part.replace(mark, ""), scored) for part, scored in parts) for parts in row.completions)
    return row.prompt.replace(mark, ""), parts


def _render_turns(
    record: Record, prompt: str, turns: tuple[Message, ...], template: ChatTemplate
) -> tuple[tuple[str, bool], ...]:
    """What each turn adds to the text; the assistant's are scored, the user's end in the next generation prompt."""
    parts: list[tuple[str, bool]] = []
    done = prompt
    history = list(_turns(record.prompt))
    for message in turns:
        history.append(message)
        scored = message.role == "assistant"
        text = template.render(history, add_generation_prompt=not scored)
        if not text.startswith(done):
            raise DataError(record.path, record.line, field=None, problem=_divergence(done, text, template, len(turns)))
        if scored and len(text) == len(done):
            problem = f"chat template {template.path} prints nothing for the assistant's message"
            raise DataError(record.path, record.line, field=None, problem=problem)
        parts.append((text[len(done) :], scored))
        done = text
    return tuple(parts)


def _one_part(text: Text) -> tuple[tuple[str, bool], ...]:
    assert isinstance(text, str), "check_record gives prompt and completions one shape"
    return ((text, True),)


def _turns(text: Text) -> tuple[Message, ...]:
    assert not isinstance(text, str), "check_record gives prompt and completions one shape"
    return text


def _divergence(before: str, after: str, template: ChatTemplate, num_turns: int) -> str:
    """Where a longer conversation's text stops beginning with the shorter one's, and what to do about it."""
    at = len(os.path.commonprefix([before, after]))
    old, new = before[max(at - 20, 0) : at + 20], after[max(at - 20, 0) : at + 20]
    remedy = "name one that only appends with data.chat_template"
    if num_turns > 1:
        remedy += ", or give one row for each assistant turn"
    return (
        f"chat template {template.path} changes the text before the answer once the answer is there: "
        f"{old!r} becomes {new!r} at character {at}; {remedy}"
    )

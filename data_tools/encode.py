"""Checked rows to token ids: a `Group` is one prompt and its completions, with the spans that are scored.

What is scored follows from the lengths of the texts, never from a token's value: padding, EOS and end-of-turn may share
an id. Over-long rows are dropped or cut as the options say, and counted. Nothing is written to disk here (`shards`).

Text that spells a control token ("<|im_end|>") stays text unless the options say otherwise: in rows that do so the
spellings are marked, the marked row is rendered, and only control tokens without a mark are tokens: the template's own.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from data_tools.chat_template import ChatTemplate
from data_tools.errors import MAX_ERRORS, DataError, DataErrors, TemplateError, TokenizerError, UserError
from data_tools.schema import Message, Record, Text
from data_tools.tokenizer import Tokenizer
from data_tools.tokenizer_specials import free_mark

OVERLONG = ("drop", "truncate_prompt_left", "truncate_completion")
SPECIAL_TOKENS = ("text", "control")
CHUNK = 1024
"""Rows rendered and tokenized together: enough for all cores, little enough memory."""
SHOWN_IDS = 5


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """One prompt and its completions as tokens, the unit that training works on.

    ids: (T,) int32, the prompt's tokens, then each completion's.
    lengths: tokens of branch 0 (the prompt; may be 0), branch 1, 2, ...; they sum to T.
    spans: per branch, half-open (start, end) token ranges that are scored, counted from the branch's own start.
    """

    record_id: str
    ids: np.ndarray
    lengths: tuple[int, ...]
    spans: tuple[tuple[tuple[int, int], ...], ...]
    weight: float = 1.0


@dataclass(frozen=True)
class EncodeOptions:
    """What decides how rows become groups, apart from the tokenizer and the template's text."""

    kind: Literal["pair", "sft"] = "pair"
    """Pairs (chosen, rejected) or one completion a row."""
    max_length: int | None = 1024
    """Tokens of the prompt and the longest completion together; None: no limit."""
    overlong: Literal["drop", "truncate_prompt_left", "truncate_completion"] = "drop"
    """What happens to a longer row."""
    chat_template: str | None = None
    """Path of a chat template that replaces the model's own."""
    special_tokens: Literal["text", "control"] = "text"
    """What the text of a row that spells a control token is read as."""

    def __post_init__(self) -> None:
        if self.kind not in ("pair", "sft"):
            raise UserError(f"kind = {self.kind!r}: must be pair or sft")
        if self.overlong not in OVERLONG:
            raise UserError(f"data.overlong = {self.overlong!r}: must be one of {', '.join(OVERLONG)}")
        if self.special_tokens not in SPECIAL_TOKENS:
            raise UserError(f"data.special_tokens = {self.special_tokens!r}: must be text or control")
        if self.max_length is not None and self.max_length < 2:
            raise UserError(f"data.max_length = {self.max_length}: must be at least 2")


@dataclass
class EncodeReport:
    """What became of the rows; every count is in rows unless it says otherwise."""

    rows: int = 0
    kept: int = 0
    dropped_overlong: int = 0
    truncated_prompts: int = 0
    truncated_completions: int = 0
    """Completions (not rows) that lost their end."""
    no_bos_unscored: int = 0
    """Rows with an empty prompt: nothing predicts their first token, so it is not scored."""
    longest: int = 0
    """Tokens of the longest kept prompt with its longest completion."""
    dropped_ids: tuple[str, ...] = ()
    """Ids of the first dropped rows."""
    special_rows: int = 0
    """Rows whose text spells a control token."""
    special_first: str = ""
    """Where the first of them is, and what it spells."""
    special_tokens: str = "text"
    """What it was read as."""

    def lines(self) -> list[str]:
        """The counts as sentences for a log; what did not happen is left out."""
        out = [f"{self.kept} of {self.rows} rows kept, longest {self.longest} tokens"]
        if self.dropped_overlong:
            out.append(f"{self.dropped_overlong} over-long rows dropped, first: {', '.join(self.dropped_ids)}")
        if self.truncated_prompts:
            out.append(f"{self.truncated_prompts} prompts cut on the left")
        if self.truncated_completions:
            out.append(f"{self.truncated_completions} completions cut at the end: no end-of-turn token to train")
        if self.no_bos_unscored:
            out.append(f"{self.no_bos_unscored} rows have no prompt and no BOS: their first token is not scored")
        if self.special_line is not None:
            out.append(self.special_line)
        return out

    @property
    def special_line(self) -> str | None:
        """How many rows spell control tokens and what became of them, or None."""
        if not self.special_rows:
            return None
        remedy = "; data.special_tokens = control reads them as tokens" if self.special_tokens == "text" else ""
        what = "text" if self.special_tokens == "text" else "tokens, as data.special_tokens says"
        spelling = f"{self.special_rows} rows spell special tokens in their text (first: {self.special_first})"
        return f"{spelling}: read as {what}{remedy}"


@dataclass(frozen=True, slots=True)
class _Rendered:
    """A record as text. Each completion is (text, is it scored) parts that follow one another."""

    record: Record
    prompt: str
    completions: tuple[tuple[tuple[str, bool], ...], ...]
    plain: bool
    """A row of strings: BOS and EOS are ours to add."""
    mark: str | None = None
    """The character that stands in the texts before what only spells a control token."""


@dataclass(slots=True)
class _Branch:
    """A completion's tokens and its scored spans."""

    ids: list[int]
    spans: list[tuple[int, int]]


def encode_records(
    records: Sequence[Record], tokenizer: Tokenizer, template: ChatTemplate | None, options: EncodeOptions
) -> tuple[list[Group], EncodeReport]:
    """Render, tokenize and fit every record; groups keep the records' order.

    A prompt is tokenized once, and each completion goes on from its last token, so both answers of a pair have the same
    prompt ids. What is scored follows from the lengths of texts, never from a token's value.
    Rows of messages: a completion is all that the template prints after the generation prompt, and the template alone
    writes BOS. Rows of strings: BOS goes before the prompt if the tokenizer puts it before plain text, EOS after each
    completion, neither twice.
    Raises DataErrors (up to 20) for rows that cannot be rendered or scored, TemplateError when rows of messages meet a
    model without template, UserError when no row is left.
    """
    report = EncodeReport(rows=len(records), special_tokens=options.special_tokens)
    groups: list[Group] = []
    errors: list[DataError] = []
    for start in range(0, len(records), CHUNK):
        rendered = []
        for record in records[start : start + CHUNK]:
            try:
                spelled = _spelled_special(record, tokenizer, report)
                row = _render(record, tokenizer, template)
                if spelled is not None and options.special_tokens == "text":
                    row = _render_marked(row, spelled, tokenizer, template)
                rendered.append(row)
            except DataError as error:
                _collect(errors, error)
        for row, prompt, branches in _tokenize(rendered, tokenizer):
            try:
                _check_scored(row.record, prompt, branches)
            except DataError as error:
                _collect(errors, error)
                continue
            group = _fit(row.record, prompt, branches, tokenizer, options, report)
            if group is not None:
                groups.append(group)
    if errors:
        raise DataErrors(errors, more=False)
    if records and not groups:
        problem = f"all {len(records)} rows are longer than data.max_length = {options.max_length}; raise it"
        raise UserError(f"{problem}, or cut rows with data.overlong (now {options.overlong})")
    return groups, report


def _collect(errors: list[DataError], error: DataError) -> None:
    errors.append(error)
    if len(errors) == MAX_ERRORS:
        raise DataErrors(errors, more=True)


def _spelled_special(record: Record, tokenizer: Tokenizer, report: EncodeReport) -> str | None:
    """The first control token that the row's text spells, or None; counts the row."""
    for text in _texts(record):
        if (found := tokenizer.spelled_special(text)) is not None:
            report.special_rows += 1
            report.special_first = report.special_first or f"{record.path}:{record.line}, '{found}'"
            return found
    return None


def _texts(record: Record) -> Iterator[str]:
    """Every string of a row that a user wrote."""
    for text in (record.prompt, *record.completions):
        yield from (text,) if isinstance(text, str) else (message.content for message in text)


def _render_marked(row: _Rendered, spelled: str, tokenizer: Tokenizer, template: ChatTemplate | None) -> _Rendered:
    """The row with every spelling of a control token marked; the text is the same but for the marks.

    Raises DataError where it is not: the template looks at the spellings or cuts through them.
    """
    record = row.record
    mark = free_mark([*_texts(record), row.prompt, *(part for parts in row.completions for part, _ in parts)])

    def marked(text: Text) -> Text:
        if isinstance(text, str):
            return tokenizer.mark_special(text, mark)
        return tuple(Message(message.role, tokenizer.mark_special(message.content, mark)) for message in text)

    new = replace(record, prompt=marked(record.prompt), completions=tuple(map(marked, record.completions)))
    try:
        found = replace(_render(new, tokenizer, template), record=record, mark=mark)
    except DataError:
        found = None
    if found is None or _without(found, mark) != (row.prompt, row.completions):
        problem = (
            f"the text spells the control token '{spelled}' and the chat template acts on that; take it out of the"
        )
        raise DataError(
            record.path, record.line, field=None, problem=f"{problem} row, or set data.special_tokens = control"
        )
    return found


def _without(row: _Rendered, mark: str) -> tuple[str, tuple[tuple[tuple[str, bool], ...], ...]]:
    parts = tuple(tuple((part.replace(mark, ""), scored) for part, scored in parts) for parts in row.completions)
    return row.prompt.replace(mark, ""), parts


def _render(record: Record, tokenizer: Tokenizer, template: ChatTemplate | None) -> _Rendered:
    if isinstance(record.prompt, str):
        if tokenizer.eos_id is None:
            problem = f"no eos_token, which rows of strings must end with (first: {record.path}:{record.line})"
            raise TokenizerError(tokenizer.path, f"{problem}; set it in tokenizer_config.json")
        completions = tuple(_one_part(text) for text in record.completions)
        return _Rendered(record, record.prompt, completions, plain=True)
    if template is None:
        problem = f"the model has no chat template, which rows of messages need (first: {record.path}:{record.line})"
        raise TemplateError(tokenizer.path, f"{problem}; name one with data.chat_template, or give strings")
    try:
        prompt = template.render(record.prompt, add_generation_prompt=True)
        completions = tuple(_render_turns(record, prompt, _turns(text), template) for text in record.completions)
    except TemplateError as error:
        raise DataError(record.path, record.line, field=None, problem=str(error)) from None
    return _Rendered(record, prompt, completions, plain=False)


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


def _tokenize(rows: list[_Rendered], tokenizer: Tokenizer) -> list[tuple[_Rendered, list[int], list[_Branch]]]:
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    eos = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    prompts = _encode([(row.prompt, row.mark, None) for row in rows], tokenizer)
    branches = [[_Branch([], []) for _ in row.completions] for row in rows]
    for row, prompt in zip(rows, prompts, strict=True):
        if row.plain and tokenizer.adds_bos and prompt[:1] != bos:
            prompt[:0] = bos
    most_parts = max((len(parts) for row in rows for parts in row.completions), default=0)
    for k in range(most_parts):  # each part continues the one before, so part k of all rows makes one batch
        todo = [
            (row, prompt, branch, *parts[k])
            for row, prompt, mine in zip(rows, prompts, branches, strict=True)
            for parts, branch in zip(row.completions, mine, strict=True)
            if k < len(parts)
        ]
        texts = [(text, row.mark, next(reversed(branch.ids or prompt), None)) for row, prompt, branch, text, _ in todo]
        ids = _encode(texts, tokenizer)
        for (row, prompt, branch, _, scored), new in zip(todo, ids, strict=True):
            end = eos if row.plain and new and new[-1:] != eos else []
            start = len(branch.ids) if prompt or branch.ids else 1  # nothing predicts the very first token
            branch.ids += new + end
            if scored and start < len(branch.ids):
                branch.spans.append((start, len(branch.ids)))
    return list(zip(rows, prompts, branches, strict=True))


def _encode(texts: Sequence[tuple[str, str | None, int | None]], tokenizer: Tokenizer) -> list[list[int]]:
    """Token ids of (text, mark or None, the token before it or None); texts with marks in them go one by one."""
    marked = [mark is not None and mark in text for text, mark, _ in texts]
    plain = [(text, after) for (text, _, after), is_marked in zip(texts, marked, strict=True) if not is_marked]
    ids = iter(tokenizer.encode_batch([text for text, _ in plain], [after for _, after in plain]))
    return [
        tokenizer.encode_marked(text, mark, after) if is_marked and mark is not None else next(ids)
        for (text, mark, after), is_marked in zip(texts, marked, strict=True)
    ]


def _check_scored(record: Record, prompt: list[int], branches: list[_Branch]) -> None:
    for k, branch in enumerate(branches):
        if not branch.spans:
            name = ("chosen", "rejected")[k] if len(branches) == 2 else "completion"
            why = (
                "the tokenizer makes no token of it" if prompt else "its only token has no prompt to be predicted from"
            )
            raise DataError(record.path, record.line, field=name, problem=f"nothing to score: {why}")
    if len(branches) == 2 and branches[0].ids == branches[1].ids:
        problem = "becomes the same tokens as 'chosen', nothing to prefer; remove the row"
        raise DataError(record.path, record.line, field="rejected", problem=problem)


def _fit(
    record: Record,
    prompt: list[int],
    branches: list[_Branch],
    tokenizer: Tokenizer,
    options: EncodeOptions,
    report: EncodeReport,
) -> Group | None:
    """The row as a group within max_length, or None where it is dropped; counts what it does in `report`."""
    limit = options.max_length
    longest = max(len(branch.ids) for branch in branches)
    if limit is not None and len(prompt) + longest > limit:
        if options.overlong == "truncate_prompt_left" and prompt and longest < limit:
            prompt = _cut_left(prompt, limit - longest, tokenizer)
            report.truncated_prompts += 1
        elif options.overlong == "truncate_completion" and (cut := _cut_ends(branches, limit - len(prompt))):
            report.truncated_completions += sum(len(a.ids) < len(b.ids) for a, b in zip(cut, branches, strict=True))
            branches = cut
        else:
            report.dropped_overlong += 1
            report.dropped_ids = (*report.dropped_ids, record.id)[:SHOWN_IDS]
            return None
    report.kept += 1
    report.no_bos_unscored += not prompt
    report.longest = max(report.longest, len(prompt) + max(len(branch.ids) for branch in branches))
    return Group(
        record_id=record.id,
        ids=np.array(prompt + [i for branch in branches for i in branch.ids], dtype=np.int32),
        lengths=(len(prompt), *(len(branch.ids) for branch in branches)),
        spans=((), *(tuple(branch.spans) for branch in branches)),
        weight=record.weight,
    )


def _cut_left(prompt: list[int], room: int, tokenizer: Tokenizer) -> list[int]:
    """The last `room` >= 1 tokens; a model used to BOS keeps it at the front, if more than one token is left."""
    if tokenizer.adds_bos and prompt[0] == tokenizer.bos_id and room > 1:
        return prompt[:1] + prompt[1 - room :]
    return prompt[-room:]


def _cut_ends(branches: list[_Branch], room: int) -> list[_Branch] | None:
    """Completions of at most `room` tokens; None where one has nothing scored left, or a pair nothing that differs."""
    cut = [
        _Branch(branch.ids[: max(room, 0)], [(start, min(end, room)) for start, end in branch.spans if start < room])
        for branch in branches
    ]
    useless = len(cut) == 2 and cut[0].ids == cut[1].ids
    return None if useless or not all(branch.spans for branch in cut) else cut

"""Checked rows to token ids: a `Group` is one prompt and its completions, with the spans that are scored.

What is scored follows from the lengths of the texts, never from a token's value: padding, EOS and end-of-turn may share
an id. In a row of steps, the last token of each step is "scored": a label stands there. Over-long rows are dropped or
cut as the options say, and counted. Nothing is written to disk here (`shards`).

Text that spells a control token ("<|im_end|>") stays text unless the options say otherwise: in rows that do so the
spellings are marked, the marked row is rendered, and only control tokens without a mark are tokens: the template's own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from data_tools.chat_template import TEMPLATE_DATE, ChatTemplate
from data_tools.errors import MAX_ERRORS, DataError, DataErrors, UserError
from data_tools.render import Rendered, render, render_marked, texts_of
from data_tools.schema import Record
from data_tools.step_rows import StepLabel
from data_tools.step_text import cut_steps
from data_tools.tokenizer import Tokenizer

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
    labels: of rows of steps; per branch, one for each span, which is then a step's last token. () for other rows.
    """

    record_id: str
    ids: np.ndarray
    lengths: tuple[int, ...]
    spans: tuple[tuple[tuple[int, int], ...], ...]
    weight: float = 1.0
    labels: tuple[tuple[StepLabel, ...], ...] = ()


@dataclass(frozen=True)
class EncodeOptions:
    """What decides how rows become groups, apart from the tokenizer and the template's text."""

    kind: Literal["pair", "sft", "prm"] = "pair"
    """Pairs (chosen, rejected), one completion a row, or one completion in labelled steps."""
    max_length: int | None = 1024
    """Tokens of the prompt and the longest completion together; None: no limit."""
    overlong: Literal["drop", "truncate_prompt_left", "truncate_completion"] = "drop"
    """What happens to a longer row."""
    chat_template: str | None = None
    """Path of a chat template that replaces the model's own."""
    special_tokens: Literal["text", "control"] = "text"
    """What the text of a row that spells a control token is read as."""
    step_separator: str = ""
    """Put behind each step of a row of steps, which is then read at the separator's last token."""

    def __post_init__(self) -> None:
        if self.kind not in ("pair", "sft", "prm"):
            raise UserError(f"kind = {self.kind!r}: must be pair or sft or prm")
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
    template_date: str = ""
    """The day that a template which asks for the date was told; empty if it did not ask."""

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
        if self.template_date:
            out.append(f"the chat template asks for the date: it is told {self.template_date}, whatever the day is")
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
    completion, neither twice. Rows of steps: `step_text.cut_steps`; they end with their last step.
    Raises DataErrors (up to 20) for rows that cannot be rendered or scored, TemplateError when rows of messages meet a
    model without template, UserError when no row is left.
    """
    report = EncodeReport(rows=len(records), special_tokens=options.special_tokens)
    if template is not None and template.asks_date and any(not isinstance(record.prompt, str) for record in records):
        report.template_date = f"{TEMPLATE_DATE:%Y-%m-%d}"
    groups: list[Group] = []
    errors: list[DataError] = []
    for start in range(0, len(records), CHUNK):
        rendered = []
        for record in records[start : start + CHUNK]:
            try:
                spelled = _spelled_special(record, tokenizer, report)
                row = render(record, tokenizer, template)
                if spelled is not None and options.special_tokens == "text":
                    row = render_marked(row, spelled, tokenizer, template)
                rendered.append(cut_steps(row, options.step_separator) if record.steps else row)
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


def encode_prompts(
    records: Sequence[Record], tokenizer: Tokenizer, template: ChatTemplate | None, *, special_tokens: str = "text"
) -> list[list[int]]:
    """The prompts of records as tokens to go on from, just as in training; completions, where there are any, do not
    matter. special_tokens: as in EncodeOptions. Raises DataErrors, TemplateError or TokenizerError."""
    found: list[list[int]] = []
    errors: list[DataError] = []
    for start in range(0, len(records), CHUNK):
        rendered = []
        for record in records[start : start + CHUNK]:
            bare = replace(record, completions=())
            try:
                spelled = _spelled_special(bare, tokenizer, EncodeReport())
                row = render(bare, tokenizer, template)
                if spelled is not None and special_tokens == "text":
                    row = render_marked(row, spelled, tokenizer, template)
                rendered.append(row)
            except DataError as error:
                _collect(errors, error)
        found += [prompt for _, prompt, _ in _tokenize(rendered, tokenizer)]
    if errors:
        raise DataErrors(errors, more=False)
    return found


def encode_prefixes(
    prefixes: Sequence[str], prompts: Sequence[Sequence[int]], tokenizer: Tokenizer, *, special_tokens: str = "text"
) -> list[list[int]]:
    """The beginnings of answers as tokens that go on from their prompts' tokens, just as whole answers do in training.

    No chat template is asked: it would end the turn. special_tokens: as in EncodeOptions.
    """
    plain = [special_tokens == "text" and tokenizer.spelled_special(text) is not None for text in prefixes]
    after = [prompt[-1] if prompt else None for prompt in prompts]
    found: list[list[int]] = [[] for _ in prefixes]
    for is_plain, encode in ((False, tokenizer.encode_batch), (True, tokenizer.encode_plain_batch)):
        rows = [row for row, own in enumerate(plain) if own == is_plain and prefixes[row]]
        ids = encode([prefixes[row] for row in rows], [after[row] for row in rows])
        for row, own in zip(rows, ids, strict=True):
            found[row] = own
    return found


def _collect(errors: list[DataError], error: DataError) -> None:
    errors.append(error)
    if len(errors) == MAX_ERRORS:
        raise DataErrors(errors, more=True)


def _spelled_special(record: Record, tokenizer: Tokenizer, report: EncodeReport) -> str | None:
    """The first control token that the row's text spells, or None; counts the row."""
    for text in texts_of(record):
        if (found := tokenizer.spelled_special(text)) is not None:
            report.special_rows += 1
            report.special_first = report.special_first or f"{record.path}:{record.line}, '{found}'"
            return found
    return None


def _tokenize(rows: list[Rendered], tokenizer: Tokenizer) -> list[tuple[Rendered, list[int], list[_Branch]]]:
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
            end = eos if row.plain and new and new[-1:] != eos and not row.record.steps else []
            start = len(branch.ids) if prompt or branch.ids else 1  # nothing predicts the very first token
            branch.ids += new + end
            if row.record.steps:
                branch.spans += [(len(branch.ids) - 1, len(branch.ids))] * (scored and bool(new))
            elif scored and start < len(branch.ids):
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
    if record.steps:
        for branch, steps in zip(branches, record.steps, strict=True):
            if len(branch.spans) < len(steps.ends):
                problem = "the tokenizer makes no token of a step, which a label could stand at"
                raise DataError(record.path, record.line, field="steps", problem=problem)
        return
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
    report.no_bos_unscored += not prompt and not record.steps
    report.longest = max(report.longest, len(prompt) + max(len(branch.ids) for branch in branches))
    return Group(
        record_id=record.id,
        ids=np.array(prompt + [i for branch in branches for i in branch.ids], dtype=np.int32),
        lengths=(len(prompt), *(len(branch.ids) for branch in branches)),
        spans=((), *(tuple(branch.spans) for branch in branches)),
        weight=record.weight,
        labels=_labels(record, branches),
    )


def _labels(record: Record, branches: list[_Branch]) -> tuple[tuple[StepLabel, ...], ...]:
    """Those of the steps whose last token is there, in the order of the spans."""
    if not record.steps:
        return ()
    kept = [of.labels[: len(branch.spans)] for of, branch in zip(record.steps, branches, strict=True)]
    return ((), *kept)


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
    useless = len(cut) == 2 and cut[0].ids == cut[1].ids  # never of steps, which have one branch in data that is cut
    return None if useless or not all(branch.spans for branch in cut) else cut

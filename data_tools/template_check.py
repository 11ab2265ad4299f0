"""Does a chat template fit training? `check_template` renders a few made-up messages and looks at text and tokens.

A completion is what the template prints after the generation prompt. That is only right if the whole conversation
begins with the prompt, in text and in tokens; and a model learns to stop only if a control token follows the answer.
Which rows are affected is found for each row in `render`; this says it of the template before any row is read.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from data_tools.chat_template import TEMPLATE_DATE, ChatTemplate
from data_tools.errors import TemplateError
from data_tools.schema import Message
from data_tools.tokenizer import Tokenizer

QUESTION, ANSWER = Message("user", "What comes first?"), Message("assistant", "Probing answers.")
SECOND, LAST = Message("user", "And after that?"), Message("assistant", "Nothing more.")
SYSTEM = Message("system", "Speak in short sentences.")


@dataclass(frozen=True)
class TemplateCheck:
    """What `check_template` found.

    answer_continues: the text of question and answer begins with the question's text and generation prompt.
    before_answer: what is printed between that and the answer, "" as a rule; it is scored.
    grows: a longer conversation's text begins with the shorter one's, so a row may have several answers.
    tokens_grow: the same for their tokens, cut where training cuts them. divergence: where the texts part, if they do.
    end_of_turn: the first control token after the answer, None where there is none; it is scored. end_is_eos: it is the
    tokenizer's eos_token.
    bos: how often BOS stands in a question's text; None for a tokenizer without BOS. starts_with_bos: it does.
    wants_bos: the tokenizer puts BOS before plain text.
    system: what becomes of a system message. date: the day that the template is told, if it asks.
    error: what the template said to a plain question and answer; then nothing else was looked at.
    """

    answer_continues: bool = False
    before_answer: str = ""
    grows: bool = False
    tokens_grow: bool = False
    divergence: str | None = None
    end_of_turn: str | None = None
    end_is_eos: bool = False
    bos: int | None = None
    starts_with_bos: bool = False
    wants_bos: bool = False
    system: Literal["printed", "left out", "refused"] = "refused"
    date: str | None = None
    error: str | None = None

    @property
    def fits(self) -> bool:
        """Rows with one answer are trained as they should be."""
        return self.answer_continues and self.end_of_turn is not None and (self.tokens_grow or not self.grows)

    def lines(self) -> list[str]:
        """The findings as sentences, one a line."""
        if self.error is not None:
            return [f"cannot render a question and its answer: {self.error}"]
        out = [f"prompt and answer make the whole text: {self._answer_words()}"]
        out.append(f"longer conversations begin with the shorter one's text and tokens: {self._growth_words()}")
        if self.end_of_turn is None:
            out.append("end-of-turn token trained: no, the model would not learn to stop; end answers with a token")
        else:
            note = "" if self.end_is_eos else ", which is not eos_token: generation has to stop at it too"
            out.append(f"end-of-turn token trained: yes ({self.end_of_turn}{note})")
        if self.bos is not None:
            out.append(f"BOS: {self._bos_words()}")
        out.append(f"a system message is {self.system}")
        if self.date is not None:
            out.append(f"the date: the template asks for it and is told {self.date}, whatever the day is")
        return out

    def _answer_words(self) -> str:
        if not self.answer_continues:
            return f"no, {self.divergence}"
        return f"yes, with {self.before_answer!r} printed before each answer" if self.before_answer else "yes"

    def _growth_words(self) -> str:
        if self.grows:
            return "yes" if self.tokens_grow else "the text, but not the tokens"
        return f"no, rows can have one answer only: {self.divergence}"

    def _bos_words(self) -> str:
        if self.bos == 0:
            return "none, though plain text gets one" if self.wants_bos else "none"
        where = "at the start" if self.starts_with_bos else "not at the start"
        return f"once, {where}" if self.bos == 1 else f"{self.bos} times, the first {where}"


def check_template(template: ChatTemplate, tokenizer: Tokenizer) -> TemplateCheck:
    """Render and tokenize made-up conversations; never raises for what is wrong with the template."""
    try:
        prompt = template.render([QUESTION], add_generation_prompt=True)
        whole = template.render([QUESTION, ANSWER], add_generation_prompt=False)
    except TemplateError as error:
        return TemplateCheck(error=str(error))
    ids = tokenizer.encode(prompt)
    after_answer = whole.rpartition(ANSWER.content)[2] if ANSWER.content in whole else ""
    texts = [prompt, whole, *_later_texts(template)]
    parting = [_divergence(*pair) for pair in zip(texts, texts[1:], strict=False)]
    continues = parting[0] is None
    rest = whole[len(prompt) :] if continues else ""
    tail = tokenizer.encode_batch([after_answer], [ids[-1] if ids else None])[0]
    end = next((i for i in tail if tokenizer.is_special(i) or i == tokenizer.eos_id), None)
    return TemplateCheck(
        answer_continues=continues and ANSWER.content in rest,
        before_answer=rest[: rest.find(ANSWER.content)].strip(" \n") if ANSWER.content in rest else "",
        grows=len(texts) == 4 and not any(parting),
        tokens_grow=continues and _tokens_grow(tokenizer, texts if not any(parting) else texts[:2]),
        divergence=next(filter(None, parting), None) or _refusal(template, len(texts)),
        end_of_turn=None if end is None else tokenizer.decode([end]),
        end_is_eos=end is not None and end == tokenizer.eos_id,
        bos=None if tokenizer.bos_id is None else ids.count(tokenizer.bos_id),
        starts_with_bos=tokenizer.bos_id is not None and ids[:1] == [tokenizer.bos_id],
        wants_bos=tokenizer.adds_bos,
        system=_system(template),
        date=f"{TEMPLATE_DATE:%Y-%m-%d}" if template.asks_date else None,
    )


def _later_texts(template: ChatTemplate) -> list[str]:
    """The texts of a second question and of its answer; none where the template refuses several turns."""
    try:
        asked = template.render([QUESTION, ANSWER, SECOND], add_generation_prompt=True)
        return [asked, template.render([QUESTION, ANSWER, SECOND, LAST], add_generation_prompt=False)]
    except TemplateError:
        return []


def _refusal(template: ChatTemplate, texts: int) -> str | None:
    return "the template refuses a second question" if texts < 4 else None


def _divergence(shorter: str, longer: str) -> str | None:
    """Where the longer text stops beginning with the shorter one, or None."""
    if longer.startswith(shorter):
        return None
    at = len(os.path.commonprefix([shorter, longer]))
    old, new = (text[max(at - 20, 0) : at + 20] for text in (shorter, longer))
    return f"{old!r} becomes {new!r} as the conversation goes on"


def _tokens_grow(tokenizer: Tokenizer, texts: Sequence[str]) -> bool:
    """Are the tokens of the parts, each going on from the one before, those of the whole last text?"""
    ids: list[int] = []
    done = ""
    for text in texts:
        ids += tokenizer.encode_batch([text[len(done) :]], [ids[-1] if ids else None])[0]
        done = text
    return ids == tokenizer.encode(done)


def _system(template: ChatTemplate) -> Literal["printed", "left out", "refused"]:
    try:
        text = template.render([SYSTEM, QUESTION], add_generation_prompt=True)
    except TemplateError:
        return "refused"
    return "printed" if SYSTEM.content in text else "left out"

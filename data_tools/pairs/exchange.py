"""What builders and samplers hand each other: requests out, samples and verdicts in, joined by id and checked.

A builder never calls a model. It writes requests (rows of prompts, see data_tools/samples.py, with further columns that
samplers pass over), `python -m eval.sample` answers them from a local model or a server, `python -m data_tools.verify`
judges the answers, and the builder's next step joins all of these. A request's id begins with its question's
(data_tools/questions.py).

The texts of requests come from a TOML file, a table each, so that they can be in any language:

    [critique]
    system = "..."                      # optional
    text = "{question}\\n{options}\\n..."   # {name}: a column of the question, or what the builder adds
"""

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_tools.errors import DataError, UserError
from data_tools.jsonl import iter_jsonl, write_rows
from data_tools.placeholders import fill
from data_tools.questions import id_of
from data_tools.samples import Sample, messages_of, read_prompts, read_samples
from data_tools.schema import Message, Text

VERDICTS = ("correct", "wrong", "invalid")


@dataclass(frozen=True, slots=True)
class PromptText:
    """A table of the TOML file: what is asked, and the system message before it."""

    text: str
    system: str | None = None

    def messages(self, values: Mapping[str, Any]) -> tuple[Message, ...]:
        """Filled in. Raises UserError for a placeholder without a value."""
        try:
            system = [] if self.system is None else [Message("system", fill(self.system, values))]
            return (*system, Message("user", fill(self.text, values)))
        except KeyError as error:
            name = error.args[0]
            raise UserError(
                f"the prompt asks for {{{name}}}, which question '{values.get('id')}' does not have"
            ) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRow:
    """One request to be written. more: further columns, for a person or a later step."""

    id: str
    prompt: Text
    more: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Answer:
    """A sample with the prompt it answers and the verdict on it (None where no verdicts were given).

    prefix: how the answer begins, where the sample goes on from a beginning.
    """

    id: str
    prompt: Text
    sample: Sample
    verdict: str | None
    prefix: str = ""


def read_prompt_texts(path: str | Path, names: Sequence[str]) -> dict[str, PromptText]:
    """The tables of these names. Raises UserError for a file, a table or a key that is missing or unknown."""
    try:
        tables = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: is no TOML: {error}") from error
    found = {}
    for name in names:
        table = tables.get(name)
        if not isinstance(table, dict) or not isinstance(table.get("text"), str):
            raise UserError(f"{path}: table [{name}] with a key 'text' is missing")
        unknown = sorted(set(table) - {"text", "system"})
        if unknown:
            raise UserError(f"{path}: [{name}]: '{unknown[0]}' is not known; known: system, text")
        found[name] = PromptText(table["text"], table.get("system"))
    return found


def write_requests(path: str | Path, requests: Iterable[RequestRow]) -> None:
    """All of them or no file. Raises UserError."""
    write_rows(path, ({"id": own.id, "prompt": prompt_json(own.prompt), **own.more} for own in requests))


def prompt_json(prompt: Text) -> str | list[dict[str, str]]:
    """A prompt as a row holds it."""
    return prompt if isinstance(prompt, str) else messages_of(prompt)


def read_answers(requests: str | Path, samples: str | Path, verdicts: str | Path | None = None) -> list[Answer]:
    """Every sample with its request, in the order of the requests and of the samples' numbers.

    Raises UserError where a sample answers no request or was drawn for another text of it, and where verdicts are given
    and one is missing. A request without samples is no error: a builder says how many there are.
    """
    asked = {prompt.id: prompt for prompt in read_prompts(requests)}
    judged = None if verdicts is None else read_verdicts(verdicts)
    found: dict[str, list[Answer]] = {name: [] for name in asked}
    for sample in sorted(read_samples(samples).samples, key=lambda own: own.sample):
        if sample.id not in asked:
            raise UserError(f"{samples}: id '{sample.id}' is no request of {requests}; name the file it was drawn for")
        own = asked[sample.id]
        if own.digest != sample.prompt_digest:
            problem = f"sample {sample.sample} of id '{sample.id}' was drawn for another prompt than {requests} has now"
            raise UserError(f"{samples}: {problem}; draw it anew into another file")
        verdict = None
        if judged is not None:
            verdict = judged.get(sample.key)
            if verdict is None:
                raise UserError(f"{verdicts}: no verdict on sample {sample.sample} of id '{sample.id}'; judge it anew")
        found[sample.id].append(Answer(sample.id, own.prompt, sample, verdict, own.prefix))
    return [answer for answers in found.values() for answer in answers]


def read_verdicts(path: str | Path) -> dict[tuple[str, int], str]:
    """(id, sample) to correct | wrong | invalid, of a file of `data_tools.verify` or of a judge. Raises DataError."""
    found = {}
    for line, row in iter_jsonl(path, may_be_empty=True):
        if not isinstance(row, dict) or row.get("verdict") not in VERDICTS:
            raise DataError(path, line, field="verdict", problem=f"expected one of {', '.join(VERDICTS)}")
        found[id_of(row, path, line), int(row.get("sample", 0))] = row["verdict"]
    return found

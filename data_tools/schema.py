"""The one strict check of a data row: from a JSON object to a `Record`, or a `DataError` that names line and field.

Shapes that are understood (other columns are ignored, apart from `id` and `weight`):

    pair   prompt + chosen + rejected      all strings, or all lists of messages
           chosen + rejected               lists of messages; the prompt is the messages both begin with
    sft    messages                        every assistant turn is scored
           prompt + completion             both strings, or both lists of messages
           text                            a string, no prompt
           any pair                        its chosen answer is the completion
    prm    prompt + steps, with labels     see `step_rows`

A message is {"role": "system" | "user" | "assistant", "content": "text"}. Nothing is repaired here: a row is right or
an error. Rendering and tokens are the business of `chat_template` and `encode`.
"""

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

from data_tools.errors import DataError
from data_tools.step_rows import FieldProblem as _Problem
from data_tools.step_rows import LabelledSteps, read_steps

Kind = Literal["pair", "sft", "prm"]

ROLES = ("system", "user", "assistant")
COLUMNS = ("id", "prompt", "chosen", "rejected", "messages", "completion", "text", "weight", "steps", "hard", "soft")

LEAST_WEIGHT = 1e-10
"""And its inverse is the largest: float32 holds a weight of 1e39 as infinity, one of 1e-46 as 0."""

# Columns that other tools use for what is meant here, so that the error can say which one to rename.
FOREIGN_COLUMNS = {
    "prompt": ("question", "instruction", "query", "input", "user"),
    "chosen": ("accepted", "preferred", "chosen_response", "response_chosen", "output_1", "win"),
    "rejected": ("dispreferred", "rejected_response", "response_rejected", "output_2", "lose"),
    "completion": ("response", "output", "answer", "target", "label"),
    "messages": ("conversations", "conversation", "dialog", "dialogue", "chat"),
}
# A message with one of these would be trained as something else than it says.
UNSUPPORTED_MESSAGE_KEYS = ("tool_calls", "function_call", "weight")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


Text = str | tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Record:
    """A checked row: one prompt and its completions, all strings or all message lists.

    completions: (chosen, rejected) of a pair, one completion of an SFT or PRM row. A completion of messages begins and
    ends with the assistant; user turns between are context, not targets. steps: of each completion, where it has any.
    """

    id: str
    prompt: Text
    completions: tuple[Text, ...]
    path: str
    line: int
    weight: float = 1.0
    steps: tuple[LabelledSteps, ...] = ()


def check_record(obj: object, *, kind: Kind, path: str | Path, line: int) -> Record:
    """Check one decoded JSON value and return it as a `Record`; a missing id becomes `<file name>:<line>`.

    Raises DataError for the first thing that is wrong.
    """
    try:
        if not isinstance(obj, dict):
            raise _Problem(None, f"expected an object like {_example(kind)}, got {_kind_of(obj)}")
        steps: tuple[LabelledSteps, ...] = ()
        if kind == "prm":
            prompt, completions, steps = _prm(obj)
        else:
            prompt, completions = _pair(obj) if kind == "pair" or _is_pair(obj) else _sft(obj)
        return Record(
            id=_id(obj, default=f"{Path(path).name}:{line}"),
            prompt=prompt,
            completions=completions if kind == "pair" else completions[:1],
            path=str(path),
            line=line,
            weight=_weight(obj),
            steps=steps,
        )
    except _Problem as wrong:
        raise DataError(path, line, field=wrong.field, problem=wrong.problem) from None


def check_prompt(obj: object, *, path: str | Path, line: int) -> Record:
    """Check one decoded JSON value that has a prompt and needs no answer; the record has no completions.

    The prompt is `prompt`, a string or messages, or `messages`; messages end with the user. Raises DataError.
    """
    try:
        if not isinstance(obj, dict):
            raise _Problem(None, f'expected an object like {{"prompt": ...}}, got {_kind_of(obj)}')
        field = "messages" if "messages" in obj and "prompt" not in obj else "prompt"
        prompt = _text(obj, field)
        if not isinstance(prompt, str):
            _check_roles(prompt, field)
            if prompt[-1].role != "user":
                raise _Problem(field, f"the last message must be of role 'user', not '{prompt[-1].role}'")
        elif field == "messages":
            raise _Problem("messages", "expected a list of messages, got a string; call the column 'prompt'")
        id = _id(obj, default=f"{Path(path).name}:{line}")
        return Record(id=id, prompt=prompt, completions=(), path=str(path), line=line)
    except _Problem as wrong:
        raise DataError(path, line, field=wrong.field, problem=wrong.problem) from None


def _is_pair(row: Mapping[str, object]) -> bool:
    return "chosen" in row or "rejected" in row


def _pair(row: Mapping[str, object]) -> tuple[Text, tuple[Text, ...]]:
    if not _is_pair(row) and ("messages" in row or "completion" in row or "text" in row):
        raise _Problem("chosen", 'missing: this row has one answer only; train it with train.objective = "sft"')
    chosen = _text(row, "chosen")
    rejected = _text(row, "rejected")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise _Problem("rejected", f"is {_shape(rejected)} but 'chosen' is {_shape(chosen)}: give both in one shape")
    if chosen == rejected:
        raise _Problem("rejected", "identical to 'chosen': nothing to prefer; remove the row")
    if "prompt" not in row:
        return _implicit_prompt(row, chosen, rejected)
    prompt = _text(row, "prompt")
    for field, completion in (("chosen", chosen), ("rejected", rejected)):
        _check_completion(prompt, completion, field)
    return prompt, (chosen, rejected)


def _implicit_prompt(row: Mapping[str, object], chosen: Text, rejected: Text) -> tuple[Text, tuple[Text, ...]]:
    """Split two whole conversations into the messages both begin with and the two ends."""
    if isinstance(chosen, str) or isinstance(rejected, str):
        _missing(row, "prompt", "needed beside a 'chosen' that is a string (it may be an empty string)")
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    prompt = chosen[:shared]
    if not prompt:
        _missing(row, "prompt", "and 'chosen' and 'rejected' do not begin with the same messages, which would be one")
    for field, whole in (("chosen", chosen), ("rejected", rejected)):
        if shared == len(whole) or whole[shared].role != "assistant":
            raise _Problem(field, "without a 'prompt', chosen and rejected must first differ in an assistant message")
        _check_completion(prompt, whole[shared:], field)
    return prompt, (chosen[shared:], rejected[shared:])


def _sft(row: Mapping[str, object]) -> tuple[Text, tuple[Text, ...]]:
    if "messages" in row:
        return _split_messages(_text(row, "messages"))
    if "completion" in row:
        completion = _text(row, "completion")
        if "prompt" not in row:
            _missing(row, "prompt", "needed beside 'completion' (it may be an empty string)")
        prompt = _text(row, "prompt")
        _check_completion(prompt, completion, "completion")
        return prompt, (completion,)
    if "text" in row:
        text = _text(row, "text")
        if not isinstance(text, str):
            raise _Problem("text", "expected a string, got a list; call the column 'messages'")
        _check_string_completion(text, "text")
        return "", (text,)
    wanted = "completion" if "prompt" in row else "messages"
    _missing(row, wanted, "an SFT row has 'messages', or 'prompt' and 'completion', or 'text'")


def _prm(row: Mapping[str, object]) -> tuple[Text, tuple[Text, ...], tuple[LabelledSteps, ...]]:
    """The answer in one piece, in the prompt's shape, and its steps."""
    if "steps" not in row:
        have = ", ".join(map(str, row))
        _missing(row, "steps", f"the row's columns are: {have if len(have) <= 100 else have[:100] + '...'}")
    prompt = _text(row, "prompt")
    answer, steps = read_steps(row)
    completion: Text = answer if isinstance(prompt, str) else (Message("assistant", answer),)
    _check_completion(prompt, completion, "steps")
    return prompt, (completion,), (steps,)


def _split_messages(messages: Text) -> tuple[Text, tuple[Text, ...]]:
    if isinstance(messages, str):
        raise _Problem("messages", "expected a list of messages, got a string; call the column 'text'")
    roles = [message.role for message in messages]
    if "assistant" not in roles:
        raise _Problem("messages", "no message is of role 'assistant': nothing to train on")
    first = roles.index("assistant")
    prompt, completion = messages[:first], messages[first:]
    if not prompt or prompt[-1].role != "user":
        raise _Problem(f"messages[{first}]", "an assistant message must follow a user message")
    _check_roles(messages, "messages")
    if messages[-1].role != "assistant":
        raise _Problem(f"messages[{len(messages) - 1}]", "the last message must be of role 'assistant'")
    return prompt, (completion,)


def _check_completion(prompt: Text, completion: Text, field: str) -> None:
    """The completion has the prompt's shape, begins and ends with the assistant and is not empty."""
    if isinstance(prompt, str) and isinstance(completion, str):
        return _check_string_completion(completion, field)
    if isinstance(prompt, str) or isinstance(completion, str):
        problem = f"is {_shape(completion)} but 'prompt' is {_shape(prompt)}: give both in one shape"
        if not isinstance(completion, str) and completion[0].content == prompt:
            problem = f"already holds the prompt: remove the column 'prompt', or keep only the answer in '{field}'"
        raise _Problem(field, problem)
    _check_roles(prompt, "prompt")
    if prompt[-1].role != "user":
        raise _Problem("prompt", f"the last message must be of role 'user', not '{prompt[-1].role}'")
    if completion[: len(prompt)] == prompt:
        raise _Problem(field, "repeats the prompt: keep only the answer, or remove the column 'prompt'")
    if completion[0].role != "assistant":
        raise _Problem(f"{field}[0]", f"an answer must be of role 'assistant', not '{completion[0].role}'")
    _check_roles(completion, field)
    if completion[-1].role != "assistant":
        raise _Problem(f"{field}[{len(completion) - 1}]", "the last message must be of role 'assistant'")


def _check_string_completion(completion: str, field: str) -> None:
    if not completion.strip():
        raise _Problem(field, "is empty: a completion needs at least one character that is not white space")


def _check_roles(messages: tuple[Message, ...], field: str) -> None:
    """A system message only at the very start, then user and assistant in turn."""
    for i, message in enumerate(messages):
        place = f"{field}[{i}]"
        if message.role == "system" and i > 0:
            raise _Problem(place, "a system message may only be the first")
        if i > 0 and message.role == messages[i - 1].role:
            raise _Problem(place, f"a second '{message.role}' message in a row: user and assistant must take turns")
        if i > 0 and messages[i - 1].role == "system" and message.role != "user":
            raise _Problem(place, f"after the system message comes a user message, not '{message.role}'")


def _text(row: Mapping[str, object], field: str) -> Text:
    """The field as a string or a tuple of messages; only the value's own form is checked."""
    if field not in row:
        have = ", ".join(map(str, row))
        _missing(row, field, f"the row's columns are: {have if len(have) <= 100 else have[:100] + '...'}")
    value = row[field]
    if isinstance(value, str):
        return _string(value, field)
    if not isinstance(value, list):
        hint = "; wrap the message in [ ]" if isinstance(value, dict) else ""
        raise _Problem(field, f"expected a string or a list of messages, got {_kind_of(value)}{hint}")
    if not value:
        raise _Problem(field, "is an empty list: at least one message is needed")
    return tuple(_message(item, f"{field}[{i}]") for i, item in enumerate(value))


def _message(value: object, place: str) -> Message:
    if not isinstance(value, dict):
        raise _Problem(place, f'expected a message like {{"role": "user", "content": "..."}}, got {_kind_of(value)}')
    if "role" not in value and "from" in value:
        raise _Problem(place, "has 'from' and 'value': call them 'role' (system, user, assistant) and 'content'")
    for key in ("role", "content"):
        if key not in value:
            raise _Problem(place, f"the message has no '{key}'{_nearest(key, value)}")
    for key in UNSUPPORTED_MESSAGE_KEYS:
        if value.get(key) is not None:
            raise _Problem(f"{place}.{key}", "is not supported: remove it, or write what it says into 'content'")
    role, content = value["role"], value["content"]
    if role not in ROLES:
        raise _Problem(f"{place}.role", f"must be one of {', '.join(ROLES)}, got {_show(role)}{_nearest_role(role)}")
    if isinstance(content, list):
        raise _Problem(f"{place}.content", "is a list of parts: text only here, give one string")
    if not isinstance(content, str):
        raise _Problem(f"{place}.content", f"expected a string, got {_kind_of(content)}")
    if not content.strip():
        raise _Problem(f"{place}.content", "is empty: remove the message or fill it in")
    return Message(role=str(role), content=_string(content, f"{place}.content"))


def _string(value: str, field: str) -> str:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as wrong:
        escape = f"\\u{ord(value[wrong.start]):04x}"
        raise _Problem(field, f"half of a surrogate pair ({escape}) at character {wrong.start}: not text") from None
    return value


def _id(row: Mapping[str, object], default: str) -> str:
    value = row.get("id", default)
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise _Problem("id", f"expected a non-empty string or a whole number, got {_show(value)}")
    return _string(str(value), "id")


def _weight(row: Mapping[str, object]) -> float:
    value = row.get("weight", 1.0)
    # whole numbers may be too large for a float, and infinity is refused before it is printed as a number
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0 or value == math.inf:
        raise _Problem("weight", f"expected a number above 0, got {_show(value)}")
    if not LEAST_WEIGHT <= value <= 1 / LEAST_WEIGHT:
        raise _Problem("weight", f"{_show(value)} leaves no digits in float32 sums; give 1e-10 to 1e10, or drop it")
    return float(value)


def _missing(row: Mapping[str, object], field: str, why: str) -> NoReturn:
    """Raise for an absent column, naming the column of the row that looks meant for it."""
    for other in FOREIGN_COLUMNS.get(field, ()):
        if other in row:
            raise _Problem(field, f"missing; rename the column '{other}' to '{field}'")
    raise _Problem(field, f"missing{_nearest(field, row)}; {why}")


def _nearest(wanted: str, row: Mapping[str, object]) -> str:
    """What to rename, if a name in the row looks like the wanted one; columns with a meaning are not offered."""
    candidates = [str(key) for key in row if key not in COLUMNS]
    by_lower = {key.lower().strip(): key for key in candidates}
    found = difflib.get_close_matches(wanted, by_lower, n=1, cutoff=0.7)
    return f"; the row has '{by_lower[found[0]]}', rename it to '{wanted}'" if found else ""


def _nearest_role(role: object) -> str:
    meant = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "prompter": "user"}
    known = meant.get(str(role).lower()) or next(iter(difflib.get_close_matches(str(role).lower(), ROLES, n=1)), None)
    return f", write '{known}'" if known else ""


def _shape(value: Text) -> str:
    return "a string" if isinstance(value, str) else "a list of messages"


def _kind_of(value: object) -> str:
    """The value's type as JSON calls it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    names = {dict: "an object", list: "a list", str: "a string", int: "a number", float: "a number"}
    return names[type(value)]


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:40] + "..."


def _example(kind: Kind) -> str:
    examples = {
        "pair": '{"prompt": ..., "chosen": ..., "rejected": ...}',
        "sft": '{"messages": [...]}',
        "prm": '{"prompt": ..., "steps": [...], "hard": [...]}',
    }
    return examples[kind]

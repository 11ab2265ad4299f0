"""The row check: every shape users have is read rightly, everything else is one clear line."""

import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.errors import DataError, UserError
from data_tools.schema import COLUMNS, Message, Record, check_record


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def check(row: object, kind: str = "pair") -> Record:
    return check_record(row, kind=kind, path="data/rows.jsonl", line=7)


U, A, B, S = Message("user", "q"), Message("assistant", "a"), Message("assistant", "b"), Message("system", "s")
PAIR = {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]}


@pytest.mark.parametrize(
    ("kind", "row", "prompt", "completions"),
    [
        ("pair", {"prompt": "q", "chosen": "a", "rejected": "b"}, "q", ("a", "b")),
        ("pair", {"prompt": "", "chosen": "a", "rejected": "b"}, "", ("a", "b")),
        ("pair", {"prompt": "q ", "chosen": " a\n", "rejected": "b"}, "q ", (" a\n", "b")),
        ("pair", PAIR, (U,), ((A,), (B,))),
        ("pair", PAIR | {"prompt": [system("s"), user("q")]}, (S, U), ((A,), (B,))),
        ("pair", PAIR | {"prompt": [user("q"), assistant("b"), user("q")]}, (U, B, U), ((A,), (B,))),
        ("pair", PAIR | {"votes": 3, "messages": None}, (U,), ((A,), (B,))),
        # the prompt is what both conversations begin with
        ("pair", {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]}, (U,), ((A,), (B,))),
        (
            "pair",
            {
                "chosen": [system("s"), user("q"), assistant("a"), user("q"), assistant("a")],
                "rejected": [system("s"), user("q"), assistant("a"), user("q"), assistant("b")],
            },
            (S, U, A, U),
            ((A,), (B,)),
        ),
        (
            "pair",
            {"chosen": [user("q"), assistant("a"), user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]},
            (U,),
            ((A, U, A), (B,)),
        ),
        ("sft", {"messages": [user("q"), assistant("a")]}, (U,), ((A,),)),
        (
            "sft",
            {"messages": [system("s"), user("q"), assistant("a"), user("q"), assistant("b")]},
            (S, U),
            ((A, U, B),),
        ),
        ("sft", {"prompt": "q", "completion": "a"}, "q", ("a",)),
        ("sft", {"prompt": [user("q")], "completion": [assistant("a")]}, (U,), ((A,),)),
        ("sft", {"text": "a story"}, "", ("a story",)),
        ("sft", PAIR, (U,), ((A,),)),
        ("sft", {"prompt": "q", "chosen": "a", "rejected": "b"}, "q", ("a",)),
    ],
)
def test_shapes_that_are_read(kind: str, row: dict, prompt: object, completions: tuple) -> None:
    record = check(row, kind)
    assert (record.prompt, record.completions) == (prompt, completions)
    assert (record.id, record.path, record.line, record.weight) == ("rows.jsonl:7", "data/rows.jsonl", 7, 1.0)


def test_id_and_weight_are_kept() -> None:
    assert check(PAIR | {"id": 12, "weight": 0.5}).id == "12"
    assert check(PAIR | {"id": "row-a", "weight": 2}).weight == 2.0


TALK = [user("q"), assistant("a")]
BAD_ROWS = [
    # (kind, row, field named, words of the message)
    ("pair", [1], None, "expected an object like"),
    ("pair", "q", None, "got a string"),
    ("pair", None, None, "got null"),
    ("sft", 3, None, '{"messages": [...]}'),
    ("pair", {}, "chosen", "missing"),
    ("pair", {"prompt": "q", "chosen": "a"}, "rejected", "missing"),
    ("pair", {"prompt": "q", "chosn": "a", "rejected": "b"}, "chosen", "the row has 'chosn'"),
    ("pair", {"Prompt": "q", "chosen": "a", "rejected": "b"}, "prompt", "the row has 'Prompt'"),
    ("pair", {"question": "q", "chosen": "a", "rejected": "b"}, "prompt", "rename the column 'question' to 'prompt'"),
    ("pair", {"instruction": "q", "chosen": "a", "rejected": "b"}, "prompt", "rename the column 'instruction'"),
    ("pair", {"chosen": "a", "rejected": "b"}, "prompt", "'chosen' that is a string"),
    ("pair", {"messages": TALK}, "chosen", 'train.objective = "sft"'),
    ("pair", {"prompt": "q", "completion": "a"}, "chosen", 'train.objective = "sft"'),
    ("pair", {"text": "a"}, "chosen", 'train.objective = "sft"'),
    ("pair", {"prompt": "q", "chosen": "a", "rejected": "a"}, "rejected", "identical"),
    ("pair", PAIR | {"rejected": [assistant("a")]}, "rejected", "identical"),
    ("pair", {"chosen": TALK, "rejected": TALK}, "rejected", "identical"),
    ("pair", {"prompt": "q", "chosen": None, "rejected": "b"}, "chosen", "got null"),
    ("pair", {"prompt": "q", "chosen": "a", "rejected": 3}, "rejected", "got a number"),
    ("pair", {"prompt": True, "chosen": "a", "rejected": "b"}, "prompt", "got true"),
    ("pair", {"prompt": user("q"), "chosen": "a", "rejected": "b"}, "prompt", "wrap the message in [ ]"),
    ("pair", {"prompt": "q", "chosen": "", "rejected": "b"}, "chosen", "is empty"),
    ("pair", {"prompt": "q", "chosen": "a", "rejected": " \n"}, "rejected", "is empty"),
    ("pair", PAIR | {"prompt": []}, "prompt", "empty list"),
    ("pair", PAIR | {"chosen": []}, "chosen", "empty list"),
    ("pair", PAIR | {"prompt": "q"}, "chosen", "is a list of messages but 'prompt' is a string"),
    ("pair", {"prompt": [user("q")], "chosen": "a", "rejected": "b"}, "chosen", "is a string but 'prompt' is a list"),
    ("pair", PAIR | {"chosen": "a"}, "rejected", "'chosen' is a string"),
    ("pair", {"prompt": "q", "chosen": TALK, "rejected": [user("q"), assistant("b")]}, "chosen", "already holds"),
    ("pair", PAIR | {"chosen": TALK}, "chosen", "repeats the prompt"),
    ("pair", PAIR | {"chosen": [user("a")]}, "chosen[0]", "role 'assistant', not 'user'"),
    ("pair", PAIR | {"chosen": [assistant("a"), user("q")]}, "chosen[1]", "last message must be of role 'assistant'"),
    ("pair", PAIR | {"chosen": [assistant("a"), assistant("c")]}, "chosen[1]", "take turns"),
    ("pair", PAIR | {"prompt": [user("q"), user("r")]}, "prompt[1]", "take turns"),
    ("pair", PAIR | {"prompt": [user("q"), system("s"), user("q")]}, "prompt[1]", "may only be the first"),
    ("pair", PAIR | {"prompt": [system("s")]}, "prompt", "last message must be of role 'user', not 'system'"),
    ("pair", PAIR | {"prompt": [system("s"), assistant("a"), user("q")]}, "prompt[1]", "comes a user message"),
    ("pair", PAIR | {"prompt": [user("q"), assistant("a")]}, "prompt", "not 'assistant'"),
    ("pair", PAIR | {"prompt": ["q"]}, "prompt[0]", "expected a message like"),
    ("pair", PAIR | {"prompt": [{"from": "human", "value": "q"}]}, "prompt[0]", "'from' and 'value'"),
    ("pair", PAIR | {"prompt": [{"content": "q"}]}, "prompt[0]", "no 'role'"),
    ("pair", PAIR | {"prompt": [{"role": "user", "contents": "q"}]}, "prompt[0]", "'contents', rename it to 'content'"),
    ("pair", PAIR | {"prompt": [{"role": "human", "content": "q"}]}, "prompt[0].role", "write 'user'"),
    ("pair", PAIR | {"chosen": [{"role": "asistant", "content": "q"}]}, "chosen[0].role", "write 'assistant'"),
    ("pair", PAIR | {"prompt": [{"role": None, "content": "q"}]}, "prompt[0].role", "must be one of"),
    ("pair", PAIR | {"prompt": [{"role": ["user"], "content": "q"}]}, "prompt[0].role", "must be one of"),
    ("pair", PAIR | {"prompt": [user("")]}, "prompt[0].content", "is empty"),
    ("pair", PAIR | {"rejected": [assistant("\t")]}, "rejected[0].content", "is empty"),
    ("pair", PAIR | {"rejected": [{"role": "assistant", "content": None}]}, "rejected[0].content", "got null"),
    (
        "pair",
        PAIR | {"prompt": [{"role": "user", "content": [{"type": "text", "text": "q"}]}]},
        "prompt[0].content",
        "text only",
    ),
    ("pair", PAIR | {"chosen": [assistant("a") | {"tool_calls": [1]}]}, "chosen[0].tool_calls", "not supported"),
    ("pair", PAIR | {"prompt": [user("\ud83d")]}, "prompt[0].content", "surrogate pair (\\ud83d) at character 0"),
    ("pair", {"prompt": "q\udc00", "chosen": "a", "rejected": "b"}, "prompt", "surrogate"),
    ("pair", PAIR | {"id": None}, "id", "got None"),
    ("pair", PAIR | {"id": ""}, "id", "non-empty string"),
    ("pair", PAIR | {"id": True}, "id", "got True"),
    ("pair", PAIR | {"id": 1.5}, "id", "got 1.5"),
    ("pair", PAIR | {"weight": 0}, "weight", "above 0"),
    ("pair", PAIR | {"weight": "2"}, "weight", "above 0"),
    ("pair", PAIR | {"weight": float("inf")}, "weight", "above 0"),
    ("pair", PAIR | {"weight": 1e39}, "weight", "1e+39 leaves no digits in float32 sums; give 1e-10 to 1e10"),
    ("sft", {"text": "a", "weight": 1e-46}, "weight", "1e-46 leaves no digits"),
    ("pair", PAIR | {"weight": 10**400}, "weight", "leaves no digits"),
    (
        "pair",
        {"chosen": [user("q"), assistant("a")], "rejected": [user("r"), assistant("b")]},
        "prompt",
        "same messages",
    ),
    ("pair", {"chosen": TALK, "rejected": [*TALK, user("r"), assistant("b")]}, "chosen", "must first differ in an"),
    (
        "pair",
        {"chosen": [*TALK, user("r"), assistant("b")], "rejected": [*TALK, user("t"), assistant("b")]},
        "chosen",
        "must first differ in an assistant message",
    ),
    ("sft", {}, "messages", "an SFT row has"),
    ("sft", {"conversations": []}, "messages", "rename the column 'conversations' to 'messages'"),
    ("sft", {"prompt": "q", "response": "a"}, "completion", "rename the column 'response' to 'completion'"),
    ("sft", {"instruction": "q", "completion": "a"}, "prompt", "rename the column 'instruction' to 'prompt'"),
    ("sft", {"completion": "a"}, "prompt", "needed beside 'completion'"),
    ("sft", {"messages": "q"}, "messages", "call the column 'text'"),
    ("sft", {"text": TALK}, "text", "call the column 'messages'"),
    ("sft", {"text": ""}, "text", "is empty"),
    ("sft", {"messages": [user("q")]}, "messages", "nothing to train on"),
    ("sft", {"messages": [*TALK, user("r")]}, "messages[2]", "last message must be of role 'assistant'"),
    ("sft", {"messages": [assistant("a")]}, "messages[0]", "must follow a user message"),
    ("sft", {"messages": [system("s"), assistant("a")]}, "messages[1]", "must follow a user message"),
    ("sft", {"messages": [*TALK, assistant("b")]}, "messages[2]", "take turns"),
    ("sft", {"messages": [*TALK, system("s"), assistant("b")]}, "messages[2]", "may only be the first"),
    ("sft", {"messages": [user("q"), user("r"), assistant("a")]}, "messages[1]", "take turns"),
    ("sft", PAIR | {"rejected": [user("b")]}, "rejected[0]", "role 'assistant'"),
]


@pytest.mark.parametrize(("kind", "row", "field", "words"), BAD_ROWS)
def test_bad_rows_are_one_clear_line(kind: str, row: object, field: str | None, words: str) -> None:
    with pytest.raises(DataError) as caught:
        check(row, kind)
    message = str(caught.value)
    place = "data/rows.jsonl:7: " if field is None else f"data/rows.jsonl:7: field '{field}': "
    assert message.startswith(place) and words in message, message
    assert isinstance(caught.value, UserError)


def test_error_without_line_or_field_leaves_them_out() -> None:
    assert str(DataError("a.jsonl", None, field=None, problem="no such file")) == "a.jsonl: no such file"
    assert str(DataError("a.jsonl", 3, field="id", problem="x")) == "a.jsonl:3: field 'id': x"


texts = st.text().map(lambda text: f"x{text}")
turns = st.integers(0, 2).flatmap(lambda k: st.lists(texts, min_size=2 * k + 1, max_size=2 * k + 1))


@settings(max_examples=50, deadline=None)
@given(prompt=turns, chosen=turns, rejected=turns, head=st.none() | texts)
def test_any_well_formed_pair_is_read_back_as_it_was_written(
    prompt: list[str], chosen: list[str], rejected: list[str], head: str | None
) -> None:
    if chosen == rejected:
        return
    before = [] if head is None else [system(head)]
    before += [(user if i % 2 == 0 else assistant)(text) for i, text in enumerate(prompt)]
    ends = [[(assistant if i % 2 == 0 else user)(text) for i, text in enumerate(end)] for end in (chosen, rejected)]
    explicit = check({"prompt": before, "chosen": ends[0], "rejected": ends[1]})
    assert [{"role": m.role, "content": m.content} for m in explicit.prompt] == before
    assert [[m.content for m in end] for end in explicit.completions] == [chosen, rejected]
    if chosen[0] != rejected[0]:
        implicit = check({"chosen": before + ends[0], "rejected": before + ends[1]})
        assert (implicit.prompt, implicit.completions) == (explicit.prompt, explicit.completions)


messages = st.fixed_dictionaries(
    {},
    optional={"role": st.sampled_from(["user", "assistant", "system", "human", 1]), "content": st.text() | st.none()},
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | messages,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(string.ascii_lowercase), inner, max_size=3),
    max_leaves=6,
)
rows = st.dictionaries(st.sampled_from(COLUMNS) | st.text(), json_values | st.lists(messages, max_size=4), max_size=6)


@settings(max_examples=50, deadline=None)
@given(row=rows | json_values, kind=st.sampled_from(["pair", "sft"]))
def test_whatever_json_holds_the_check_answers_with_a_record_or_one_line(row: object, kind: str) -> None:
    try:
        record = check(row, kind)
    except DataError as error:
        assert str(error).startswith("data/rows.jsonl:7: ")
        assert len(str(error).splitlines()) == 1
    else:
        assert len(record.completions) == (2 if kind == "pair" else 1)
        assert all(completion for completion in record.completions)

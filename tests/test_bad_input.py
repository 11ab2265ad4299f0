"""What users get wrong in data, chat template and tokenizer: one clear line that names the place, exit code 2, nothing
lost. Models are in test_bad_input_models.py, folders and commands in test_bad_input_folders.py."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
from bad_input_fixtures import (
    ABSENT,
    NO,
    PAIR,
    PLAIN,
    TALK,
    YES,
    Kind,
    Setup,
    assert_refused,
    assert_training_refused,
    both,
    config,
    kinds,
    make_setup,
    model_file,
    raw,
    rows,
    second,
    setting,
    template,
    tensors,
    tokenizer_config,
)
from run_fixtures import OWN_PAIRS, ROOT, contents, run_here

SURROGATE = "\ud83d"
HEADS = ("model.embed_tokens.weight", "lm_head.weight")


def turn(role: str, content: object = "x") -> list[dict[str, object]]:
    return [{"role": role, "content": content}]


WHOLE_FILE = {
    "no such file": (lambda s: s.data.unlink(), "no such file"),
    "an empty file": (raw(b""), "is empty"),
    "only blank lines": (raw(b"\n \n"), "is empty"),
    "a folder": (lambda s: (s.data.unlink(), s.data.mkdir()), "is a folder; name the .jsonl file in it"),
    "cut gzip": (raw(gzip.compress(OWN_PAIRS.read_bytes())[:-20]), "copy the file again"),
    "gzip that is none": (raw(b"\x1f\x8bnot gzip at all"), "cannot be read"),
    "the file twice": (setting("data.train={data},{data}"), "is given twice; name each file once"),
}
FIRST_LINE = {
    "UTF-16": (raw(json.dumps(PAIR).encode("utf-16")), "the file is UTF-16; save it as UTF-8"),
    "a byte order mark": (raw(json.dumps(PAIR).encode("utf-8-sig")), "begins with a byte order mark"),
    "one JSON array": (rows([PAIR, PAIR]), "this is one JSON array"),
    "an indented array": (raw(json.dumps([PAIR], indent=1).encode()), "this is one JSON array"),
    "an indented object": (raw(json.dumps(PAIR, indent=1).encode()), "an object spread over lines"),
    "CSV": (raw(b"prompt,chosen,rejected\n"), "bad JSON"),
    "sft rows for dpo": (rows({"messages": [*TALK, *YES]}), 'one answer only; train it with train.objective = "sft"'),
    "other column names": (rows({"question": "q", "chosen": "a", "rejected": "b"}), "'question' to 'prompt'"),
}
SECOND_LINE = {
    "Latin-1": (second(b'{"prompt": "\xe4"}'), "byte 13 of the line (0xe4) is not UTF-8"),
    "a torn line": (second(b'{"prompt": "ab'), "bad JSON at column 12"),
    "a string": (second("text"), "expected an object like"),
    "null": (rows(PAIR, None), "expected an object like"),
    "nested too deep": (second(b"[" * 100_000), "nested too deep"),
    "a key twice": (second(b'{"prompt": "a", "prompt": "b"}'), "key 'prompt' stands twice"),
    "NaN": (second(b'{"weight": NaN}'), "NaN is not JSON"),
    "half a surrogate": (second(PLAIN | {"chosen": SURROGATE}), r"half of a surrogate pair (\ud83d)"),
    "an id twice": (second(id="good"), "field 'id': 'good' already stands at"),
    "an id that is a list": (second(id=[1]), "field 'id': expected a non-empty string"),
    "no prompt": (second({"chosen": "a", "rejected": "b"}), "field 'prompt': missing"),
    "no rejected": (second(rejected=ABSENT), "field 'rejected': missing"),
    "null chosen": (second(PLAIN | {"chosen": None}), "field 'chosen': expected a string"),
    "a number chosen": (second(chosen=4), "field 'chosen': expected a string"),
    "identical answers": (second(rejected=YES), "field 'rejected': identical to 'chosen'"),
    "an empty answer": (second(PLAIN | {"chosen": ""}), "field 'chosen': is empty"),
    "empty content": (second(chosen=turn("assistant", " \n")), "field 'chosen[0].content': is empty"),
    "no messages": (second(prompt=[]), "field 'prompt': is an empty list"),
    "two users in a row": (second(prompt=TALK * 2), "field 'prompt[1]': a second 'user' message in a row"),
    "a late system message": (second(prompt=[*TALK, *turn("system")]), "a system message may only be the first"),
    "an answer by the user": (second(chosen=turn("user")), "field 'chosen[0]': an answer must be of role 'assistant'"),
    "a prompt that ends in an answer": (second(prompt=[*TALK, *NO]), "the last message must be of role 'user'"),
    "an unknown role": (second(prompt=turn("human")), "field 'prompt[0].role'"),
    "ShareGPT": (second(prompt=[{"from": "human", "value": "x"}]), "call them 'role'"),
    "no content": (second(prompt=[{"role": "user"}]), "field 'prompt[0]': the message has no 'content'"),
    "parts of content": (second(prompt=turn("user", [{"type": "text"}])), "is a list of parts"),
    "a tool call": (second(chosen=[YES[0] | {"tool_calls": [{}]}]), "field 'chosen[0].tool_calls': is not supported"),
    "one nesting too much": (second(prompt={"messages": TALK}), "field 'prompt': expected a string or a list"),
    "a list in a list": (second(prompt=[TALK]), "field 'prompt[0]': expected a message"),
    "mixed shapes": (second(prompt="q"), "is a list of messages but 'prompt' is a string"),
    "mixed answers": (second(rejected="no"), "give both in one shape"),
    "no common prompt": (second(prompt=ABSENT), "do not begin with the same messages"),
    "the prompt again": (second(chosen=[*TALK, *YES]), "field 'chosen': repeats the prompt"),
    "weight 0": (second(weight=0), "field 'weight': expected a number above 0, got 0"),
    "weight in words": (second(weight="much"), "field 'weight': expected a number above 0"),
    "sft without an answer": (
        both(setting("train.objective=sft"), second({"messages": TALK})),
        "no message is of role 'assistant': nothing to train on",
    ),
    "sft text in a list": (
        both(setting("train.objective=sft"), second({"text": TALK})),
        "field 'text': expected a string, got a list",
    ),
    "bad held-out rows beside good ones": (
        both(second({"prompt": 1}), setting(f"data.train={OWN_PAIRS}", "data.eval={data}")),
        "field 'chosen': missing",
    ),
}
DATA = [
    *kinds("{data}: ", WHOLE_FILE),
    *kinds("{data}:1: ", FIRST_LINE),
    *kinds("{data}:2: ", SECOND_LINE),
    *kinds("all 2 rows ", {"no row short enough": (setting("data.max_length=9"), "data.max_length = 9; raise it")}),
]

TEMPLATE_TEXT = {
    "a syntax error": (template("{% for m in messages %}"), "chat template, line 1: Unexpected end of template"),
    "an unknown filter": (template("{{ messages|shout }}"), "No filter named 'shout'"),
    "an unknown tag": (template("{% frob %}"), "unknown tag 'frob'"),
    "a number": (template(7), "'chat_template' must be a string or a list"),
    "no default": (template([{"name": "tool", "template": "x"}]), "no chat template named 'default'"),
}
TEMPLATE_AT_WORK = {
    "one that refuses": (template("{{ raise_exception('only tools here') }}"), "only tools here"),
    "one that reaches for Python": (template("{{ messages.__class__.__mro__ }}"), "unsafe"),
    "an unknown function": (template("{{ now() }}"), "'now' is undefined"),
    "a message that is not there": (template("{{ messages[9].content }}"), "has no element 9"),
    "a division by zero": (template("{{ 1 // 0 }}"), "zero"),
    "one deaf to answers": (template("{{ messages[0].content }}"), "prints nothing for the assistant's message"),
    "one that rewrites the prompt": (template("{{ messages|length }}"), "changes the text before the answer"),
}
TEMPLATE = [
    *kinds("{model}/tokenizer_config.json: ", TEMPLATE_TEXT),
    *kinds("{data}:1: ", TEMPLATE_AT_WORK),
    *kinds("{model}: ", {"none for messages": (template(ABSENT), "no chat template, which rows of messages need")}),
    *kinds("no.jinja: ", {"no such file": (setting("data.chat_template=no.jinja"), "cannot be read")}),
    *kinds(
        "{model}/model.safetensors: ",
        {"a file that is not text": (setting("data.chat_template={model}/model.safetensors"), "is not UTF-8 text")},
    ),
]


def other_tokenizer(name: str, content: bytes) -> object:
    return both(model_file("tokenizer.json", None), model_file(name, content))


TOKENIZER_FOLDER = {
    "none": (model_file("tokenizer.json", None), "no tokenizer.json and no tokenizer.model"),
    "only vocab.json": (other_tokenizer("vocab.json", b"{}"), "vocab.json alone has no merges.txt"),
    "an end token it lacks": (tokenizer_config(eos_token="<stop>"), "eos_token '<stop>' is not in the vocabulary"),
    "no end token for strings": (both(tokenizer_config(eos_token=ABSENT), rows(PLAIN)), "no eos_token"),
    "ids beyond the weights": (
        both(config(vocab_size=100), tensors(lambda t: t.update({name: t[name][:100].clone() for name in HEADS}))),
        "vocab_size in config.json is 100: tokenizer and weights do not belong together",
    ),
}
UNREADABLE = "cannot be read as a tokenizer"
TOKENIZER = [
    *kinds("{model}: ", TOKENIZER_FOLDER),
    *kinds(
        "{model}/tokenizer.json: ",
        {
            "not JSON": (model_file("tokenizer.json", "{"), UNREADABLE),
            "JSON of another kind": (model_file("tokenizer.json", '{"a": 1}'), UNREADABLE),
            "an empty file": (model_file("tokenizer.json", ""), UNREADABLE),
        },
    ),
    *kinds(
        "{model}/tokenizer_config.json: ",
        {
            "a torn config": (model_file("tokenizer_config.json", "{"), "cannot be read as JSON"),
            "a config that is a list": (model_file("tokenizer_config.json", "[]"), "expected a JSON object"),
            "added tokens in a list": (tokenizer_config(added_tokens_decoder=[1]), "must map ids to objects"),
        },
    ),
    *kinds(
        "{model}/tokenizer.model: ",
        {
            "garbage": (other_tokenizer("tokenizer.model", b"\0garbage" * 9), "as a sentencepiece model"),
            "a tiktoken file": (other_tokenizer("tokenizer.model", b"IQ== 0\nIg== 1\n"), "does not say how"),
        },
    ),
]


@pytest.fixture
def setup(tiny_model_dir: Path, tmp_path: Path) -> Setup:
    return make_setup(tmp_path, tiny_model_dir)


@pytest.mark.parametrize("kind", DATA)
def test_bad_data(kind: Kind, setup: Setup, capsys: pytest.CaptureFixture[str]) -> None:
    assert_training_refused(kind, setup, capsys)


@pytest.mark.parametrize("kind", TEMPLATE)
def test_bad_template(kind: Kind, setup: Setup, capsys: pytest.CaptureFixture[str]) -> None:
    assert_training_refused(kind, setup, capsys)


@pytest.mark.parametrize("kind", TOKENIZER)
def test_bad_tokenizer(kind: Kind, setup: Setup, capsys: pytest.CaptureFixture[str]) -> None:
    assert_training_refused(kind, setup, capsys)


def test_what_nothing_is_wrong_with_runs(setup: Setup) -> None:
    """Else every kind above could be refused for a reason that all share."""
    setup.overrides.append("train.max_steps=1")
    assert run_here(setup.argv()) == 0
    assert (setup.run_dir / "notes.txt").read_text() == "keep me"
    assert (setup.run_dir / "export" / "model.safetensors").stat().st_size > 100_000


def test_many_bad_rows_come_together_and_are_counted(setup: Setup, capsys: pytest.CaptureFixture[str]) -> None:
    rows(*[PLAIN | {"chosen": ""}] * 3, PLAIN, b"{", PLAIN | {"weight": -1})(setup)
    before = contents(setup.run_dir)
    assert run_here(setup.argv()) == 2
    first, *lines, count = capsys.readouterr().err.splitlines()
    assert first.startswith(f"error: {setup.data}:1: field 'chosen': is empty")
    assert [line.split(": ")[0] for line in lines] == [f"{setup.data}:{number}" for number in (2, 3, 5, 6)]
    assert count == "5 errors" and contents(setup.run_dir) == before
    rows(*[{}] * 50)(setup)
    assert run_here(setup.argv()) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 21 and lines[-1] == "20 errors, the rest was not checked"


@pytest.mark.parametrize(
    "break_it", [template("{{ raise_exception('no') }}"), setting("loss.betta=1")], ids=["template", "key"]
)
def test_the_real_command(break_it, setup: Setup) -> None:  # noqa: ANN001
    break_it(setup)
    before = contents(setup.run_dir)
    command = [sys.executable, str(ROOT / "trainer" / "main.py"), *setup.argv()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert_refused(done.returncode, done.stderr)
    assert contents(setup.run_dir) == before

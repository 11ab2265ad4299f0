"""Recipes: a TOML list of stages, which are commands over files. Read and checked here; nothing is run.

    name = "quickstart"                         # letters, digits, _ and -
    work = "runs/recipes/quickstart"            # where outputs go (this is the default); may name settings

    [settings]                                  # what --set changes: a text, number, true/false or list
    model = "models/SmolLM2-135M-Instruct"
    data = ""
    sampler = ["--temperature", "1.0"]

    [required]                                  # what is said where such a setting is empty or its file is not there
    data = "questions with id, question, gold; published at ..."

    [loops.round]
    times = 3                                   # at most so many turns, from 1
    stop_when = "{work}/round{round}/state"     # ends after the turn that left this file empty or beginning with "stop"
    [loops.round.carry.policy]                  # a placeholder {policy}: one value in turn 1, another one later
    first = "{model}"
    then = "{work}/round{previous}/train/export"

    [[stage]]
    name = "sample"
    each = "round"                              # or ["round", "turn"]: the inner loop in each turn of the outer
    command = ["{python}", "-m", "eval.sample", "--model", "{policy}", "--prompts", "{data}", "--n", "4",
               "{sampler}", "--out", "{work}/round{round}/samples.jsonl"]
    inputs = ["{data}", "{policy}"]             # files or folders that it reads
    outputs = ["{work}/round{round}/samples.jsonl"]   # files or folders that it makes, in {work}
    appends = true                              # it goes on by itself with what is there, and adds to it
    calls = { prompts = "{data}", n = 4, max_tokens = 256, model = "{policy}" }   # for the plan
    when = "model"    # only if this setting is not empty, false or 0 (of a list: each); `unless`: only if it is (each)

Placeholders: the settings, {work}, {recipe} (the recipe's folder), {python} (this interpreter); in a loop also {round}
and {previous} (the turn before; 0 in the first, {previous_round} says of which loop), {each_round} (the text once for
every turn up to this one), {each_before_round} (for 0 and every turn before this one) and what it carries; after the
loop {last_round} (the last turn, 0 if there was none), {each_round}, and of the rest what the next turn would have had.
A list stands alone as "{name}" and becomes its items.

`extends = "other.toml"`: stages of a recipe beside this one, with settings of its own (data_tools/pipeline_extends.py).
"""

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_tools.errors import UserError
from data_tools.pipeline_extends import extended
from data_tools.pipeline_tables import CheckedTable, fail, nearest, read_tables
from data_tools.placeholders import fill, names_in

Setting = str | int | float | bool | list[str]

RECIPE_KEYS = ("name", "about", "work", "settings", "required", "loops", "stage")
LOOP_KEYS = ("times", "stop_when", "carry")
CARRY_KEYS = ("first", "then")
STAGE_KEYS = ("name", "about", "command", "inputs", "outputs", "appends", "calls", "each", "when", "unless")
CALL_KEYS = ("prompts", "n", "max_tokens", "model", "samples")
OWN_NAMES = ("work", "recipe", "python", "previous")
NAME = re.compile(r"[A-Za-z0-9_-]+")
WORD = re.compile(r"[A-Za-z_]\w*", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Calls:
    """What a stage asks of a model: so many samples of each row of `prompts`. Texts may hold placeholders."""

    prompts: str
    n: str = "1"
    max_tokens: str | None = None
    model: str | None = None
    samples: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A [[stage]] as written; placeholders are not filled in."""

    name: str
    command: tuple[str, ...]
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    appends: bool = False
    calls: Calls | None = None
    each: tuple[str, ...] = ()
    about: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loop:
    """A [loops.name]; carry: name to (value in the first turn, value in later ones)."""

    name: str
    times: str
    stop_when: str | None = None
    carry: Mapping[str, tuple[str, str]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Block:
    """Stages that stand together; loop None: the whole recipe."""

    loop: Loop | None
    body: tuple["Stage | Block", ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A checked recipe with its settings decided; stages that `when` or `unless` leave out are not in `block`."""

    path: Path
    name: str
    work: Path
    settings: Mapping[str, Setting]
    required: Mapping[str, str]
    block: Block

    @property
    def folder(self) -> Path:
        return self.path.parent


def read_recipe(path: str | Path, sets: Sequence[str] = ()) -> Recipe:
    """Read a recipe; sets: `key=value` texts over its settings. Raises UserError naming table and key."""
    path = Path(path)
    tables = CheckedTable(str(path), "", extended(path, read_tables), RECIPE_KEYS)
    name = tables.text("name", NAME)
    tables.text("about", None, "")
    overridden = _overrides(sets)
    settings = _settings(path, tables, overridden)
    required = tables.table("required")
    for key, text in required.items():
        if key not in settings:
            fail(path, "[required]", f"'{key}' is no setting; known: {', '.join(sorted(settings))}")
        if not isinstance(text, str):
            fail(path, "[required]", f"'{key}': expected a text that says what is needed")
        if settings[key] in ("", []):
            raise UserError(f"{path}: setting '{key}' is empty: {text}; give it by --set {key}=...")
    work_text = overridden.get("work", tables.text("work", None, f"runs/recipes/{name}"))
    try:
        work = Path(fill(work_text, {**texts(settings), "recipe": str(path.parent)}))
    except KeyError as error:
        fail(path, "work", f"{{{error.args[0]}}} is no setting")
    loops = {key: _loop(path, key, table) for key, table in tables.table("loops").items()}
    block = Block(None, _blocks(path, _stages(path, tables, settings), loops, 0, set()))
    _check_names(path, settings, loops)
    return Recipe(path=path, name=name, work=work, settings=settings, required=required, block=block)


def texts(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as a command line shows them; lists stay lists of texts."""
    return {
        key: str(value).lower() if isinstance(value, bool) else value if isinstance(value, list) else str(value)
        for key, value in settings.items()
    }


def _overrides(sets: Sequence[str]) -> dict[str, str]:
    found = {}
    for text in sets:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--set {text}: expected key=value")
        found[key.strip()] = value
    return found


def _settings(path: Path, tables: CheckedTable, overridden: Mapping[str, str]) -> dict[str, Setting]:
    """The recipe's, with {recipe} filled in, and what --set says over them."""
    settings: dict[str, Setting] = {}
    for key, value in tables.table("settings").items():
        if not WORD.fullmatch(key):
            fail(path, "[settings]", f"'{key}': a name has letters, digits and _")
        is_list = isinstance(value, list) and all(isinstance(own, str) for own in value)
        if not is_list and not isinstance(value, str | int | float | bool):
            fail(path, "[settings]", f"'{key}': expected a text, a number, true, false or a list of texts")
        folder = str(path.parent)
        settings[key] = value.replace("{recipe}", folder) if isinstance(value, str) else value
        if isinstance(value, list):
            settings[key] = [own.replace("{recipe}", folder) for own in value]
    for key, text in overridden.items():
        if key == "work":
            continue
        if key not in settings:
            raise UserError(f"--set {key}: no such setting{nearest(key, settings)}; known: work, {', '.join(settings)}")
        settings[key] = _parsed(key, text, settings[key])
    return settings


def _parsed(key: str, text: str, default: Setting) -> Setting:
    """A text of --set as the kind that the recipe's own value has."""
    if isinstance(default, str):
        return text
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, KeyError):
        value = None
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    texts_only = not isinstance(value, list) or all(isinstance(own, str) for own in value)
    if type(value) is not type(default) or not texts_only:
        kind = {int: "a whole number", float: "a number", bool: "true or false"}.get(type(default), '["a", "b"]')
        raise UserError(f"--set {key}={text}: expected {kind}, as in the recipe ({default!r})")
    return value


def _loop(path: Path, name: str, table: object) -> Loop:
    where = f"[loops.{name}]"
    if not WORD.fullmatch(name):
        fail(path, where, "a name has letters, digits and _")
    own = CheckedTable(str(path), where, table, LOOP_KEYS)
    times = own.count("times")
    if times is None:
        own.fail("'times' is missing")
    carry = {}
    for key, value in own.table("carry").items():
        one = CheckedTable(str(path), f"[loops.{name}.carry.{key}]", value, CARRY_KEYS)
        carry[key] = (one.text("first"), one.text("then"))
    stop_when = own.optional("stop_when")
    if stop_when is not None and name not in names_in(stop_when):
        own.fail(f"'stop_when' must hold {{{name}}}: a file of each turn, so that a second run stops at the same one")
    return Loop(name=name, times=times, stop_when=stop_when, carry=carry)


def _stages(path: Path, tables: CheckedTable, settings: Mapping[str, Setting]) -> list[Stage]:
    """Those that take part; all are checked."""
    rows = tables.get("stage")
    if not isinstance(rows, list) or not rows:
        fail(path, "[[stage]]", "a recipe has at least one")
    found: dict[str, Stage] = {}
    taking_part = []
    for number, row in enumerate(rows, start=1):
        name = row.get("name") if isinstance(row, dict) else None
        where = f"stage '{name}'" if isinstance(name, str) else f"stage {number}"
        own = CheckedTable(str(path), where, row, STAGE_KEYS)
        stage = _stage(own, path, where)
        if stage.name in found:
            own.fail("another stage has this name")
        found[stage.name] = stage
        if all(_are_on(own, "when", settings)) and not any(_are_on(own, "unless", settings)):
            taking_part.append(stage)
    if not taking_part:
        fail(path, "[[stage]]", "the settings leave out every stage")
    return taking_part


def _stage(own: CheckedTable, path: Path, where: str) -> Stage:
    command, outputs = own.texts("command"), own.texts("outputs")
    if not command or not outputs:
        own.fail(f"'{'outputs' if command else 'command'}' is missing")
    calls = None
    if "calls" in own:
        table = CheckedTable(str(path), f"{where}: calls", own.get("calls"), CALL_KEYS)
        calls = Calls(
            prompts=table.text("prompts"),
            n=table.count("n", "1") or "1",
            max_tokens=table.count("max_tokens"),
            model=table.optional("model"),
            samples=table.optional("samples"),
        )
    return Stage(
        name=own.text("name", NAME),
        about=own.text("about", None, ""),
        command=command,
        inputs=own.texts("inputs"),
        outputs=outputs,
        appends=own.flag("appends"),
        calls=calls,
        each=own.texts("each", single=True),
    )


def _are_on(own: CheckedTable, key: str, settings: Mapping[str, Setting]) -> list[bool]:
    """Of each setting that `when` or `unless` names, whether it says something; all are looked up."""
    names = own.texts(key, single=True)
    for name in names:
        if name not in settings:
            own.fail(f"'{key}': '{name}' is no setting{nearest(name, settings)}")
    return [settings[name] not in ("", [], False, 0) for name in names]


def _blocks(
    path: Path, stages: Sequence[Stage], loops: Mapping[str, Loop], depth: int, seen: set[str]
) -> tuple[Stage | Block, ...]:
    """Stages of one loop, standing together, become a block."""
    body: list[Stage | Block] = []
    rest = list(stages)
    while rest:
        stage = rest[0]
        if len(stage.each) == depth:
            body.append(rest.pop(0))
            continue
        name = stage.each[depth]
        if name not in loops:
            fail(path, f"stage '{stage.name}'", f"each: there is no [loops.{name}]{nearest(name, loops)}")
        if name in seen:
            fail(path, f"stage '{stage.name}'", f"the stages of loop '{name}' do not stand together")
        seen.add(name)
        turn = []
        while rest and rest[0].each[: depth + 1] == stage.each[: depth + 1]:
            turn.append(rest.pop(0))
        body.append(Block(loops[name], _blocks(path, turn, loops, depth + 1, seen)))
    return tuple(body)


def _check_names(path: Path, settings: Mapping[str, Setting], loops: Mapping[str, Loop]) -> None:
    """No two meanings for one placeholder."""
    taken = {name: "Logratio's own" for name in OWN_NAMES}
    for loop in loops.values():
        own = [loop.name, *(f"{word}_{loop.name}" for word in ("previous", "last", "each", "each_before")), *loop.carry]
        for name in own:
            if name in taken:
                fail(path, f"[loops.{loop.name}]", f"{{{name}}} is {taken[name]} already; take another name")
            taken[name] = f"of [loops.{loop.name}]"
    for name in settings:
        if name in taken:
            fail(path, "[settings]", f"{{{name}}} is {taken[name]}; take another name")

"""The stages of a recipe one after another, loops unrolled and placeholders filled in, and what is wrong with them.

`walk` yields them in order. Whether a loop ends is asked after each turn, so that the files that decide it can be made
meanwhile; a check or a plan, which make none, answer as they like. Nothing is run here.
"""

import itertools
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.errors import UserError
from data_tools.pipeline_recipe import Block, Calls, Loop, Recipe, Stage, texts
from data_tools.pipeline_tables import nearest
from data_tools.placeholders import fill, names_in

OWN_FILES = ("pipeline", "logs", "provenance.json", "provenance.md")
"""What the pipeline itself keeps in the work folder."""

Stopped = Callable[[Loop, int, str], bool]
"""(loop, turn, path of its stop_when after that turn): does the loop end here? Turn 0 is asked before the first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A stage in one turn of its loops. key: its name, with the turns behind it (`sample.round2.turn1`).

    plain: the command with the work folder, the recipe's folder and the interpreter as placeholders, so that a work
    folder may be moved.
    """

    stage: Stage
    key: str
    turns: Mapping[str, int]
    command: tuple[str, ...]
    plain: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    calls: Calls | None


def walk(recipe: Recipe, stopped: Stopped) -> Iterator[Step]:
    """All steps in order. Raises UserError for a placeholder without value."""
    own = {"work": str(recipe.work), "recipe": str(recipe.folder), "python": sys.executable}
    yield from _walk(recipe, recipe.block, {**texts(recipe.settings), **own}, {}, stopped)


def check(recipe: Recipe) -> list[Step]:
    """All steps, were no loop to end early, after all checks that need no run. Raises UserError."""
    steps: list[Step] = []
    made: dict[str, Step] = {}

    def stopped(loop: Loop, turn: int, path: str) -> bool:
        if turn and not makers(made, path):
            problem = f"stop_when: no stage of the loop makes {path}; it must be an output"
            raise UserError(f"{recipe.path}: [loops.{loop.name}]: {problem}")
        return False

    for step in walk(recipe, stopped):
        steps.append(step)
        _check_outputs(recipe, step, made)
        made |= dict.fromkeys(step.outputs, step)
    earlier: dict[str, Step] = {}
    for step in steps:
        _check_inputs(recipe, step, earlier, made)
        _check_command(recipe, step, earlier)
        earlier |= dict.fromkeys(step.outputs, step)
    return steps


def makers(made: Mapping[str, Step], path: str) -> list[Step]:
    """The steps whose outputs are this path, hold it or lie in it."""
    if path in made:
        return [made[path]]
    found = [step for own, step in made.items() if inside(path, own) or inside(own, path)]
    return list({step.key: step for step in found}.values())


def inside(path: str, folder: str) -> bool:
    """Does a path lie in a folder (or is it the folder)?"""
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def plain_text(text: str, recipe: Recipe) -> str:
    """A text without the paths that say only where things stand."""
    own = {str(recipe.work): "{work}", str(recipe.folder): "{recipe}"}
    for path in sorted(own, key=len, reverse=True):
        if path != ".":
            text = re.sub(rf"(?<![\w./-]){re.escape(path)}(?![\w.-])", own[path], text)
    return "{python}" if text == sys.executable else text


def masked(text: str) -> str:
    """A text as it may be written down: without the user and password of an address."""
    return re.sub(r"(\w+://)[^/@\s]+@", r"\1***@", text)


def shown(command: Sequence[str]) -> list[str]:
    """A command as it may be written down, `python` for this interpreter."""
    return ["python" if own == sys.executable else masked(own) for own in command]


def label(step: Step) -> str:
    """`sample` or `sample [round 2, turn 1]`."""
    turns = ", ".join(f"{loop} {turn}" for loop, turn in step.turns.items())
    return f"{step.stage.name} [{turns}]" if turns else step.stage.name


def _walk(
    recipe: Recipe, block: Block, values: dict[str, Any], turns: Mapping[str, int], stopped: Stopped
) -> Iterator[Step]:
    for part in block.body:
        if isinstance(part, Stage):
            yield _step(recipe, part, values, turns)
        else:
            yield from _walk_loop(recipe, part, values, turns, stopped)


def _walk_loop(
    recipe: Recipe, block: Block, values: dict[str, Any], turns: Mapping[str, int], stopped: Stopped
) -> Iterator[Step]:
    """Its turns; leaves in `values` what later stages may name."""
    loop = block.loop
    assert loop is not None
    where = f"{recipe.path}: [loops.{loop.name}]"
    times = whole_number(_filled(loop.times, values, f"{where}: times"), f"{where}: times")
    last = 0
    while last < times and not _ends(loop, last, values, stopped, where):
        last += 1
        inner = {**values, **_turn_values(loop, last, values, where), loop.name: str(last)}
        yield from _walk(recipe, block, inner, {**turns, loop.name: last}, stopped)
    following = _turn_values(loop, last + 1, values, where)
    values |= {name: following[name] for name in loop.carry}
    values |= {f"last_{loop.name}": str(last), f"each_{loop.name}": _numbers(last)}
    values[f"each_before_{loop.name}"] = following[f"each_before_{loop.name}"]


def _ends(loop: Loop, turn: int, values: Mapping[str, Any], stopped: Stopped, where: str) -> bool:
    if loop.stop_when is None:
        return False
    path = os.path.normpath(_filled(loop.stop_when, {**values, loop.name: str(turn)}, f"{where}: stop_when"))
    return stopped(loop, turn, path)


def _turn_values(loop: Loop, turn: int, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    own: dict[str, Any] = {name: str(turn - 1) for name in ("previous", f"previous_{loop.name}")}
    own[f"each_{loop.name}"] = _numbers(turn)
    own[f"each_before_{loop.name}"] = ["0", *_numbers(turn - 1)]
    known = {**values, **own, loop.name: str(turn)}
    for name, (first, then) in loop.carry.items():
        own[name] = _filled(first if turn == 1 else then, known, f"{where}: carry.{name}")
    return own


def _numbers(last: int) -> list[str]:
    return [str(turn) for turn in range(1, last + 1)]


def _step(recipe: Recipe, stage: Stage, values: Mapping[str, Any], turns: Mapping[str, int]) -> Step:
    where = f"{recipe.path}: stage '{stage.name}'"
    calls = None
    if stage.calls is not None:
        own = {
            name: text if text is None else _filled(text, values, f"{where}: calls.{name}")
            for name in ("prompts", "n", "max_tokens", "model", "samples")
            for text in [getattr(stage.calls, name)]
        }
        for name in ("n", "max_tokens"):
            if own[name] is not None:
                whole_number(str(own[name]), f"{where}: calls.{name}")
        own |= {name: os.path.normpath(path) for name in ("prompts", "samples") if (path := own[name])}
        calls = Calls(**own)  # type: ignore[arg-type]
    command = _filled_list(stage.command, values, f"{where}: command")
    return Step(
        stage=stage,
        key=".".join([stage.name, *(f"{loop}{turn}" for loop, turn in turns.items())]),
        turns=dict(turns),
        command=command,
        plain=tuple(plain_text(own, recipe) for own in command),
        inputs=tuple(dict.fromkeys(_paths(stage.inputs, values, f"{where}: inputs"))),
        outputs=tuple(dict.fromkeys(_paths(stage.outputs, values, f"{where}: outputs"))),
        calls=calls,
    )


def _paths(paths: Sequence[str], values: Mapping[str, Any], where: str) -> Iterator[str]:
    for path in _filled_list(paths, values, where):
        if not path:
            raise UserError(f"{where}: a path is empty; is a setting?")
        yield os.path.normpath(path)


def _filled_list(items: Sequence[str], values: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """Placeholders filled in; an item with a list in it becomes several."""
    found: list[str] = []
    for item in items:
        lists = [name for name in sorted(names_in(item)) if isinstance(values.get(name), list)]
        others = [name for name in lists if not name.startswith("each_") and item != f"{{{name}}}"]
        if others:
            raise UserError(f"{where}: '{item}': the list {{{others[0]}}} must stand alone")
        for chosen in itertools.product(*(values[name] for name in lists)):
            found.append(_filled(item, {**values, **dict(zip(lists, chosen, strict=True))}, where))
    return tuple(found)


def _filled(text: str, values: Mapping[str, Any], where: str) -> str:
    try:
        return fill(text, values)
    except KeyError as error:
        name = error.args[0]
        if name in values:
            raise UserError(f"{where}: '{text}': {{{name}}} is a list, one text is needed") from None
        known = ", ".join(sorted(values))
        problem = f"{{{name}}} has no value here{nearest(name, values)}; known: {known}"
        raise UserError(f"{where}: '{text}': {problem}") from None


def whole_number(text: str, where: str) -> int:
    """Raises UserError for anything else."""
    if not text.isdecimal():
        raise UserError(f"{where}: expected a whole number, got '{text}'")
    return int(text)


def _check_outputs(recipe: Recipe, step: Step, made: Mapping[str, Step]) -> None:
    """In the work folder, not the pipeline's own, nobody else's."""
    work = os.path.normpath(recipe.work)
    for path in step.outputs:
        where = f"{recipe.path}: stage '{step.key}': output {path}"
        if not inside(path, work) or path == work:
            raise UserError(f"{where}: lies outside the work folder; begin it with {{work}}/")
        if any(inside(path, os.path.join(work, own)) for own in OWN_FILES):
            raise UserError(f"{where}: this name is the pipeline's own; take another one")
        for other in makers(made, path):
            if other.stage.name == step.stage.name:
                names = ", ".join(f"{{{loop}}}" for loop in step.turns)
                raise UserError(f"{where}: is also that of '{other.key}'; put {names} into its path")
            raise UserError(f"{where}: is made by stage '{other.key}' too; a path belongs to one stage")


def _check_inputs(recipe: Recipe, step: Step, earlier: Mapping[str, Step], made: Mapping[str, Step]) -> None:
    for path in step.inputs:
        where = f"{recipe.path}: stage '{step.key}': input {path}"
        if makers(earlier, path):
            continue
        later = makers(made, path)
        if later:
            raise UserError(f"{where}: is made by stage '{later[0].key}', which does not come before")
        if inside(path, os.path.normpath(recipe.work)):
            raise UserError(f"{where}: no stage makes it{nearest(path, earlier)}")
        if not os.path.exists(path):
            raise UserError(f"{where}: no such file or folder{_published(recipe, path)}")
    if step.calls and not os.path.exists(step.calls.prompts) and not makers(earlier, step.calls.prompts):
        raise UserError(f"{recipe.path}: stage '{step.key}': calls: prompts {step.calls.prompts}: no stage makes it")


def _published(recipe: Recipe, path: str) -> str:
    """Where to get what a required setting names."""
    for key, text in recipe.required.items():
        if os.path.normpath(str(recipe.settings[key])) == path:
            return f"; setting '{key}': {text}"
    return ""


def _check_command(recipe: Recipe, step: Step, earlier: Mapping[str, Step]) -> None:
    """What a command is seen to read must be among the inputs, or a change of it would go unnoticed."""
    folder = Path(recipe.folder).as_posix() + "/"
    for argument in step.command:
        value = argument.partition("=")[2] if argument.startswith("-") and "=" in argument else argument
        path = os.path.normpath(value) if value else value
        if any(inside(path, own) or inside(own, path) for own in (*step.inputs, *step.outputs)):
            continue
        of_stage = [other for own, other in earlier.items() if inside(path, own)]
        if of_stage or (value.startswith(folder) and os.path.exists(path)):
            said = f"of stage '{of_stage[0].key}'" if of_stage else "of the recipe"
            problem = f"the command names {value} {said}, which is no input; add it to inputs"
            raise UserError(f"{recipe.path}: stage '{step.key}': {problem}")

"""A recipe that has another one's stages and settings of its own: `extends = "published.toml"`, a file beside it.

It may have `name`, `about`, `work`, [settings] and [required]; what it leaves out is the other one's, of [settings]
each key (a [required] of its own is all that is required). A setting must be one that the other has, and of its kind,
so that a slip of the pen is no new setting that nothing reads.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from data_tools.errors import UserError

OWN_KEYS = ("extends", "name", "about", "work", "settings", "required")
Tables = dict[str, Any]


def extended(path: Path, read: Callable[[Path], Tables]) -> Tables:
    """The tables of a recipe, with what it extends put in. read: a TOML file's tables. Raises UserError."""
    tables = read(path)
    if "extends" not in tables:
        return tables
    said = tables["extends"]
    if not isinstance(said, str) or not said or Path(said).name != said:
        raise UserError(f"{path}: 'extends': expected the name of a recipe in the same folder, got {said!r}")
    base = read(path.with_name(said))
    if "extends" in base:
        raise UserError(f"{path}: 'extends': {said} extends another one itself; name that one")
    for key in tables:
        if key not in OWN_KEYS:
            raise UserError(f"{path}: '{key}' stands in {said}, which this recipe extends; leave it out")
    _check_settings(path, said, tables.get("settings", {}), base.get("settings", {}))
    found = {**base, **{key: value for key, value in tables.items() if key != "extends"}}
    if "settings" in found:
        found["settings"] = {**base.get("settings", {}), **tables.get("settings", {})}
    return found


def _check_settings(path: Path, base: str, own: object, theirs: Mapping[str, Any]) -> None:
    if not isinstance(own, dict):
        raise UserError(f"{path}: [settings]: expected a table")
    for key, value in own.items():
        if key not in theirs:
            raise UserError(f"{path}: [settings]: '{key}' is no setting of {base}; known: {', '.join(theirs)}")
        if type(value) is not type(theirs[key]):
            kinds = f"{theirs[key]!r} there, {value!r} here"
            raise UserError(f"{path}: [settings]: '{key}' is of another kind than in {base}: {kinds}")

"""One training file of several sources: weights, caps, a system prompt for each, in an order that a seed decides.

    python -m data_tools.mixture mixture.toml --out train.jsonl [--folder DIR] [--tokenizer DIR]

    kind = "sft"             # or pair
    rows = 20000             # in all, shared by weight; left out: every source gives all it has, up to its cap
    seed = 0
    dedup = "prompt"         # a prompt once (default of sft), row: a row once (default of pair), none
    [[source]]
    name = "medmcqa"         # becomes the rows' `source`
    path = "sft/medmcqa.jsonl"   # beside the TOML file, or in --folder
    weight = 3.0             # with `rows` only: its share is weight / sum of weights
    cap = 5000               # at most
    system = "Answer with the option's letter."   # every row's system message; a row's own is replaced, and counted

Rows may have any shape that training takes. SFT rows become `messages`; pairs keep their columns. A row's id becomes
`name/id`. Of equal prompts (system messages and white space do not count) the first source's stays. Which rows of a
source are taken, and their order, follow sha256(seed, name, id): adding a source or a row moves no other. A source that
has fewer rows than its share (or none: a file of no bytes) gives them all, which is said and not made up by others.
Tokens are those of all message texts by the tokenizer of --tokenizer, without the template's; or, without one, guessed
as a quarter of the bytes.
"""

import argparse
import hashlib
import json
import sys
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from data_tools.errors import DataError, UserError, check_each
from data_tools.jsonl import iter_jsonl, write_rows
from data_tools.samples import messages_of
from data_tools.schema import Record, Text, check_record
from data_tools.tokenizer import load_tokenizer

Dedup = Literal["prompt", "row", "none"]
BYTES_A_TOKEN = 4
KEYS = {"kind": str, "rows": int, "seed": int, "dedup": str, "source": list}
SOURCE_KEYS = {"name": str, "path": str, "weight": (int, float), "cap": int, "system": str}
Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A table [[source]]."""

    name: str
    path: Path
    weight: float = 1.0
    cap: int | None = None
    system: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """A checked TOML file."""

    kind: Literal["sft", "pair"]
    sources: tuple[Source, ...]
    rows: int | None = None
    seed: int = 0
    dedup: Dedup = "prompt"


@dataclass(slots=True)
class Part:
    """What became of a source. wanted: its share. rows: (place in the order, row) of what is taken."""

    source: Source
    read: int = 0
    twice: int = 0
    systems: int = 0
    wanted: int | None = None
    rows: list[tuple[str, Row]] = field(default_factory=list)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code: 0, or 2 with one line a fault of the input."""
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.mixture",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("mixture", help="TOML file")
    parser.add_argument("--out", required=True, help="JSON Lines, written anew and whole")
    parser.add_argument(
        "--folder", metavar="DIR", help="where the sources' paths begin (default: beside the TOML file)"
    )
    parser.add_argument("--tokenizer", metavar="DIR", help="count tokens with this model folder's tokenizer")
    args = parser.parse_args(argv)
    try:
        parts = mix(read_mixture(args.mixture, args.folder))
        rows = [row for _, row in sorted((own for part in parts for own in part.rows), key=lambda own: own[0])]
        counts = _tokens(rows, args.tokenizer)
        write_rows(args.out, rows)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(_lines(parts, rows, counts, args.out, guessed=args.tokenizer is None)))
    return 0


def read_mixture(path: str | Path, folder: str | Path | None = None) -> Mixture:
    """Read and check a TOML file; folder: where the sources' paths begin, None: beside it.

    Raises UserError that names the file and the key.
    """
    try:
        tables = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: is no TOML: {error}") from error
    _check(path, "", tables, KEYS)
    kind, given = tables.get("kind", "sft"), tables.get("source", [])
    dedup = tables.get("dedup", "prompt" if kind == "sft" else "row")
    for key, value, known in (("kind", kind, ("sft", "pair")), ("dedup", dedup, ("prompt", "row", "none"))):
        if value not in known:
            raise UserError(f"{path}: {key} = {value!r}: must be {' or '.join(known)}")
    sources = []
    for own in given:
        _check(path, "source.", own, SOURCE_KEYS)
        if missing := [name for name in ("name", "path") if name not in own]:
            raise UserError(f"{path}: a [[source]] has no '{missing[0]}'")
        sources.append(Source(**{**own, "path": Path(folder or Path(path).parent) / own["path"]}))
    for wrong, problem in (
        (not sources, "has no [[source]]"),
        (len({own.name for own in sources}) < len(sources), "two sources have one name"),
        (any(own.weight <= 0 for own in sources), "weight must be > 0"),
        (any(own.cap is not None and own.cap < 1 for own in sources), "cap must be 1 or more"),
        (tables.get("rows", 1) < 1, "rows must be 1 or more"),
        ("rows" not in tables and any("weight" in own for own in given), "weight needs rows, the number in all"),
    ):
        if wrong:
            raise UserError(f"{path}: {problem}")
    rows, seed = tables.get("rows"), tables.get("seed", 0)
    return Mixture(kind=kind, sources=tuple(sources), rows=rows, seed=seed, dedup=dedup)


def mix(mixture: Mixture) -> list[Part]:
    """The parts of the mixture, a source each. Raises DataErrors for rows that training would refuse."""
    seen: set[str] = set()
    parts = []
    for source, wanted in zip(mixture.sources, shares(mixture), strict=True):
        part = Part(source, wanted=None if mixture.rows is None else wanted)
        for record, raw in _records(source, mixture.kind):
            part.read += 1
            key = _key(record, mixture.dedup)
            if key in seen:
                part.twice += 1
                continue
            if mixture.dedup != "none":
                seen.add(key)
            place = hashlib.sha256(f"{mixture.seed}\n{source.name}\n{record.id}".encode()).hexdigest()
            part.rows.append((place, _row(record, raw, source, mixture.kind)))
        part.rows = sorted(part.rows, key=lambda own: own[0])[:wanted]
        part.systems = sum(row.pop("_replaced") for _, row in part.rows)
        parts.append(part)
    return parts


def shares(mixture: Mixture) -> list[int | None]:
    """How many rows each source is to give, at most; None: all. The largest remainders get what rounding leaves."""
    if mixture.rows is None:
        return [own.cap for own in mixture.sources]
    total = sum(own.weight for own in mixture.sources)
    exact = [mixture.rows * own.weight / total for own in mixture.sources]
    whole = [int(own) for own in exact]
    order = sorted(range(len(exact)), key=lambda index: (whole[index] - exact[index], index))
    for index in order[: mixture.rows - sum(whole)]:
        whole[index] += 1
    return [
        count if own.cap is None else min(count, own.cap) for count, own in zip(whole, mixture.sources, strict=True)
    ]


def _records(source: Source, kind: Literal["sft", "pair"]) -> list[tuple[Record, Row]]:
    ids: dict[str, int] = {}

    def check(item: tuple[int, object]) -> tuple[Record, Row]:
        line, value = item
        record = check_record(value, kind=kind, path=source.path, line=line)
        assert isinstance(value, dict)
        if kind == "sft" and record.prompt == "":
            problem = "has no prompt: a mixture of conversations needs one"
            raise DataError(source.path, line, field=None, problem=problem)
        if (first := ids.setdefault(record.id, line)) != line:
            raise DataError(source.path, line, field="id", problem=f"'{record.id}' already stands in line {first}")
        return record, value

    return check_each(iter_jsonl(source.path, may_be_empty=True), check)


def _key(record: Record, dedup: Dedup) -> str:
    texts = [record.prompt] if dedup == "prompt" else [record.prompt, *record.completions]
    turns = [[turn["role"], " ".join(turn["content"].split())] for text in texts for turn in _spoken(text)]
    return hashlib.sha256(json.dumps(turns).encode()).hexdigest()


def _spoken(text: Text) -> list[dict[str, str]]:
    """Messages without the system's."""
    return [turn for turn in messages_of(text) if turn["role"] != "system"]


def _row(record: Record, raw: Row, source: Source, kind: str) -> Row:
    """The row as it is written, and in `_replaced` whether another system message was."""
    head = {"id": f"{source.name}/{record.id}"}
    first = messages_of(record.prompt)[0]
    replaced = first["role"] == "system" and source.system not in (None, first["content"])
    tail = {"source": source.name, "_replaced": replaced}
    if kind == "sft":
        answer = record.completions[0]
        said = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else messages_of(answer)
        messages = [*_with_system(record.prompt, source.system), *said]
        shape = ("messages", "prompt", "completion", "text", "chosen", "rejected")
        return {**head, "messages": messages, **{k: v for k, v in raw.items() if k not in ("id", *shape)}, **tail}
    prompt: Any = record.prompt
    sides: Row = {}
    if not isinstance(prompt, str) or source.system is not None:
        prompt = _with_system(record.prompt, source.system)
        for name, text in zip(("chosen", "rejected"), record.completions, strict=True):
            sides[name] = [{"role": "assistant", "content": text}] if isinstance(text, str) else messages_of(text)
    return {**head, "prompt": prompt, **{k: v for k, v in raw.items() if k not in ("id", "prompt")}, **sides, **tail}


def _with_system(prompt: Text, system: str | None) -> list[dict[str, str]]:
    if system is None:
        return messages_of(prompt)
    return [{"role": "system", "content": system}, *_spoken(prompt)]


def _tokens(rows: Sequence[Row], folder: str | None) -> Counter[str]:
    """By source."""
    texts = [(row["source"], text) for row in rows for text in _texts(row)]
    if folder is None:
        counts = [-(-len(text.encode()) // BYTES_A_TOKEN) for _, text in texts]
    else:
        counts = [len(ids) for ids in load_tokenizer(folder).encode_plain_batch([text for _, text in texts])]
    found: Counter[str] = Counter()
    for (name, _), count in zip(texts, counts, strict=True):
        found[name] += count
    return found


def _texts(row: Mapping[str, Any]) -> list[str]:
    own = [row.get(name) for name in ("messages", "prompt", "chosen", "rejected")]
    listed = [turn["content"] for value in own if isinstance(value, list) for turn in value]
    return listed + [value for value in own if isinstance(value, str)]


def _lines(parts: Sequence[Part], rows: Sequence[Row], tokens: Counter[str], out: str, *, guessed: bool) -> list[str]:
    found = []
    about = "about " if guessed else ""
    for part in parts:
        name, taken = part.source.name, len(part.rows)
        said = f"{name}: {taken} of {part.read} rows, {about}{tokens[name]} tokens"
        said += f", {part.twice} left out as there already" if part.twice else ""
        said += f", {part.systems} system messages replaced" if part.systems else ""
        found.append(said + (f"; short of its {part.wanted}" if taken < (part.wanted or 0) else ""))
    return [*found, f"{len(rows)} rows of {len(parts)} sources, {about}{tokens.total()} tokens, in {out}"]


def _check(path: str | Path, where: str, table: object, known: Mapping[str, Any]) -> None:
    if not isinstance(table, dict):
        raise UserError(f"{path}: {where.rstrip('.')} must be tables [[source]]")
    for key, value in table.items():
        if key not in known:
            raise UserError(f"{path}: {where}{key}: no such key; known: {', '.join(known)}")
        if isinstance(value, bool) or not isinstance(value, known[key]):
            raise UserError(f"{path}: {where}{key} = {value!r}: is of another kind than it must be")


if __name__ == "__main__":
    sys.exit(main())

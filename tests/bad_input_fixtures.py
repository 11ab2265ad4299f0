"""A run that would work, and short names for breaking one thing in it. Not a test itself."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from run_fixtures import arguments, contents, run_here
from safetensors.torch import load_file, save_file

TALK = [{"role": "user", "content": "Is it so?"}]
YES, NO, PERHAPS = ([{"role": "assistant", "content": text}] for text in ("yes", "no", "perhaps"))
PAIR = {"prompt": TALK, "chosen": YES, "rejected": NO}
PLAIN = {"prompt": "q: ", "chosen": "a", "rejected": "b"}
ABSENT = object()


@dataclass
class Setup:
    """Paths of a run whose folder holds rows, an export and a note, but no checkpoint: a start would begin anew."""

    model: Path
    data: Path
    run_dir: Path
    overrides: list[str] = field(default_factory=list)

    @property
    def weights(self) -> Path:
        return self.model / "model.safetensors"

    def argv(self) -> list[str]:
        return arguments(self.run_dir, self.model, *self.overrides, data=self.data)


Break = Callable[[Setup], object]


@dataclass(frozen=True)
class Kind:
    """One kind of bad input: how to make it, the place that the message names ({model}, {data}: paths), its words."""

    break_it: Break
    place: str
    words: str


def kinds(place: str, entries: dict[str, tuple[Break, str]]) -> list[Any]:
    """Parameters of a test: kinds of bad input that are found in the same place, by name."""
    return [pytest.param(Kind(break_it, place, words), id=name) for name, (break_it, words) in entries.items()]


def make_setup(tmp_path: Path, model: Path) -> Setup:
    """The run before anything is broken; its two rows are good."""
    run_dir = tmp_path / "run"
    (run_dir / "export").mkdir(parents=True)
    (run_dir / "export" / "model.safetensors").write_bytes(b"precious")
    (run_dir / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    (run_dir / "config.toml").write_text("[model]\n")
    (run_dir / "notes.txt").write_text("keep me")
    setup = Setup(Path(shutil.copytree(model, tmp_path / "model")), tmp_path / "pairs.jsonl", run_dir)
    rows(PAIR, PAIR | {"rejected": PERHAPS})(setup)
    return setup


def assert_refused(code: int, err: str, *words: str) -> None:
    """Exit code 2 and one line "error: ..." with all of these words."""
    assert code == 2, err
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    for word in words:
        assert word in err, err


def assert_training_refused(kind: Kind, setup: Setup, capsys: pytest.CaptureFixture[str]) -> None:
    """Break it, start it: refused in one line, the run folder as it was byte for byte."""
    kind.break_it(setup)
    before = contents(setup.run_dir)
    code = run_here(setup.argv())
    place = kind.place.format(model=setup.model, data=setup.data)
    assert_refused(code, capsys.readouterr().err, f"error: {place}", kind.words)
    assert contents(setup.run_dir) == before


# --- ways to break it ------------------------------------------------------------------------------------------------


def rows(*values: object) -> Break:
    """A data file of these rows; bytes are lines as they are."""
    lines = [value if isinstance(value, bytes) else json.dumps(value).encode() for value in values]
    return raw(b"".join(line + b"\n" for line in lines))


def raw(content: bytes) -> Break:
    """A data file of these bytes."""
    return lambda setup: setup.data.write_bytes(content)


def second(row: object = None, **changes: object) -> Break:
    """A data file with a good row and a bad one on line 2: `row`, or a pair with columns changed (ABSENT: left out)."""
    changed = {name: value for name, value in (PAIR | changes).items() if value is not ABSENT}
    return rows(PAIR | {"id": "good"}, changed if row is None else row)


def setting(*overrides: str) -> Break:
    """Keys of the command line; {model}, {data} stand for the paths."""
    return lambda setup: setup.overrides.extend(text.format(model=setup.model, data=setup.data) for text in overrides)


def both(*breaks: Break) -> Break:
    return lambda setup: [break_it(setup) for break_it in breaks]


def model_file(name: str, content: str | bytes | None) -> Break:
    """A file of the model with this content, None: without it."""

    def apply(setup: Setup) -> None:
        path = setup.model / name
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return apply


def model_keys(name: str, **changes: object) -> Break:
    """A JSON file of the model with keys changed (ABSENT: left out)."""

    def apply(setup: Setup) -> None:
        path = setup.model / name
        changed = json.loads(path.read_text(encoding="utf-8")) | changes
        path.write_text(json.dumps({key: value for key, value in changed.items() if value is not ABSENT}))

    return apply


def config(**changes: object) -> Break:
    return model_keys("config.json", **changes)


def tokenizer_config(**changes: object) -> Break:
    return model_keys("tokenizer_config.json", **changes)


def template(text: object) -> Break:
    """A chat template, with one row of data: a template at fault is at fault in every row."""
    return both(tokenizer_config(chat_template=text), rows(PAIR))


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Break:
    """Weights as `change` leaves them."""

    def apply(setup: Setup) -> None:
        loaded = load_file(setup.weights)
        change(loaded)
        save_file(loaded, setup.weights, metadata={"format": "pt"})

    return apply


def index(content: str) -> Break:
    """A model in two shards of which one is there, with this index."""

    def apply(setup: Setup) -> None:
        setup.weights.rename(setup.model / "model-00001-of-00002.safetensors")
        (setup.model / "model.safetensors.index.json").write_text(content, encoding="utf-8")

    return apply

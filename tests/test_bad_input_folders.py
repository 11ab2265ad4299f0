"""What users get wrong with checkpoints, run folders and other commands: one clear line, exit code 2, nothing lost."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from bad_input_fixtures import TALK, YES, Setup, assert_refused, make_setup, tensors
from run_fixtures import HELD_OUT, OWN_PAIRS, arguments, contents, killed_run, run_here, torch_settings_kept

from data_tools import show
from eval import preference
from trainer import score
from trainer.entry import exit_code


@pytest.fixture(scope="module")
def killed(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return killed_run(tmp_path_factory.mktemp("killed"), tiny_model_dir)


@pytest.fixture
def setup(tiny_model_dir: Path, tmp_path: Path) -> Setup:
    return make_setup(tmp_path, tiny_model_dir)


# --- checkpoints -----------------------------------------------------------------------------------------------------


def manifest(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """A change of manifest.json, which then has no digest of itself; what `change` returns, if anything, takes its
    place."""

    def apply(step: Path) -> None:
        path = step / "manifest.json"
        raw = json.loads(path.read_text(encoding="utf-8"))
        del raw["digest"]
        replacement = change(raw)
        path.write_text(json.dumps(raw if replacement is None else replacement), encoding="utf-8")

    return apply


def flip(step: Path) -> None:
    raw = bytearray((step / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (step / "model.safetensors").write_bytes(bytes(raw))


CHECKPOINTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "has no manifest.json: not a complete checkpoint"),
    "a file": (lambda step: (shutil.rmtree(step), step.write_text("x")), "has no manifest.json"),
    "no manifest": (lambda step: (step / "manifest.json").unlink(), "has no manifest.json"),
    "a torn manifest": (lambda step: (step / "manifest.json").write_text('{"step": '), "is not a checkpoint manifest"),
    "a manifest that is a list": (manifest(lambda raw: [raw]), "is not a checkpoint manifest"),
    "another format": (manifest(lambda raw: raw.update(format=2, more=1)), "has format 2, this version reads 1"),
    "a config of another version": (
        manifest(lambda raw: raw.update(config=raw["config"] + "\n[moon]\nphase = 1\n")),
        "its config is not one of this version (moon.phase: unknown key",
    ),
    "another training": (
        manifest(lambda raw: raw.update(config=raw["config"].replace("beta = 0.1", "beta = 0.3"))),
        "loss.beta: was 0.3, now 0.1",
    ),
    "other data": (manifest(lambda raw: raw.update(data_digest="0")), "the training data changed since this run began"),
    "another model": (manifest(lambda raw: raw.update(weights_digest="0")), "the weights in model.path changed"),
    "a lost file": (lambda step: (step / "optimizer.safetensors").unlink(), "is missing or cut short"),
    "a cut file": (
        lambda step: (step / "model.safetensors").write_bytes((step / "model.safetensors").read_bytes()[:-7]),
        "is missing or cut short",
    ),
    "a flipped bit": (flip, "differs from its sha256 in the manifest"),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_bad_checkpoint_by_name(
    name: str, killed: Path, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(killed, tmp_path / "run"))
    step = Path(shutil.copytree(killed / "checkpoints" / "step_2", tmp_path / "copied"))
    break_it, words = CHECKPOINTS[name]
    break_it(step)
    argv = arguments(folder, tiny_model_dir, *HELD_OUT, f"run.resume={step}")
    before = contents(tmp_path)
    assert_refused(run_here(argv), capsys.readouterr().err, f"error: {step}", words)
    assert contents(tmp_path) == before


def test_a_run_folder_with_damaged_checkpoints_only(
    killed: Path, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(killed, tmp_path / "run"))
    for step in ("step_1", "step_2"):
        (folder / "checkpoints" / step / "manifest.json").unlink()
    before = contents(folder)
    assert run_here(arguments(folder, tiny_model_dir, *HELD_OUT)) == 2
    second, first, error = capsys.readouterr().err.splitlines()
    assert second.startswith(f"passed over: {folder}/checkpoints/step_2: has no manifest.json")
    assert first.startswith(f"passed over: {folder}/checkpoints/step_1: has no manifest.json")
    assert error.startswith(f"error: {folder}/checkpoints: none of its 2 checkpoints is whole; move them away")
    assert contents(folder) == before


# --- run folders -----------------------------------------------------------------------------------------------------


def in_the_way(name: str) -> Callable[[Setup], object]:
    """A folder where the run writes a file."""

    def apply(setup: Setup) -> None:
        (setup.run_dir / name).unlink()
        (setup.run_dir / name / "inside").mkdir(parents=True)

    return apply


A_FILE = "a file stands where a folder should be; move it or choose another folder"
FOLDERS: dict[str, tuple[Callable[[Setup], object], str, str]] = {
    "a file": (lambda s: setattr(s, "run_dir", s.data), "pairs.jsonl", A_FILE),
    "below a file": (lambda s: setattr(s, "run_dir", s.data / "run"), "pairs.jsonl/run", A_FILE),
    "checkpoints is a file": (lambda s: (s.run_dir / "checkpoints").write_text("x"), "run/checkpoints", A_FILE),
    "rows are no JSON": (
        lambda s: (s.run_dir / "metrics.jsonl").write_text("step,loss\n1,0.5\n"),
        "run/metrics.jsonl:1",
        "is not a row of metrics",
    ),
    "rows are a folder": (in_the_way("metrics.jsonl"), "run/metrics.jsonl", "cannot be read (Is a directory)"),
    "config is a folder": (in_the_way("config.toml"), "run/config.toml", "is a folder where the run writes a file"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_bad_run_folder(name: str, setup: Setup, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    break_it, place, words = FOLDERS[name]
    break_it(setup)
    argv = [*arguments(tmp_path / "settings", setup.model, data=setup.data), f"--run.dir={setup.run_dir}"]
    before = contents(tmp_path)
    assert_refused(run_here(argv), capsys.readouterr().err, f"error: {tmp_path / place}", words)
    assert contents(tmp_path) == before


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs /proc, which nobody can write to")
def test_a_run_folder_that_cannot_be_written(setup: Setup, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*setup.argv(), "--run.dir=/proc/self/run"]
    assert_refused(run_here(argv), capsys.readouterr().err, "error: /proc/self/run", "cannot be written to (")


# --- the other commands ----------------------------------------------------------------------------------------------

SCORE = ["--model", "{model}", "--data", "{data}", "--out", "{tmp}/out.jsonl"]
BEFORE_AFTER = ["--before", "{model}", "--after", "{model}", "--data", "{data}"]
SHOW = ["--model", "{model}", "--data", "{data}"]
COMMANDS: dict[str, tuple[object, list[str], str]] = {
    "score: no data": (score.main, [*SCORE, "--data", "{tmp}/none.jsonl"], "{tmp}/none.jsonl: no such file"),
    "score: no model": (score.main, [*SCORE, "--model", "{tmp}/none"], "{tmp}/none: no such folder"),
    "score: sft rows": (score.main, [*SCORE, "--data", "{tmp}/sft.jsonl"], "{tmp}/sft.jsonl:1: field 'chosen'"),
    "score: out is a folder": (score.main, [*SCORE, "--out", "{model}"], "{model}: is a folder; name a file"),
    "score: out below a file": (score.main, [*SCORE, "--out", "{data}/x"], "{data}: a file stands where a folder"),
    "score: bad weights": (score.main, [*SCORE, "--model", "{tmp}/cut"], "{tmp}/cut/model.safetensors: is not a whole"),
    "score: few ids": (score.main, [*SCORE, "--model", "{tmp}/few"], "{tmp}/few: the tokenizer gives id"),
    "score: no template": (score.main, [*SCORE, "--chat-template", "none.jinja"], "none.jinja: cannot be read"),
    "eval: no data": (preference.main, [*BEFORE_AFTER, "--data", "{tmp}/none.jsonl"], "{tmp}/none.jsonl: no such file"),
    "eval: no model": (preference.main, [*BEFORE_AFTER, "--after", "{tmp}/none"], "{tmp}/none: no such folder"),
    "eval: few ids": (preference.main, [*BEFORE_AFTER, "--after", "{tmp}/few"], "{tmp}/few: the tokenizer gives id"),
    "eval: no run": (preference.main, [*BEFORE_AFTER, "--run", "{tmp}/none"], "{tmp}/none: cannot be read"),
    "eval: out is a folder": (preference.main, [*BEFORE_AFTER, "--json", "{model}"], "{model}: is a folder"),
    "show: no data": (show.main, [*SHOW, "--data", "{tmp}/none.jsonl"], "{tmp}/none.jsonl: no such file"),
    "show: no model": (show.main, [*SHOW, "--model", "{tmp}/none"], "{tmp}/none: no such model folder"),
    "show: sft rows": (show.main, [*SHOW, "--data", "{tmp}/sft.jsonl"], "{tmp}/sft.jsonl:1: field 'chosen'"),
    "show: no rows": (show.main, [*SHOW, "-n", "0"], "-n 0: must be at least 1"),
}


@pytest.fixture(scope="module")
def places(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models and rows that are wrong in one way each; commands that write into it have failed."""
    tmp_path = tmp_path_factory.mktemp("places")
    (tmp_path / "work").mkdir()
    few = make_setup(tmp_path / "work", tiny_model_dir)
    names = ("model.embed_tokens.weight", "lm_head.weight")
    tensors(lambda t: t.update({name: t[name][:100].clone() for name in names}))(few)
    raw = json.loads((few.model / "config.json").read_text(encoding="utf-8")) | {"vocab_size": 100}
    (few.model / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    few.model.rename(tmp_path / "few")
    shutil.copytree(tiny_model_dir, tmp_path / "cut")
    (tmp_path / "cut" / "model.safetensors").write_bytes(b"\0" * 99)
    (tmp_path / "sft.jsonl").write_text(json.dumps({"messages": [*TALK, *YES]}) + "\n", encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("name", COMMANDS)
def test_a_bad_argument_of_another_command(
    name: str, places: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, argv, words = COMMANDS[name]
    paths = {"tmp": places, "model": tiny_model_dir, "data": OWN_PAIRS}
    before = contents(places)
    with torch_settings_kept():
        filled = [item.format(**paths) for item in argv]
        code = show.main(filled) if command is show.main else exit_code(command, filled)  # type: ignore[arg-type]
    assert_refused(code, capsys.readouterr().err, words.format(**paths))
    assert contents(places) == before

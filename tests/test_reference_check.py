"""`python -m trainer.reference --check`: what a cache file is, and one line with exit code 2 when it is not well."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from run_fixtures import OWN_PAIRS, ROOT, arguments, run_here, torch_settings_kept
from safetensors import safe_open
from safetensors.numpy import save_file

from data_tools.chat_template import load_chat_template
from data_tools.encode import EncodeOptions, encode_records
from data_tools.jsonl import read_records
from data_tools.tokenizer import load_tokenizer
from trainer.entry import exit_code
from trainer.models.hf_weights import load_decoder
from trainer.reference import main
from trainer.reference_cache import Header, ReferenceCache, read_cache_file
from trainer.reference_pass import score_missing


@pytest.fixture(scope="module")
def filled(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache file that a run over the first 10 pairs made."""
    folder = tmp_path_factory.mktemp("filled")
    data = folder / "ten.jsonl"
    data.write_text("".join(OWN_PAIRS.read_text().splitlines(keepends=True)[:10]))
    settings = (f"reference.cache_file={folder / 'ref.safetensors'}", "train.epochs=1")
    assert run_here(arguments(folder / "run", tiny_model_dir, *settings, data=data)) == 0
    return folder / "ref.safetensors"


@pytest.fixture
def file(filled: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(filled, tmp_path))


def check(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> tuple[int, str, str]:
    """Exit code, output and errors of the command."""
    capsys.readouterr()
    with torch_settings_kept():
        code = exit_code(main, ["--check", *map(str, argv)])
    return code, *capsys.readouterr()


def refused(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> str:
    """The one line of a check that ends with 2."""
    code, _, errors = check(capsys, *argv)
    (line,) = errors.splitlines()
    assert code == 2 and line.startswith("error: ")
    return line.removeprefix("error: ")


def with_rows(file: Path, change: float, numbers: slice = slice(1)) -> None:
    """Write the file anew with `change` added to some numbers of every row, checksum and all."""
    fields, rows = read_cache_file(file)
    file.unlink()
    cache = ReferenceCache(file, Header(**fields))
    for row in rows.values():
        row[numbers] += np.float32(change)
    cache.add(rows)
    cache.save()


def test_the_file_in_words(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fields, rows = read_cache_file(file)
    code, said, errors = check(capsys, file)
    assert code == 0 and errors == ""
    lines = said.splitlines()
    assert lines[0] == f"{file}: reference log-probs, float32 nats a scored token"
    words = {line.split()[0]: line.split()[1] for line in lines[1:]}
    assert {name: words[name] for name in fields} == fields
    values = np.concatenate(list(rows.values()))
    assert f"  completions  {len(rows)}, of them with non-finite numbers: 0" in lines and len(rows) == 20
    longest = max(map(len, rows.values()))
    assert f"  tokens       {len(values)}, longest {longest}, mean log-prob {values.mean():.4f}" in lines
    assert f"  size         {file.stat().st_size / 2**20:.1f} MiB, checksum right" in lines


def test_as_a_command(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])
    command = [sys.executable, "-m", "trainer.reference", "--check", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith(f"error: {file}: is not")


def test_weights_and_data_that_belong_to_it(
    file: Path, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said, _ = check(capsys, file, "--model", tiny_model_dir)
    assert code == 0 and said.splitlines()[-1] == f"model {tiny_model_dir}: its weights made this file"
    some = tmp_path / "some.jsonl"
    some.write_text("".join(OWN_PAIRS.read_text().splitlines(keepends=True)[8:13]))
    code, said, errors = check(capsys, file, "--model", tiny_model_dir, "--data", some)
    assert code == 0 and errors == ""
    assert "data: the file holds 4 of 10 completions; a run scores the other 6" in said
    last = said.splitlines()[-1]
    assert last.startswith("4 completions scored again: differ by at most ")
    assert float(last.split("at most ")[1].split()[0]) < 2e-5  # other rows share the batch: rounding, as in the pass
    assert "data.max_length = 20" in refused(
        capsys, file, "--model", tiny_model_dir, "--data", some, "--max-length", "20"
    )


def test_numbers_that_other_arithmetic_made(
    file: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with_rows(file, 0.001)
    assert check(capsys, file)[0] == 0  # the checksum cannot tell
    line = refused(capsys, file, "--model", tiny_model_dir, "--data", OWN_PAIRS)
    assert line.startswith(f"{file}: rows scored again differ by at most 1.0") and "(allowed: at most 1e-04)" in line
    with_rows(file, float("nan"))
    assert "nan" in refused(capsys, file, "--model", tiny_model_dir, "--data", OWN_PAIRS)
    assert "of them with non-finite numbers: 20" in check(capsys, file)[1]


def test_bf16_numbers_are_judged_by_their_mean(
    file: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template, records = load_chat_template(tiny_model_dir), read_records([OWN_PAIRS], kind="pair")
    groups = encode_records(records, load_tokenizer(tiny_model_dir), template, EncodeOptions())[0]
    model = load_decoder(tiny_model_dir, dtype=torch.bfloat16).requires_grad_(False)
    fields, _ = read_cache_file(file)
    file.unlink()
    cache = ReferenceCache(file, replace(Header(**fields), dtype="bfloat16"))
    score_missing(cache, groups, model, device=torch.device("cpu"), tokens_per_batch=999)
    argv = (file, "--model", tiny_model_dir, "--data", OWN_PAIRS)
    assert check(capsys, *argv)[0] == 0
    with_rows(file, 0.1)  # one number a row, about 0.002 on average
    assert check(capsys, *argv)[0] == 0
    with_rows(file, 0.1, slice(None))
    assert "(allowed: on average 2e-02)" in refused(capsys, *argv)


def test_other_weights_are_named(
    file: Path, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Path(shutil.copytree(tiny_model_dir, tmp_path / "other"))
    with open(other / "model.safetensors", "r+b") as weights:
        weights.seek(-4, 2)
        weights.write(np.float32(1.5).tobytes())
    line = refused(capsys, file, "--model", other)
    assert line.startswith(f"{file}: does not belong to {other} (weights '") and "quantisation" not in line
    fields, rows = read_cache_file(file)
    file.unlink()
    cache = ReferenceCache(file, replace(Header(**fields), quantisation="q4"))
    cache.add(rows)
    cache.save()
    # packed by the run from these very weights: they made it, but are not what a check can score with
    code, output, _ = check(capsys, file, "--model", tiny_model_dir)
    assert code == 0 and "quantisation q4" in " ".join(output.split()) and "its weights made this file" in output
    line = refused(capsys, file, "--model", tiny_model_dir, "--data", OWN_PAIRS)
    assert "its weights were quantised (q4); only a run scores them" in line


def test_damage_of_every_kind_is_one_line(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = file.read_bytes()
    with safe_open(file, framework="np") as opened:
        tensors, metadata = {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata()  # noqa: SIM118
    file.write_bytes(whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:])
    assert "is not a whole reference cache (its numbers differ from their sha256)" in refused(capsys, file)
    for raw in (b"", whole[:-9], bytes(len(whole))):
        file.write_bytes(raw)
        assert refused(capsys, file).startswith(f"{file}: is not a whole reference cache (")
    fields = json.loads(metadata["header"])
    for header in ({**fields, "future": "x"}, {"dtype": "float32"}, ["float32"]):
        save_file(tensors, file, metadata={**metadata, "header": json.dumps(header)})
        assert refused(capsys, file).startswith(f"{file}: is not a whole reference cache (")
    file.unlink()
    assert refused(capsys, file) == f"{file}: no such file; without it a run scores its rows again"


def test_what_cannot_be_checked_is_said(file: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        refused(capsys, file, "--data", OWN_PAIRS) == "--data: the tokenizer is in the model's folder; give --model too"
    )
    fields, rows = read_cache_file(file)
    file.unlink()
    cache = ReferenceCache(file, replace(Header(**fields), kernel="abacus"))
    cache.add(rows)
    cache.save()
    line = refused(capsys, file, "--model", tiny_model_dir, "--data", OWN_PAIRS)
    assert line.startswith(f"{file}: its rows cannot be scored again here (") and line.endswith("leave out --data")

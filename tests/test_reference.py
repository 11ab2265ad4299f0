"""Reference log-probs: keyed by what decides them, found again in any order, never read where they do not belong."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from run_fixtures import OWN_PAIRS, arguments, rows, run_here
from safetensors import safe_open
from safetensors.numpy import save_file

from data_tools.chat_template import load_chat_template
from data_tools.encode import EncodeOptions, Group, encode_records
from data_tools.file_digests import FileDigests
from data_tools.jsonl import read_records
from data_tools.tokenizer import load_tokenizer
from trainer.batch import build_stream
from trainer.errors import RunError
from trainer.models.decoder import Decoder
from trainer.models.hf_weights import load_decoder
from trainer.reference_cache import Header, ReferenceCache, row_key, weights_digest
from trainer.reference_pass import plan_batches, score_batch

CPU = torch.device("cpu")
HEADER = Header(weights="w", dtype="float32", kernel="cpu")


@pytest.fixture(scope="module")
def groups(tiny_model_dir: Path) -> list[Group]:
    records = read_records([OWN_PAIRS], kind="pair")[:6]
    template = load_chat_template(tiny_model_dir)
    return encode_records(records, load_tokenizer(tiny_model_dir), template, EncodeOptions())[0]


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> Decoder:
    return load_decoder(tiny_model_dir).requires_grad_(False)


@pytest.fixture(scope="module")
def scored(model: Decoder, groups: list[Group]) -> dict[bytes, np.ndarray]:
    return score(model, groups, 500)


def score(model: Decoder, groups: list[Group], budget: int) -> dict[bytes, np.ndarray]:
    rows: dict[bytes, np.ndarray] = {}
    for batch in plan_batches(groups, budget):
        rows |= score_batch(model, batch, CPU)
    return rows


def group_of(prompt: list[int], *completions: list[int]) -> Group:
    ids = np.array(prompt + [i for completion in completions for i in completion], dtype=np.int32)
    lengths = (len(prompt), *map(len, completions))
    return Group("x", ids, lengths, ((), *(((0, len(completion)),) for completion in completions)))


# --- keys ------------------------------------------------------------------------------------------------------------


def test_a_key_is_the_prompt_the_completion_and_what_is_scored() -> None:
    pair = group_of([1, 2, 3], [4, 5], [6])
    key = row_key(pair, 1)
    assert len(key) == 32
    assert key == row_key(group_of([1, 2, 3], [9], [4, 5]), 2)  # the other answer and the place do not matter
    assert key == row_key(replace(pair, record_id="another", weight=2.0), 1)
    others = [
        row_key(pair, 2),
        row_key(group_of([1, 2, 7], [4, 5]), 1),
        row_key(group_of([1, 2], [3, 4, 5]), 1),  # the same tokens, cut elsewhere
        row_key(group_of([1, 2, 3], [4, 5, 6]), 1),
        row_key(replace(pair, spans=((), ((1, 2),), ((0, 1),))), 1),
    ]
    assert len({key, *others}) == 1 + len(others)


def test_a_header_changes_with_every_field() -> None:
    others = [replace(HEADER, **{name: f"{value}x"}) for name, value in asdict(HEADER).items()]
    assert len({HEADER.digest(), *(other.digest() for other in others)}) == 1 + len(asdict(HEADER))


def test_weights_digest_follows_config_and_weights(tiny_model_dir: Path, tmp_path: Path) -> None:
    def digest(folder: Path) -> str:
        return weights_digest(folder, FileDigests(tmp_path / "digests.json"))

    copy = tmp_path / "copy"
    shutil.copytree(tiny_model_dir, copy)
    assert digest(copy) == digest(tiny_model_dir)
    (copy / "tokenizer_config.json").write_text("{}")
    assert digest(copy) == digest(tiny_model_dir)  # the tokenizer's part is in the rows' keys
    raw = bytearray((copy / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (copy / "model.safetensors").write_bytes(bytes(raw))
    changed = digest(copy)
    (copy / "config.json").write_text((copy / "config.json").read_text() + " ")
    assert len({digest(tiny_model_dir), changed, digest(copy)}) == 3


# --- scoring ---------------------------------------------------------------------------------------------------------


def test_scores_are_the_models_log_probs_whatever_the_batches(
    model: Decoder, groups: list[Group], scored: dict[bytes, np.ndarray]
) -> None:
    for other in (
        score(model, groups, 1),
        score(model, groups[::-1], 9999),
    ):
        assert other.keys() == scored.keys() and len(other) == 2 * len(groups)
        for key, row in scored.items():
            np.testing.assert_allclose(other[key], row, atol=1e-5, rtol=1e-6)
    for group in groups:
        for branch in (1, 2):
            first = sum(group.lengths[:branch])
            ids = np.concatenate([group.ids[: group.lengths[0]], group.ids[first : first + group.lengths[branch]]])
            alone = build_stream([group_of(ids.tolist())])
            logits = model(alone, output="logits").log_softmax(-1)
            targets = torch.from_numpy(ids.astype(np.int64))[group.lengths[0] :]
            wanted = logits[group.lengths[0] - 1 : -1].gather(1, targets[:, None])[:, 0]
            row = scored[row_key(group, branch)]
            assert row.dtype == np.float32
            np.testing.assert_allclose(row, wanted.numpy(), atol=2e-5)


def test_rows_come_back_in_the_streams_order(
    groups: list[Group], scored: dict[bytes, np.ndarray], model: Decoder, tmp_path: Path
) -> None:
    cache = ReferenceCache(tmp_path / "c.safetensors", HEADER)
    cache.add(scored)
    some = [groups[3], groups[0], groups[5]]
    stream = build_stream(some)
    torch.testing.assert_close(cache.token_logps(some, stream), model(stream), atol=2e-5, rtol=0)


# --- the file --------------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path, scored: dict[bytes, np.ndarray]) -> Path:
    cache = ReferenceCache(tmp_path / "c.safetensors", HEADER)
    cache.add(scored)
    cache.save()
    return cache.path


def test_a_file_gives_back_every_bit(file: Path, scored: dict[bytes, np.ndarray]) -> None:
    cache = ReferenceCache.open(file, HEADER, named_by_user=False)
    assert cache._rows.keys() == scored.keys()
    for key, row in scored.items():
        assert cache._rows[key].tobytes() == row.tobytes()
    before = file.stat().st_mtime_ns
    cache.save()
    assert file.stat().st_mtime_ns == before  # nothing new: not written
    assert sorted(path.name for path in file.parent.iterdir()) == [file.name, f"{file.name}.lock"]


def test_shuffled_cut_and_appended_data_find_their_rows(file: Path, groups: list[Group]) -> None:
    cache = ReferenceCache.open(file, HEADER, named_by_user=False)
    new = group_of([1, 2, 3], [4, 5], [6])
    assert cache.missing(groups[::-1]) == [] and cache.missing(groups[2:4]) == []
    assert cache.missing([groups[1], new, groups[0], replace(new, record_id="again")]) == [new]
    half_known = replace(groups[0], ids=groups[0].ids.copy())
    half_known.ids[-1] += 1
    assert cache.missing([half_known]) == [half_known]


DAMAGE = {
    "empty": lambda raw: b"",
    "cut": lambda raw: raw[:-9],
    "no header": lambda raw: b"\0" * len(raw),
    "a flipped bit in a number": lambda raw: raw[:-2] + bytes([raw[-2] ^ 1]) + raw[-1:],
    "JSON": lambda raw: b'{"rows": []}',
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_file_is_scored_again_with_a_line_or_refused_if_named(
    kind: str, file: Path, groups: list[Group], capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_bytes(DAMAGE[kind](file.read_bytes()))
    before = file.read_bytes()
    cache = ReferenceCache.open(file, HEADER, named_by_user=False)
    assert len(cache) == 0 and len(cache.missing(groups)) == len(groups)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"reference cache {file} is damaged (") and line.endswith("its rows are scored again")
    with pytest.raises(RunError, match="is not a whole reference cache") as caught:
        ReferenceCache.open(file, HEADER, named_by_user=True)
    assert "\n" not in str(caught.value) and file.read_bytes() == before


def test_a_file_without_its_checksum_or_header_is_damaged(file: Path) -> None:
    with safe_open(file, framework="np") as opened:
        tensors, metadata = {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata()  # noqa: SIM118
    for missing in ("sha256", "header"):
        save_file(tensors, file, metadata={name: text for name, text in metadata.items() if name != missing})
        assert len(ReferenceCache.open(file, HEADER, named_by_user=False)) == 0
    save_file(tensors, file, metadata=metadata)
    assert len(ReferenceCache.open(file, HEADER, named_by_user=False)) == 12


def test_a_named_file_of_other_weights_is_refused_with_the_reason(file: Path) -> None:
    other = replace(HEADER, weights="v", dtype="bfloat16")
    with pytest.raises(RunError) as caught:
        ReferenceCache.open(file, other, named_by_user=True)
    assert str(caught.value) == (
        f"{file}: is a reference cache of something else (weights 'w' instead of 'v', dtype 'float32' instead of "
        "'bfloat16'); leave out reference.cache_file"
    )
    assert len(ReferenceCache.open(file, other, named_by_user=False)) == 0


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path, scored: dict[bytes, np.ndarray]) -> None:
    cache = ReferenceCache(tmp_path / "c.safetensors", HEADER)
    cache.add(scored)
    cache.path.mkdir()
    with pytest.raises(RunError, match="the reference cache cannot be written .*; set reference.cache_dir"):
        cache.save()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.safetensors", "c.safetensors.lock"]


# --- in runs ---------------------------------------------------------------------------------------------------------


def out_of(capsys: pytest.CaptureFixture[str], words: str) -> str:
    (line,) = (line for line in capsys.readouterr().out.splitlines() if words in line)
    return line


def losses(run_dir: Path) -> list[float]:
    return [json.loads(row)["loss"] for row in rows(run_dir)]


def test_rows_are_scored_once_over_runs_and_a_bit_of_new_data(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = OWN_PAIRS.read_text(encoding="utf-8").splitlines(keepends=True)
    cache_dir = f"reference.cache_dir={tmp_path / 'cache'}"

    def said(name: str, kept: list[str], *settings: str) -> str:
        data = tmp_path / f"{name}.jsonl"
        data.write_text("".join(kept), encoding="utf-8")
        argv = arguments(
            tmp_path / name, tiny_model_dir, cache_dir, "train.max_steps=9", "train.epochs=9", *settings, data=data
        )
        assert run_here(argv) == 0
        return out_of(capsys, "reference: ")

    assert said("first", lines[:8]).startswith("reference: 0 of 8 groups cached, 8 to score")
    assert said("shuffled", lines[7::-1]).startswith("reference: 8 of 8 groups cached, 0 to score")
    assert said("subset", lines[2:6]).startswith("reference: 4 of 4 groups cached, 0 to score")
    assert said("appended", lines[:10]).startswith("reference: 8 of 10 groups cached, 2 to score")
    files = set((tmp_path / "cache").glob("*.safetensors"))
    assert len(files) == 1
    assert said("bf16", lines[:8], "train.dtype=bf16").startswith("reference: 0 of 8 groups cached, 8 to score")
    assert len(set((tmp_path / "cache").glob("*.safetensors")) - files) == 1


def test_a_frozen_model_and_the_cache_give_the_same_run(tiny_model_dir: Path, tmp_path: Path) -> None:
    for mode in ("cache", "model"):
        settings = ("train.tokens_per_microbatch=9999", f"reference.mode={mode}", f"data.eval={OWN_PAIRS}")
        assert run_here(arguments(tmp_path / mode, tiny_model_dir, *settings)) == 0
    found, wanted = rows(tmp_path / "cache"), rows(tmp_path / "model")
    for a, b in zip(found, wanted, strict=True):
        assert json.loads(a) == pytest.approx(json.loads(b), rel=1e-4, abs=1e-5)
    # it is the starting model that stays frozen: the policy moved away from it
    assert abs(json.loads(found[-1])["rewards/margins"]) > 0.01


def test_another_model_as_reference(tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    trained = arguments(tmp_path / "train", tiny_model_dir, "train.max_steps=2")
    assert run_here(trained) == 0
    shutil.copytree(tmp_path / "train" / "export", other)
    capsys.readouterr()
    for mode in ("cache", "model"):
        settings = (f"reference.path={other}", f"reference.mode={mode}", "train.max_steps=1", "train.global_batch=16")
        assert run_here(arguments(tmp_path / mode, tiny_model_dir, *settings)) == 0
        assert "step 0:" not in capsys.readouterr().out  # policy and reference rightly differ
    (cached,), (frozen,) = losses(tmp_path / "cache"), losses(tmp_path / "model")
    assert cached == pytest.approx(frozen, rel=1e-5)
    # by hand, from both models' scores
    models = [load_decoder(folder).requires_grad_(False) for folder in (tiny_model_dir, other)]
    records = read_records([OWN_PAIRS], kind="pair")
    template = load_chat_template(tiny_model_dir)
    groups = encode_records(records, load_tokenizer(tiny_model_dir), template, EncodeOptions())[0]
    policy, reference = (score(model, groups, 2000) for model in models)
    gaps = [
        sum(sign * float((policy[row_key(g, k)] - reference[row_key(g, k)]).sum()) for k, sign in ((1, 1), (2, -1)))
        for g in groups
    ]
    assert cached == pytest.approx(float(np.mean(np.log1p(np.exp(-0.1 * np.array(gaps))))), rel=1e-5)
    assert abs(cached - np.log(2)) > 1e-4


def test_a_tampered_cache_is_caught_before_the_first_update(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = arguments(tmp_path / "run", tiny_model_dir, f"reference.cache_dir={tmp_path / 'cache'}")
    assert run_here(argv) == 0
    (path,) = (tmp_path / "cache").glob("*.safetensors")
    with safe_open(path, framework="np") as file:
        header = Header(**json.loads(file.metadata()["header"]))
    rows_there = ReferenceCache.open(path, header, named_by_user=True)._rows
    path.unlink()
    cache = ReferenceCache(path, header)
    cache.add({key: row + np.float32(0.001) for key, row in rows_there.items()})
    cache.save()
    capsys.readouterr()
    assert run_here(arguments(tmp_path / "again", tiny_model_dir, f"reference.cache_dir={tmp_path / 'cache'}")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"error: {path}: before the first update policy and reference differ by 1.00e-03 nats a token"
    )
    assert "delete the cache file" in line
    assert not (tmp_path / "again" / "metrics.jsonl").exists() or rows(tmp_path / "again") == []


def test_a_named_cache_file(tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    named = tmp_path / "reference.safetensors"
    assert run_here(arguments(tmp_path / "a", tiny_model_dir, f"reference.cache_file={named}")) == 0
    before = named.read_bytes()
    assert run_here(arguments(tmp_path / "b", tiny_model_dir, f"reference.cache_file={named}")) == 0
    assert rows(tmp_path / "a") == rows(tmp_path / "b")
    other = tmp_path / "a" / "export"
    capsys.readouterr()
    assert run_here(arguments(tmp_path / "c", other, f"reference.cache_file={named}")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {named}: is a reference cache of something else (weights '")
    assert named.read_bytes() == before


def test_non_finite_weights_stop_the_first_step_and_name_rows(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "nan"
    shutil.copytree(tiny_model_dir, model)
    raw = bytearray((model / "model.safetensors").read_bytes())
    raw[-4:] = np.float32(np.nan).tobytes()
    (model / "model.safetensors").write_bytes(bytes(raw))
    settings = (f"reference.cache_dir={tmp_path / 'cache'}",)
    assert run_here(arguments(tmp_path / "run", model, *settings)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("stopped: step 1: loss nan, gradient norm nan; nothing was updated. Rows: own-")
    assert not (tmp_path / "run" / "export").exists() and list((tmp_path / "run" / "checkpoints").iterdir()) == []

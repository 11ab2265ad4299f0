"""Scores of pairs: the model's numbers in the rows' order, for rows of any length, as a command too."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from model_fixtures import padded_token_logps, random_decoder, random_group, tiny_config

from data_tools.tokenizer import load_tokenizer
from trainer.errors import UserError
from trainer.models.hf_weights import load_decoder
from trainer.score import main, read_pairs, score_pairs

ROOT = Path(__file__).resolve().parent.parent
KEYS = ["id", "chosen_logps", "rejected_logps", "chosen_tokens", "rejected_tokens", "chosen_ids", "rejected_ids"]


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Chat and plain rows, out of length order; the second is far longer than a run's data.max_length."""
    talk = [{"role": "user", "content": "How many?"}]
    rows = [
        {"id": "short", "prompt": "one and", "chosen": " one is two", "rejected": " one"},
        {"id": "long", "prompt": "the answer " * 150, "chosen": "that " * 400, "rejected": "no"},
        {
            "id": "chat",
            "prompt": talk,
            "chosen": [{"role": "assistant", "content": "three"}],
            "rejected": [{"role": "assistant", "content": "four of them"}],
        },
    ]
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl.gz"
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


@pytest.mark.parametrize("budget", [10**6, 20, 1])
def test_scores_equal_padded_rows_in_the_groups_order(budget: int) -> None:
    model = random_decoder(tiny_config())
    shapes = [(3, 2, 9), (1, 1, 1), (6, 8, 2), (0, 2, 4)]
    groups = [random_group(shape, seed=seed) for seed, shape in enumerate(shapes)]
    with torch.no_grad():
        expected = iter(padded_token_logps(dict(model.named_parameters()), model.config, groups).tolist())
    scores = score_pairs(model, groups, tokens_per_batch=budget)
    assert [score.record_id for score in scores] == [group.record_id for group in groups]
    for group, score in zip(groups, scores, strict=True):
        skipped = 0 if group.lengths[0] else 1  # nothing predicts the first token of an empty prompt's completion
        prompt, chosen, _ = group.lengths
        assert score.chosen_ids == group.ids[prompt + skipped : prompt + chosen].tolist()
        assert score.rejected_ids == group.ids[prompt + chosen + skipped :].tolist()
        assert score.chosen_logps == pytest.approx(sum(next(expected) for _ in score.chosen_ids), rel=1e-5)
        assert score.rejected_logps == pytest.approx(sum(next(expected) for _ in score.rejected_ids), rel=1e-5)
        assert score.chosen_mean == score.chosen_logps / len(score.chosen_ids)
        assert score.rejected_mean == score.rejected_logps / len(score.rejected_ids)


def test_no_row_is_dropped_or_cut(tiny_model_dir: Path, pairs_file: Path) -> None:
    groups = read_pairs(str(pairs_file), tiny_model_dir)
    assert [group.record_id for group in groups] == ["short", "long", "chat"]
    text = load_tokenizer(tiny_model_dir).decode(groups[1].ids[groups[1].lengths[0] :][: groups[1].lengths[1]].tolist())
    assert text.startswith("that " * 400)
    assert len(score_pairs(load_decoder(tiny_model_dir), groups, tokens_per_batch=100)) == 3


def test_the_command(tiny_model_dir: Path, pairs_file: Path, tmp_path: Path) -> None:
    """In a process of its own, in bf16: rows in the file's order, near the float32 numbers."""
    out = tmp_path / "scores.jsonl"
    options = ["--model", str(tiny_model_dir), "--data", str(pairs_file), "--out", str(out), "--dtype", "bf16"]
    command = [sys.executable, "-m", "trainer.score", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "3 pairs scored" in done.stdout
    assert list(tmp_path.iterdir()) == [out]
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    expected = score_pairs(load_decoder(tiny_model_dir), read_pairs(str(pairs_file), tiny_model_dir))
    for row, score in zip(rows, expected, strict=True):
        assert list(row) == KEYS
        assert row["id"] == score.record_id
        for side in ("chosen", "rejected"):
            ids = getattr(score, f"{side}_ids")
            assert (row[f"{side}_ids"], row[f"{side}_tokens"]) == (ids, len(ids))
            # bf16 has 3 digits; over a completion the errors average out
            assert row[f"{side}_logps"] == pytest.approx(getattr(score, f"{side}_logps"), rel=0.02)


@pytest.mark.parametrize("missing", ["--model", "--data", "--out"])
def test_bad_paths_are_named(missing: str, tiny_model_dir: Path, pairs_file: Path, tmp_path: Path) -> None:
    paths = {"--model": tiny_model_dir, "--data": pairs_file, "--out": tmp_path / "scores.jsonl"}
    paths[missing] = tmp_path / "absent" / "thing"
    if missing == "--out":
        (tmp_path / "absent").write_text("a file where a folder should be")
    with pytest.raises(UserError, match="absent"):
        main([part for key, value in paths.items() for part in (key, str(value))])
    assert not (tmp_path / "scores.jsonl").exists()

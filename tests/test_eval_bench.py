"""The bench of generation: how parity is counted, and a whole run beside transformers."""

import json
import multiprocessing
from pathlib import Path

import numpy as np
import pytest

from eval import bench
from trainer.entry import exit_code


def test_parity_is_counted_by_where_tokens_part() -> None:
    mine = {"ids": [[1, 2, 3], [1, 2, 3], [1, 9, 9]]}
    theirs = {"ids": [[1, 2, 3], [1, 2, 4], [1, 8, 8]], "gaps": [[1.0, 1.0, 0.0], [1.0, 0.0, 5e-5], [0.0, 0.2, 0.0]]}
    assert bench.compare(mine, theirs) == {"equal": 1, "near_ties": 1, "different": 1}


@pytest.mark.long
def test_a_run_beside_transformers(tiny_model_dir: Path, tmp_path: Path) -> None:
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.json"
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in ("Why?", "Count to three.", "一二三")]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    argv = ["--model", str(tiny_model_dir), "--prompts", str(prompts), "--batch", "3", "--tokens", "20", "--parity"]
    assert exit_code(bench.main, [*argv, "--repeats", "1", "--json", str(out)]) == 0
    numbers = json.loads(out.read_text(encoding="utf-8"))
    assert numbers["parity_equal"] + numbers["parity_near_ties"] == 3
    assert min(numbers["ours_tokens_per_s"], numbers["theirs_tokens_per_s"], numbers["ours_peak_rss_mib"]) > 0


def test_waiting_threads_sleep_unless_the_environment_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert bench.environment()["OMP_WAIT_POLICY"] == "passive" and "PATH" in bench.environment()
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert bench.environment()["OMP_WAIT_POLICY"] == "active"


def test_memory_is_the_familys_and_shared_pages_count_once() -> None:
    """A forked process shares 64 MiB and fills 64 of its own."""
    shared = np.ones(64 << 20, dtype=np.uint8)
    context = multiprocessing.get_context("fork")
    filled, ended = context.Event(), context.Event()

    def fill() -> None:
        own = np.ones(64 << 20, dtype=np.uint8)
        filled.set()
        ended.wait()
        assert own[0] == shared[0]

    process = context.Process(target=fill)
    with bench.FamilyMemory() as before:
        before.look()
    process.start()
    with bench.FamilyMemory() as beside:
        assert filled.wait(60)
        beside.look()
    ended.set()
    process.join()
    assert 60 < beside.most_mib - before.most_mib < 100


def test_too_few_prompts_are_named(tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "x"}\n', encoding="utf-8")
    argv = ["--model", str(tiny_model_dir), "--prompts", str(prompts), "--side", "ours", "--batch", "2"]
    assert exit_code(bench.main, argv) == 2
    assert "1 prompts, --batch 2 needs more" in capsys.readouterr().err

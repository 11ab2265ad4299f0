"""The step benchmark: its numbers follow from the rows, its FLOP floor from the sizes, its errors are lines."""

import json
from pathlib import Path

import pytest

from trainer import bench
from trainer.entry import exit_code
from trainer.score import read_pairs

PAIRS = Path(__file__).parent / "golden" / "own_16.jsonl"


def run_bench(tiny_model_dir: Path, tmp_path: Path, *options: str) -> dict:
    out = tmp_path / "bench.json"
    argv = ["step", "--model", str(tiny_model_dir), "--data", str(PAIRS), "--json", str(out), *options]
    assert exit_code(bench.main, argv) == 0
    return json.loads(out.read_text())


@pytest.mark.parametrize("objective", ["dpo", "orpo", "sft"])
@pytest.mark.parametrize("dtype", ["float32", "bf16"])
def test_counts_are_those_of_the_rows_in_file_order(
    objective: str, dtype: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    numbers = run_bench(
        tiny_model_dir, tmp_path, "--objective", objective, "--dtype", dtype, "--pairs", "2", "--steps", "3"
    )
    groups = read_pairs(str(PAIRS), tiny_model_dir)[2:6]  # the first step's two pairs are not counted
    branches = 2 if objective == "sft" else 3  # sft learns chosen alone
    tokens = sum(sum(group.lengths[:branches]) for group in groups) / 2
    scored = sum(sum(group.lengths[1:branches]) for group in groups) / 2
    if objective == "orpo":  # its likelihood runs over the prompt too
        scored += sum(group.lengths[0] - 1 for group in groups) / 2
    assert numbers["counted_steps"] == 2
    assert numbers["stream_tokens"] == tokens
    assert numbers["scored_tokens"] == scored
    assert numbers["pairs_per_s"] == pytest.approx(2 / numbers["wall_s_per_step"])
    share = numbers["gflop_floor"] / numbers["wall_s_per_step"] / numbers["gemm_limit_gflops"]
    assert numbers["gemm_share"] == pytest.approx(share)
    assert numbers["startup_s"] > 0
    assert numbers["peak_rss_mib"] > 50


def test_flop_floor_by_hand(tiny_model_dir: Path, tmp_path: Path) -> None:
    numbers = run_bench(tiny_model_dir, tmp_path, "--dtype", "float32", "--pairs", "1", "--steps", "2")
    (group,) = read_pairs(str(PAIRS), tiny_model_dir)[1:2]
    prompt, chosen, rejected = group.lengths
    # conftest's model: D 64, 4 heads and 2 key-value heads of 16, F 128, V 300, 2 layers
    layer = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128 + 2 * 64
    visible = prompt * (prompt + 1) / 2
    visible += sum(length * prompt + length * (length + 1) / 2 for length in (chosen, rejected))
    flop = 6 * 2 * layer * (prompt + chosen + rejected) + 6 * 64 * 300 * (chosen + rejected) + 12 * 2 * 4 * 16 * visible
    assert numbers["gflop_floor"] == pytest.approx(flop / 1e9)
    # with adapters, neither the layers' weights nor the head get a gradient
    low = run_bench(tiny_model_dir, tmp_path, "--dtype", "float32", "--pairs", "1", "--steps", "2", "--lora", "4")
    adapters = 2 * 4 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))
    assert low["trained_parameters"] == adapters and numbers["lora_r"] == 0
    scored, tokens = chosen + rejected, prompt + chosen + rejected
    products = 4 * (2 * layer * tokens + 64 * 300 * scored) + 6 * adapters * tokens
    assert low["gflop_floor"] == pytest.approx((products + 12 * 2 * 4 * 16 * visible) / 1e9)
    base = 300 * 64 * 2 + 2 * layer + 64
    assert numbers["weights_mib"] == pytest.approx(12 * base / 2**20, rel=0.01)
    assert low["weights_mib"] == pytest.approx((4 * base + 12 * adapters) / 2**20, rel=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "1"], "must be 2 or more"),
        (["--pairs", "9", "--steps", "2"], "16 usable rows, 9 pairs x 2 steps need more"),
        (["--json", "/nowhere/x.json", "--pairs", "1", "--steps", "2"], "cannot be written"),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    options: list[str], message: str, tiny_model_dir: Path, capsys: pytest.CaptureFixture
) -> None:
    argv = ["step", "--model", str(tiny_model_dir), "--data", str(PAIRS), *options]
    assert exit_code(bench.main, argv) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1

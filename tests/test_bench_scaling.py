"""The scaling benchmark: what it starts and reads, on a tiny model; its errors are lines."""

import json
from pathlib import Path

import pytest
from run_fixtures import OWN_PAIRS, torch_settings_kept

from data_tools.jsonl import read_records
from trainer import bench, bench_scaling
from trainer.entry import exit_code


def run_bench(model: Path, *options: str) -> int:
    with torch_settings_kept():
        return exit_code(bench.main, ["scaling", "--model", str(model), "--data", str(OWN_PAIRS), *options])


@pytest.mark.long
def test_numbers_of_one_and_two_ranks(tiny_model_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "scaling.json"
    sizes = ("--pairs", "2", "--steps", "5", "--tokens-per-microbatch", "150", "--startup-pairs", "200")
    assert run_bench(tiny_model_dir, *sizes, "--ranks", "1", "2", "--dtype", "float32", "--json", str(out)) == 0
    numbers = json.loads(out.read_text(encoding="utf-8"))
    assert all(value > 0 for name, value in numbers.items() if isinstance(value, int | float)), numbers
    assert numbers["ranks_1/token_imbalance"] == 1.0
    assert numbers["ranks_2/token_imbalance"] >= 1.0
    ratio = numbers["reference_tokens_per_s"] / numbers["ranks_1/tokens_per_s"]
    assert numbers["reference_rate_over_training_rate"] == pytest.approx(ratio)
    assert numbers["startup_pairs"] == 200
    assert 0.5 < numbers["startup_s"] < 100


def test_numbered_pairs_are_all_different(tmp_path: Path) -> None:
    path = tmp_path / "many.jsonl"
    bench_scaling.write_numbered(str(OWN_PAIRS), 40, path)
    before, after = read_records([OWN_PAIRS], kind="pair"), read_records([path], kind="pair")
    assert len(after) == 40
    assert len({str(record.prompt) for record in after}) == 40
    assert after[17].completions == before[1].completions
    last = after[17].prompt if isinstance(after[17].prompt, str) else after[17].prompt[-1].content
    assert last.startswith("(17) ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "4"], "--steps 4: must be 5 or more"),
        (["--ranks", "0"], "--ranks 0: must be 1 or more each"),
        (["--pairs", "9", "--steps", "5"], "16 usable rows, 9 pairs x 5 steps need more"),
        (
            ["--pairs", "1", "--steps", "5", "--tokens-per-microbatch", "100000"],
            "fit in one batch of the reference pass",
        ),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    options: list[str], message: str, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_bench(tiny_model_dir, *options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_run_that_fails_gives_its_own_line(tmp_path: Path) -> None:
    with pytest.raises(bench_scaling.RunError, match=r"1 ranks: error: .*nowhere.toml: no such file"):
        bench_scaling.launch([str(tmp_path / "nowhere.toml")], 1, 1)

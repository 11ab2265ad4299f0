"""`kernels.bench`: each row measures what its name says; the command writes what it prints."""

import json
from pathlib import Path

import pytest

from kernels import bench

SMALL = ["--rows", "40", "--width", "64", "--vocab", "1100", "--repeats", "1"]


@pytest.mark.parametrize("variant", list(bench.LINEAR_LOGPS))
def test_every_way_to_linear_logps_is_measured_and_exact(variant: str) -> None:
    if not bench.available(variant):
        pytest.skip("this PyTorch has no F.linear_cross_entropy")
    row = bench.measure(variant, bench.parse([*SMALL, "--dtype", "float32"]))
    assert row["max_error"] < 1e-4 and row["milliseconds"] > 0 and row["gemm_share"] > 0
    assert (row["gradient_error"] == 0) == (variant == "no gradient")
    assert row["gradient_error"] < 1e-4


@pytest.mark.parametrize("op", list(bench.SMALL))
def test_small_operators_are_measured_against_the_plain_ones(op: str) -> None:
    for variant in ("plain", "ours"):
        row = bench.measure(variant, bench.parse([*SMALL, "--op", op, "--dtype", "float32"]))
        assert row["max_error"] < 1e-4 and 0 < row["gradient_error"] < 1e-4 and row["milliseconds"] > 0


def test_the_command_prints_and_writes_the_same_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rope.json"
    assert bench.main(["--op", "rope", *SMALL, "--threads", "1", "--json", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    written = json.loads(file.read_text())
    assert written["threads"] == 1 and written["op"] == "rope" and "torch" in lines[0]
    assert [row["variant"] for row in written["readings"]] == ["plain", "ours"]
    assert lines[-2:] == [bench.row_words(row) for row in written["readings"]]
    assert all(row["peak_mib"] >= 0 and row["max_error"] < 0.1 for row in written["readings"])


def test_bad_numbers_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        bench.parse(["--rows", "0"])
    assert error.value.code == 2
    assert "--rows 0: must be at least 1" in capsys.readouterr().err

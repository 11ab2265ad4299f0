"""`kernels.bench`: each row measures what its name says; the command writes what it prints; devices are kept apart.

Nothing here asks how fast anything is. Triton's rows run in its interpreter, in a process of their own.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kernels import bench, bench_cases, bench_meter, reference
from kernels.bench_cases import OPERATORS, Sizes, Variant

CPU = torch.device("cpu")
SMALL = ["--rows", "70", "--width", "64", "--vocab", "1100", "--repeats", "1", "--device", "cpu"]
"""More rows than errors are taken on."""
WORK = {
    # 2 N D V
    "linear_logps": 2 * 70 * 64 * 1100,
    # three products of 2 N D F with F = 64 * 8 // 3
    "swiglu_linear": 3 * 2 * 70 * 64 * 170,
    "geglu_linear": 3 * 2 * 70 * 64 * 170,
    # float32: read logits; read logits, write their gradient
    "logits_logps": 4 * 3 * 70 * 1100,
    # read x, write the norm; read x and the gradient, write one
    "rms_norm": 4 * 5 * 70 * 64,
    # read x and residual, write sum and norm; read the sum and both gradients, write one
    "add_rms_norm": 4 * 8 * 70 * 64,
    "rope": 4 * 4 * 70 * 64,
}
"""FLOP, or bytes, of forward and backward, by hand; of linear_logps, of one product."""
HEADS = {
    "plain": 3,
    "F.linear_cross_entropy": 4,
    "F.linear_cross_entropy, best": 4,
    "recompute, cpu": 4,
    "stash, cpu": 3,
    "frozen head, cpu": 2,
    "no gradient, cpu": 1,
}


@pytest.fixture(autouse=True)
def _small_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """The buffers that the size of the cache asks for take most of the time here."""
    for module in (bench, bench_meter):
        monkeypatch.setattr(module, "cache_bytes", lambda device: 1 << 16)


def found_here(op: str) -> list[Variant]:
    """But the compiled one, which takes long."""
    found = bench_cases.variants(op, torch.float32, CPU)
    return [variant for variant in found if not variant.missing and variant.name != "torch.compile"]


@pytest.mark.parametrize("op", OPERATORS)
def test_every_way_to_an_operator_is_exact_and_its_work_is_counted(op: str) -> None:
    options = bench.parse([*SMALL, "--dtype", "float32"])
    ways = found_here(op)
    assert [way.name for way in ways][0] == "plain" and len(ways) > 1
    assert op != "linear_logps" or {way.name: way.times for way in ways} == HEADS
    for way in ways:
        row = bench.measure(op, way.name, options)
        assert row["max_error"] < 1e-5, way.name
        assert (row["gradient_error"] is None) == (way.name == "no gradient, cpu")
        assert 0 < (row["gradient_error"] or 1e-7) < 1e-6, way.name
        unit = {"TFLOP/s": 1e12, "GB/s": 1e9}[row["unit"]]
        work = WORK[op] * HEADS.get(way.name, 1) if op == "linear_logps" else WORK[op]
        assert row["speed"] * unit * row["milliseconds"] / 1e3 == pytest.approx(work)
        assert row["share"] > 0 and row["peak_mib"] < 100
        assert (row["note"] != "") == way.name.endswith("best")


def test_triton_rows_in_the_interpreter() -> None:
    pytest.importorskip("triton", reason="the package triton is for Linux only")
    script = "import test_kernel_bench; test_kernel_bench.measure_triton_rows()"
    environment = os.environ | {"TRITON_INTERPRET": "1", "LOGRATIO_KERNELS": "triton", "OMP_NUM_THREADS": "1"}
    path = os.pathsep.join([str(bench.ROOT), str(bench.ROOT / "tests")])
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:-1] == [
        "linear_logps: recompute, fused",
        "linear_logps: frozen head, fused",
        "linear_logps: stash, vendor",
        "linear_logps: no gradient, vendor",
        "logits_logps: ours, triton",
        "logits_logps: ours, triton, in place",
        *(f"{op}: ours, triton" for op in list(OPERATORS)[2:]),
    ]


def measure_triton_rows() -> None:
    """Run in that process: half of the heads, and all else."""
    bench.cache_bytes = bench_meter.cache_bytes = lambda device: 1 << 12
    sizes = ["--rows", "8", "--width", "32", "--vocab", "70", "--repeats", "1", "--device", "cpu"]
    options = bench.parse([*sizes, "--dtype", "float32"])
    skipped = ("stash, fused", "no gradient, fused", "recompute, vendor", "frozen head, vendor")
    for op in OPERATORS:
        for way in bench_cases.variants(op, torch.float32, CPU):
            if way.name.endswith(("fused", "vendor", "triton", "in place")) and "cpu" not in way.name:
                if way.name not in skipped:
                    row = bench.measure(op, way.name, options)
                    assert row["max_error"] < 1e-5 and (row["gradient_error"] or 0) < 1e-6, (op, way.name, row)
                    print(f"{op}: {way.name}")


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler here")
def test_the_compiled_row() -> None:
    row = bench.measure("rope", "torch.compile", bench.parse([*SMALL, "--dtype", "float32"]))
    assert row["max_error"] < 1e-5 and 0 < row["gradient_error"] < 1e-6


@pytest.mark.parametrize(
    ("wrong", "value_error", "gradient_error"),
    [
        (lambda x, weight: 1.01 * reference.rms_norm(x, weight, 1e-5), 0.01, 0.01),
        (lambda x, weight: reference.rms_norm(x, weight, 1e-5) + 0.5, 0.5, 0.0),
        (lambda x, weight: reference.rms_norm(x, weight.detach() + 0 * weight, 1e-5), 0.0, 1.0),
    ],
)
def test_errors_are_seen(wrong: Callable, value_error: float, gradient_error: float) -> None:
    x, weight = torch.ones(100, 16), torch.ones(16)  # so the norm is 1, but for eps
    error, by_inputs = bench.errors(wrong, OPERATORS["rms_norm"], [x.requires_grad_(), weight.requires_grad_()], True)
    assert error == pytest.approx(value_error, abs=1e-5)
    assert by_inputs == pytest.approx(gradient_error, rel=1e-3, abs=1e-3)


def test_inputs_take_turns_beyond_the_cache() -> None:
    sizes, way = Sizes(70, 64, 1100), found_here("rms_norm")[0]
    sets = bench.input_sets(OPERATORS["rms_norm"], way, sizes, torch.bfloat16, CPU)
    assert len(sets) == 15  # of 2 * (70 + 1) * 64 bytes, for twice 65,536
    assert len({inputs[0].data_ptr() for inputs in sets}) == 15
    seen: list[int] = []
    rounds = [lambda index=index: seen.append(index) for index in range(3)]
    seconds, most = bench.timings(rounds, (lambda: seen.append(-1), 8.0), 4, CPU, iter(range(100)).__next__)
    assert seen == [-1, 0, -1, 1, -1, 2, -1, 0, -1, 1]
    assert seconds == 1 and most == 8.0  # a clock that says a second more each time


def test_peak_memory_is_what_a_function_adds_each_time() -> None:
    held = torch.ones(1 << 20)
    for _ in range(2):  # the second time, memory that the first one freed is taken again
        peak = bench_meter.peak_mib(lambda: torch.ones(5 << 20).sum(), CPU)
        if peak is None:
            pytest.skip("this system does not say")
        assert peak == pytest.approx(20, abs=4)
    assert len(held)


def run_main(folder: Path, *more: str) -> tuple[int, Path]:
    file = folder / "rope.json"
    return bench.main(["--op", "rope", *SMALL, "--threads", "1", "--json", str(file), *more]), file


def test_the_command_prints_and_writes_the_same_rows_and_compares_its_own_device(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_cases.shutil, "which", lambda name: None)
    code, file = run_main(tmp_path)
    assert code == 0
    lines = capsys.readouterr().out.splitlines()
    written = json.loads(file.read_text())
    assert written["device"] == bench_meter.device_name(CPU) and written["device"] in lines[0]
    assert (written["threads"], written["dtype"], written["rows"]) == (1, "bf16", 70)
    assert [row["variant"] for row in written["readings"]] == ["plain", "torch.compile", "Liger", "ours, cpu"]
    assert lines[2].startswith("rope: (70, 1, 64), (70, 32), (70, 32)")
    assert lines[4:] == [bench.row_words(row) for row in written["readings"]]
    assert lines[5].endswith("n/a (no C++ compiler here)") and "n/a (" in lines[6]
    assert all(row["peak_mib"] >= 0 and row["max_error"] < 0.1 for row in written["readings"][::3])

    older = bench.read_older(str(file), {**written})
    was = written["readings"][3]
    words = bench.row_words({**was, "milliseconds": 3 * was["milliseconds"]}, older["rope", "ours, cpu"])
    assert words.endswith(f"was {was['milliseconds']:.4g} ms: 3.00 times that")
    for change, words in (
        ({"device": "GPU of somebody"}, "read on GPU of somebody, this is CPU"),
        ({"dtype": "float32"}, "dtype is float32 there and bf16 here"),
        ({"readings": None}, "not a file that --json wrote"),
    ):
        file.write_text(json.dumps(written | change))
        code, _ = run_main(tmp_path, "--compare", str(file))
        found = capsys.readouterr()
        assert code == 2 and not found.out and words in found.err and len(found.err.splitlines()) == 1


def test_functions_of_the_package_name_rows_too() -> None:
    assert bench.parse(["--op", "logps_from_logits", "geglu", "rope"]).op == ["logits_logps", "geglu_linear", "rope"]


def test_an_implementation_that_cannot_run_here_is_an_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOGRATIO_KERNELS", "tritom")
    assert bench.main(["--op", "rope", *SMALL]) == 2
    assert "must be one of auto" in capsys.readouterr().err


def test_a_row_that_fails_says_why() -> None:
    way = Variant("nothing", bench_cases._always(reference.apply_rope), 1, 1)
    row = bench.run_row("rope", way, [*SMALL])
    assert "ValueError" in row["failed"] and "failed (ValueError" in bench.row_words(row)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rows", "0"], "--rows 0: must be at least 1"),
        (["--width", "63"], "--width 63: must be even"),
        (["--device", "cuda"], "--device cuda: PyTorch finds no GPU here"),
        (["--json", "no/such/folder/f.json"], "--json no/such/folder/f.json: must be a file in a folder that exists"),
        (["--json", "."], "--json .: must be a file in a folder that exists"),
    ],
)
def test_bad_options_are_refused(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as error:
        bench.parse(arguments)
    assert error.value.code == 2
    assert words in capsys.readouterr().err

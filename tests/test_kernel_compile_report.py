"""`compile_report`: what it reads from machine code, that its gate finds each fault, and that our kernels have none."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kernels import assembly, compile_report
from kernels.kernel_case import TARGETS, KernelCase

pytest.importorskip("triton", reason="the package triton is not installed")

ROOT = Path(__file__).resolve().parent.parent
FIELDS = {"kernel", "target", "shape", "dtype", "spills", "shared_bytes", "registers", "tensor_core_ops", "wide_loads"}


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command, with the `kernels` package that lies in `folder`."""
    command = [sys.executable, "-m", "kernels.compile_report", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=1200)


@pytest.fixture(scope="module")
def samples_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of `kernels` with the samples in place of our own Triton files."""
    folder = tmp_path_factory.mktemp("samples")
    (folder / "kernels").mkdir()
    for path in (ROOT / "kernels").glob("*.py"):
        if not path.stem.endswith("_triton"):
            shutil.copy(path, folder / "kernels")
    shutil.copy(ROOT / "tests" / "compile_fixtures.py", folder / "kernels" / "samples_triton.py")
    return folder


@pytest.fixture(scope="module")
def gate(samples_folder: Path) -> subprocess.CompletedProcess[str]:
    return run(samples_folder, "--gate", "--json", "rows.json")


@pytest.fixture(scope="module")
def rows(samples_folder: Path, gate: subprocess.CompletedProcess[str]) -> dict[tuple[str, str, str], dict[str, Any]]:
    """(operator, target, shape and source) -> row."""
    found = json.loads((samples_folder / "rows.json").read_text())
    keyed = {(row["operator"], row["target"], f"{row['shape']} {row['source']}"): row for row in found}
    assert len(keyed) == len(found)
    return keyed


def of_operator(rows: dict[tuple[str, str, str], dict[str, Any]], operator: str) -> dict[str, dict[str, Any]]:
    return {target: row for (name, target, _), row in rows.items() if name == operator}


def test_good_kernels_pass_on_all_four_targets(rows: dict[tuple[str, str, str], dict[str, Any]]) -> None:
    good = {key: row for key, row in rows.items() if key[0] == "good"}
    assert {target for _, target, _ in good} == set(TARGETS)
    assert len(good) == 11
    for row in good.values():
        assert row.keys() >= FIELDS | {"atomics", "source", "flops", "bytes", "roofline_ms"}
        assert row["problems"] == []
        assert row["spills"] == row["atomics"] == 0
        assert row["wide_loads"] > 0 and row["registers"] > 0
        assert (row["tensor_core_ops"] > 0) == row["kernel"].startswith("product")


def test_the_tiles_of_a_product_can_be_found_in_its_numbers(rows: dict[tuple[str, str, str], dict[str, Any]]) -> None:
    """By hand: two stages of (128 + 128) x 64 bf16; HMMA of 16 x 8 x 16 over the tile, 8 warps: 64 each; HGMMA of
    64 x 128 x 16, two groups of warps: 4 each; a row of 1024 bf16 on 64 threads: 16 each, two loads of 16 bytes."""
    product = "M4096 N4096 K1024 pointers"
    assert rows["good", "sm_80", product]["tensor_core_ops"] == 128 * 128 * 64 // (16 * 8 * 16) // 8 == 64
    assert rows["good", "sm_90", product]["tensor_core_ops"] == 4
    assert rows["good", "sm_90", product]["shared_bytes"] == 2 * 2 * (128 + 128) * 64 == 65536
    assert (
        rows["good", "sm_90", "M4096 N4096 K1024 descriptors"]["shared_bytes"] // 1024
        == 3 * 2 * (128 + 256) * 64 // 1024
    )
    assert rows["good", "sm_90", "R8192 D1024 pointers"]["wide_loads"] == 1024 * 2 // 64 // 16 == 2


def test_a_shape_that_compiles_to_the_same_code_shares_the_reading(
    rows: dict[tuple[str, str, str], dict[str, Any]],
) -> None:
    small, large = (rows["good", "sm_80", f"M{size} N{size} K1024 pointers"] for size in (4096, 8192))
    assert small | {"shape": large["shape"]} == large


def test_bounds_are_those_of_the_data_sheets(rows: dict[tuple[str, str, str], dict[str, Any]]) -> None:
    """2 x 4096 x 4096 x 1024 operations at 312 TFLOP/s; 8192 rows of 2052 bytes at 5.3 TB/s."""
    product = rows["good", "sm_80", "M4096 N4096 K1024 pointers"]
    assert product["roofline_ms"] == pytest.approx(34.359738368e9 / 312e12 * 1e3)
    assert rows["good", "gfx942", "R8192 D1024 pointers"]["roofline_ms"] == pytest.approx(8192 * 2052 / 5.3e12 * 1e3)


@pytest.mark.parametrize(
    ("operator", "targets", "problem"),
    [
        ("spills", {"sm_80", "gfx942"}, " spills"),
        ("no attributes", {"sm_80", "gfx942"}, " spills"),
        ("no attributes", {"sm_80", "gfx942"}, "no load of 16 bytes a thread"),
        ("float32", {"sm_80"}, "a matrix product without tensor cores"),
        ("shared memory", {"sm_80"}, "196608 bytes of shared memory, A100 has 166912"),
        ("shared memory", {"gfx942"}, "196608 bytes of shared memory, MI300X has 65536"),
        ("shared memory", {"sm_90"}, " bytes of shared memory, H100 has 232448"),
        ("serialised", {"sm_90"}, "ptxas serialises its wgmma instructions"),
        ("atomics", {"sm_90", "gfx942"}, "1 atomics"),
        ("narrow", {"sm_90", "gfx942"}, "no load of 16 bytes a thread"),
        ("wrong types", {"sm_90"}, "does not compile: CompilationError: at "),
        ("dies", {"sm_90"}, "does not compile: the compiler ended the process (exit code 41)"),
        ("incomplete", {"sm_90"}, "does not compile: ValueError: the case and the kernel's arguments differ: out"),
    ],
)
def test_the_gate_names_every_bad_kernel(
    operator: str,
    targets: set[str],
    problem: str,
    rows: dict[tuple[str, str, str], dict[str, Any]],
    gate: subprocess.CompletedProcess[str],
) -> None:
    assert gate.returncode == 1, gate.stderr
    bad = of_operator(rows, operator)
    for target in targets:
        assert any(problem in found for found in bad[target]["problems"]), bad[target]
        place = compile_report.row_name(bad[target])
        assert any(line.startswith(f"FAIL {place}: ") and problem in line for line in gate.stdout.splitlines())


def test_only_the_fault_that_was_put_in_is_found(rows: dict[tuple[str, str, str], dict[str, Any]]) -> None:
    for operator in ("float32", "shared memory", "atomics", "narrow", "wrong types", "dies", "incomplete"):
        for row in of_operator(rows, operator).values():
            assert len(row["problems"]) == 1, row


def test_a_kernel_without_a_case_and_a_target_without_a_kernel_are_found(
    gate: subprocess.CompletedProcess[str],
) -> None:
    lines = gate.stdout.splitlines()
    assert "FAIL kernels.samples_triton: without_case: no compile case" in lines
    assert "FAIL atomics: no compile case for sm_80" in lines
    assert not any("helper" in line or "FAIL good" in line for line in lines)


def test_one_operator_on_one_target(samples_folder: Path) -> None:
    done = run(samples_folder, "--gate", "--op", "good", "--target", "gfx942")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split()[:2] for line in done.stdout.splitlines()[1:3]] == [["good:", "product"], ["good:", "row_sums"]]
    wrong = run(samples_folder, "--op", "godo")
    assert wrong.returncode == 2 and "--op godo: must be one of atomics, dies, " in wrong.stderr


def test_an_empty_folder_does_not_pass(samples_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(samples_folder / "kernels", tmp_path / "kernels")
    (tmp_path / "kernels" / "samples_triton.py").unlink()
    done = run(tmp_path, "--gate")
    assert done.returncode == 1 and "no file kernels/*_triton.py has a compile case" in done.stdout


def test_what_the_user_can_mend_exits_with_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match="2"):
        compile_report.main(["--json", str(tmp_path / "none" / "rows.json")])
    assert "must be a file in a folder that exists" in capsys.readouterr().err
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert compile_report.main([]) == 2
    assert "TRITON_INTERPRET=1" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "triton", None)  # as find_spec sees a package that is not there
    assert compile_report.main([]) == 2
    assert "the package triton is not installed" in capsys.readouterr().err


def test_our_own_kernels_pass_the_gate(tmp_path: Path) -> None:
    """All of them, at all shapes of their cases, for all four targets (gaps are the gate's business)."""
    done = run(ROOT, "--gate", "--json", str(tmp_path / "rows.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "rows.json").read_text())
    kernels = {(row["operator"], row["kernel"]) for row in found}
    assert {operator for operator, _ in kernels} == {
        "linear_logps",
        "logits_logps",
        "rms_norm",
        "rope",
        "swiglu_linear",
    }
    products = [row for row in found if row["kernel"].endswith("_gemm")]
    assert {row["source"] for row in products} == {"pointers", "descriptors"}
    assert {row["kernel"] for row in products} == {"forward_gemm", "backward_gemm"}
    assert all(row["tensor_core_ops"] > 0 for row in products)
    assert all(row["spills"] == row["atomics"] == 0 for row in found)


LOG = "ptxas info    : Used 42 registers, used 1 barriers\n"


def sass(*instructions: str) -> str:
    return "".join(f"        /*{16 * at:04x}*/  {text} ;\n" for at, text in enumerate([*instructions, "EXIT"]))


@pytest.mark.parametrize(
    ("instruction", "field"),
    [
        ("@!P0 STL.64 [R1+0x10], R2", "spills"),
        ("LDL.LU R192, [R1+0x374]", "spills"),
        ("HMMA.16816.F32.BF16 R4, R8, R2, R4", "tensor_core_ops"),
        ("HGMMA.64x256x16.F32.BF16 R24, gdesc[UR20], R24", "tensor_core_ops"),
        ("@UP0 UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8]", "tensor_core_ops"),
        ("@P3 LDG.E.128.CONSTANT R4, desc[UR4][R2.64]", "wide_loads"),
        ("LDG.E.ENL2.256 R4, R8, desc[UR4][R2.64]", "wide_loads"),
        ("LDGSTS.E.BYPASS.LTC128B.128 [R5], desc[UR4][R2.64]", "wide_loads"),
        ("@UP3 UTMALDG.2D [UR20], [UR4]", "wide_loads"),
        ("ATOMG.E.ADD.F32.FTZ.RN.STRONG.GPU PT, R2, R4", "atomics"),
        ("RED.E.ADD.F32.FTZ.RN.STRONG.GPU [R2.64], R5", "atomics"),
        ("UTMAREDG.2D.ADD [UR4], [UR6]", "atomics"),
        # alike in name, but not what is counted
        ("LDGSTS.E.LTC128B.64 [R5], desc[UR4][R2.64]", None),
        ("LDG.E.64 R4, desc[UR4][R2.64]", None),
        ("LDS.128 R4, [R2]", None),
        ("LDGDEPBAR", None),
        ("REDUX.SUM UR4, R2", None),
        ("ATOMS.OR RZ, [UR5], R3", None),
        ("UTCATOMSWS.AND URZ, UR4", None),
        ("UTCBAR [UR4], URZ", None),
    ],
)
def test_each_instruction_counts_as_what_it_is(instruction: str, field: str | None) -> None:
    nothing = assembly.Reading(0, 42, 0, 0, 0, False)
    expected = nothing if field is None else assembly.Reading(**{**vars(nothing), field: 1})
    assert assembly.read_nvidia(sass("MOV R1, R2", instruction), LOG, "") == expected


def test_an_atomic_in_the_intermediate_form_counts() -> None:
    for name in ("tt.atomic_rmw fadd", "tt.atomic_cas acq_rel", "tt.descriptor_reduce add"):
        assert assembly.read_nvidia(sass("NOP"), LOG, f"  %3 = {name}, %1").atomics == 1


AMD_METADATA = "\ts_endpgm\n    .vgpr_count:     90\n    .vgpr_spill_count: 0\n    .sgpr_spill_count: {scalars}\n"


@pytest.mark.parametrize(
    ("instruction", "field"),
    [
        ("scratch_store_dwordx4 off, v[2:5], s33", "spills"),
        ("v_mfma_f32_32x32x8_bf16_1k a[0:15], v[2:3], v[4:5], a[0:15]", "tensor_core_ops"),
        ("buffer_load_dwordx4 v[2:5], v1, s[8:11], 0 offen", "wide_loads"),
        ("global_load_dwordx4 v[2:5], v[2:3], off", "wide_loads"),
        ("buffer_atomic_add_f32 v1, v2, s[8:11], 0 offen", "atomics"),
        ("global_atomic_add_f32 v1, v2, s[0:1]", "atomics"),
        ("global_load_dwordx2 v[2:3], v[2:3], off", None),
        ("s_load_dwordx4 s[12:15], s[0:1], 0x28", None),
    ],
)
def test_each_amd_instruction_counts_as_what_it_is(instruction: str, field: str | None) -> None:
    nothing = assembly.Reading(0, 90, 0, 0, 0, False)
    expected = nothing if field is None else assembly.Reading(**{**vars(nothing), field: 1})
    assert assembly.read_amd(f"\t{instruction}\n" + AMD_METADATA.format(scalars=0), "") == expected
    assert assembly.read_amd(AMD_METADATA.format(scalars=3), "").spills == 3


def test_text_without_what_is_looked_for_is_no_reading_of_zero() -> None:
    with pytest.raises(ValueError, match="version changed"):
        assembly.read_nvidia("", LOG, "")
    with pytest.raises(ValueError, match="version changed"):
        assembly.read_nvidia(sass("NOP"), "", "")
    with pytest.raises(ValueError, match="version changed"):
        assembly.read_amd("", "")


CASE = KernelCase(
    operator="x", kernel=SimpleNamespace(arg_names=["a", "b", "n"]), source="pointers", targets=("sm_100",),
    signature={"a": "*bf16", "b": "*bf16", "n": "i32"}, constexprs={}, divisible_by_16=("a", "n"), over_2_gib=("b",),
    num_warps=4, num_stages=2, shape="", dtype="bf16", flops=1, bytes_moved=1, is_gemm=True,
)  # fmt: skip


def test_attributes_are_what_a_launch_would_find() -> None:
    """On AMD, Triton also marks pointers to less than 2 GiB (HIPBackend.get_tensor_specialization of 3.7.1)."""
    multiple = ["tt.divisibility", 16]
    assert compile_report.attributes(CASE, "sm_80") == {(0,): [multiple], (2,): [multiple]}
    assert compile_report.attributes(CASE, "gfx942") == {(0,): [multiple, ["tt.pointer_range", 32]], (2,): [multiple]}


def test_tensor_memory_has_its_own_limit() -> None:
    """128 x 256 float32 sums take 256 columns of 128 lanes; B200 has 512."""
    reading = assembly.Reading(0, 42, 1, 1, 0, False)
    for columns, found in ((512, 0), (1024, 1)):
        compiled = compile_report.Compiled(reading, 1024, columns)
        assert len(list(compile_report.problems(CASE, "sm_100", compiled))) == found

"""How commands end: exit codes, one line, no traceback but for our own bugs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.entry import exit_code
from trainer.errors import ConfigError, RunError, TrainingStopped

ROOT = Path(__file__).resolve().parent.parent


def raising(error: BaseException):  # noqa: ANN201
    def command(argv: list[str]) -> None:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ConfigError("loss.beta", -1, "must be > 0"), 2, "error: loss.beta = -1: must be > 0\n"),
        (RunError("runs/a", "in use"), 2, "error: runs/a: in use\n"),
        (TrainingStopped("step 3: loss nan"), 1, "stopped: step 3: loss nan\n"),
        (KeyboardInterrupt(), 1, "stopped: interrupted; start the same command again to resume\n"),
    ],
    ids=["config", "run", "stopped", "interrupted"],
)
def test_what_is_known_ends_in_one_line(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(raising(error), []) == code
    assert capsys.readouterr() == ("", line)


def test_a_command_that_returns_is_done(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[list[str]] = []
    assert exit_code(seen.append, ["a", "b"]) == 0
    assert seen == [["a", "b"]] and capsys.readouterr() == ("", "")


def test_our_own_bugs_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        exit_code(raising(ZeroDivisionError()), [])


def run_python(program: str, **options: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("env", {})}  # type: ignore[dict-item]
    command = [sys.executable, "-c", program]
    options = {"stdout": subprocess.PIPE, "cwd": ROOT, **options}
    return subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, check=False, **options)  # type: ignore[call-overload]


def test_an_uncaught_bug_exits_1_with_a_traceback() -> None:
    done = run_python("from trainer.entry import run_command; run_command(lambda argv: 1 / 0, [])")
    assert done.returncode == 1 and done.stderr.startswith("Traceback") and "ZeroDivisionError" in done.stderr


def test_output_into_a_pipe_that_was_closed_ends_quietly() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    program = "from trainer.entry import run_command; run_command(lambda argv: print('x' * 100000), [])"
    try:
        done = run_python(program, stdout=writing)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


def test_a_terminal_that_lacks_letters_does_not_end_a_run() -> None:
    program = r"from trainer.entry import run_command; run_command(lambda argv: print('Gr\xfc\xdfe \u4f60'), [])"
    done = run_python(program, env={"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stdout, done.stderr) == (0, "Gr\\xfc\\xdfe \\u4f60\n", "")


def test_another_package_named_kernels_is_named_before_it_fails(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("")
    done = run_python("import trainer.entry; import kernels.linear_logps", cwd=tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {tmp_path}/kernels: this is another package named kernels, Logratio's is {ROOT}")
    assert "pip uninstall kernels" in line


def test_the_script_puts_this_checkout_first(tmp_path: Path) -> None:
    """Another `kernels` before ours on the path, and trainer/ itself not on it: its config.py would shadow others."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("")
    main = ROOT / "trainer" / "main.py"
    program = (
        f"import runpy, sys; sys.path[:0] = ['', {str(main.parent)!r}]; runpy.run_path({str(main)!r});"
        "import kernels; print(kernels.__file__, [p for p in sys.path if p.endswith('trainer')], sys.path[0])"
    )
    done = run_python(program, cwd=tmp_path)
    assert done.stdout == f"{ROOT}/kernels/__init__.py [] {ROOT}\n", done.stderr

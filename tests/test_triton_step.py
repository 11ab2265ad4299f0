"""A whole DPO step and a whole ORPO step by Triton's kernels, in a process with its interpreter: `interpreted_step`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent / "interpreted_step.py"


def test_in_the_interpreter() -> None:
    pytest.importorskip("triton", reason="the package triton is for Linux only")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(TESTS)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "2 passed" in found.stdout

"""The Triton kernels of `linear_logps`, in a process with Triton's interpreter: see `interpreted_linear_logps`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent / "interpreted_linear_logps.py"


def test_in_the_interpreter() -> None:
    pytest.importorskip("triton", reason="the package triton is for Linux only")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(TESTS)]
    found = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stdout + found.stderr

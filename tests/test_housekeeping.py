"""The files around the code: dependencies are declared and pinned, make lists its targets, the licence is whole."""

import ast
import hashlib
import re
import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
APACHE_2_SHA256 = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"


@pytest.fixture(scope="module")
def setup_keywords() -> dict[str, ast.expr]:
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    (call,) = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "setup"]
    return {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}


def names(requirements: list[str]) -> set[str]:
    return {Requirement(text).name for text in requirements}


def test_every_dependency_is_pinned_once_and_nothing_else(setup_keywords: dict[str, ast.expr]) -> None:
    declared = names(ast.literal_eval(setup_keywords["install_requires"]))
    for extra in ast.literal_eval(setup_keywords["extras_require"]).values():
        declared |= names(extra)
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.+]+", pin) for pin in pins)
    # accelerate comes with peft and is pinned along.
    assert sorted(pin.split("==")[0] for pin in pins) == sorted(declared | {"accelerate"})
    assert "torch==2.13.0" in pins


def test_oracles_and_peers_are_no_run_time_dependency(setup_keywords: dict[str, ast.expr]) -> None:
    run_time = names(ast.literal_eval(setup_keywords["install_requires"]))
    assert not run_time & {"transformers", "trl", "peft", "datasets", "accelerate"}
    assert "trl" not in (ROOT / "setup.py").read_text(encoding="utf-8")


def test_make_help_lists_the_targets() -> None:
    result = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    listed = re.findall(r"^make ([a-z-]+) ", result.stdout, re.MULTILINE)
    assert {"train", "test", "test-long", "lint", "help", "clean"} <= set(listed)


def test_licence_is_the_whole_apache_2() -> None:
    assert hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest() == APACHE_2_SHA256

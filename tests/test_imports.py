"""Who may import whom (docs: CONTRIBUTING.md), checked on the source of every module.

    kernels   data_tools   ->   trainer   ->   eval   ->   tests

The rules are a function of one file's text, so that the second half can show that each of them bites.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {
    "kernels": {"kernels"},
    "data_tools": {"data_tools"},
    "trainer": {"kernels", "data_tools", "trainer"},
    "eval": {"kernels", "data_tools", "trainer", "eval"},
}
LIBRARIES = {"torch", "safetensors", "tokenizers", "sentencepiece", "numpy", "jinja2", "gguf", "tqdm", "triton"}
LIBRARIES_OF = {
    "kernels": {"torch", "triton"},
    "data_tools": LIBRARIES - {"torch", "triton"},
    "trainer": LIBRARIES,
    "eval": LIBRARIES,
}
SLOW = {"torch.distributed.fsdp"}
"""Imported where they are used: they take most of a second, and a run on one rank does without."""
OPTIONAL = {"bitsandbytes", "httpx", "matplotlib", "tensorboard", "triton", "torch.utils.tensorboard"} | SLOW
"""Imported inside the function that needs them, since they may not be installed."""
COLLECTIVES_IN = {"trainer/dist.py"}
SHARDING_MODULES = ("checkpoint", "device_mesh", "fsdp", "tensor")
"""Parts of torch.distributed that hold no collective of ours: saving and sharding."""
TAKEN_NAMES = sys.stdlib_module_names | LIBRARIES | {"transformers", "peft", "sklearn", "pytest", "hypothesis"}


def sources() -> list[Path]:
    return sorted(path for package in MAY_IMPORT for path in (ROOT / package).rglob("*.py"))


def imports(tree: ast.AST) -> Iterator[tuple[int, str, bool]]:
    """(line, absolute module name or "." for a relative import, inside a function?) of every import."""
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield node.lineno, name.name, id(node) in inside
        elif isinstance(node, ast.ImportFrom):
            module = "." if node.level else node.module or ""
            names = [f"{module}.{name.name}" for name in node.names] if module == "torch" else [module]
            for name in names:
                yield node.lineno, name, id(node) in inside


def violations(path: PurePosixPath, text: str) -> list[str]:
    """What the file `path` (relative to the repository) does against the rules, one line each."""
    package = path.parts[0]
    tree = ast.parse(text)
    found = [f"{path}:{line}: {problem}" for line, problem in _import_problems(package, path, tree)]
    if str(path) not in COLLECTIVES_IN:
        found += [
            f"{path}:{node.lineno}: torch.distributed outside trainer/dist.py"
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute)
            and ast.unparse(node.value) == "torch.distributed"
            and node.attr not in SHARDING_MODULES
        ]
    if path.stem in TAKEN_NAMES or path.parent.name in TAKEN_NAMES:
        found.append(f"{path}: named like a standard module or a dependency")
    return found


def _import_problems(package: str, path: PurePosixPath, tree: ast.AST) -> Iterator[tuple[int, str]]:
    for line, module, deferred in imports(tree):
        top = module.split(".")[0]
        optional = module in OPTIONAL or top in OPTIONAL
        ours = top in MAY_IMPORT or top == "tests"
        if module == ".":
            yield line, "relative import"
        elif ours and top not in MAY_IMPORT[package]:
            yield line, f"{package} must not import {top}"
        elif not ours and top not in sys.stdlib_module_names | LIBRARIES_OF[package] | OPTIONAL:
            yield line, f"{package} must not import {top}"
        elif top == "torch" and package == "data_tools":
            yield line, "data_tools must not import torch"
        if deferred and not optional and not (str(path) == "kernels/dispatch.py" and top == "kernels"):
            yield line, f"deferred import of {module}: only optional libraries may be"
        if optional and not deferred and top != "triton":
            yield line, f"{module} is optional: import it where it is used"
        if module.startswith("torch.distributed") and str(path) not in COLLECTIVES_IN:
            rest = module.split(".")[2:]
            if not rest or rest[0] not in SHARDING_MODULES:
                yield line, "torch.distributed outside trainer/dist.py"


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_module_keeps_the_rules(path: Path) -> None:
    assert violations(PurePosixPath(path.relative_to(ROOT)), path.read_text(encoding="utf-8")) == []


def test_every_package_is_looked_at() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in sources()} == set(MAY_IMPORT)


def test_tests_are_no_package() -> None:
    assert not (ROOT / "tests" / "__init__.py").exists()
    named = {folder.name for folder in (ROOT / "tests").rglob("*") if folder.is_dir()}
    assert not named & set(MAY_IMPORT), "a test folder bears a package's name"


@pytest.mark.parametrize(
    ("path", "text", "problem"),
    [
        ("kernels/x.py", "import numpy", "kernels must not import numpy"),
        ("kernels/x.py", "from trainer.dist import rank", "kernels must not import trainer"),
        ("data_tools/x.py", "import torch", "data_tools must not import torch"),
        ("data_tools/x.py", "from torch.nn import Module", "data_tools must not import torch"),
        ("data_tools/x.py", "from kernels import reference", "data_tools must not import kernels"),
        ("trainer/x.py", "from eval.generate import sample", "trainer must not import eval"),
        ("eval/x.py", "import tests.conftest", "eval must not import tests"),
        ("trainer/x.py", "import transformers", "trainer must not import transformers"),
        ("trainer/x.py", "def f():\n    from peft import LoraConfig", "trainer must not import peft"),
        ("eval/x.py", "from trl import DPOTrainer", "eval must not import trl"),
        ("eval/x.py", "import psutil", "eval must not import psutil"),
        ("trainer/x.py", "from .errors import UserError", "relative import"),
        ("trainer/x.py", "from . import errors", "relative import"),
        ("trainer/x.py", "def f():\n    import json", "deferred import of json"),
        ("trainer/x.py", "class A:\n    def f(self):\n        from trainer import dist", "deferred import of trainer"),
        ("trainer/x.py", "import matplotlib.pyplot", "matplotlib.pyplot is optional"),
        ("trainer/x.py", "import torch.distributed as dist", "torch.distributed outside trainer/dist.py"),
        ("trainer/x.py", "from torch import distributed", "torch.distributed outside trainer/dist.py"),
        ("trainer/x.py", "from torch.distributed import all_reduce", "torch.distributed outside trainer/dist.py"),
        ("kernels/x.py", "import torch\ntorch.distributed.barrier()", "torch.distributed outside trainer/dist.py"),
        ("trainer/logging.py", "", "named like a standard module"),
        ("trainer/tokenizers.py", "", "named like a standard module"),
        ("eval/json/x.py", "", "named like a standard module"),
    ],
)  # fmt: skip
def test_each_rule_bites(path: str, text: str, problem: str) -> None:
    assert any(problem in line for line in violations(PurePosixPath(path), text)), violations(PurePosixPath(path), text)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("kernels/x.py", "import math\nimport torch\nfrom kernels.reference import rms_norm"),
        ("kernels/dispatch.py", "def f():\n    from kernels.rms_norm_triton import rms_norm"),
        ("trainer/dist.py", "import torch.distributed as dist"),
        ("trainer/x.py", "from data_tools.schema import Record"),
        ("trainer/x.py", "def f():\n    from torch.distributed.fsdp import FSDPModule"),
        ("trainer/x.py", "def f():\n    import matplotlib.pyplot as plt"),
        ("data_tools/x.py", "import numpy\ndef f():\n    import httpx"),
    ],
)  # fmt: skip
def test_what_is_allowed_passes(path: str, text: str) -> None:
    assert violations(PurePosixPath(path), text) == []

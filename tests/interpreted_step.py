"""One whole training step with Triton's kernels, in its interpreter, against the CPU's; `test_triton_step` runs this.

The interpreter is chosen when Triton is imported, so this needs a process of its own, and its name keeps pytest from
collecting it elsewhere. All of it is the trainer's own: config, data, reference cache, decoder, loss, clipping, update.
LOGRATIO_KERNELS alone says which kernels run, as it would on a GPU. float32, three short pairs.

The measure: both paths are float32 with sums in another order, so a loss agrees to 1e-6 and a gradient to 5e-6 of its
tensor's largest number.
"""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from run_fixtures import arguments, torch_settings_kept
from safetensors.torch import load_file, save_file
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from kernels import dispatch
from trainer.config import load_config
from trainer.loop import train_step
from trainer.startup import make_run, open_data

PAIRS = [("2+3?", "5", "6"), ("Name a fruit.", "Pear", "Iron ore"), ("Up or down?", "up, I think", "no")]

FORWARD = {"forward_gemm": 1, "forward_rows": 5, "rotate_rows": 4, "multiply": 2}
"""Launches of one forward of two layers: the head; two norms a layer and the last; queries and keys; SwiGLU."""
BACKWARD = {"backward_gemm": 1, "backward_rows": 5, "rotate_rows": 4, "differentiate": 2}


@dataclass(frozen=True)
class Step:
    """What one step from the same weights gave, and the kernels that ran before and in it."""

    row: dict[str, float]
    gradients: dict[str, Tensor]
    before: Counter
    launches: Counter


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """How often each kernel was launched, from here on."""
    counter: Counter = Counter()
    run = InterpretedFunction.run

    def counted(self: InterpretedFunction, *args: object, **kwargs: object) -> object:
        counter[self.__name__] += 1
        return run(self, *args, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "run", counted)
    return counter


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    file = tmp_path / "pairs.jsonl"
    rows = [dict(zip(("prompt", "chosen", "rejected"), pair, strict=True)) for pair in PAIRS]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture
def other_model(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A reference that is not the policy: with equal ones DPO's loss would be ln 2 whatever the kernels find."""
    folder = tmp_path / "reference"
    folder.mkdir()
    for file in tiny_model_dir.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(tiny_model_dir / "model.safetensors")
    moved = {name: values * (1.2 if "mlp" in name else 1.0) for name, values in weights.items()}
    save_file(moved, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def one_step(argv: list[str], impl: str, launches: Counter, monkeypatch: pytest.MonkeyPatch) -> Step:
    monkeypatch.setenv(dispatch.VARIABLE, impl)
    launches.clear()
    with torch_settings_kept():
        config = load_config(argv)
        run = make_run(config, *open_data(config), None)
        assert run.model.kernel_impl == impl
        before = launches.copy()
        launches.clear()
        row = train_step(run)
    assert row is not None
    gradients = {name: master.grad for name, master in run.masters.named()}
    return Step(row, gradients, before, launches.copy())


@pytest.mark.parametrize("objective", ["dpo", "orpo"])
def test_a_step_by_triton_is_the_step_of_the_cpu_path(
    objective: str,
    tiny_model_dir: Path,
    other_model: Path,
    pairs: Path,
    launches: Counter,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = [f"train.objective={objective}", "train.global_batch=3", "train.max_steps=1", "train.max_grad_norm=1"]
    settings += ["train.warmup_ratio=0", f"reference.cache_dir={tmp_path / 'cache'}"]
    settings += [f"reference.path={other_model}"] if objective == "dpo" else []
    argv = arguments(tmp_path / "run", tiny_model_dir, *settings, data=pairs)
    ours, plain = (one_step(argv, impl, launches, monkeypatch) for impl in ("triton", "cpu"))

    assert ours.launches == Counter(FORWARD) + Counter(BACKWARD)
    assert ours.before == (Counter(FORWARD) if objective == "dpo" else Counter())  # the reference's log-probs
    assert not plain.before and not plain.launches

    assert ours.row["loss"] == pytest.approx(plain.row["loss"], rel=1e-6)
    assert ours.row["grad_norm"] == pytest.approx(plain.row["grad_norm"], rel=1e-5)
    for name in ("logps/chosen", "logps/rejected"):
        assert ours.row[name] == pytest.approx(plain.row[name], rel=1e-6), name
    if objective == "dpo":
        assert abs(plain.row["rewards/margins"]) > 1e-3  # the reference differs, so the loss says something
    assert len(ours.gradients) == 2 * 9 + 3
    for name, exact in plain.gradients.items():
        largest = exact.abs().max().item()
        assert largest > 1e-5, name
        error = (ours.gradients[name] - exact).abs().max().item()
        assert error <= 5e-6 * largest, f"{name}: {error=} {largest=}"

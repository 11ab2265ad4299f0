"""What only a GPU can show, in one command: `make test-gpu`.

Every test's body takes a device, and runs on the CPU too, with the CPU's operators and small shapes: so the bodies are
known to be right where there is no GPU. On a GPU it is Triton's operators, flex and merge attention, and the trainer.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from model_fixtures import random_decoder, random_group, random_pairs, tiny_config
from run_fixtures import OWN_PAIRS, ROOT, arguments, contents, rows, run_child, torch_settings_kept
from torch import Tensor

from kernels import dispatch, linear_logps_plan
from kernels.linear_logps import linear_logps
from kernels.logits_logps import logps_from_logits
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.rope import apply_rope
from kernels.swiglu_linear import geglu_linear, swiglu_linear
from kernels.vocabulary_slabs import KEPT_SHARE
from trainer import numerics
from trainer.batch import Stream, build_stream
from trainer.models.attention_form import stream_attend
from trainer.parallelize import recompute_activations

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]
on_every_device = pytest.mark.parametrize("device", DEVICES)
REPEATS = 10


def every(on_cpu: Iterable[str], on_gpu: Iterable[str]) -> pytest.MarkDecorator:
    """The test for each name on each device in each dtype; the CPU's operators are not made for float16."""
    half = torch.bfloat16, torch.float16
    cases = [pytest.param(name, "cpu", dtype) for name in on_cpu for dtype in (torch.float32, torch.bfloat16)]
    cases += [pytest.param(name, "cuda", dtype, marks=GPU) for name in on_gpu for dtype in (torch.float32, *half)]
    return pytest.mark.parametrize(("name", "device", "dtype"), cases, ids=str)


@pytest.fixture(autouse=True)
def _settings_of_a_run() -> Iterator[None]:
    """Deterministic algorithms and full float32 products, as trainer.main has them; put back afterwards."""
    with torch_settings_kept():
        numerics.prepare_process()
        numerics.set_up(threads=None, deterministic=True, matmul="highest")
        yield


def implementation(device: str) -> str:
    """Of the operators."""
    return "triton" if device == "cuda" else "cpu"


@dataclass(frozen=True)
class Case:
    """A call of an operator. inputs: float64, on the device; the first `differentiable` of them get gradients.

    call(impl, *inputs of any dtype) -> its outputs.
    """

    inputs: Sequence[Tensor]
    differentiable: int
    call: Callable[..., Tensor | tuple[Tensor, ...]]

    def results(self, impl: str, dtype: torch.dtype) -> list[Tensor]:
        """Outputs and gradients with inputs rounded to `dtype`, for one random cotangent of each output."""
        inputs = [x.to(dtype) for x in self.inputs]
        wanted = [x.requires_grad_() for x in inputs[: self.differentiable]]
        found = self.call(impl, *inputs)
        outputs = found if isinstance(found, tuple) else (found,)
        generator = torch.Generator().manual_seed(5)
        cotangents = [torch.randn(x.shape, generator=generator).to(x) for x in outputs]
        return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, wanted, cotangents)]


def normal(device: str, *shape: int, seed: int = 0) -> Tensor:
    """float64 values that every dtype here holds exactly, so that all of them compute the same thing."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.bfloat16().half().double().to(device)


def head_case(
    device: str, *, stash: bool = False, frozen: bool = False, bias: bool = False, softcap: float | None = None
) -> Case:
    rows, width, vocabulary = (20, 32, 150) if device == "cpu" else (300, 576, 3001)
    hidden, weight = normal(device, rows, width), normal(device, vocabulary, width, seed=1) * 4 / width**0.5
    weight = weight.bfloat16().double()
    targets = torch.randint(vocabulary, (rows,), generator=torch.Generator().manual_seed(2)).to(device)
    targets[0], targets[-1] = 0, vocabulary - 1

    def call(impl: str, hidden: Tensor, weight: Tensor, *rest: Tensor) -> Tensor:
        own_bias = rest[0] if rest else None
        return linear_logps(hidden, weight, targets, bias=own_bias, softcap=softcap, stash=stash, impl=impl)

    inputs = [hidden, weight, normal(device, vocabulary, seed=3)] if bias else [hidden, weight]
    return Case(inputs, 1 if frozen else len(inputs), call)


def norm_case(device: str, *, residual: bool) -> Case:
    x, weight = normal(device, 77, 576), normal(device, 576, seed=1)
    if not residual:
        return Case([x, weight], 2, lambda impl, x, weight: rms_norm(x, weight, 1e-5, impl=impl))
    inputs = [x, normal(device, 77, 576, seed=2), weight]
    return Case(inputs, 3, lambda impl, x, added, weight: add_rms_norm(x, added, weight, 1e-5, impl=impl))


def rope_case(device: str) -> Case:
    angles = torch.outer(torch.arange(77.0), torch.logspace(0, -4, 32)).to(device)
    return Case([normal(device, 77, 9, 64)], 1, lambda impl, x: apply_rope(x, angles.cos(), angles.sin(), impl=impl))


def gated_case(device: str, operator: Callable[..., Tensor]) -> Case:
    weight = (normal(device, 96, 160, seed=2) / 8).bfloat16().double()
    inputs = [normal(device, 77, 160), normal(device, 77, 160, seed=1), weight]
    return Case(inputs, 3, lambda impl, gate, up, weight: operator(gate, up, weight, impl=impl))


def logits_case(device: str, *, inplace: bool) -> Case:
    targets = torch.randint(1501, (77,), generator=torch.Generator().manual_seed(2)).to(device)

    def call(impl: str, logits: Tensor) -> Tensor:
        own = logits * 1  # not a leaf: its memory may be overwritten
        return logps_from_logits(own, targets, inplace=inplace and impl != "reference", impl=impl)

    return Case([normal(device, 77, 1501) * 4], 1, call)


CASES = {
    "linear_logps": head_case,
    "linear_logps stash": lambda device: head_case(device, stash=True),
    "linear_logps frozen head": lambda device: head_case(device, frozen=True),
    "linear_logps bias": lambda device: head_case(device, bias=True),
    "linear_logps bias stash": lambda device: head_case(device, bias=True, stash=True),
    "linear_logps softcap": lambda device: head_case(device, softcap=5.0),
    "rms_norm": lambda device: norm_case(device, residual=False),
    "add_rms_norm": lambda device: norm_case(device, residual=True),
    "apply_rope": rope_case,
    "swiglu_linear": lambda device: gated_case(device, swiglu_linear),
    "geglu_linear": lambda device: gated_case(device, geglu_linear),
    "logps_from_logits": lambda device: logits_case(device, inplace=False),
    "logps_from_logits in place": lambda device: logits_case(device, inplace=True),
}


def assert_no_worse(
    found: Sequence[Tensor], plain: Sequence[Tensor], truth: Sequence[Tensor], *, rounding: float
) -> None:
    """Each tensor's error against float64 is at most twice that of plain PyTorch in the same dtype, and `rounding`
    times its largest number."""
    for index, (ours, theirs, exact) in enumerate(zip(found, plain, truth, strict=True)):
        assert torch.isfinite(ours).all(), f"tensor {index}"
        error, baseline = ((x.double().to(exact.device) - exact).abs().max().item() for x in (ours, theirs))
        room = rounding * exact.abs().max().item()
        assert error <= 2 * baseline + room, f"tensor {index}: {error=} {baseline=} {room=}"


def assert_repeats(results: Callable[[], list[Tensor]]) -> None:
    """Bit for bit the same every time: nothing depends on which of two threads comes first."""
    first = results()
    for _ in range(REPEATS - 1):
        for again, once in zip(results(), first, strict=True):
            assert torch.equal(again, once)


@every(CASES, CASES)
def test_operator_is_as_good_as_plain_pytorch_and_repeats(name: str, device: str, dtype: torch.dtype) -> None:
    case = CASES[name](device)
    impl = implementation(device)
    found = case.results(impl, dtype)
    plain, truth = (case.results("reference", kind) for kind in (dtype, torch.float64))
    assert_no_worse(found, plain, truth, rounding=torch.finfo(dtype).eps)
    assert_repeats(lambda: case.results(impl, dtype))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("plan", [{"source": "pointers"}, {"backend": "vendor"}], ids=str)
@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("linear_logps")])
def test_linear_logps_by_the_ways_that_the_device_may_not_choose(
    name: str, plan: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    forced = partial(linear_logps_plan.choose_plan, **plan)
    monkeypatch.setattr(dispatch.triton_module("linear_logps"), "choose_plan", forced)
    test_operator_is_as_good_as_plain_pytorch_and_repeats(name, "cuda", torch.bfloat16)


@on_every_device
@pytest.mark.parametrize("stash", [False, True])
def test_memory_of_the_head(stash: bool, device: str) -> None:
    """bfloat16, forward and backward: what is held at the peak beyond inputs and gradients, against one (N, V) matrix
    of logits, of which plain PyTorch holds several. The CPU's way keeps some slabs: KEPT_SHARE of the weight's size."""
    rows, width, vocabulary = (512, 64, 32768) if device == "cpu" else (8192, 1024, 131072)
    hidden, weight = (torch.randn(n, width, dtype=torch.bfloat16, device=device) for n in (rows, vocabulary))
    hidden, weight = hidden.requires_grad_(), (weight / 32).requires_grad_()
    targets = torch.arange(rows, device=device) * 7 % vocabulary
    weight = weight.detach().requires_grad_()

    def step() -> None:
        linear_logps(hidden, weight, targets, stash=stash, impl=implementation(device)).sum().backward()

    peak = peak_bytes(step, device) - hidden.nbytes - weight.nbytes
    logits = rows * vocabulary * 2
    kept = KEPT_SHARE * weight.nbytes if device == "cpu" and not stash else 0
    assert peak - kept <= (1.25 if stash else 0.25) * logits
    assert peak >= logits or not stash


def peak_bytes(step: Callable[[], None], device: str) -> int:
    """Most bytes allocated at a time during `step`, beyond what was before."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    held = peak = 0
    for event in events:
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


# --- attention -------------------------------------------------------------------------------------------------------

LAYOUT = [(90, 70, 60), (0, 140, 30), (5, 1, 1), (300, 17, 200, 1), (30,)]


def attention_results(
    form: str, lengths: Sequence[tuple[int, ...]], device: str, dtype: torch.dtype, tail: int = 23
) -> list[Tensor]:
    """Output and gradients by q, k and v of a stream with `tail` tokens behind its groups, in CPU memory."""
    config = tiny_config(hidden_size=384, num_attention_heads=6, num_key_value_heads=2)
    stream = build_stream([random_group(each) for each in lengths]).to(device)
    tokens = len(stream.tokens) + tail
    attend = stream_attend(form, stream, tokens, config, dtype)
    generator = torch.Generator().manual_seed(tokens)
    # scores of some units: q carries the scale
    inputs = [torch.randn(tokens, heads, 64, generator=generator) for heads in (6, 2, 2)]
    inputs[0] *= 3 / 8
    inputs = [x.bfloat16().half().to(device, dtype).requires_grad_() for x in inputs]
    out = attend(*inputs)
    cotangent = torch.randn(out.shape, generator=generator).bfloat16().to(device, dtype)
    return [x.cpu() for x in (out.detach(), *torch.autograd.grad(out, inputs, cotangent))]


@every(["merge"], ["flex", "merge", "blocks"])
def test_attention_is_as_good_as_the_blocks_of_the_cpu_and_repeats(name: str, device: str, dtype: torch.dtype) -> None:
    found = attention_results(name, LAYOUT, device, dtype)
    blocks, truth = (attention_results("blocks", LAYOUT, "cpu", kind) for kind in (dtype, torch.float64))
    # a score of up to 16 is rounded in float32, whatever the dtype, and so is a row's log-sum-exp
    assert_no_worse(found, blocks, truth, rounding=32 * torch.finfo(torch.float32).eps)
    for values in found:
        assert not values[-23:].any()
    assert_repeats(lambda: attention_results(name, LAYOUT, device, dtype))


@pytest.mark.parametrize(("form", "device"), [("merge", "cpu"), pytest.param("flex", "cuda", marks=GPU)])
def test_attention_serves_streams_of_many_lengths(form: str, device: str) -> None:
    """One compiled program for all: PyTorch raises when it has compiled too many."""
    for index in range(12):
        lengths = [(40 + 31 * index, 20, 50 + 17 * index)] * (1 + index % 3)
        found = attention_results(form, lengths, device, torch.float32, tail=index)
        for ours, theirs in zip(
            found, attention_results("blocks", lengths, "cpu", torch.float32, tail=index), strict=True
        ):
            # float32 with scores of up to about 15: as in test_attention_gpu_forms
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 * max(1.0, theirs.abs().max().item()))


# --- the model and the trainer ---------------------------------------------------------------------------------------


@on_every_device
@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
def test_a_decoder_gives_the_log_probs_and_gradients_of_the_cpu(recompute: str, device: str) -> None:
    config = tiny_config()
    stream = build_stream(random_pairs(6))
    results = []
    for place, form, how in (("cpu", "blocks", "none"), (device, own_attention(device), recompute)):
        model = random_decoder(config).to(place)
        model.kernel_impl, model.attention_form = implementation(place), form
        recompute_activations(model, how)
        results.append(logps_and_gradients(model, stream.to(place)))
    expected, found = results
    for name, values in found.items():
        # float32, two layers, sums in another order
        assert (values - expected[name]).abs().max() <= 1e-5 * expected[name].abs().max(), name


def own_attention(device: str) -> str:
    """The form that is tested on the device; on a CPU one that is not its default."""
    return "flex" if device == "cuda" else "merge"


def logps_and_gradients(model: torch.nn.Module, stream: Stream) -> dict[str, Tensor]:
    logps = model(stream)
    logps.double().square().sum().backward()
    gradients = {name: parameter.grad.cpu() for name, parameter in model.named_parameters()}
    return {"logps": logps.detach().cpu(), **gradients}


def losses_of(folder: Path) -> list[float]:
    return [json.loads(row)["loss"] for row in rows(folder)]


@pytest.mark.parametrize(
    ("device", "dtype", "tolerance"),
    [
        ("cpu", "float32", 1e-3),
        pytest.param("cuda", "float32", 1e-3, marks=GPU),
        pytest.param("cuda", "bf16", 5e-2, marks=GPU),
    ],
)
def test_twenty_steps_of_dpo_give_the_loss_curve_of_the_cpu(
    device: str, dtype: str, tolerance: float, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Through trainer/main.py, with a cached reference and activation checkpointing; on a GPU a real model.

    bf16: a completion's log-prob is a sum of some 50 rounded to about 0.01 each, times beta in the loss.
    """
    model = request.getfixturevalue("smollm2_dir" if device == "cuda" else "tiny_model_dir")
    peak = "1e-5" if device == "cuda" else "1e-3"
    settings = ["train.max_steps=20", "train.activation_checkpointing=full", "checkpoint.every=20", "run.export=false"]
    settings += [f"train.dtype={dtype}", f"train.learning_rate={peak}", f"reference.cache_dir={tmp_path / 'cache'}"]
    curves = []
    for name, place, form in (("cpu", "cpu", "auto"), ("own", device, own_attention(device))):
        own = [f"run.device={place}", f"kernels.attention={form}", f"run.threads={4 if device == 'cuda' else 1}"]
        command = [sys.executable, "trainer/main.py", *arguments(tmp_path / name, model, *settings, *own)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        curves.append(losses_of(tmp_path / name))
    expected, found = curves
    assert len(found) == 20 and found[-1] < found[0]
    assert found == pytest.approx(expected, rel=0, abs=tolerance)


@on_every_device
def test_runs_repeat_and_resume_bit_for_bit(device: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    settings = (f"run.device={device}", "train.dtype=bf16", f"data.eval={OWN_PAIRS}", "eval.max_pairs=3")
    whole, again = tmp_path / "whole", tmp_path / "again"
    for folder in (whole, again):
        assert run_child(arguments(folder, tiny_model_dir, *settings), tmp_path / "out") == 0
    assert rows(again) == rows(whole)
    assert contents(again / "export") == contents(whole / "export")
    shutil.rmtree(again / "checkpoints" / "step_4")
    shutil.rmtree(again / "export")
    assert run_child(arguments(again, tiny_model_dir, *settings), tmp_path / "out") == 0
    assert rows(again) == rows(whole)
    assert contents(again / "export") == contents(whole / "export")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no two GPUs")
def test_two_gpus_give_the_loss_curve_of_one(tiny_model_dir: Path, tmp_path: Path) -> None:
    """As test_two_workers_of_torchrun (tests/test_dist_ranks.py) does it on a CPU."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    for number in ("1", "2"):
        argv = arguments(tmp_path / number, tiny_model_dir, "run.device=cuda")
        done = subprocess.run([*command, number, "trainer/main.py", *argv], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert losses_of(tmp_path / "2") == pytest.approx(losses_of(tmp_path / "1"), rel=1e-5)

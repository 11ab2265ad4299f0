"""Triton's small operators in its interpreter. Run by `test_kernel_triton_operators.py`, in a process of its own.

The interpreter takes the place of the compiler when Triton is imported with TRITON_INTERPRET=1. bfloat16 is wrong in
it, so float32 and float16 stand for all. Shapes are no multiples of a tile, and few: a program takes 10 to 20 ms.
The measure: log-probabilities within 3e-6 of the largest logit (at least 1) of float64, everything else no worse than
twice the error of plain PyTorch in the same dtype, plus one rounding of the largest value.
"""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from kernels import dispatch
from kernels.logits_logps import logps_from_logits
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.rope import apply_rope
from kernels.swiglu_linear import geglu, geglu_linear, swiglu, swiglu_linear

DTYPES = [torch.float32, torch.float16]
ROUNDING = {torch.float32: 2**-23, torch.float16: 2**-11}
EPS = 1e-5


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def run(function: Callable, inputs: Sequence[Tensor], grads: Sequence[Tensor], impl: str) -> list[Tensor]:
    """The results and the gradients by `inputs`."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    results = function(*leaves, impl=impl)
    results = results if isinstance(results, tuple) else (results,)
    torch.autograd.backward(results, [grad.to(out.dtype) for grad, out in zip(grads, results, strict=True)])
    return [*(result.detach() for result in results), *(leaf.grad for leaf in leaves)]


def assert_as_good_as_plain(function: Callable, inputs: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
    """Returns what Triton found."""
    truth = run(function, [t.double() for t in inputs], grads, "reference")
    plain, ours = run(function, inputs, grads, "reference"), run(function, inputs, grads, "triton")
    for index, (exact, other, value) in enumerate(zip(truth, plain, ours, strict=True)):
        assert value.dtype == other.dtype and value.shape == exact.shape
        error, baseline = (value - exact).abs().max(), (other - exact).abs().max()
        allowed = 2 * baseline + ROUNDING[inputs[0].dtype] * exact.abs().max()
        assert error <= allowed, f"result {index}: {error=} {baseline=} {[tuple(t.shape) for t in inputs]}"
    return ours


@pytest.fixture(autouse=True)
def every_call_runs_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """A path that left Triton out would pass every comparison."""
    loaded = []
    find = dispatch.triton_module
    monkeypatch.setattr(dispatch, "triton_module", lambda operator: loaded.append(operator) or find(operator))
    yield
    assert loaded


# --- rms_norm --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(70, 70), (3, 2, 96), (5, 3), (1, 5000)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = random(*shape, dtype=dtype, scale=3), 1 + random(shape[-1], dtype=dtype, seed=1, scale=0.3)
    function = lambda x, weight, impl: rms_norm(x, weight, EPS, impl=impl)  # noqa: E731
    assert_as_good_as_plain(function, (x, weight), [random(*shape, dtype=dtype, seed=2)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("programs", [2, 512])
def test_add_rms_norm(dtype: torch.dtype, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five tiles of rows: more than two programs, which then take several tiles each."""
    monkeypatch.setattr(dispatch.triton_module("rms_norm"), "BACKWARD_PROGRAMS", programs)
    shape = (130, 100)
    inputs = (random(*shape, dtype=dtype, scale=3), random(*shape, dtype=dtype, seed=1), random(100, dtype=dtype))
    function = lambda x, residual, weight, impl: add_rms_norm(x, residual, weight, EPS, impl=impl)  # noqa: E731
    grads = [random(*shape, dtype=dtype, seed=seed) for seed in (2, 3)]
    total, normed, *_ = assert_as_good_as_plain(function, inputs, grads)
    assert torch.equal(total, inputs[0] + inputs[1])
    assert torch.equal(normed, rms_norm(total, inputs[2], EPS, impl="triton"))  # of the sum as it was rounded


def test_rms_norm_leaves_out_what_nobody_asks_for() -> None:
    x, residual, weight = random(6, 9), random(6, 9, seed=1), random(9, seed=2)
    grads = random(6, 9, seed=3), random(6, 9, seed=4)
    for used in ([0], [1], [0, 1]):  # one of the two results, or both, and no gradient by the weight
        found = []
        for impl in ("triton", "reference"):
            leaves = [tensor.clone().requires_grad_() for tensor in (x, residual)]
            results = add_rms_norm(*leaves, weight, EPS, impl=impl)
            torch.autograd.backward([results[i] for i in used], [grads[i] for i in used])
            found.append([leaf.grad for leaf in leaves])
        for ours, plain in zip(*found, strict=True):
            torch.testing.assert_close(ours, plain)
    first = [add_rms_norm(x, None, weight, EPS, impl=impl) for impl in ("triton", "reference")]
    torch.testing.assert_close(*first)
    empty = run(lambda x, weight, impl: rms_norm(x, weight, EPS, impl=impl), (x[:0], weight), [x[:0]], "triton")
    assert empty[0].shape == empty[1].shape == (0, 9) and not empty[2].any()


def test_rms_norm_rounds_before_the_product_with_the_weight() -> None:
    x, weight = random(40, 96, dtype=torch.float16), random(96, dtype=torch.float16, seed=1)
    exact = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + EPS)
    twice = (exact.half().double() * weight.double()).half()
    assert (rms_norm(x, weight, EPS, impl="triton") == twice).float().mean() > 0.995  # sums may flip a tie


# --- rope ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "heads", "half"), [(50, 3, 12), (7, 5, 1), (3, 1, 33), (0, 2, 4)])
def test_rope(tokens: int, heads: int, half: int, dtype: torch.dtype) -> None:
    angles = 7 * torch.rand(tokens, half, generator=torch.Generator().manual_seed(3))
    x, grad = (random(tokens, heads, 2 * half, dtype=dtype, seed=seed) for seed in (0, 1))

    def function(x: Tensor, impl: str) -> Tensor:
        return apply_rope(x, angles.cos(), angles.sin(), impl=impl)

    if tokens:
        assert_as_good_as_plain(function, [x], [grad])
        part = apply_rope(random(tokens, heads + 2, 2 * half)[:, 1:-1], angles.cos(), angles.sin(), impl="triton")
        whole = apply_rope(random(tokens, heads + 2, 2 * half), angles.cos(), angles.sin(), impl="triton")
        assert torch.equal(part, whole[:, 1:-1])  # a view, with gaps between the rows
    else:
        assert all(found.shape == x.shape for found in run(function, [x], [grad], "triton"))


# --- swiglu, geglu ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", [swiglu, geglu])
def test_gated(function: Callable, dtype: torch.dtype) -> None:
    shape = (3, 41, 37)  # 4551 numbers: two tiles and a part
    inputs = [random(*shape, dtype=dtype, seed=seed, scale=3) for seed in (0, 1)]
    assert_as_good_as_plain(function, inputs, [random(*shape, dtype=dtype, seed=2)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", [swiglu_linear, geglu_linear])
def test_gated_linear(function: Callable, dtype: torch.dtype) -> None:
    inputs = [random(33, 70, dtype=dtype), random(33, 70, dtype=dtype, seed=1), random(19, 70, dtype=dtype, seed=2)]
    assert_as_good_as_plain(function, inputs, [random(33, 19, dtype=dtype, seed=3)])


@pytest.mark.parametrize("function", [swiglu, geglu])
def test_gated_far_out(function: Callable) -> None:
    """Where exp would overflow, the results are the limits, never nan."""
    gate, up = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4]), torch.full((5,), 2.0)
    out, by_gate, by_up = run(function, (gate, up), [torch.ones(5)], "triton")
    torch.testing.assert_close(out, torch.tensor([0.0, 0.0, 0.0, 200.0, 2e4]))
    torch.testing.assert_close(by_gate, torch.tensor([0.0, 0.0, 1.0, 2.0, 2.0]))
    torch.testing.assert_close(by_up, torch.tensor([0.0, 0.0, 0.0, 100.0, 1e4]))


def test_gated_with_nothing_to_do() -> None:
    out, *gradients = run(swiglu_linear, (random(0, 5), random(0, 5), random(3, 5)), [random(0, 3)], "triton")
    assert out.shape == (0, 3) and [tuple(g.shape) for g in gradients] == [(0, 5), (0, 5), (3, 5)]


# --- logps_from_logits -----------------------------------------------------------------------------------------------


def from_logits(targets: Tensor, *, inplace: bool = False) -> Callable:
    """As a function of logits that are no leaf."""
    return lambda logits, impl: logps_from_logits(logits * 1, targets, inplace=inplace, impl=impl)


def check_logps(logits: Tensor, targets: Tensor, grad: Tensor) -> None:
    """In place and not: values, gradients, and that both give the same bits."""
    plain = assert_gradients(logits, targets, grad, inplace=False)
    for ours, other in zip(assert_gradients(logits, targets, grad, inplace=True), plain, strict=True):
        assert torch.equal(ours, other)


def assert_gradients(logits: Tensor, targets: Tensor, grad: Tensor, *, inplace: bool) -> list[Tensor]:
    truth = run(from_logits(targets), [logits.double()], [grad], "reference")
    plain = run(from_logits(targets), [logits], [grad], "reference")
    ours = run(from_logits(targets, inplace=inplace), [logits], [grad], "triton")
    largest = max(1.0, float(logits[logits > -torch.inf].abs().max()))
    assert ours[0].dtype == torch.float32 and ours[1].dtype == logits.dtype
    torch.testing.assert_close(ours[0].double(), truth[0], rtol=0, atol=3e-6 * largest)
    error, baseline = ((found[1] - truth[1]).abs().max() for found in (ours, plain))
    assert error <= 2 * baseline + ROUNDING[logits.dtype] * grad.abs().max(), f"{error=} {baseline=}"
    return ours


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "vocabulary"), [(5, 9001), (7, 300), (1, 4096), (3, 1)])
def test_logps(rows: int, vocabulary: int, dtype: torch.dtype) -> None:
    """9001 columns are two tiles and a part. Targets in the first and the last column, and one twice."""
    logits, grad = random(rows, vocabulary, dtype=dtype, scale=3), random(rows, seed=1)
    targets = torch.randint(vocabulary, (rows,), generator=torch.Generator().manual_seed(2))
    targets[0], targets[-1] = 0, vocabulary - 1
    targets[1:2] = vocabulary - 1
    grad[2:3] = 0.0
    check_logps(logits, targets, grad)


@pytest.mark.parametrize("dtype", DTYPES)
def test_logps_of_hard_rows(dtype: torch.dtype) -> None:
    """Peaked at the target and away from it, in the first tile and the last, +-1e4, tokens that are ruled out."""
    logits = random(6, 5000, dtype=dtype)
    targets = torch.tensor([4999, 7, 0, 4100, 4500, 4999])
    logits[0, 4999] += 30  # sure and right
    logits[1, 4999] += 30  # sure and wrong
    logits[2] = torch.where(torch.arange(5000) % 2 == 0, 1e4, -1e4).to(dtype)
    logits[3] -= 1e4
    logits[4, :4096] = -torch.inf  # nothing in the first tile
    logits[5, ::3] = -torch.inf
    logits[5, 4999] = 1.0
    check_logps(logits, targets, random(6, seed=1))
    if dtype == torch.float32:
        sure = logps_from_logits(logits, targets, impl="triton")[0]
        exact = torch.log_softmax(logits[0].double(), 0)[4999]
        assert exact < -1e-11
        torch.testing.assert_close(sure.double(), exact, rtol=1e-5, atol=0)  # not rounded to 0


def test_logps_of_rows_with_gaps_and_of_none() -> None:
    whole, targets = random(4, 40), torch.tensor([0, 19, 3, 3])
    for logits in (whole[:, :20], whole[:, ::2], whole.T[:4, :4]):
        part = targets[: len(logits)].clamp_max(logits.shape[1] - 1)
        check_logps(logits, part, random(len(logits), seed=1))
    out, by_logits = run(from_logits(targets[:0]), [whole[:0]], [random(0)], "triton")
    assert out.shape == (0,) and by_logits.shape == (0, 40)


def test_in_place_is_told_to_those_who_kept_the_logits() -> None:
    leaf, targets = random(3, 8).requires_grad_(), torch.tensor([0, 7, 3])
    logits = leaf.exp()  # its backward needs its result
    logps = logps_from_logits(logits, targets, inplace=True, impl="triton")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logps.sum().backward()


# --- all -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function",
    [
        lambda x: rms_norm(x, x[0], EPS, impl="triton"),
        lambda x: apply_rope(x[None], x[:1, :2].float(), x[:1, :2].float(), impl="triton"),
        lambda x: geglu(x, x, impl="triton"),
        lambda x: logps_from_logits(x, torch.tensor([0, 1]), impl="triton"),
    ],
)
def test_float64_is_refused_by_name(function: Callable) -> None:
    with pytest.raises(ValueError, match=r"not torch.float64; use impl='cpu'"):
        function(torch.ones(2, 4).double())


def test_a_wide_norm_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="widths to 8192, not 8193; use impl='cpu'"):
        rms_norm(torch.ones(1, 8193), torch.ones(8193), EPS, impl="triton")

"""`linear_logps`: values and gradients against float64, every way to the gradient, memory, repeatability, errors.

The measure is that of `head_fixtures`. Options of the head are in test_kernel_linear_logps_options.py.
"""

import math
from collections.abc import Iterator

import pytest
import torch
from head_fixtures import ROUNDING, WAYS, assert_as_good_as_plain, make_inputs, run
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import reference, vocabulary_slabs
from kernels.linear_logps import linear_logps

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def narrow_slabs_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """64 columns a slab, so that small vocabularies have several. One thread: these shapes are too small for two."""
    monkeypatch.setattr(vocabulary_slabs, "SLAB_COLUMNS", 64)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients_are_as_good_as_plain_pytorch(dtype: torch.dtype, way: str) -> None:
    assert_as_good_as_plain(*make_inputs(60, 1000, 32, dtype), way)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_real_slab_width_with_a_ragged_end(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert vocabulary_slabs.SLAB_COLUMNS < 2500 and 2500 % vocabulary_slabs.SLAB_COLUMNS
    assert_as_good_as_plain(*make_inputs(40, 2500, 64, dtype), "recompute")


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(0, 9),
    vocabulary=st.integers(1, 200),
    width=st.integers(1, 20),
    dtype=st.sampled_from([*DTYPES, torch.float64]),
    way=st.sampled_from(WAYS),
    spread=st.sampled_from([0.1, 3.0, 30.0]),
)
def test_any_shape(rows: int, vocabulary: int, width: int, dtype: torch.dtype, way: str, spread: float) -> None:
    inputs = make_inputs(rows, vocabulary, width, dtype, spread=spread, seed=rows + vocabulary)
    if rows:
        assert_as_good_as_plain(*inputs, way)
    else:  # no rows: nothing to compare, but shapes and zero gradients
        logps, by_hidden, by_weight = run(*inputs, way)
        assert logps.shape == (0,)
        assert by_hidden is None or by_hidden.shape == (0, width)
        assert by_weight is None or not by_weight.any()


@pytest.mark.parametrize("way", WAYS)
def test_gradients_by_finite_differences(way: str) -> None:
    hidden, weight, targets, _ = make_inputs(5, 150, 4, torch.float64)
    targets = torch.tensor([0, 149, 63, 64, 63])  # first and last column, both sides of a slab's edge, one repeated
    hidden.requires_grad_(way != "frozen hidden")
    weight.requires_grad_(way != "frozen head")
    assert torch.autograd.gradcheck(lambda h, w: linear_logps(h, w, targets, stash=way == "stash"), (hidden, weight))


@pytest.mark.parametrize("dtype", DTYPES)
def test_by_hand(dtype: torch.dtype) -> None:
    """Equal logits give -log V; logits 0 and log 3 give probabilities 1/4 and 3/4."""
    hidden = torch.tensor([[0.0], [1.0]], dtype=dtype)
    even = linear_logps(hidden[:1], torch.ones(256, 1, dtype=dtype), torch.tensor([77]))
    torch.testing.assert_close(even, torch.tensor([-math.log(256)]), rtol=1e-6, atol=0)
    log3 = torch.tensor([[0.0], [math.log(3)]], dtype=dtype)
    logps = linear_logps(hidden[[1, 1]], log3, torch.tensor([0, 1]))
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 4e-3}[dtype]
    torch.testing.assert_close(logps, torch.tensor([0.25, 0.75]).log(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_logits_of_ten_thousand(sign: float, dtype: torch.dtype, way: str) -> None:
    """One token at +-1e4, all others at 0, over several slabs: exactly 0, -1e4 or -log of the number of others."""
    weight = torch.zeros(200, 1, dtype=dtype)
    weight[100] = 1.0
    hidden = torch.full((3, 1), sign * 9984.0, dtype=dtype)  # representable in bfloat16
    targets = torch.tensor([100, 0, 199])
    logps, by_hidden, by_weight = run(hidden, weight, targets, torch.ones(3), way)
    others = -math.log(199)
    expected = [0.0, -9984.0, -9984.0] if sign > 0 else [-9984.0 + others, others, others]
    torch.testing.assert_close(logps, torch.tensor(expected), rtol=1e-6, atol=4e-3)
    if by_hidden is not None:  # w_target - sum p w
        expected = [0.0, -1.0, -1.0] if sign > 0 else [1.0, 0.0, 0.0]
        torch.testing.assert_close(by_hidden.float(), torch.tensor(expected)[:, None], rtol=ROUNDING[dtype], atol=1e-6)
    if by_weight is not None:
        assert torch.isfinite(by_weight).all()
        picked = -2 * 9984.0 if sign > 0 else -9984.0  # column 100: the sum over rows of (onehot - p) * hidden
        torch.testing.assert_close(float(by_weight[100]), picked, rtol=3 * ROUNDING[dtype], atol=0)


@pytest.mark.parametrize("way", ["recompute", "stash", "frozen head"])
def test_a_row_whose_target_lies_far_below_a_later_slab(way: str) -> None:
    """The center of the first slabs is 300 nats below the normaliser: nothing overflows, the gradient is exact."""
    weight = torch.zeros(200, 2)
    weight[3], weight[190] = torch.tensor([-300.0, 0.0]), torch.tensor([10.0, 1.0])
    hidden, targets = torch.tensor([[1.0, 2.0]]), torch.tensor([3])
    assert_as_good_as_plain(hidden, weight, targets, torch.ones(1), way)
    assert_as_good_as_plain(hidden.bfloat16(), weight.bfloat16(), targets, torch.ones(1), way)


@pytest.mark.parametrize("way", ["recompute", "stash", "frozen head"])
def test_float32_gradients_do_not_lose_digits_to_large_logits(way: str) -> None:
    """Logits of exactly 1024 and 1023.5: as one number their normaliser is off by 5e-5, and so would p be."""
    weight = torch.zeros(200, 2)
    weight[3], weight[190] = torch.tensor([1.0, 1.0]), torch.tensor([1.0 - 2**-11, -1.0])
    inputs = torch.tensor([[1024.0, 0.0]]), weight, torch.tensor([3]), torch.ones(1)
    truth = run(
        *(tensor.double() if tensor.is_floating_point() else tensor for tensor in inputs), way, impl="reference"
    )
    for exact, value in zip(truth, run(*inputs, way), strict=True):
        assert (exact is None) == (value is None)
        if exact is not None:
            torch.testing.assert_close(value.double(), exact, rtol=1e-6, atol=1e-6)


def test_bfloat16_is_within_5e_3_of_the_truth_where_full_logits_are_not() -> None:
    """Logits as large as a trained model's (up to 50): the reason for subtracting inside the product."""
    hidden, weight, targets, _ = make_inputs(200, 5000, 64, torch.bfloat16, spread=10.0)
    truth = reference.linear_logps(hidden.double(), weight.double(), targets)
    assert (hidden.double() @ weight.double().T).max() > 40
    assert (linear_logps(hidden, weight, targets) - truth).abs().max() <= 5e-3
    assert (reference.linear_logps(hidden, weight, targets) - truth).abs().max() > 2e-2


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sure_token_keeps_its_small_log_probability(dtype: torch.dtype) -> None:
    """p = 1 - 1e-9 or so: log-probabilities are negative, and right to a relative error, also in bfloat16."""
    hidden, weight = torch.tensor([[16.0], [20.0]], dtype=dtype), torch.tensor([[1.0], [0.0], [0.0]], dtype=dtype)
    targets = torch.tensor([0, 0])
    truth = reference.linear_logps(hidden.double(), weight.double(), targets)
    logps = linear_logps(hidden, weight, targets)
    assert (logps < 0).all()
    torch.testing.assert_close(logps.double(), truth, rtol=0.02 if dtype == torch.bfloat16 else 1e-5, atol=0)


def test_a_nan_stays_in_its_row_and_is_not_hidden() -> None:
    hidden, weight, targets, _ = make_inputs(3, 200, 4, torch.float32)
    hidden[1, 0] = math.nan
    assert torch.isnan(linear_logps(hidden, weight, targets)).tolist() == [False, True, False]


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that any operator returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize(("way", "whole"), [("recompute", False), ("frozen head", False), ("stash", True)])
def test_no_tensor_of_rows_times_vocabulary_without_the_stash(way: str, whole: bool) -> None:
    rows, vocabulary, width = 100, 2000, 8
    inputs = make_inputs(rows, vocabulary, width, torch.float32)
    with LargestTensor() as watch:
        run(*inputs, way)
    if whole:  # less what lies where the gradient of the head will be
        assert rows * vocabulary - vocabulary * width <= watch.elements < rows * vocabulary
    else:
        assert watch.elements == vocabulary * width


def test_without_gradients_nothing_but_one_slab_is_made() -> None:
    hidden, weight, targets, _ = make_inputs(100, 2000, 8, torch.float32)
    weight.requires_grad_()
    with torch.no_grad(), LargestTensor() as watch:
        logps = linear_logps(hidden, weight, targets, stash=True)
    assert watch.elements == 100 * vocabulary_slabs.SLAB_COLUMNS
    assert not logps.requires_grad


@pytest.mark.parametrize("way", WAYS)
def test_repeats_bit_for_bit_in_deterministic_mode(way: str) -> None:
    inputs = make_inputs(50, 700, 16, torch.bfloat16)
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = run(*inputs, way), run(*inputs, way)
    finally:
        torch.use_deterministic_algorithms(False)
    for one, other in zip(first, second, strict=True):
        assert one is other is None or torch.equal(one, other)


@pytest.mark.parametrize("stash", [False, True])
def test_backward_twice_through_a_kept_graph_gives_the_same(stash: bool) -> None:
    hidden, weight, targets, grad = make_inputs(10, 200, 8, torch.float32)
    weight.requires_grad_()
    logps = linear_logps(hidden, weight, targets, stash=stash)
    (first,) = torch.autograd.grad(logps, weight, grad, retain_graph=True)
    (second,) = torch.autograd.grad(logps, weight, grad)
    assert torch.equal(first, second)


def test_second_derivatives_are_refused() -> None:
    hidden, weight, targets, _ = make_inputs(4, 90, 3, torch.float64)
    hidden.requires_grad_()
    (grad,) = torch.autograd.grad(linear_logps(hidden, weight, targets).exp().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda h, w, t: (h[0], w, t), r"hidden \(N, D\).*got \(4,\), \(9, 4\), \(5,\)"),
        (lambda h, w, t: (h[:, :3], w, t), r"D differs.*\(5, 3\), \(9, 4\)"),
        (lambda h, w, t: (h, w, t[:2]), r"N or D differs.*\(2,\)"),
        (lambda h, w, t: (h, w[:0], t), "D or V is 0"),
        (lambda h, w, t: (h.bfloat16(), w, t), "hidden is torch.bfloat16, weight torch.float32"),
        (lambda h, w, t: (h.half(), w.half(), t), "the CPU path does not take torch.float16; use bfloat16"),
        (lambda h, w, t: (h.to(torch.float8_e4m3fn), w.to(torch.float8_e4m3fn), t), "must be the same, of .*bfloat16"),
        (lambda h, w, t: (h, w, t.int()), "targets are torch.int32; must be torch.int64"),
        (lambda h, w, t: (h, w, t - 100), "range from -96 to -92.* leave out the rows that are not scored"),
        (lambda h, w, t: (h, w, t + 9), "the vocabulary from 0 to 8"),
    ],
)
def test_errors_say_what_does_not_fit(change, problem: str) -> None:
    hidden, weight, targets, _ = make_inputs(5, 9, 4, torch.float32)
    with pytest.raises(ValueError, match=problem):
        linear_logps(*change(hidden, weight, targets))

"""`logps_from_logits`: values and gradients against float64, in place and not, what memory it takes, errors."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import logits_logps as module
from kernels.logits_logps import logps_from_logits

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 2**-23, torch.float16: 2**-11, torch.bfloat16: 2**-8}


def make_inputs(rows: int, vocabulary: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(rows, vocabulary, generator=generator)).to(dtype)
    return logits, torch.randint(vocabulary, (rows,), generator=generator), torch.randn(rows, generator=generator)


def run(
    logits: Tensor, targets: Tensor, grad: Tensor, impl: str = "cpu", *, inplace: bool = False
) -> tuple[Tensor, Tensor]:
    leaf = logits.clone().requires_grad_()
    logps = logps_from_logits(leaf * 1, targets, inplace=inplace, impl=impl)
    logps.backward(grad.to(logps.dtype))
    return logps.detach(), leaf.grad


def assert_as_good_as_plain(logits: Tensor, targets: Tensor, grad: Tensor, *, inplace: bool = False) -> None:
    """Log-probs within 3e-6 of the largest logit (at least 1), the gradient within twice plain PyTorch's error."""
    truth = run(logits.double(), targets, grad, "reference")
    plain, ours = run(logits, targets, grad, "reference"), run(logits, targets, grad, inplace=inplace)
    largest = max(1.0, float(logits[logits > -torch.inf].abs().max()))
    assert ours[0].dtype == torch.float32 and ours[1].dtype == logits.dtype
    torch.testing.assert_close(ours[0].double(), truth[0], rtol=0, atol=3e-6 * largest)
    error, baseline = ((found[1] - truth[1]).abs().max() for found in (ours, plain))
    assert error <= 2 * baseline + ROUNDING[logits.dtype] * grad.abs().max(), f"{error=} {baseline=}"


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 9),
    vocabulary=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    inplace=st.booleans(),
    seed=st.integers(0, 99),
)
@example(rows=8, vocabulary=34, dtype=torch.float32, inplace=False, seed=27)  # a likely token beside an unlikely target
def test_as_good_as_plain_pytorch(rows: int, vocabulary: int, dtype: torch.dtype, inplace: bool, seed: int) -> None:
    """A slab holds 64 logits here: several rows, or one that is longer than it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SLAB_NUMBERS", 64)
        assert_as_good_as_plain(*make_inputs(rows, vocabulary, dtype, seed), inplace=inplace)


def test_by_hand() -> None:
    """Logits 0 and log 3 are probabilities 1/4 and 3/4; the gradient is one-hot less them, times the upstream."""
    logits, targets = torch.tensor([[0.0, math.log(3)], [0.0, math.log(3)]]), torch.tensor([0, 1])
    logps, by_logits = run(logits, targets, torch.tensor([1.0, -2.0]))
    torch.testing.assert_close(logps, torch.tensor([math.log(1 / 4), math.log(3 / 4)]))
    torch.testing.assert_close(by_logits, torch.tensor([[3 / 4, -3 / 4], [1 / 2, -1 / 2]]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inplace", [False, True])
def test_hard_rows(dtype: torch.dtype, inplace: bool) -> None:
    """Peaked at the target and away from it, +-1e4, tokens that are ruled out, targets twice, no upstream gradient."""
    logits, _, grad = make_inputs(7, 50, dtype)
    targets = torch.tensor([49, 7, 0, 41, 3, 49, 0])
    logits[0, 49] += 40
    logits[1, 49] += 40
    logits[2] = torch.where(torch.arange(50) % 2 == 0, 1e4, -1e4).to(dtype)
    logits[3] -= 1e4
    logits[4, 10:] = -torch.inf
    logits[5, ::7] = -torch.inf
    logits[5, 49] = 1.0
    grad[6] = 0.0
    assert_as_good_as_plain(logits, targets, grad, inplace=inplace)


def test_a_sure_token_is_not_rounded_to_certainty() -> None:
    logits = torch.tensor([[25.0, 0.0, 1.0]])
    logps, by_logits = run(logits, torch.tensor([0]), torch.ones(1))
    exact = math.log1p(math.exp(-25) + math.exp(-24))
    torch.testing.assert_close(logps.item(), -exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(by_logits[0, 0].item(), -math.expm1(-exact), rtol=1e-6, atol=0)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_gradients_by_finite_differences(impl: str) -> None:
    logits, targets, _ = make_inputs(4, 6, torch.float64)
    assert logps_from_logits(logits, targets, impl=impl).dtype == torch.float64
    assert torch.autograd.gradcheck(lambda z: logps_from_logits(z, targets, impl=impl), (logits.requires_grad_(),))


def test_no_rows() -> None:
    logps, by_logits = run(*make_inputs(0, 5, torch.float32))
    assert logps.shape == (0,) and by_logits.shape == (0, 5)


def test_rows_with_gaps() -> None:
    whole, _, grad = make_inputs(8, 8, torch.float32)
    for logits in (whole[:, :5], whole[:, ::2], whole.T):
        assert_as_good_as_plain(logits, torch.zeros(8, dtype=torch.int64), grad)


# --- memory ----------------------------------------------------------------------------------------------------------


class LargestResult(TorchDispatchMode):
    """Remembers the most bytes that one operator returned in memory of its own."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.bytes = max(self.bytes, result.untyped_storage().nbytes())
        return result


def test_no_second_matrix_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensors are the logits and their gradient, in bfloat16; a slab is smaller."""
    monkeypatch.setattr(module, "SLAB_NUMBERS", 4096)
    logits, targets, grad = make_inputs(64, 1024, torch.bfloat16)
    found = {}
    for impl in ("cpu", "reference"):
        leaf = logits.clone().requires_grad_()
        with LargestResult() as largest:
            logps_from_logits(leaf, targets, impl=impl).backward(grad)
        found[impl] = largest.bytes
    assert found["cpu"] == logits.numel() * 2
    assert found["reference"] == logits.numel() * 4


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place_the_gradient_is_the_logits_memory(dtype: torch.dtype) -> None:
    values, targets, grad = make_inputs(5, 9, dtype)
    kept = []
    logits = values.clone().requires_grad_() * 1
    logits.register_hook(lambda gradient: kept.append(gradient))
    logps_from_logits(logits, targets, inplace=True).backward(grad)
    assert kept[0].data_ptr() == logits.data_ptr()
    assert torch.equal(kept[0], run(values, targets, grad)[1])


def test_not_in_place_the_logits_are_left_alone() -> None:
    logits, targets, grad = make_inputs(5, 9, torch.float32)
    before = logits.clone()
    logps_from_logits(logits.requires_grad_(), targets).backward(grad)
    assert torch.equal(logits, before)


def test_in_place_backward_happens_once_and_is_told_to_others() -> None:
    values, targets, _ = make_inputs(5, 9, torch.float32)
    leaf = values.requires_grad_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logps_from_logits(leaf.exp(), targets, inplace=True).sum().backward()  # exp needs its result
    total = logps_from_logits(leaf * 1, targets, inplace=True).sum()
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("logits", "targets", "problem"),
    [
        (torch.ones(3, 4), torch.tensor([0, 1]), r"got \(3, 4\) and \(2,\)"),
        (torch.ones(4), torch.tensor([0]), r"logits \(N, V\)"),
        (torch.ones(2, 0), torch.tensor([0, 0]), "V > 0"),
        (torch.ones(2, 4), torch.tensor([0, 1]).int(), "targets torch.int32; must be"),
        (torch.ones(2, 4).int(), torch.tensor([0, 1]), "logits are torch.int32"),
        (torch.ones(2, 4), torch.tensor([0, 4]), "targets range from 0 to 4, the vocabulary from 0 to 3"),
        (torch.ones(2, 4), torch.tensor([-100, 3]), "from -100 to 3, .* leave out the rows that are not scored"),
    ],
)
def test_errors_say_what_does_not_fit(logits: Tensor, targets: Tensor, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        logps_from_logits(logits, targets)


def test_a_leaf_is_not_overwritten() -> None:
    with pytest.raises(ValueError, match="overwrite logits that are a leaf; leave it out"):
        logps_from_logits(torch.ones(2, 4).requires_grad_(), torch.tensor([0, 1]), inplace=True)

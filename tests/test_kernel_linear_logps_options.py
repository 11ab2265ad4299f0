"""`linear_logps` with bias, scale, softcap, entropy and argmax: values and gradients, alone and together; errors.

The measure is that of `head_fixtures`; what an option must not change is compared bit for bit.
"""

import math
from collections.abc import Iterator
from itertools import product

import pytest
import torch
from head_fixtures import ROUNDING, WAYS, assert_as_good_as_plain, make_bias, make_inputs, run
from torch import Tensor

from kernels import reference, vocabulary_slabs
from kernels.head import LinearLogps
from kernels.linear_logps import linear_logps

DTYPES = [torch.float32, torch.bfloat16]
HEADS = [head for head in product([False, True], [1.0, -0.3], [None, 4.0]) if head != (False, 1.0, None)]
"""(bias?, scale, softcap), all but the plain head."""


@pytest.fixture(autouse=True)
def narrow_slabs_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """16 columns a slab, so that small vocabularies have several."""
    monkeypatch.setattr(vocabulary_slabs, "SLAB_COLUMNS", 16)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("with_bias", "scale", "softcap"), HEADS)
def test_every_head_is_as_good_as_plain_pytorch(
    with_bias: bool, scale: float, softcap: float | None, dtype: torch.dtype, way: str
) -> None:
    bias = make_bias(200, dtype) if with_bias else None
    inputs = make_inputs(30, 200, 16, dtype, spread=6.0)  # capped at 4: well into the bend
    assert_as_good_as_plain(*inputs, way, bias=bias, scale=scale, softcap=softcap)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize(("with_bias", "scale", "softcap"), [(False, 1.0, None), *HEADS])
def test_gradients_by_finite_differences(
    with_bias: bool, scale: float, softcap: float | None, impl: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vocabulary_slabs, "SLAB_COLUMNS", 8)
    hidden, weight, _, _ = make_inputs(5, 21, 3, torch.float64)
    targets = torch.tensor([0, 20, 7, 8, 7])  # first and last column, both sides of a slab's edge, one repeated
    bias = make_bias(21, torch.float64) if with_bias else None
    hidden.requires_grad_(way != "frozen hidden")
    for tensor in (weight, bias):
        if tensor is not None:
            tensor.requires_grad_(way != "frozen head")
    options = {"scale": scale, "softcap": softcap, "stash": way == "stash", "impl": impl}
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_logps(h, w, targets, bias=b, **options), (hidden, weight, bias)
    )


@pytest.mark.parametrize("stash", [False, True])
def test_a_trained_bias_on_a_frozen_weight(stash: bool) -> None:
    hidden, weight, targets, _ = make_inputs(5, 40, 3, torch.float64)
    hidden.requires_grad_()
    bias = make_bias(40, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda h, b: linear_logps(h, weight, targets, bias=b, softcap=5.0, stash=stash), (hidden, bias)
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_by_hand(dtype: torch.dtype) -> None:
    """A logit of 1e4 capped at 2 is 2, without gradient; scale and bias give logits 0 and log 3."""
    hidden = torch.tensor([[1e4]], dtype=dtype, requires_grad=True)
    weight = torch.tensor([[1.0], [0.0], [-1.0]], dtype=dtype, requires_grad=True)
    normaliser = math.log(math.exp(2) + 1 + math.exp(-2))
    for target, logit in enumerate((2.0, 0.0, -2.0)):
        logps = linear_logps(hidden, weight, torch.tensor([target]), softcap=2.0)
        torch.testing.assert_close(logps.detach(), torch.tensor([logit - normaliser]), rtol=2e-6, atol=0)
        (by_weight,) = torch.autograd.grad(logps, weight)
        probability = math.exp(-normaliser)  # of the middle token, the only one on the slope of tanh
        expected = 1e4 * torch.tensor([0.0, (target == 1) - probability, 0.0])[:, None]
        # the slope of a capped logit is found by a difference: 1 - 1 is zero but for a rounding
        torch.testing.assert_close(by_weight.float(), expected, rtol=4 * ROUNDING[dtype], atol=1e4 * 2**-23)
    bias = torch.tensor([0.0, -2.0], dtype=dtype)
    weight = torch.tensor([[0.0], [4.0]], dtype=dtype)
    hidden = torch.tensor([[2 + math.log(3)]], dtype=dtype)
    logps = linear_logps(hidden, weight, torch.tensor([1]), bias=bias, scale=0.25)
    torch.testing.assert_close(logps, torch.tensor([math.log(0.75)]), rtol=0, atol=max(1e-6, ROUNDING[dtype]))


@pytest.mark.parametrize("way", ["recompute", "stash", "frozen head"])
def test_logits_on_the_flat_end_of_a_softcap(way: str) -> None:
    """Where tanh is within 1e-4 to 1e-6 of 1, one rounding of it is up to a tenth of the slope: no more may be added.

    Means over 400 rows, so that nobody is lucky; the target is the capped token in half of them.
    """
    hidden = torch.linspace(15.0, 20.0, 400)[:, None]
    weight, targets, grad = torch.tensor([[1.0], [0.0]]), torch.arange(400) % 2, torch.ones(400)
    truth = run(hidden.double(), weight.double(), targets, grad, way, "reference", softcap=3.0)[1]
    plain, ours = (run(hidden, weight, targets, grad, way, impl, softcap=3.0)[1] for impl in ("reference", "cpu"))
    for rows in (slice(0, None, 2), slice(1, None, 2)):
        errors = [float(((found - truth) / truth)[rows].abs().mean()) for found in (plain, ours)]
        assert errors[1] <= 1.1 * errors[0], f"{way}: {errors=}"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_bias_of_ten_thousand(sign: float, dtype: torch.dtype, way: str) -> None:
    hidden, weight, targets, grad = make_inputs(6, 100, 4, dtype)
    targets[:3] = torch.tensor([50, 0, 99])
    bias = torch.zeros(100, dtype=dtype)
    bias[50] = sign * 1e4
    assert_as_good_as_plain(hidden, weight, targets, grad, way, bias=bias)


@pytest.mark.parametrize("way", WAYS)
def test_a_zero_upstream_gradient_gives_zero(way: str) -> None:
    """Also for rows whose probabilities span everything that float32 holds."""
    hidden, weight, targets, grad = make_inputs(8, 100, 4, torch.float32, spread=300.0)
    _, *gradients = run(hidden, weight, targets, grad * 0, way, bias=make_bias(100, torch.float32), softcap=1e3)
    assert all(gradient is None or not gradient.any() for gradient in gradients)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("with_bias", "scale", "softcap"), [(False, 1.0, None), (True, 0.5, None), (True, 2.0, 9.0)])
def test_entropy_and_argmax(with_bias: bool, scale: float, softcap: float | None, dtype: torch.dtype, way: str) -> None:
    """Against float64. Log-probabilities and gradients are the same bits as without them."""
    hidden, weight, targets, grad = make_inputs(60, 200, 16, dtype, spread=4.0)
    bias = make_bias(200, dtype) if with_bias else None
    targets[1::2] = reference.head_logits(hidden, weight, bias, scale=scale)[1::2].argmax(1)
    targets[::4] = 7
    options = {"bias": bias, "scale": scale, "softcap": softcap, "stash": way == "stash"}
    hidden.requires_grad_(way != "frozen hidden")
    weight.requires_grad_(way != "frozen head")
    leaves = [leaf for leaf in (hidden, weight) if leaf.requires_grad]
    found = linear_logps(hidden, weight, targets, with_entropy=True, with_argmax=True, **options)
    alone = linear_logps(hidden, weight, targets, **options)
    assert isinstance(found, LinearLogps) and torch.equal(found.logps, alone)
    assert not found.entropy.requires_grad and not found.argmax_hit.requires_grad
    for one, other in zip(
        torch.autograd.grad(found.logps, leaves, grad), torch.autograd.grad(alone, leaves, grad), strict=True
    ):
        assert torch.equal(one, other)
    wide = [tensor.detach().double() for tensor in (hidden, weight)]
    options["bias"] = None if bias is None else bias.double()
    truth = linear_logps(*wide, targets, with_entropy=True, with_argmax=True, impl="reference", **options)
    # a logit is rounded by its size, and the entropy is a mean of logits times at most log V = 5.3
    tolerance = 1e-5 if dtype == torch.float32 else 6e-2
    torch.testing.assert_close(found.entropy.double(), truth.entropy, rtol=0, atol=tolerance)
    logits = reference.head_logits(*wide, options["bias"], scale=scale, softcap=softcap)
    chosen = logits.gather(1, targets[:, None])
    others = logits.scatter(1, targets[:, None], -torch.inf).amax(1, keepdim=True)
    clear = ((chosen - others).abs() > (1e-5 if dtype == torch.float32 else 0.1)).squeeze(1)
    assert found.argmax_hit[clear].sum() > 10 and (~found.argmax_hit[clear]).sum() > 10
    assert torch.equal(found.argmax_hit[clear], truth.argmax_hit[clear])


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_entropy_and_argmax_by_hand(impl: str, dtype: torch.dtype) -> None:
    """Even logits: log V, and a tie is a hit. Two of 40 tokens share what there is: log 2. A sure one: 0."""
    hidden = torch.eye(4, dtype=dtype)
    weight = torch.zeros(40, 4, dtype=dtype)
    weight[[3, 37], 1] = 9984.0
    weight[20, 2] = 9984.0
    weight[5, 3] = -9984.0
    targets = torch.tensor([39, 37, 0, 5])
    found = linear_logps(hidden, weight, targets, with_entropy=True, with_argmax=True, impl=impl)
    expected = torch.tensor([math.log(40), math.log(2), 0.0, math.log(39)])
    torch.testing.assert_close(found.entropy, expected, rtol=2e-6, atol=1e-7)
    assert found.argmax_hit.tolist() == [True, True, False, False]


def test_only_what_is_asked_for_comes_back() -> None:
    hidden, weight, targets, _ = make_inputs(3, 40, 4, torch.float32)
    assert isinstance(linear_logps(hidden, weight, targets), Tensor)
    found = linear_logps(hidden, weight, targets, with_entropy=True)
    assert found.argmax_hit is None and found.entropy is not None
    found = linear_logps(hidden, weight, targets, with_argmax=True)
    assert found.entropy is None and found.argmax_hit.dtype == torch.bool


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("rows", [0, 1])
def test_no_row_and_one(rows: int, impl: str) -> None:
    hidden, weight, targets, _ = make_inputs(rows, 40, 4, torch.float32)
    bias = make_bias(40, torch.float32).requires_grad_()
    options = {"bias": bias, "softcap": 3.0, "with_entropy": True, "with_argmax": True, "impl": impl}
    found = linear_logps(hidden, weight.requires_grad_(), targets, **options)
    assert found.logps.shape == found.entropy.shape == found.argmax_hit.shape == (rows,)
    found.logps.sum().backward()
    assert weight.grad.shape == weight.shape and bias.grad.shape == bias.shape
    assert bool(bias.grad.any()) == bool(rows)


def test_float16_is_for_the_reference_alone_on_a_cpu() -> None:
    hidden, weight, targets, _ = make_inputs(5, 40, 4, torch.float16)
    plain = linear_logps(hidden, weight, targets, impl="reference")
    truth = linear_logps(hidden.double(), weight.double(), targets, impl="reference")
    torch.testing.assert_close(plain.double(), truth, rtol=0, atol=1e-2)  # logits up to 16 are rounded by 2^-8
    with pytest.raises(ValueError, match="the CPU path does not take torch.float16; use bfloat16 or float32"):
        linear_logps(hidden, weight, targets, impl="cpu")


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"bias": torch.zeros(8)}, r"bias is \(8,\) torch.float32; .* needs \(9,\) torch.float32"),
        ({"bias": torch.zeros(9).bfloat16()}, r"bias is \(9,\) torch.bfloat16"),
        ({"softcap": 0.0}, "softcap 0.0: must be a positive number, or None for no cap"),
        ({"softcap": math.inf}, "softcap inf: must be a positive number"),
        ({"scale": 0.0}, "scale 0.0: must be a number other than 0"),
        ({"scale": math.nan}, "scale nan: must be a number"),
        ({"vocab_start": -1}, "vocab_start -1: must be at least 0"),
        ({"combine": lambda *partials: partials}, "combine without vocab_start; say at which token"),
        ({"vocab_start": 0, "with_entropy": True}, "need the whole vocabulary; leave them out, or pass the whole"),
        ({"vocab_start": 0, "with_argmax": True}, "need the whole vocabulary"),
    ],
)
def test_errors_say_which_option_does_not_fit(options: dict, problem: str) -> None:
    hidden, weight, targets, _ = make_inputs(5, 9, 4, torch.float32)
    with pytest.raises(ValueError, match=problem):
        linear_logps(hidden, weight, targets, **options)

"""The Triton kernels of `linear_logps` in Triton's interpreter; `test_kernel_linear_logps_triton` runs this file.

The interpreter is chosen when Triton is imported, so these tests need a process of their own, and their name keeps
pytest from collecting them elsewhere. Tiles of 32 x 32 and slabs of 64 columns make several programs of small inputs,
whose sizes are no multiples of them. float32 and float16: in bfloat16 the interpreter itself is wrong.

The measure of log-probabilities: 3e-6 times the largest logit (at least 1) from float64, about what float32 sums of
products of the inputs leave. Of gradients: twice the error of plain PyTorch in the same dtype, and a few roundings.
"""

import math
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from head_fixtures import make_bias, make_inputs, run
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import dispatch, linear_logps_plan, reference
from kernels.head import HeadOptions, LinearLogps, merge_partials
from kernels.linear_logps import linear_logps
from kernels.linear_logps_plan import Tiles, choose_plan

ROWS, VOCABULARY, WIDTH = 37, 110, 24
TILES = Tiles(32, 32, 16, warps=4, stages=1)
SLAB = 64
PLANS = {
    "pointers": {"source": "pointers"},
    "descriptors": {"source": "descriptors"},
    "vendor": {"backend": "vendor"},
}
WAYS = ["recompute", "stash", "frozen head", "frozen hidden"]
ROUNDING = {torch.float32: 2**-24, torch.float16: 2**-11}
EVERYTHING = {"scale": 0.7, "softcap": 5.0}

triton_head = dispatch.triton_module("linear_logps")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    use_plan(monkeypatch, "pointers")
    monkeypatch.setattr(triton_head, "GROUP", 1)  # so that two row tiles are two groups
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def use_plan(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    forced = partial(linear_logps_plan.choose_plan, tiles=TILES, slab=SLAB, **PLANS[name])
    monkeypatch.setattr(triton_head, "choose_plan", forced)


def inputs_with_edges(dtype: torch.dtype, width: int = WIDTH) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Targets in the first and the last column, on both sides of a tile's and of a slab's edge, and repeated."""
    hidden, weight, targets, grad = make_inputs(ROWS, VOCABULARY, width, dtype)
    targets[:8] = torch.tensor([0, VOCABULARY - 1, 31, 32, 63, 64, 64, 0])
    return hidden, weight, targets, grad


def assert_good(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    grad: Tensor,
    way: str,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> None:
    options = {"scale": scale, "softcap": softcap}
    wide = None if bias is None else bias.double()
    truth = run(hidden.double(), weight.double(), targets, grad, way, "reference", bias=wide, **options)
    plain = run(hidden, weight, targets, grad, way, "reference", bias=bias, **options)
    ours = run(hidden, weight, targets, grad, way, "triton", bias=bias, **options)
    logits = reference.head_logits(hidden.double(), weight.double(), wide, **options)
    assert ours[0].dtype == torch.float32
    error = float((ours[0] - truth[0]).abs().max())
    assert error <= 3e-6 * max(1.0, float(logits.abs().max())), f"{way}: logps are off by {error}"
    # plain PyTorch may be lucky: roundings of the largest number, four of float32 sums and one of the result, are free
    for name, exact, other, value in zip(("hidden", "weight", "bias"), truth[1:], plain[1:], ours[1:], strict=False):
        assert (value is None) == (exact is None), f"{way}: gradient by {name}"
        if exact is not None:
            assert value.dtype == hidden.dtype
            error, baseline = (float((tensor.double() - exact).abs().max()) for tensor in (value, other))
            lucky = (4 * ROUNDING[torch.float32] + ROUNDING[hidden.dtype]) * float(exact.abs().max())
            assert error <= 2 * baseline + lucky, f"{way} by {name}: {error=} {baseline=} {lucky=}"


@pytest.mark.parametrize("way", WAYS[:3])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dtype", ROUNDING)
def test_values_and_gradients(dtype: torch.dtype, plan: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_plan(monkeypatch, plan)
    assert_good(*inputs_with_edges(dtype), way)


@pytest.mark.parametrize("way", WAYS[:3])
@pytest.mark.parametrize("plan", PLANS)
def test_with_bias_scale_and_softcap(plan: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_plan(monkeypatch, plan)
    assert_good(*inputs_with_edges(torch.float32), way, bias=make_bias(VOCABULARY, torch.float32), **EVERYTHING)


@pytest.mark.parametrize("plan", PLANS)
def test_with_bias_scale_and_softcap_in_float16(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_plan(monkeypatch, plan)
    assert_good(*inputs_with_edges(torch.float16), "recompute", bias=make_bias(VOCABULARY, torch.float16), **EVERYTHING)


@pytest.mark.parametrize(("rows", "vocabulary", "width"), [(1, 1, 1), (1, 33, 7), (16, 64, 16), (17, 65, 17)])
def test_other_shapes(rows: int, vocabulary: int, width: int) -> None:
    """One of everything, odd widths (no 16 bytes a row), exactly one tile, and one more than that."""
    assert_good(*make_inputs(rows, vocabulary, width, torch.float32), "recompute")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("plan", PLANS)
def test_no_rows(plan: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_plan(monkeypatch, plan)
    logps, by_hidden, by_weight = run(*make_inputs(0, VOCABULARY, WIDTH, torch.float32), way, "triton")
    assert logps.shape == (0,)
    assert by_hidden is None or by_hidden.shape == (0, WIDTH)
    assert by_weight is None or (by_weight.shape == (VOCABULARY, WIDTH) and not by_weight.any())


def test_the_tiles_of_a_gpu_by_the_public_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for dtype, tiles in ((torch.float16, (128, 128)), (torch.float32, (64, 64))):
        inputs = make_inputs(5, VOCABULARY, 24, dtype)
        plan = choose_plan(inputs[0])
        assert (plan.backend, plan.source, plan.tiles.rows, plan.tiles.columns) == ("fused", "pointers", *tiles)
        assert_good(*inputs, "recompute")


@pytest.mark.parametrize("plan", PLANS)
def test_entropy_and_argmax(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are of the whole row, and change neither the log-probabilities nor their gradient."""
    use_plan(monkeypatch, plan)
    hidden, weight, targets, grad = inputs_with_edges(torch.float32)
    hidden.requires_grad_()
    found = linear_logps(hidden, weight, targets, with_entropy=True, with_argmax=True, impl="triton")
    assert isinstance(found, LinearLogps) and not found.entropy.requires_grad
    truth = reference.run_linear_logps(
        hidden.double(), weight.double(), targets, None, HeadOptions(with_entropy=True, with_argmax=True)
    )
    torch.testing.assert_close(found.entropy.double(), truth.entropy, rtol=0, atol=1e-5)
    assert truth.argmax_hit.any() and not truth.argmax_hit.all()
    assert torch.equal(found.argmax_hit, truth.argmax_hit)
    plain = linear_logps(hidden, weight, targets, impl="triton")
    assert torch.equal(found.logps, plain)
    assert torch.equal(*(torch.autograd.grad(logps, hidden, grad)[0] for logps in (found.logps, plain)))


def test_a_tie_is_a_hit_and_equal_logits_have_the_largest_entropy() -> None:
    hidden, weight, targets = torch.zeros(2, 3), torch.ones(VOCABULARY, 3), torch.tensor([0, 109])
    found = linear_logps(hidden, weight, targets, with_entropy=True, with_argmax=True, impl="triton")
    assert found.argmax_hit.all()
    torch.testing.assert_close(found.entropy, torch.full((2,), math.log(VOCABULARY)), rtol=1e-6, atol=0)
    torch.testing.assert_close(found.logps, torch.full((2,), -math.log(VOCABULARY)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("way", WAYS)
def test_logits_of_ten_thousand(way: str) -> None:
    """One token at 1e4, or at -1e4, all others at 0; the target is that token or another."""
    weight = torch.zeros(VOCABULARY, 1)
    weight[100] = 1.0
    hidden = torch.tensor([1e4, 1e4, 1e4, -1e4, -1e4, -1e4])[:, None]
    assert_good(hidden, weight, torch.tensor([100, 0, 109, 100, 0, 109]), torch.ones(6), way)


@pytest.mark.parametrize("way", WAYS)
def test_large_logits_do_not_cost_the_gradient_digits(way: str) -> None:
    """Logits of exactly 1024 and 1023.5: their normaliser as one number is off by 5e-5, and so would p be."""
    weight = torch.zeros(VOCABULARY, 2)
    weight[3], weight[105] = torch.tensor([1.0, 1.0]), torch.tensor([1.0 - 2**-11, -1.0])
    inputs = torch.tensor([[1024.0, 0.0]]), weight, torch.tensor([3]), torch.ones(1)
    truth = run(*(t.double() if t.is_floating_point() else t for t in inputs), way, "reference")
    for exact, value in zip(truth, run(*inputs, way, "triton"), strict=True):
        if exact is not None:
            torch.testing.assert_close(value.double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("way", WAYS[:3])
def test_a_sure_token_keeps_its_digits(way: str) -> None:
    """1 - p is 3e-7 and 6e-9: the difference of 1 and a float32 p has one digit of the first and none of the second."""
    hidden, weight = torch.tensor([[20.0], [24.0]]), torch.zeros(VOCABULARY, 1)
    weight[70] = 1.0
    inputs = hidden, weight, torch.tensor([70, 70]), torch.ones(2)
    truth = run(hidden.double(), weight.double(), *inputs[2:], way, "reference")
    logps, by_hidden, by_weight = run(*inputs, way, "triton")
    assert (logps < 0).all()
    torch.testing.assert_close(logps.double(), truth[0], rtol=3e-6, atol=0)
    torch.testing.assert_close(by_hidden.double(), truth[1], rtol=3e-6, atol=0)
    if by_weight is not None:
        torch.testing.assert_close(by_weight.double(), truth[2], rtol=3e-6, atol=0)


@pytest.mark.parametrize("way", WAYS)
def test_forbidden_tokens(way: str) -> None:
    """A bias of -inf over a whole tile, a whole slab and more: they weigh nothing, and nothing becomes nan."""
    hidden, weight, targets, grad = make_inputs(5, VOCABULARY, 4, torch.float32)
    bias = torch.full((VOCABULARY,), -200.0)
    bias[:100] = -torch.inf
    targets = targets.clamp_min(100)
    targets[0] = 2  # forbidden itself: -inf, and all others are pushed up
    found = run(hidden, weight, targets, grad, way, "triton", bias=bias)
    truth = run(hidden.double(), weight.double(), targets, grad, way, "reference", bias=bias.double())
    for exact, value in zip(truth, found, strict=True):
        if exact is not None:
            torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-5)
    entropy = linear_logps(hidden, weight, targets, bias=bias, with_entropy=True, impl="triton").entropy
    whole = reference.run_linear_logps(hidden, weight, targets, bias, HeadOptions(with_entropy=True)).entropy
    torch.testing.assert_close(entropy, whole, rtol=1e-4, atol=1e-4)


def test_a_nan_stays_in_its_row_and_is_not_hidden() -> None:
    hidden, weight, targets, _ = make_inputs(3, VOCABULARY, 4, torch.float32)
    hidden[1, 0] = math.nan
    assert torch.isnan(linear_logps(hidden, weight, targets, impl="triton")).tolist() == [False, True, False]


@pytest.mark.parametrize("way", WAYS)
def test_zero_upstream_gradients_give_exact_zeros(way: str) -> None:
    hidden, weight, targets, grad = inputs_with_edges(torch.float32)
    grad[5:] = 0.0
    _, by_hidden, by_weight = run(hidden, weight, targets, grad, way, "triton")
    assert by_hidden is None or (by_hidden[:5].any() and not by_hidden[5:].any())
    if by_weight is not None:
        # rows of hidden without a gradient add nothing to any token
        other, _, rest = run(hidden[:5], weight, targets[:5], grad[:5], way, "triton")
        torch.testing.assert_close(by_weight, rest, rtol=1e-5, atol=1e-6)
        assert len(other) == 5


@pytest.mark.parametrize("stash", [False, True])
def test_backward_twice_through_a_kept_graph_gives_the_same(stash: bool) -> None:
    hidden, weight, targets, grad = make_inputs(10, VOCABULARY, 8, torch.float32)
    weight.requires_grad_()
    logps = linear_logps(hidden, weight, targets, stash=stash, impl="triton")
    (first,) = torch.autograd.grad(logps, weight, grad, retain_graph=True)
    (second,) = torch.autograd.grad(logps, weight, grad)
    assert torch.equal(first, second)


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest tensor that any operator of PyTorch returned. (The interpreter looks at memory as bytes.)"""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.bytes = max(self.bytes, tensor.nbytes)
        return out


@pytest.mark.parametrize("plan", ["pointers", "vendor"])
@pytest.mark.parametrize("way", WAYS[:3])
def test_only_the_stash_holds_rows_times_vocabulary(way: str, plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_plan(monkeypatch, plan)
    inputs = make_inputs(60, 250, 8, torch.float32)
    with LargestTensor() as watch:
        run(*inputs, way, "triton")
    assert watch.bytes == 4 * 60 * (256 if way == "stash" else SLAB)


class Products(TorchDispatchMode):
    """Multiplications in all matrix products of PyTorch."""

    multiplications = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_):
            left, right = args[-2:]
            self.multiplications += left.shape[0] * left.shape[1] * right.shape[1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("way", "products"), [("recompute", 4), ("stash", 3), ("frozen head", 2), ("frozen hidden", 3)]
)
def test_the_number_of_products(way: str, products: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the vendor's library multiplies, all can be counted; the kernels' own products stand in the same places."""
    use_plan(monkeypatch, "vendor")
    inputs = make_inputs(ROWS, VOCABULARY, WIDTH, torch.float32)
    with Products() as count:
        run(*inputs, way, "triton")
    assert count.multiplications == products * ROWS * VOCABULARY * WIDTH


def test_without_gradients_no_logits_are_written() -> None:
    hidden, weight, targets, _ = make_inputs(60, 250, 8, torch.float32)
    weight.requires_grad_()
    with torch.no_grad(), LargestTensor() as watch:
        logps = linear_logps(hidden, weight, targets, stash=True, impl="triton")
    assert watch.bytes == weight.nbytes < 4 * 60 * SLAB
    assert not logps.requires_grad
    assert torch.equal(logps, linear_logps(hidden, weight, targets, impl="triton"))


@pytest.mark.parametrize("group", [2, 16])
def test_programs_in_any_order_of_tiles_give_the_same(group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three row tiles in groups of 2 and 1, and in one that could hold more."""
    hidden, weight, targets, _ = make_inputs(90, 70, 8, torch.float32)
    monkeypatch.setattr(triton_head, "GROUP", group)
    truth = reference.linear_logps(hidden.double(), weight.double(), targets)
    found = linear_logps(hidden, weight, targets, impl="triton")
    torch.testing.assert_close(found.double(), truth, rtol=0, atol=1e-5)


@pytest.mark.parametrize("way", WAYS[:3])
def test_a_split_vocabulary_equals_the_whole(way: str) -> None:
    """Three parts, the last without any target: values, and gradients of which a part has its own or its share."""
    hidden, weight, targets, grad = inputs_with_edges(torch.float32)
    targets = targets.clamp_max(99)
    bias = make_bias(VOCABULARY, torch.float32)
    whole = run(hidden, weight, targets, grad, way, "triton", bias=bias, **EVERYTHING)
    cuts = [0, 70, 100, VOCABULARY]
    spans = [slice(start, stop) for start, stop in zip(cuts[:-1], cuts[1:], strict=True)]
    options = {"impl": "triton", **EVERYTHING}
    partials = [linear_logps(hidden, weight[s], targets, bias=bias[s], vocab_start=s.start, **options) for s in spans]
    merged = merge_partials(partials)
    parts = [
        run(
            hidden, weight[s], targets, grad, way, "triton", bias=bias[s], vocab_start=s.start,
            combine=lambda *mine: merged, **EVERYTHING,
        )
        for s in spans
    ]  # fmt: skip
    for logps, *_ in parts:
        torch.testing.assert_close(logps, whole[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(sum(by_hidden for _, by_hidden, *_ in parts), whole[1], rtol=1e-5, atol=1e-6)
    if way != "frozen head":
        torch.testing.assert_close(torch.cat([part[2] for part in parts]), whole[2], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(torch.cat([part[3] for part in parts]), whole[3], rtol=1e-5, atol=1e-6)


def test_the_partials_of_a_part_are_those_of_the_reference() -> None:
    hidden, weight, targets, _ = inputs_with_edges(torch.float32)
    found = linear_logps(hidden, weight[64:], targets, vocab_start=64, impl="triton")
    truth = linear_logps(hidden.double(), weight[64:].double(), targets, vocab_start=64, impl="reference")
    for value, exact in zip(found, truth, strict=True):
        torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-5)
    assert torch.isneginf(found[2]).any() and torch.isfinite(found[2]).any()


@pytest.mark.parametrize("softcap", [1.0, 1000.0])
def test_a_cap_is_exact_from_small_logits_to_large_ones(softcap: float) -> None:
    """5e-7 of the value, where softcap * (1 - 2 / (exp + 1)) alone would be off by softcap / 1e7."""
    sizes = torch.tensor([1e-4, 1e-2, 0.2, 0.25, 0.3, 1.0, 3.0, 20.0, 200.0])
    hidden = softcap * torch.cat([sizes, -sizes])[:, None]
    targets = torch.zeros(len(hidden), dtype=torch.int64)
    _, _, capped = linear_logps(hidden, torch.ones(2, 1), targets, softcap=softcap, vocab_start=0, impl="triton")
    exact = softcap * torch.tanh(hidden[:, 0].double() / softcap)
    torch.testing.assert_close(capped.double(), exact, rtol=5e-7, atol=0)


def test_what_is_not_supported_is_refused_with_the_alternative() -> None:
    hidden, weight, targets, _ = make_inputs(3, 9, 5, torch.float64)
    with pytest.raises(ValueError, match="have no torch.float64; use impl 'cpu' or 'reference'"):
        linear_logps(hidden, weight, targets, impl="triton")
    with pytest.raises(ValueError, match="D 5 in torch.float16 has 10; use source 'pointers'"):
        choose_plan(hidden.half(), source="descriptors")
    with pytest.raises(ValueError, match="slab 100 is not a multiple of the tiles' 128 columns"):
        choose_plan(hidden.half(), slab=100)
    with pytest.raises(ValueError, match="backend 'other' must be 'fused' or 'vendor'"):
        choose_plan(hidden.half(), backend="other")


def test_a_chip_with_the_copy_engine_gets_descriptors_where_rows_allow_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_logps_plan, "_has_copy_engine", lambda device: True)
    rows = torch.zeros(3, 24, dtype=torch.bfloat16)
    plain, capped = choose_plan(rows), choose_plan(rows, options=HeadOptions(softcap=30.0))
    assert (plain.source, plain.tiles.columns) == ("descriptors", 256)
    assert (capped.source, capped.tiles.columns) == ("descriptors", 128)
    assert choose_plan(rows[:, :20]).source == "pointers"
    assert choose_plan(rows.float()).source == "pointers"

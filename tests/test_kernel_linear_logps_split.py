"""`linear_logps` on a head whose vocabulary is split: over calls in one process, and over two processes with gloo.

Parts must give the numbers of the whole to rounding, gradients too. The gathering is the caller's: here a list, and
torch.distributed.
"""

import math
from pathlib import Path

import pytest
import torch
from head_fixtures import WAYS, make_bias, make_inputs, run
from torch import Tensor

from kernels import vocabulary_slabs
from kernels.head import Partials, merge_partials
from kernels.linear_logps import linear_logps

CUTS = (0, 70, 71, 100)
"""Where the parts of 100 tokens begin and end: larger and smaller than a slab, and a single token."""


@pytest.fixture(autouse=True)
def narrow_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary_slabs, "SLAB_COLUMNS", 32)


def run_split(
    hidden: Tensor, weight: Tensor, targets: Tensor, grad: Tensor, way: str, impl: str, bias: Tensor, **options: float
) -> list[Tensor | None]:
    """As `run` gives it, by parts one after another: what all parts' first calls gave is what each combines."""
    parts = [slice(start, stop) for start, stop in zip(CUTS[:-1], CUTS[1:], strict=True)]
    gathered = [
        linear_logps(hidden, weight[part], targets, bias=bias[part], vocab_start=part.start, impl=impl, **options)
        for part in parts
    ]
    results = []
    for index, part in enumerate(parts):

        def combine(*own: Tensor, index: int = index) -> Partials:
            for mine, found in zip(own, gathered[index], strict=True):
                assert torch.equal(mine, found) and not mine.requires_grad
            return merge_partials(gathered)

        options_of_part = {**options, "vocab_start": part.start, "combine": combine}
        results.append(run(hidden, weight[part], targets, grad, way, impl, bias=bias[part], **options_of_part))
    logps, by_hidden, by_weight, by_bias = zip(*results, strict=True)
    assert all(torch.equal(one, logps[0]) for one in logps)
    return [
        logps[0],
        None if by_hidden[0] is None else sum(by_hidden),
        *(None if found[0] is None else torch.cat(found) for found in (by_weight, by_bias)),
    ]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("spread", [3.0, 300.0])
def test_parts_give_the_numbers_of_the_whole(spread: float, softcap: float | None, impl: str, way: str) -> None:
    """In float64 against the plain whole head. Targets in the first and last column of parts; logits up to 1e3."""
    hidden, weight, targets, grad = make_inputs(12, 100, 8, torch.float64, spread=spread)
    targets[:5] = torch.tensor([0, 69, 70, 71, 99])
    bias = make_bias(100, torch.float64)
    options = {"scale": 0.5, "softcap": softcap}
    whole = run(hidden, weight, targets, grad, way, "reference", bias=bias, **options)
    for found, wanted in zip(run_split(hidden, weight, targets, grad, way, impl, bias, **options), whole, strict=True):
        assert (found is None) == (wanted is None)
        if wanted is not None:
            torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11 * max(1.0, float(wanted.abs().max())))


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_partials_of_a_part(dtype: torch.dtype, impl: str) -> None:
    """Logits 0, log 3 and 5: a part with the target and one without it, whatever the sums are relative to."""
    hidden, weight = torch.ones(2, 1, dtype=dtype), torch.tensor([[0.0], [math.log(3)], [5.0]], dtype=dtype)
    logits = weight.double().squeeze(1)
    targets = torch.tensor([2, 0])
    for start, stop in ((0, 2), (2, 3)):
        part = weight[start:stop].requires_grad_()
        maxima, sums, target_logits = linear_logps(hidden, part, targets, vocab_start=start, impl=impl)
        assert not any(tensor.requires_grad for tensor in (maxima, sums, target_logits))
        total = logits[start:stop].exp().sum()
        torch.testing.assert_close((maxima.exp() * sums).double(), total.expand(2), rtol=2e-3, atol=0)
        expected = [logits[target] if start <= target < stop else -math.inf for target in targets.tolist()]
        torch.testing.assert_close(target_logits.double(), torch.tensor(expected, dtype=torch.float64))


def test_merging_by_hand() -> None:
    """Sums 2 e^0 and 3 e^10 are 3 + 2 e^-10 relative to 10; an absent target is -inf."""
    one = torch.tensor([0.0]), torch.tensor([2.0]), torch.tensor([-math.inf])
    other = torch.tensor([10.0]), torch.tensor([3.0]), torch.tensor([9.0])
    for parts in ([one, other], [other, one]):
        maxima, sums, target_logits = merge_partials(parts)
        assert maxima.tolist() == [10.0] and target_logits.tolist() == [9.0]
        torch.testing.assert_close(sums, torch.tensor([3 + 2 * math.exp(-10)]), rtol=1e-7, atol=0)
    assert all(torch.equal(alone, given) for alone, given in zip(merge_partials([other]), other, strict=True))


VOCABULARY = 301


def _two_process_inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    hidden, weight, targets, grad = make_inputs(40, VOCABULARY, 16, dtype, spread=4.0)
    return hidden, weight, targets, grad, make_bias(VOCABULARY, dtype)


def _run_part(rank: int, folder: str) -> None:
    """One of two processes: its part of the vocabulary, the same rows as the other."""
    torch.set_num_threads(1)
    vocabulary_slabs.SLAB_COLUMNS = 32
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)

    def combine(*own: Tensor) -> Partials:
        gathered = [[torch.empty_like(tensor) for _ in range(2)] for tensor in own]
        for tensor, room in zip(own, gathered, strict=True):
            torch.distributed.all_gather(room, tensor)
        return merge_partials(list(zip(*gathered, strict=True)))

    part = slice(0, 150) if rank == 0 else slice(150, VOCABULARY)
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        hidden, weight, targets, grad, bias = _two_process_inputs(dtype)
        for way in WAYS:
            options = {"bias": bias[part], "vocab_start": part.start, "combine": combine}
            results = run(hidden, weight[part], targets, grad, way, **options)
            if results[1] is not None:  # the shares of the gradient by hidden
                torch.distributed.all_reduce(results[1])
            found[dtype, way] = results
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_give_the_numbers_of_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_run_part, args=(str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, 8e-3)):
        hidden, weight, targets, grad, bias = _two_process_inputs(dtype)
        for way in WAYS:
            logps, by_hidden, by_weight, by_bias = run(hidden, weight, targets, grad, way, bias=bias)
            one, other = (found[dtype, way] for found in ranks)
            assert torch.equal(one[0], other[0])
            _assert_near(one[0], logps, tolerance)
            for value, alone in ((one[1], by_hidden), (other[1], by_hidden)):
                _assert_near(value, alone, tolerance)
            for index, alone in ((2, by_weight), (3, by_bias)):
                parts = [found[dtype, way][index] for found in ranks]
                _assert_near(None if parts[0] is None else torch.cat(parts), alone, tolerance)


def _assert_near(found: Tensor | None, wanted: Tensor | None, tolerance: float) -> None:
    """Within `tolerance` of the largest number: a few roundings of what is summed, in the inputs' dtype."""
    assert (found is None) == (wanted is None)
    if wanted is not None:
        torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance * float(wanted.abs().max()))

"""Flex and merge attention against the blocks of the CPU and against the definition, on random streams.

Flex has no backward on a CPU: its gradients, and both forms' kernels for GPUs, are tests/test_gpu.py's.
"""

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_fixtures import random_group, tiny_config
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask

from trainer.batch import GroupLayout, build_stream
from trainer.errors import ModelError
from trainer.models import flex_attention
from trainer.models.attention import allowed_mask, batch_blocks, head_batches, stream_attention
from trainer.models.attention_form import choose_form, stream_attend
from trainer.models.flex_attention import block_mask, masked_attention
from trainer.models.merge_attention import attend, attend_backward, merge_plan, merged_attention

CPU = torch.device("cpu")
HEADS, WIDTH = 6, 8
ROUNDING = 1e-5
"""Float32: a score of up to 16 is wrong by 1e-6, so is a row's log-sum-exp; a probability carries both."""
GRADIENT_ROUNDING = 1e-4
"""By q and k a probability's error is multiplied by grad . value, up to 20, and by a key or query of up to 4."""
Layout = tuple[GroupLayout, ...]

GROUP = st.tuples(st.integers(0, 9), st.lists(st.sampled_from([1, 1, 2, 5, 8]), max_size=4)).filter(
    lambda group: group[0] + sum(group[1]) > 0
)
LAYOUTS = st.lists(GROUP, min_size=1, max_size=4).map(lambda groups: layout_of([(p, *b) for p, b in groups]))
"""Groups with and without a prompt, with up to four branches or none, many of one token."""
STREAMS = st.tuples(LAYOUTS, st.integers(0, 5), st.sampled_from([1, 2, 6]), st.integers(0, 1000))
"""Layout, tokens behind it, key-value heads, seed."""


def layout_of(lengths: list[tuple[int, ...]]) -> Layout:
    starts = [sum(map(sum, lengths[:index])) for index in range(len(lengths))]
    return tuple(GroupLayout(start, each) for start, each in zip(starts, lengths, strict=True))


def visible(layout: Layout, num_tokens: int, window: int | None = None) -> Tensor:
    """(T, T) bool, the definition: the groups' masks along the diagonal."""
    allowed = torch.zeros(num_tokens, num_tokens, dtype=torch.bool)
    for group in layout:
        allowed[group.start : group.stop, group.start : group.stop] = allowed_mask(group.lengths, window)
    return allowed


def random_heads(tokens: int, kv_heads: int, seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q (T, H, h), k and v (T, K, h), with scores large enough to make the softmax uneven."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(tokens, n, WIDTH, generator=generator).to(dtype) for n in (HEADS, kv_heads, kv_heads)]


def by_definition(q_THh: Tensor, k_TKh: Tensor, v_TKh: Tensor, allowed: Tensor) -> Tensor:
    """Softmax over the whole stream with -inf where a token may not look; zeros for a token that sees nothing."""
    k_THh, v_THh = (x.repeat_interleave(q_THh.shape[1] // x.shape[1], 1) for x in (k_TKh, v_TKh))
    scores_HTT = torch.einsum("ihd,jhd->hij", q_THh, k_THh).masked_fill(~allowed, float("-inf"))
    blind = ~allowed.any(1)
    probs_HTT = scores_HTT.masked_fill(blind[:, None], 0.0).softmax(-1).masked_fill(blind[:, None], 0.0)
    return torch.einsum("hij,jhd->ihd", probs_HTT, v_THh)


def by_blocks(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, window: int | None = None, softcap: float | None = None
) -> Tensor:
    batches = head_batches(batch_blocks(layout, len(q), window), len(q), q.shape[1], k.shape[1], q.dtype)
    return stream_attention(q, k, v, batches, softcap)


def with_gradients(out: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """The output and its gradients by q, k and v; the random cotangent also weighs tokens behind the groups."""
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, inputs, cotangent)]


@pytest.fixture
def _quiet() -> Iterator[None]:
    """Uncompiled flex attention warns that it is slow."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without")
        yield


# --- merge -----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(STREAMS)
def test_merge_gives_values_and_gradients_of_blocks_and_definition(stream: tuple[Layout, int, int, int]) -> None:
    layout, tail, kv_heads, seed = stream
    num_tokens = layout[-1].stop + tail
    plan, allowed = merge_plan(layout, CPU), visible(layout, num_tokens)

    def results(attention: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        inputs = [x.to(dtype).requires_grad_() for x in random_heads(num_tokens, kv_heads, seed)]
        return with_gradients(attention(*inputs), inputs)

    merged = results(lambda q, k, v: merged_attention(q, k, v, plan), torch.float32)
    exact = results(lambda q, k, v: merged_attention(q, k, v, plan), torch.float64)
    blocks = results(lambda q, k, v: by_blocks(q, k, v, layout), torch.float32)
    truth = results(lambda q, k, v: by_definition(q, k, v, allowed), torch.float64)
    for index, name in enumerate(("out", "q", "k", "v")):
        scale = max(1.0, truth[index].abs().max().item())
        assert (exact[index] - truth[index]).abs().max() <= 1e-12 * scale, name
        rounding = ROUNDING if name == "out" else GRADIENT_ROUNDING
        assert (merged[index] - truth[index]).abs().max() <= rounding * scale, name
        assert (merged[index] - blocks[index]).abs().max() <= rounding * scale, name
        assert (merged[index][layout[-1].stop :] == 0).all(), name


def test_plan_by_hand() -> None:
    """No sequence is without rows or keys: a flash kernel gives such a row a log-sum-exp of infinity."""
    plan = merge_plan(layout_of([(2, 1, 0, 2), (0, 3, 1), (4,), (1, 2)]), CPU)
    assert plan.own.cu_rows.tolist() == plan.own.cu_keys.tolist() == [0, 2, 3, 5, 8, 9, 13, 14, 16]
    assert (plan.num_tokens, plan.own.most_rows, plan.own.most_keys, plan.own.causal) == (16, 4, 4, True)
    assert plan.prompts is not None and not plan.prompts.causal
    assert (plan.prompts.cu_rows.tolist(), plan.prompts.cu_keys.tolist()) == ([0, 3, 5], [0, 2, 3])
    assert (plan.prompts.most_rows, plan.prompts.most_keys) == (3, 2)
    assert (plan.rows.tolist(), plan.keys.tolist()) == ([2, 3, 4, 14, 15], [0, 1, 13])
    assert merge_plan(layout_of([(0, 3), (4,)]), CPU).prompts is None


def test_a_part_by_itself_is_plain_attention() -> None:
    """`attend` and `attend_backward` without anything to merge, as a flash kernel would be called."""
    layout = layout_of([(5,), (3,)])
    inputs = [x.requires_grad_() for x in random_heads(8, 2, 3, torch.float64)]
    expected = by_definition(*inputs, visible(layout, 8))
    cotangent = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).double()
    plan = merge_plan(layout, CPU)
    assert plan.prompts is None
    detached = [x.detach() for x in inputs]
    out, lse = attend(*detached, plan.own)
    torch.testing.assert_close(out, expected.detach(), rtol=1e-12, atol=1e-12)
    found = attend_backward(cotangent, *detached, out, lse, plan.own)
    for ours, theirs in zip(found, torch.autograd.grad(expected, inputs, cotangent), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_merge_stays_finite_where_one_part_outweighs_the_other() -> None:
    """Scores of +-300: one part's weight is exactly 0, and the gradient does not turn into NaN."""
    layout = layout_of([(2, 2)])
    q, k, v = random_heads(4, 1, 0)
    k[:2] = 300 * q[2, 0] / q[2, 0].square().sum()
    k[2:] = -k[:2]
    inputs = [x.requires_grad_() for x in (q, k, v)]
    found = with_gradients(merged_attention(*inputs, merge_plan(layout, CPU)), inputs)
    expected = with_gradients(by_definition(*inputs, visible(layout, 4)), inputs)
    for ours, theirs in zip(found, expected, strict=True):
        # a score of 300 in float32 is rounded by up to 3e-5, and gradients by q and k carry keys of that size
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_flash_operators_take_what_the_merge_gives_them() -> None:
    """Their signature and shapes, which PyTorch knows without a GPU: the meta device computes nothing."""
    q, k = (
        torch.empty(10, 6, 16, device="meta", dtype=torch.bfloat16),
        torch.empty(7, 2, 16, device="meta", dtype=torch.bfloat16),
    )
    cu = torch.empty(3, device="meta", dtype=torch.int32)
    out, lse, *_ = torch.ops.aten._flash_attention_forward(q, k, k, cu, cu, 6, 4, 0.0, False, False, scale=1.0)
    assert out.shape == q.shape and lse.shape == (6, 10) and lse.dtype == torch.float32


# --- flex ------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(LAYOUTS, st.integers(0, 5), st.sampled_from([2, 4, 16]), st.sampled_from([None, 1, 2, 5, 12]))
def test_flex_mask_and_its_tiles_are_the_definition(layout: Layout, tail: int, block: int, window: int | None) -> None:
    num_tokens = layout[-1].stop + tail
    allowed = visible(layout, num_tokens, window)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex_attention, "BLOCK", block)
        mask = block_mask(layout, num_tokens, CPU, window)
    dense = create_mask(mask.mask_mod, 1, 1, num_tokens, num_tokens, device="cpu")[0, 0]
    assert torch.equal(dense, allowed)
    padding = -num_tokens % block
    tiles = (
        torch.nn.functional.pad(allowed, (0, padding, 0, padding)).unflatten(0, (-1, block)).unflatten(2, (-1, block))
    )
    some, every = tiles.any(3).any(1), tiles.all(3).all(1)
    assert torch.equal(listed(mask.full_kv_num_blocks, mask.full_kv_indices), every)
    assert torch.equal(listed(mask.kv_num_blocks, mask.kv_indices), some & ~every)
    # what the backward reads: the same tiles by column
    assert torch.equal(listed(mask.full_q_num_blocks, mask.full_q_indices), every.T)
    assert torch.equal(listed(mask.q_num_blocks, mask.q_indices), (some & ~every).T)


def listed(counts: Tensor, columns: Tensor) -> Tensor:
    """(Q, Q) bool from a `BlockMask`'s lists."""
    tiles = torch.zeros(columns.shape[-2:], dtype=torch.bool)
    for row, count in enumerate(counts[0, 0].tolist()):
        tiles[row, columns[0, 0, row, :count].long()] = True
    return tiles


@pytest.mark.usefixtures("_quiet")
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_flex_gives_the_values_of_blocks_and_definition(kv_heads: int) -> None:
    """Streams of one length, padded behind the groups: PyTorch traces a new program for each length."""

    @settings(max_examples=20, deadline=None)
    @given(LAYOUTS, st.integers(0, 1000))
    def check(layout: Layout, seed: int) -> None:
        num_tokens = 164  # no layout is longer
        inputs = random_heads(num_tokens, kv_heads, seed)
        out = masked_attention(*inputs, block_mask(layout, num_tokens, CPU))
        assert not out[layout[-1].stop :].any()
        truth = by_definition(*(x.double() for x in inputs), visible(layout, num_tokens))
        for other in (by_blocks(*inputs, layout).double(), truth):
            torch.testing.assert_close(out.double(), other, rtol=0, atol=ROUNDING * max(1.0, truth.abs().max().item()))

    check()


@pytest.mark.usefixtures("_quiet")
def test_flex_with_window_and_softcap_gives_the_values_of_blocks() -> None:
    layout = layout_of([(7, 5, 8), (0, 9), (12,)])
    inputs = random_heads(48, 2, 4)
    for window, softcap in ((None, 2.0), (4, None), (6, 1.5)):
        out = masked_attention(*inputs, block_mask(layout, 48, CPU, window), softcap)
        torch.testing.assert_close(out, by_blocks(*inputs, layout, window, softcap), rtol=0, atol=ROUNDING)


@pytest.mark.long
def test_compiled_flex_gives_the_values_of_blocks() -> None:
    """PyTorch's compiled kernel goes by the lists of tiles; one program serves streams of several lengths."""
    programs = torch._dynamo.utils.counters["stats"]
    before = programs["unique_graphs"]
    compiled = torch.compile(flex_attention.flex_attention, dynamic=True, fullgraph=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex_attention, "flex_attention", compiled)
        for seed, lengths in enumerate([[(90, 70, 60), (20, 90)], [(300, 100, 1, 30)], [(0, 200, 40), (1, 1), (150,)]]):
            layout = layout_of(lengths)
            num_tokens = layout[-1].stop + 9
            inputs = random_heads(num_tokens, 2, seed)
            out = masked_attention(*inputs, block_mask(layout, num_tokens, CPU))
            torch.testing.assert_close(out, by_blocks(*inputs, layout), rtol=0, atol=ROUNDING)
            assert not out[layout[-1].stop :].any()
    assert programs["unique_graphs"] == before + 1


# --- which one -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "device", "chosen"),
    [
        ("auto", "cpu", "blocks"),
        ("auto", "cuda", "flex"),
        ("blocks", "cuda", "blocks"),
        ("merge", "cpu", "merge"),
        ("merge", "cuda", "merge"),
        ("flex", "cuda", "flex"),
    ],
)
def test_form_by_device(form: str, device: str, chosen: str) -> None:
    assert choose_form(form, torch.device(device)) == chosen


def test_merge_refuses_what_it_does_not_know_and_takes_windows_that_hide_nothing() -> None:
    stream = build_stream([random_group((6, 3, 4))])
    plain, capped = tiny_config(), tiny_config(model_type="gemma2", head_dim=16)
    inputs = random_heads(16, 2, 0)
    out = stream_attend("merge", stream, 16, plain, torch.float32, window=10)(*inputs)
    torch.testing.assert_close(out, by_blocks(*inputs, stream.layout), rtol=0, atol=ROUNDING)
    for config, window, word in ((plain, 9, "sliding windows"), (capped, None, "soft caps")):
        with pytest.raises(ModelError, match=f"'merge' does not know {word}; use 'flex' on a GPU, or 'blocks'"):
            stream_attend("merge", stream, 16, config, torch.float32, window=window)


@pytest.mark.parametrize(("form", "problem"), [("flex", "on a CPU"), ("dense", "must be one of auto, blocks, flex")])
def test_form_that_cannot_be(form: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        choose_form(form, CPU)

"""Prefix-shared attention against its definition: one softmax over what a token may see, group by group."""

import pytest
import torch
from model_fixtures import random_group
from torch import Tensor

from trainer.batch import GroupLayout, build_stream
from trainer.models import attention
from trainer.models.attention import (
    Block,
    HeadBatch,
    allowed_mask,
    batch_blocks,
    head_batches,
    row_blocks,
    stream_attention,
)

LENGTHS = [(5, 3, 4), (1, 1, 2, 6), (0, 4, 2), (7,), (2, 9)]
PATHS = pytest.mark.parametrize(
    ("whole_group", "rows"), [(128, 256), (0, 256), (0, 2), (9, 4)], ids=["whole", "branches", "blocks", "both"]
)


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch, whole_group: int, rows: int) -> None:
    """How groups are cut into blocks."""
    monkeypatch.setattr(attention, "WHOLE_GROUP", whole_group)
    monkeypatch.setattr(attention, "ROWS", rows)


def layout_of(lengths: list[tuple[int, ...]]) -> tuple[GroupLayout, ...]:
    return build_stream([random_group(each) for each in lengths]).layout


def random_heads(tokens: int, *, heads: int = 6, kv_heads: int = 2, width: int = 8, seed: int = 0) -> list[Tensor]:
    """q (T, H, h), k and v (T, K, h) in float64, with scores large enough to make the softmax uneven."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(tokens, n, width, generator=generator).double() for n in (heads, kv_heads, kv_heads)]


def batches_of(layout: tuple[GroupLayout, ...], inputs: list[Tensor], window: int | None = None) -> list[HeadBatch]:
    q, k, _ = inputs
    return head_batches(batch_blocks(layout, len(q), window), len(q), q.shape[1], k.shape[1], q.dtype)


def definition(
    q_THh: Tensor,
    k_TKh: Tensor,
    v_TKh: Tensor,
    layout: tuple[GroupLayout, ...],
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """A loop over tokens and heads; the scale is in q."""
    out = torch.zeros_like(q_THh)
    rep = q_THh.shape[1] // k_TKh.shape[1]
    for group in layout:
        allowed = allowed_mask(group.lengths, window)
        for row in range(sum(group.lengths)):
            seen = group.start + allowed[row].nonzero().squeeze(1)
            for head in range(q_THh.shape[1]):
                scores = k_TKh[seen, head // rep] @ q_THh[group.start + row, head]
                scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
                out[group.start + row, head] = scores.softmax(0) @ v_TKh[seen, head // rep]
    return out


def visible(block: Block) -> list[tuple[int, int]]:
    """(row, key) stream positions that a block lets through."""
    rows, keys = block.rows.tolist(), block.keys.tolist()
    return [(rows[row], keys[key]) for row, key in block.allowed.nonzero().tolist()]


def test_mask_by_hand() -> None:
    assert allowed_mask((2, 2, 1)).int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1],
    ]


def test_mask_with_a_window_by_hand() -> None:
    """Two tokens are seen, the own one among them; a branch's first token is next to the prompt's last."""
    assert allowed_mask((2, 2, 1), window=2).int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 1, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 1, 0, 0, 1],
    ]


@PATHS
@pytest.mark.parametrize("window", [None, 1, 3, 6])
@pytest.mark.usefixtures("cut")
def test_blocks_let_through_what_the_mask_allows(window: int | None) -> None:
    layout = layout_of(LENGTHS)
    found = [pair for block in row_blocks(layout, window) for pair in visible(block)]
    expected = [
        (group.start + row, group.start + key)
        for group in layout
        for row, key in allowed_mask(group.lengths, window).nonzero().tolist()
    ]
    assert sorted(found) == sorted(expected)


def test_a_window_leaves_keys_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "WHOLE_GROUP", 0)
    monkeypatch.setattr(attention, "ROWS", 3)
    keys = [block.keys.tolist() for block in row_blocks(layout_of([(4, 5, 2)]), window=3)]
    # prompt: 0-2, 3; first branch, positions 4-8 at places 4-8; second branch, positions 4-5 at places 9-10
    assert keys == [[0, 1, 2], [1, 2, 3], [2, 3, 4, 5, 6], [5, 6, 7, 8], [2, 3, 9, 10]]


def test_long_groups_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "WHOLE_GROUP", 8)
    monkeypatch.setattr(attention, "ROWS", 3)
    blocks = row_blocks(layout_of([(2, 3, 3), (4, 1, 7)]))
    assert [(int(block.rows[0]), int(block.rows[-1]) + 1) for block in blocks] == [
        (0, 8),
        (8, 11),
        (11, 12),
        (12, 13),
        (13, 16),
        (16, 19),
        (19, 20),
    ]
    # the third block of the last branch: prompt, then the branch so far
    assert blocks[-1].keys.tolist() == [*range(8, 12), *range(13, 20)]


def test_batches_hold_every_block_once_and_have_few_shapes() -> None:
    layout = layout_of([(20, 30, 40)] * 5 + [(90, 60, 60)] * 3)
    batches = batch_blocks(layout, 1100)  # five whole groups, and three of three branches; tokens end before 1100
    found = sorted(place for batch in batches for place in batch.places.flatten().tolist() if place < 1100)
    assert found == list(range(layout[-1].stop))
    assert sorted(tuple(batch.mask.shape) for batch in batches) == [(2, 64, 160), (4, 64, 160), (8, 96, 96)]


def test_tokens_behind_the_groups_get_zeros_and_give_nothing() -> None:
    layout = layout_of([(3, 2, 2)])
    inputs = [x.requires_grad_() for x in random_heads(10)]
    out = stream_attention(*inputs, batches_of(layout, inputs))
    assert (out[7:] == 0).all()
    for grad in torch.autograd.grad(out.sum(), inputs):
        assert (grad[7:] == 0).all()
        assert (grad[:7] != 0).any()


@PATHS
@pytest.mark.parametrize(
    ("kv_heads", "window", "softcap"),
    [(1, None, None), (2, None, None), (6, None, None), (2, 4, None), (2, None, 1.5), (3, 3, 2.0)],
)
@pytest.mark.usefixtures("cut")
def test_values_and_gradients(kv_heads: int, window: int | None, softcap: float | None) -> None:
    layout = layout_of(LENGTHS)
    inputs = [x.requires_grad_() for x in random_heads(layout[-1].stop, kv_heads=kv_heads)]
    out = stream_attention(*inputs, batches_of(layout, inputs, window), softcap)
    expected = definition(*inputs, layout, window, softcap)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    found = torch.autograd.grad(out, inputs, cotangent)
    for name, ours, theirs in zip("qkv", found, torch.autograd.grad(expected, inputs, cotangent), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


@PATHS
@pytest.mark.usefixtures("cut")
def test_backward_is_the_derivative() -> None:
    inputs = [x.requires_grad_() for x in random_heads(7, heads=4, width=4)]
    for window, softcap in ((None, None), (3, 1.5)):
        blocks = batches_of(layout_of([(2, 2, 3)]), inputs, window)
        assert torch.autograd.gradcheck(
            lambda q, k, v, blocks=blocks, softcap=softcap: stream_attention(q, k, v, blocks, softcap), inputs
        )


@PATHS
@pytest.mark.usefixtures("cut")
def test_what_may_not_be_seen_has_no_influence() -> None:
    """Rejected rows are bit for bit the same whatever keys and values chosen has, and send it no gradient."""
    q, k, v = random_heads(15)
    blocks = batches_of(layout_of([(4, 5, 6)]), [q, k, v])
    before = stream_attention(q, k, v, blocks)
    k[4:9] *= -3
    v[4:9] += 100
    k.requires_grad_(), v.requires_grad_()
    after = stream_attention(q, k, v, blocks)
    assert torch.equal(before[9:], after[9:])
    assert torch.equal(before[:4], after[:4])
    assert (before[4:9] != after[4:9]).all()
    for gradient in torch.autograd.grad(after[9:].sum(), (k, v)):
        assert (gradient[4:9] == 0).all()
        assert (gradient[:4] != 0).any()


def plain_attention(q_THh: Tensor, k_TKh: Tensor, v_TKh: Tensor, layout: tuple[GroupLayout, ...]) -> Tensor:
    """PyTorch operators in the inputs' dtype, a group at a time."""
    outputs = []
    for group in layout:
        q, k, v = (x[group.start : group.stop].transpose(0, 1) for x in (q_THh, k_TKh, v_TKh))
        k, v = (x.repeat_interleave(q.shape[0] // k.shape[0], 0) for x in (k, v))
        scores = (q @ k.transpose(1, 2)).masked_fill(~allowed_mask(group.lengths), float("-inf"))
        outputs.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outputs)


@PATHS
@pytest.mark.usefixtures("cut")
def test_bfloat16_is_no_worse_than_plain() -> None:
    """Output and gradients, root mean square error against float64; 1.5 is for the draw of rounding errors."""
    layout = layout_of([(40, 30, 35), (6, 5, 9)])
    rounded = [x.bfloat16() for x in random_heads(layout[-1].stop, width=16)]
    cotangent = torch.randn(rounded[0].shape, generator=torch.Generator().manual_seed(7)).bfloat16()
    results = []
    for kind, dtype in (("ours", torch.bfloat16), ("plain", torch.bfloat16), ("plain", torch.float64)):
        inputs = [x.to(dtype).requires_grad_() for x in rounded]
        out = (
            stream_attention(*inputs, batches_of(layout, inputs))
            if kind == "ours"
            else plain_attention(*inputs, layout)
        )
        assert out.dtype == dtype
        results.append([out, *torch.autograd.grad(out, inputs, cotangent.to(dtype))])
    for name, ours, plain, truth in zip(("out", "q", "k", "v"), *results, strict=True):
        error, baseline = ((x.double() - truth).square().mean().sqrt().item() for x in (ours, plain))
        assert error <= 1.5 * baseline, f"{name}: {error=} {baseline=}"

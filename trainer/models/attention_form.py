"""Which form of prefix-shared attention a model runs on a device; all give the same numbers up to rounding.

blocks   trainer.models.attention: matrix products a block; the fastest on a CPU
flex     trainer.models.flex_attention: one masked kernel; on a GPU only
merge    trainer.models.merge_attention: flash kernels over packed sequences; float32 is slow
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from trainer.batch import GroupLayout, Stream
from trainer.errors import ModelError
from trainer.models.attention import HeadBatch, batch_blocks, head_batches, stream_attention
from trainer.models.config import ModelConfig
from trainer.models.flex_attention import block_mask, masked_attention
from trainer.models.merge_attention import merge_plan, merged_attention

FORMS = ("auto", "blocks", "flex", "merge")


def choose_form(form: str, device: torch.device) -> str:
    """ "blocks", "flex" or "merge" for `form`, one of FORMS; "auto" is flex on a GPU, blocks elsewhere.

    Raises ValueError for an unknown one, and for flex on a CPU, where PyTorch has no backward of it.
    """
    if form not in FORMS:
        raise ValueError(f"attention {form!r}: must be one of {', '.join(FORMS)}")
    if form == "auto":
        return "flex" if device.type == "cuda" else "blocks"
    if form == "flex" and device.type != "cuda":
        raise ValueError("PyTorch cannot train with flex attention on a CPU; use 'auto', 'blocks' or 'merge'")
    return form


def stream_attend(
    form: str, stream: Stream, num_tokens: int, config: ModelConfig, dtype: torch.dtype, *, window: int | None = None
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A stream's attention for all layers of one window: (q (T, H, h), k (T, K, h), v (T, K, h)) -> (T, H, h).

    form: as `choose_form` takes it. num_tokens: T, at least the stream's length; tokens behind the groups see nothing
    and get zeros. dtype: of q, k and v. q is scaled already. window: a token sees so many positions, its own included.
    Raises what `choose_form` raises, and ModelError for "merge" with a softcap or a window that hides something.
    """
    device, softcap = stream.tokens.device, config.attention_softcap
    form = choose_form(form, device)
    if window is not None and all(longest_sequence(group) <= window for group in stream.layout):
        window = None
    if form == "flex":
        mask = block_mask(stream.layout, num_tokens, device, window)
        return partial(masked_attention, mask=mask, softcap=softcap)
    if form == "merge":
        if softcap is not None or window is not None:
            kind = "soft caps" if softcap is not None else "sliding windows"
            raise ModelError("kernels.attention", f"'merge' does not know {kind}; use 'flex' on a GPU, or 'blocks'")
        return partial(merged_attention, plan=merge_plan(stream.layout, device))
    blocks = batch_blocks(stream.layout, num_tokens, window)
    batches = head_batches(blocks, num_tokens, config.num_heads, config.num_kv_heads, dtype)
    moved = [HeadBatch(*(values.to(device) for values in batch)) for batch in batches]
    return partial(stream_attention, batches=moved, softcap=softcap)


def longest_sequence(group: GroupLayout) -> int:
    """Tokens of the prompt with its longest completion."""
    return group.lengths[0] + max(group.lengths[1:], default=0)

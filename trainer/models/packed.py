"""A frozen model made ready for drawing samples: fewer and larger products, weights in the CPU library's own order.

One token a slot means products of few rows, which take as long as their weights take to be read. On a CPU with bfloat16
the library behind F.linear would put the weights in order anew in each of them; here that is done once, and the plain
weights are dropped. 16 rows of (576, 3072), one thread of a Zen 4 processor: 685 us plain, 421 us packed. Everywhere,
queries, keys and values become one product, gate and up another. Training such a model is not possible.
"""

import torch
from torch import Tensor, nn

from trainer import numerics
from trainer.models.decoder import Decoder
from trainer.models.one_token import one_token

ROWS = 16
"""What the library is told to expect; any number of rows is computed."""


class PackedLinear(nn.Module):
    """nn.Linear with its weight in the library's order. No gradient."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.bias = bias
        self.out_features, self.in_features = weight.shape
        self.product = torch.ops.mkldnn._linear_pointwise.default  # one of the name's overloads: none is looked for
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)
        numerics.use_huge_pages(torch.ops.mkldnn.data_ptr(self.packed), torch.ops.mkldnn._nbytes(self.packed))

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x.contiguous(), self.packed, self.bias, "none", [], "")

    __call__ = forward  # without a module's hooks: it is called more than a hundred times a token


def can_pack(model: Decoder) -> bool:
    """bfloat16 on a CPU whose library has products for it."""
    weight = model.embed_tokens.weight
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


@torch.no_grad()
def pack_for_sampling(model: Decoder) -> None:
    """Join what can be joined, and pack what can be packed, in place. Layers that are more than a product are left."""
    for block in model.layers:
        attention, mlp = block.self_attn, block.mlp
        parts = [] if attention.fused else [attention.q_proj, attention.k_proj, attention.v_proj]
        if parts and _joinable(parts):
            attention.qkv_proj, attention.fused = _joined(parts), True
            del attention.q_proj, attention.k_proj, attention.v_proj
        parts = [mlp.gate_proj, getattr(mlp, mlp.up)] if mlp.gated and not mlp.fused else []
        if parts and _joinable(parts):
            mlp.gate_up_proj, mlp.fused = _joined(parts), True
            del mlp.gate_proj
            delattr(mlp, mlp.up)
    if can_pack(model):
        _pack(model)
    for block in model.layers:
        block.one_token = one_token(block, model.config)


def _pack(model: Decoder) -> None:
    for block in model.layers:
        for parent in (block.self_attn, block.mlp):
            for name, child in list(parent.named_children()):
                if type(child) is nn.Linear:
                    setattr(parent, name, PackedLinear(child.weight, child.bias))
    head = PackedLinear(model.head_weight, None)
    model.head_product = lambda hidden, _: head(hidden)


def _joinable(parts: list[nn.Module]) -> bool:
    return all(type(part) is nn.Linear for part in parts) and len({part.bias is None for part in parts}) == 1


def _joined(parts: list[nn.Linear]) -> nn.Linear:
    weight = torch.cat([part.weight for part in parts])
    joined = nn.Linear(weight.shape[1], weight.shape[0], bias=parts[0].bias is not None, device="meta")
    joined.weight = nn.Parameter(weight, requires_grad=False)
    if parts[0].bias is not None:
        joined.bias = nn.Parameter(torch.cat([part.bias for part in parts]), requires_grad=False)
    return joined

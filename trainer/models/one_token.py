"""A decoder block of the commonest form as one plain function, for one token a slot.

A few rows are multiplied in less time than Python takes to find layers, check shapes and choose kernels: a step of 8
rows took 34.5 ms of one CPU by way of the modules and 31.5 ms so (SmolLM2-135M, bfloat16, Zen 4). The operations are
those of `decoder.Block` for kernels "cpu", in its order; a test compares the results.
"""

from collections.abc import Callable

from torch import Tensor, nn

from kernels.rms_norm import rms_norm_of_few
from kernels.swiglu_linear import gated_cpu
from trainer.models.config import ModelConfig
from trainer.models.shared_by_layers import SharedByLayersOfSlots

OneToken = Callable[[Tensor, Tensor | None, SharedByLayersOfSlots], tuple[Tensor, Tensor]]


def one_token(block: nn.Module, config: ModelConfig) -> OneToken | None:
    """The `Block` as a function of the residual stream, what is added to it, and what layers share; None for a block of
    another form. Its layers are looked up now: it is for a model whose layers stay what they are."""
    attention, mlp = block.self_attn, block.mlp
    usual = config.placement == "pre" and config.norm == "rms" and config.qk_norm == "none"
    if not (usual and attention.fused and mlp.fused and config.activation in ("silu", "gelu_tanh")):
        return None
    qkv, out, layer, width = attention.qkv_proj, getattr(attention, attention.output), attention.layer, config.head_dim
    gate_up, down, activation = mlp.gate_up_proj, getattr(mlp, mlp.down), config.activation
    first, second = (getattr(block, name).weight for name in block.norms if name is not None)
    eps = config.norm_eps

    def run(x_SD: Tensor, added_SD: Tensor | None, shared: SharedByLayersOfSlots) -> tuple[Tensor, Tensor]:
        x_SD = x_SD if added_SD is None else x_SD + added_SD
        normed_SD = rms_norm_of_few(x_SD, first, eps)
        x_SD = x_SD + out(shared.attention_of_one[layer](qkv(normed_SD).unflatten(-1, (-1, width))))
        normed_SD = rms_norm_of_few(x_SD, second, eps)
        gate_SF, up_SF = gate_up(normed_SD).chunk(2, dim=-1)
        return x_SD, down(gated_cpu(gate_SF, up_SF, activation))

    return run

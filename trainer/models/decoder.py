"""A decoder on streams, for all families of trainer.models.families. One entry: `model(stream, output=...)`.

Module names are Hugging Face's, less the leading "model.", so a weight's name says where it comes from. What sets one
family apart from another is in `ModelConfig`; nothing here asks for a family's name.
Letters: T tokens of the stream, N scored tokens, D width, V vocabulary, H query heads, K key-value heads, h head width.
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import dispatch
from kernels.linear_logps import linear_logps
from kernels.reference import compute_dtype
from kernels.rms_norm import add_rms_norm
from kernels.swiglu_linear import geglu, geglu_linear, swiglu, swiglu_linear
from trainer.batch import Stream
from trainer.models.config import ModelConfig
from trainer.models.families import Layer
from trainer.models.kv_cache import PromptCache, SlotCache
from trainer.models.one_token import OneToken
from trainer.models.shared_by_layers import Shared, SharedByLayers, SharedByLayersOfSlots, padded
from trainer.models.tied_embedding import embed_tied


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last axis, with the addition to the residual stream in front of it or without.

    shape: of the weight; its last axis is the one that the norm is over, those before it are a row's own.
    """

    def __init__(self, config: ModelConfig, *shape: int) -> None:
        super().__init__()
        self.kind, self.eps = config.norm, config.norm_eps
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(shape)) if config.norm == "layer" else None

    def forward(self, x: Tensor, residual: Tensor | None, impl: str) -> tuple[Tensor, Tensor]:
        """The sum of x and residual, where there is one, and the norm of it."""
        if self.kind.startswith("rms"):
            # 1 + weight in float32: as bfloat16, a weight near 0 would be lost
            plus_one = self.kind == "rms_plus_one"
            weight = self.weight.to(compute_dtype(self.weight.dtype)) + 1.0 if plus_one else self.weight
            return add_rms_norm(x, residual, weight, self.eps, impl=impl)
        total = _sum(x, residual)
        if self.weight.ndim == 1:
            return total, F.layer_norm(total, self.weight.shape, self.weight, self.bias, self.eps)
        wide = total.to(compute_dtype(total.dtype))
        normed = F.layer_norm(wide, self.weight.shape[-1:], eps=self.eps) * self.weight
        return total, normed.to(total.dtype)


class SelfAttention(nn.Module):
    def __init__(self, config: ModelConfig, layer: Layer) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        width, heads, kv_heads = config.hidden_size, config.num_heads, config.num_kv_heads
        self.widths = [count * config.head_dim for count in (heads, kv_heads, kv_heads)]
        if config.fused:
            self.qkv_proj = nn.Linear(width, sum(self.widths), bias=config.qkv_bias)
        else:
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, own, bias=config.qkv_bias) for own in self.widths)
        self.fused, self.qk_norm = config.fused, config.qk_norm
        self.output, self.q_norm_name, self.k_norm_name = (config.name(x) for x in ("o_proj", "q_norm", "k_norm"))
        self.add_module(self.output, nn.Linear(self.widths[0], width, bias=config.output_bias))
        if config.qk_norm != "none":
            for name, count in ((self.q_norm_name, heads), (self.k_norm_name, kv_heads)):
                own = {"head": (config.head_dim,), "all": (count * config.head_dim,), "each": (count, config.head_dim)}
                self.add_module(name, Norm(config, *own[config.qk_norm]))

    def forward(self, x_TD: Tensor, shared: Shared) -> Tensor:
        if self.fused:
            q, k, v = self.qkv_proj(x_TD).split(self.widths, dim=-1)
            if torch.is_grad_enabled():
                v = v.contiguous()  # a view would keep all of the product for the backward pass
        else:
            q, k, v = self.q_proj(x_TD), self.k_proj(x_TD), self.v_proj(x_TD)
        q_THh, k_TKh = self._heads(q, self.q_norm_name, shared), self._heads(k, self.k_norm_name, shared)
        v_TKh = v.unflatten(-1, (-1, self.head_dim))
        out_THh = shared.attention(self.layer, q_THh, k_TKh, v_TKh)
        return getattr(self, self.output)(out_THh.flatten(-2))

    def _heads(self, x: Tensor, norm: str, shared: Shared) -> Tensor:
        """(T, heads h) as (T, heads, h), normed where this family does so."""
        if self.qk_norm == "all":
            x = getattr(self, norm)(x, None, shared.impl)[1]
        heads = x.unflatten(-1, (-1, self.head_dim))
        return getattr(self, norm)(heads, None, shared.impl)[1] if self.qk_norm in ("head", "each") else heads


class MLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.activation, self.gated, self.fused = config.activation, config.gated, config.fused
        self.up, self.down = config.name("up_proj"), config.name("down_proj")
        if config.fused:
            self.gate_up_proj = nn.Linear(width, 2 * inner, bias=bias)
        else:
            if config.gated:
                self.gate_proj = nn.Linear(width, inner, bias=bias)
            self.add_module(self.up, nn.Linear(width, inner, bias=bias))
        self.add_module(self.down, nn.Linear(inner, width, bias=bias))

    def forward(self, x_TD: Tensor, impl: str) -> Tensor:
        down = getattr(self, self.down)
        if not self.gated:
            return down(_activate(getattr(self, self.up)(x_TD), self.activation))
        if self.fused:
            gate_TF, up_TF = self.gate_up_proj(x_TD).chunk(2, dim=-1)
        else:
            gate_TF, up_TF = self.gate_proj(x_TD), getattr(self, self.up)(x_TD)
        if self.activation not in GATED:
            return down(_activate(gate_TF, self.activation) * up_TF)
        gated, gated_linear = GATED[self.activation]
        if type(down) is not nn.Linear:  # a layer that does more than a product
            return down(gated(gate_TF, up_TF, impl=impl))
        out_TD = gated_linear(gate_TF, up_TF, down.weight, impl=impl)
        return out_TD if down.bias is None else out_TD + down.bias


GATED = {"silu": (swiglu, swiglu_linear), "gelu_tanh": (geglu, geglu_linear)}


def _activate(x: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return F.silu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


BLOCK_NORMS = {
    "pre": ("input_layernorm", None, "post_attention_layernorm", None),
    "post": (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    "sandwich": (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
    "parallel": ("input_layernorm", None, None, None),
}
"""Hugging Face's names of a block's norms by placement: before attention, behind it, before the MLP, behind it."""


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: Layer) -> None:
        super().__init__()
        self.norms = BLOCK_NORMS[config.placement]
        for name in filter(None, self.norms):
            self.add_module(name, Norm(config, config.hidden_size))
        self.parallel = config.placement == "parallel"
        self.self_attn = SelfAttention(config, layer)
        self.mlp = MLP(config)
        self.recompute: Callable | None = None
        """Runs a function so that the backward pass computes it again (trainer.parallelize); None: keep activations."""
        self.one_token: OneToken | None = None
        """The same block for one token a slot, with kernels "cpu" (trainer.models.packed)."""

    def forward(self, x_TD: Tensor, added_TD: Tensor | None, shared: Shared) -> tuple[Tensor, Tensor]:
        """The residual stream is x + added, in and out: the sum is left to the norm that reads it next."""
        if self.one_token is not None and isinstance(shared, SharedByLayersOfSlots) and shared.impl == "cpu":
            return self.one_token(x_TD, added_TD, shared)
        if self.recompute is None or not torch.is_grad_enabled():
            return self._run(x_TD, added_TD, shared)
        # one tensor is kept for each block, not two
        return self.recompute(self._run, _sum(x_TD, added_TD), None, shared)

    def _run(self, x_TD: Tensor, added_TD: Tensor | None, shared: Shared) -> tuple[Tensor, Tensor]:
        before_attention, after_attention, before_mlp, after_mlp = self.norms
        x_TD, normed_TD = self._enter(before_attention, x_TD, added_TD, shared)
        added_TD = self._leave(after_attention, self.self_attn(normed_TD, shared), shared)
        if self.parallel:
            return x_TD, added_TD + self.mlp(normed_TD, shared.impl)
        x_TD, normed_TD = self._enter(before_mlp, x_TD, added_TD, shared)
        return x_TD, self._leave(after_mlp, self.mlp(normed_TD, shared.impl), shared)

    def _enter(self, norm: str | None, x_TD: Tensor, added_TD: Tensor | None, shared: Shared) -> tuple[Tensor, Tensor]:
        """The residual stream, summed, and what attention or the MLP reads of it."""
        if norm is not None:
            return getattr(self, norm)(x_TD, added_TD, shared.impl)
        total_TD = _sum(x_TD, added_TD)
        return total_TD, total_TD

    def _leave(self, norm: str | None, x_TD: Tensor, shared: Shared) -> Tensor:
        return x_TD if norm is None else getattr(self, norm)(x_TD, None, shared.impl)[1]


class Decoder(nn.Module):
    """Token ids in, log-probs (or states, or logits) of a stream out."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        # not drawn at random: the weights are loaded, and on the meta device a draw imports torch's compiler (1.7 s)
        self.embed_tokens = nn.Embedding.from_pretrained(
            torch.empty(config.vocab_size, config.hidden_size), freeze=False
        )
        self.layers = nn.ModuleList(Block(config, layer) for layer in config.layers)
        self.last_norm = config.name("norm")
        self.add_module(self.last_norm, Norm(config, config.hidden_size))
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else nn.Linear(config.hidden_size, config.vocab_size, bias=config.head_bias)
        self.reward_head: nn.Linear | None = None
        """One number of a token's state, for process rewards; `add_reward_head` makes it."""
        self.stash_logits = False
        self.kernel_impl = "auto"
        self.attention_form = "auto"
        self.head_product: Callable[[Tensor, Tensor], Tensor] = F.linear
        """What multiplies states by the head's weight where logits are asked for (trainer.models.packed)."""

    @property
    def head_weight(self) -> Tensor:
        """(V, D); the embedding itself when the head is tied."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def add_reward_head(self, dtype: torch.dtype) -> None:
        """A head that is trained, in place of the language model's, which stays as it is: nothing reads it. It has no
        values yet (`hf_weights.load_weights` gives it some: those in the folder, else zeros)."""
        device = self.embed_tokens.weight.device
        self.reward_head = nn.Linear(self.config.hidden_size, 1, dtype=dtype, device="meta").to_empty(device=device)
        if self.lm_head is not None:
            self.lm_head.requires_grad_(False)

    def forward(
        self,
        stream: Stream,
        output: Literal["logps", "rewards", "hidden", "logits", "next"] = "logps",
        cache: PromptCache | SlotCache | None = None,
    ) -> Tensor:
        """logps: (N,) float32 nats of the scored tokens. hidden: (T, D) after the final norm. logits: (T, V), for tests
        and inspection only: training never builds them. next: (N, V) logits behind the tokens at `score_index`.
        rewards: (N,) float32 of the reward head there, log-odds that the step which ends there is right.

        cache: a PromptCache is filled; with a SlotCache the stream is one token a slot, behind what the
        slot holds; nothing else of the stream is read (trainer.models.kv_cache).
        """
        num_tokens, num_scored = len(stream.tokens), len(stream.score_targets)
        dtype = self.embed_tokens.weight.dtype
        impl = dispatch.resolve(self.kernel_impl, stream.tokens.device)  # once: it asks the environment
        one_token = isinstance(cache, SlotCache)
        shared: Shared
        if one_token:
            shared = SharedByLayersOfSlots(self.config, impl, cache)
        else:
            shared = SharedByLayers(stream, self.config, impl, self.attention_form, dtype, cache)
        x_TD, head_weight = self._embed(stream.tokens if one_token else padded(stream.tokens))
        added_TD = None
        for layer in self.layers:
            x_TD, added_TD = layer(x_TD, added_TD, shared)
        x_TD = _sum(x_TD, added_TD)
        if output == "logps":
            hidden_ND = self._norm(x_TD.index_select(0, padded(stream.score_index)))
            logps = self._logps(hidden_ND, head_weight, padded(stream.score_targets))
            return logps[:num_scored].clone()  # not a view: FSDP2 hooks the tensor that is returned
        if output == "rewards":
            hidden_ND = self._norm(x_TD.index_select(0, padded(stream.score_index)))
            return self._rewards(hidden_ND)[:num_scored].clone()
        if output == "next":
            picked = x_TD if one_token else x_TD.index_select(0, stream.score_index)
            return self._logits(self._norm(picked), head_weight)
        hidden_TD = self._norm(x_TD)[:num_tokens]
        return hidden_TD if output == "hidden" else self._logits(hidden_TD, head_weight)

    def _embed(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(T, D) of the tokens, and the head's weight."""
        if self.lm_head is None:
            x_TD, head_weight = embed_tied(self.embed_tokens.weight, tokens)
        else:
            x_TD, head_weight = self.embed_tokens(tokens), self.lm_head.weight
        if self.config.embedding_scale != 1.0:  # rounded to the dtype, as checkpoints were trained
            x_TD = x_TD * torch.tensor(self.config.embedding_scale, dtype=x_TD.dtype, device=x_TD.device)
        return x_TD, head_weight

    def _norm(self, x: Tensor) -> Tensor:
        return getattr(self, self.last_norm)(x, None, self.kernel_impl)[1]

    @property
    def _head_bias(self) -> Tensor | None:
        return None if self.lm_head is None else self.lm_head.bias

    def _logps(self, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
        return linear_logps(
            hidden_ND,
            weight_VD,
            targets_N,
            bias=self._head_bias,
            softcap=self.config.logit_softcap,
            scale=self.config.logit_scale,
            stash=self.stash_logits,
            impl=self.kernel_impl,
        )

    def _rewards(self, hidden_ND: Tensor) -> Tensor:
        assert self.reward_head is not None, "add_reward_head comes first"
        weight, wide = self.reward_head.weight, compute_dtype(hidden_ND.dtype)
        return F.linear(hidden_ND.to(wide), weight.to(wide), self.reward_head.bias.to(wide)).squeeze(-1)

    def _logits(self, hidden: Tensor, weight_VD: Tensor) -> Tensor:
        logits, cap = self.head_product(hidden, weight_VD), self.config.logit_softcap
        logits = logits if self.config.logit_scale == 1.0 else logits * self.config.logit_scale
        logits = logits if self._head_bias is None else logits + self._head_bias
        return logits if cap is None else (logits / cap).tanh() * cap


def _sum(x: Tensor, added: Tensor | None) -> Tensor:
    return x if added is None else x + added

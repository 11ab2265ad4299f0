"""A decoder of the Llama family on streams. One entry: `model(stream, output=...)`.

Module names are Hugging Face's, less the leading "model.", so a weight's name says where it comes from.
Letters: T tokens of the stream, N scored tokens, D width, V vocabulary, H query heads, K key-value heads, h head width.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.linear_logps import linear_logps
from kernels.rms_norm import add_rms_norm
from kernels.rope import apply_rope
from kernels.swiglu_linear import swiglu_linear
from trainer.batch import Stream
from trainer.models.attention_form import stream_attend
from trainer.models.config import ModelConfig
from trainer.models.tied_embedding import embed_tied

SHAPE_STEP = 32
"""Tokens and scored tokens are padded to a multiple of this, so that products have few different shapes: the CPU
library builds a program for each shape, which takes milliseconds and about 1 MB. No token sees a padded one."""


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None, impl: str) -> tuple[Tensor, Tensor]:
        """The sum of x and residual, where there is one, and the norm of it."""
        return add_rms_norm(x, residual, self.weight, self.eps, impl=impl)


class SelfAttention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        width, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(width, config.num_heads * config.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, config.num_kv_heads * config.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, config.num_kv_heads * config.head_dim, bias=bias)
        self.o_proj = nn.Linear(config.num_heads * config.head_dim, width, bias=bias)

    def forward(self, x_TD: Tensor, shared: "SharedByLayers") -> Tensor:
        q_THh = self.q_proj(x_TD).unflatten(-1, (-1, self.head_dim))
        k_TKh = self.k_proj(x_TD).unflatten(-1, (-1, self.head_dim))
        v_TKh = self.v_proj(x_TD).unflatten(-1, (-1, self.head_dim))
        q_THh = apply_rope(q_THh, shared.scaled_cos, shared.scaled_sin, impl=shared.impl)
        k_TKh = apply_rope(k_TKh, shared.cos, shared.sin, impl=shared.impl)
        out_THh = shared.attend(q_THh, k_TKh, v_TKh)
        return self.o_proj(out_THh.flatten(-2))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x_TD: Tensor, impl: str) -> Tensor:
        out_TD = swiglu_linear(self.gate_proj(x_TD), self.up_proj(x_TD), self.down_proj.weight, impl=impl)
        return out_TD if self.down_proj.bias is None else out_TD + self.down_proj.bias


class Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = SelfAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)
        self.recompute: Callable | None = None
        """Runs a function so that the backward pass computes it again (trainer.parallelize); None: keep activations."""

    def forward(self, x_TD: Tensor, added_TD: Tensor | None, shared: "SharedByLayers") -> tuple[Tensor, Tensor]:
        """The residual stream is x + added, in and out: the sum is left to the norm that reads it next."""
        if self.recompute is None or not torch.is_grad_enabled():
            return self._run(x_TD, added_TD, shared)
        # one tensor is kept for each block, not two
        return self.recompute(self._run, _sum(x_TD, added_TD), None, shared)

    def _run(self, x_TD: Tensor, added_TD: Tensor | None, shared: "SharedByLayers") -> tuple[Tensor, Tensor]:
        x_TD, normed_TD = self.input_layernorm(x_TD, added_TD, shared.impl)
        x_TD, normed_TD = self.post_attention_layernorm(x_TD, self.self_attn(normed_TD, shared), shared.impl)
        return x_TD, self.mlp(normed_TD, shared.impl)


class SharedByLayers:
    """What every layer of one forward needs of the stream: rotary tables (T, h / 2) float32, attention.

    The queries' tables carry attention's 1 / sqrt(h), so that scaling costs neither a pass nor a rounding.
    """

    def __init__(self, stream: Stream, config: ModelConfig, impl: str, attention: str, dtype: torch.dtype) -> None:
        self.impl = impl
        positions = _padded(stream.positions)
        angles = torch.outer(positions.float(), rope_frequencies(config).to(positions.device))
        self.cos, self.sin = angles.cos(), angles.sin()
        scale = config.head_dim**-0.5
        self.scaled_cos, self.scaled_sin = self.cos * scale, self.sin * scale
        self.attend = stream_attend(attention, stream, len(positions), config, dtype)


class Decoder(nn.Module):
    """Token ids in, log-probs (or states, or logits) of a stream out."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        # not drawn at random: the weights are loaded, and on the meta device a draw imports torch's compiler (1.7 s)
        self.embed_tokens = nn.Embedding.from_pretrained(
            torch.empty(config.vocab_size, config.hidden_size), freeze=False
        )
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = (
            None if config.tie_word_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        )
        self.stash_logits = False
        self.kernel_impl = "auto"
        self.attention_form = "auto"

    @property
    def head_weight(self) -> Tensor:
        """(V, D); the embedding itself when the head is tied."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def forward(self, stream: Stream, output: Literal["logps", "hidden", "logits"] = "logps") -> Tensor:
        """logps: (N,) float32 nats of the scored tokens. hidden: (T, D) after the final norm. logits: (T, V), for tests
        and inspection only: training never builds them.
        """
        num_tokens, num_scored = len(stream.tokens), len(stream.score_targets)
        dtype = self.embed_tokens.weight.dtype
        shared = SharedByLayers(stream, self.config, self.kernel_impl, self.attention_form, dtype)
        x_TD, head_weight = self._embed(_padded(stream.tokens))
        added_TD = None
        for layer in self.layers:
            x_TD, added_TD = layer(x_TD, added_TD, shared)
        x_TD = _sum(x_TD, added_TD)
        if output == "logps":
            _, hidden_ND = self.norm(x_TD.index_select(0, _padded(stream.score_index)), None, self.kernel_impl)
            targets = _padded(stream.score_targets)
            logps = linear_logps(hidden_ND, head_weight, targets, stash=self.stash_logits, impl=self.kernel_impl)
            return logps[:num_scored].clone()  # not a view: FSDP2 hooks the tensor that is returned
        _, hidden_TD = self.norm(x_TD, None, self.kernel_impl)
        hidden_TD = hidden_TD[:num_tokens]
        return hidden_TD if output == "hidden" else F.linear(hidden_TD, head_weight)

    def _embed(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(T, D) of the tokens, and the head's weight."""
        if self.lm_head is None:
            return embed_tied(self.embed_tokens.weight, tokens)
        return self.embed_tokens(tokens), self.lm_head.weight


def rope_frequencies(config: ModelConfig) -> Tensor:
    """(h / 2,) float32 radians a position (Su et al. 2021, eq. 15; Llama 3's stretching of the slow ones)."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponent
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    wavelength = 2 * math.pi / frequencies
    # turns within the original context: below low_freq_factor fully stretched, above high_freq_factor untouched
    turns = scaling.original_max_position_embeddings / wavelength
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)
    return blend * frequencies + (1 - blend) * frequencies / scaling.factor


def _padded(values: Tensor) -> Tensor:
    """(n,) int64 with zeros behind it up to a multiple of SHAPE_STEP."""
    return F.pad(values, (0, -len(values) % SHAPE_STEP))


def _sum(x: Tensor, added: Tensor | None) -> Tensor:
    return x if added is None else x + added

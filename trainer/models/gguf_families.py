"""The model families that GGUF files are read from and written to: one table, used in both directions.

A family says how llama.cpp and Hugging Face name its tensors and settings, and what the two store differently. The
names are those of the `gguf` package's constants and of `transformers` 5.23; what llama.cpp computes without storing it
(which layers slide, how attention is scaled) is as its `src/models` have it in 2026.

Letters: V vocabulary, D width, F feed-forward width, G = 2 F, h head dim, N query heads, M key-value heads, Q = N h,
K = M h, P = Q + 2 K (fused q, k and v).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Names = Mapping[str, tuple[str, str]]
"""GGUF name -> (Hugging Face name, shape in letters)."""

GLOBAL_TENSORS: Names = {
    "token_embd.weight": ("model.embed_tokens.weight", "VD"),
    "output_norm.weight": ("model.norm.weight", "D"),
}
HEAD_TENSOR: Names = {"output.weight": ("lm_head.weight", "VD")}
ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Factors on the rotary frequencies: part of config.json at Hugging Face, not a weight."""

# Names below stand behind "blk.{i}." and "model.layers.{i}.".
ATTENTION: Names = {
    "attn_q.weight": ("self_attn.q_proj.weight", "QD"),
    "attn_k.weight": ("self_attn.k_proj.weight", "KD"),
    "attn_v.weight": ("self_attn.v_proj.weight", "KD"),
    "attn_output.weight": ("self_attn.o_proj.weight", "DQ"),
}
GATED_MLP: Names = {
    "ffn_gate.weight": ("mlp.gate_proj.weight", "FD"),
    "ffn_up.weight": ("mlp.up_proj.weight", "FD"),
    "ffn_down.weight": ("mlp.down_proj.weight", "DF"),
}
PRE_NORMS: Names = {
    "attn_norm.weight": ("input_layernorm.weight", "D"),
    "ffn_norm.weight": ("post_attention_layernorm.weight", "D"),
}
POST_NORMS: Names = {
    "post_attention_norm.weight": ("post_attention_layernorm.weight", "D"),
    "post_ffw_norm.weight": ("post_feedforward_layernorm.weight", "D"),
}
FOUR_NORMS: Names = {
    "attn_norm.weight": ("input_layernorm.weight", "D"),
    "ffn_norm.weight": ("pre_feedforward_layernorm.weight", "D"),
    **POST_NORMS,
}
HEAD_NORMS: Names = {
    "attn_q_norm.weight": ("self_attn.q_norm.weight", "h"),
    "attn_k_norm.weight": ("self_attn.k_norm.weight", "h"),
}
QKV_BIASES: Names = {
    "attn_q.bias": ("self_attn.q_proj.bias", "Q"),
    "attn_k.bias": ("self_attn.k_proj.bias", "K"),
    "attn_v.bias": ("self_attn.v_proj.bias", "K"),
}
ATTENTION_BIASES: Names = {**QKV_BIASES, "attn_output.bias": ("self_attn.o_proj.bias", "D")}
MLP_BIASES: Names = {
    "ffn_gate.bias": ("mlp.gate_proj.bias", "F"),
    "ffn_up.bias": ("mlp.up_proj.bias", "F"),
    "ffn_down.bias": ("mlp.down_proj.bias", "D"),
}
LLAMA_LAYER: Names = {**PRE_NORMS, **ATTENTION, **GATED_MLP}


@dataclass(frozen=True)
class Setting:
    """A number that both formats hold. default: its value where a file leaves it out; None means it may not."""

    config: str
    gguf: str
    kind: type
    default: Any = None


SIZES = (
    Setting("hidden_size", "embedding_length", int),
    Setting("intermediate_size", "feed_forward_length", int),
    Setting("num_hidden_layers", "block_count", int),
    Setting("num_attention_heads", "attention.head_count", int),
    Setting("max_position_embeddings", "context_length", int),
)
RMS_EPS = Setting("rms_norm_eps", "attention.layer_norm_rms_epsilon", float)
LAYER_EPS = Setting("layer_norm_eps", "attention.layer_norm_epsilon", float)


@dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture. Where a field differs from its default, that is what is special about the family."""

    architecture: str
    """llama.cpp's name, the value of `general.architecture`."""
    model_type: str
    class_name: str
    layer: Names
    switches: Mapping[str, Names] = field(default_factory=dict)
    """Tensors of every layer that are there when this key of config.json is true."""
    switched_at: Mapping[str, int] = field(default_factory=dict)
    """Keys of `switches` that llama.cpp takes for true from this number of layers on, and for false below."""
    settings: tuple[Setting, ...] = (RMS_EPS,)
    """Beside SIZES, key-value heads, head dim and RoPE."""
    constants: Mapping[str, Any] = field(default_factory=lambda: {"hidden_act": "silu"})
    """Keys of config.json that every model of the family has with this value."""
    free_head_dim: bool = False
    """The head dim is a key of config.json and need not be width / heads."""
    default_head_dim: int | None = None
    """What config.json means when it has no head_dim; None: width / heads."""
    pairs_interleaved: bool = False
    """q and k rows are stored as (0, h/2, 1, h/2 + 1, ...) within a head, see `gguf_tensors.rotary_rows`."""
    norm_shift: float = 0.0
    """GGUF holds the weights of all norms plus this."""
    sliding_period: int | None = None
    """All layers but each last of so many have a sliding window."""
    no_rope_period: int | None = None
    """Each last of so many layers has no rotary embedding."""
    scaled_by_width_at: int | None = None
    """Attention is scaled by h, and at this number of layers by width / heads: nothing in a GGUF says so."""
    local_theta: float | None = None
    """RoPE base of sliding layers, where it is one of their own."""
    partial_rope: bool = False
    """Only a part of each head may be rotated (`partial_rotary_factor`)."""
    tied: bool = False
    """What config.json means when it has no tie_word_embeddings."""
    default_theta: float = 10000.0
    """What config.json means when it has no rope_theta."""
    written_from: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Other model types that are this family to llama.cpp, and what their config.json must say for that."""


GEMMA_NORMS = {"norm_shift": 1.0, "free_head_dim": True, "default_head_dim": 256, "tied": True}
GEMMA_CONSTANTS = {"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False}

_ALL = (
    Family(
        architecture="llama",
        model_type="llama",
        class_name="LlamaForCausalLM",
        layer=LLAMA_LAYER,
        switches={"attention_bias": ATTENTION_BIASES, "mlp_bias": MLP_BIASES},
        free_head_dim=True,
        pairs_interleaved=True,
        written_from={"mistral": {"sliding_window": None}},
    ),
    Family(
        architecture="smollm3",
        model_type="smollm3",
        class_name="SmolLM3ForCausalLM",
        layer=LLAMA_LAYER,
        switches={"attention_bias": ATTENTION_BIASES, "mlp_bias": MLP_BIASES},
        pairs_interleaved=True,
        no_rope_period=4,
        tied=True,
        default_theta=2_000_000.0,
    ),
    Family(
        architecture="qwen2",
        model_type="qwen2",
        class_name="Qwen2ForCausalLM",
        layer={**LLAMA_LAYER, **QKV_BIASES},
        constants={"hidden_act": "silu", "use_sliding_window": False},
    ),
    Family(
        architecture="qwen3",
        model_type="qwen3",
        class_name="Qwen3ForCausalLM",
        layer={**LLAMA_LAYER, **HEAD_NORMS},
        constants={"hidden_act": "silu", "use_sliding_window": False, "attention_bias": False},
        free_head_dim=True,
        default_head_dim=128,
    ),
    Family(
        architecture="gemma",
        model_type="gemma",
        class_name="GemmaForCausalLM",
        layer=LLAMA_LAYER,
        constants={"hidden_act": "gelu_pytorch_tanh", "attention_bias": False},
        **GEMMA_NORMS,
    ),
    Family(
        architecture="gemma2",
        model_type="gemma2",
        class_name="Gemma2ForCausalLM",
        layer={**FOUR_NORMS, **ATTENTION, **GATED_MLP},
        settings=(
            RMS_EPS,
            Setting("attn_logit_softcapping", "attn_logit_softcapping", float, 50.0),
            Setting("final_logit_softcapping", "final_logit_softcapping", float, 30.0),
            Setting("sliding_window", "attention.sliding_window", int, 4096),
        ),
        constants=GEMMA_CONSTANTS,
        sliding_period=2,
        scaled_by_width_at=46,
        **GEMMA_NORMS,
    ),
    Family(
        architecture="gemma3",
        model_type="gemma3_text",
        class_name="Gemma3ForCausalLM",
        layer={**FOUR_NORMS, **ATTENTION, **HEAD_NORMS, **GATED_MLP},
        settings=(RMS_EPS, Setting("sliding_window", "attention.sliding_window", int, 4096)),
        constants=GEMMA_CONSTANTS,
        sliding_period=6,
        scaled_by_width_at=62,
        local_theta=10000.0,
        **GEMMA_NORMS,
    ),
    Family(
        architecture="phi3",
        model_type="phi3",
        class_name="Phi3ForCausalLM",
        layer={
            **PRE_NORMS,
            "attn_qkv.weight": ("self_attn.qkv_proj.weight", "PD"),
            "attn_output.weight": ("self_attn.o_proj.weight", "DQ"),
            "ffn_up.weight": ("mlp.gate_up_proj.weight", "GD"),
            "ffn_down.weight": ("mlp.down_proj.weight", "DF"),
        },
        settings=(RMS_EPS, Setting("sliding_window", "attention.sliding_window", int, 0)),
        partial_rope=True,
    ),
    Family(
        architecture="olmo2",
        model_type="olmo2",
        class_name="Olmo2ForCausalLM",
        layer={
            **POST_NORMS,
            **ATTENTION,
            **GATED_MLP,
            "attn_q_norm.weight": ("self_attn.q_norm.weight", "Q"),
            "attn_k_norm.weight": ("self_attn.k_norm.weight", "K"),
        },
        constants={"hidden_act": "silu", "attention_bias": False},
    ),
    Family(
        architecture="command-r",
        model_type="cohere",
        class_name="CohereForCausalLM",
        layer={"attn_norm.weight": ("input_layernorm.weight", "D"), **ATTENTION, **GATED_MLP},
        switches={
            "use_qk_norm": {
                "attn_q_norm.weight": ("self_attn.q_norm.weight", "Nh"),
                "attn_k_norm.weight": ("self_attn.k_norm.weight", "Mh"),
            }
        },
        switched_at={"use_qk_norm": 64},
        default_theta=500_000.0,
        settings=(LAYER_EPS, Setting("logit_scale", "logit_scale", float)),
        constants={"hidden_act": "silu", "attention_bias": False},
        tied=True,
    ),
    Family(
        architecture="cohere2",
        model_type="cohere2",
        class_name="Cohere2ForCausalLM",
        layer={"attn_norm.weight": ("input_layernorm.weight", "D"), **ATTENTION, **GATED_MLP},
        settings=(
            LAYER_EPS,
            Setting("logit_scale", "logit_scale", float),
            Setting("sliding_window", "attention.sliding_window", int),
        ),
        constants={"hidden_act": "silu", "attention_bias": False},
        sliding_period=4,
        tied=True,
    ),
)
FAMILIES: dict[str, Family] = {family.architecture: family for family in _ALL}
"""By llama.cpp's name of the architecture."""

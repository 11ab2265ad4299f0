"""The families of decoders, a few lines each: what sets one apart from Llama, read from its `config.json`.

An entry of FAMILIES is the defaults of the config's keys (those of transformers 5.23's config classes) and a function
that returns the fields of `trainer.models.config.ModelConfig` that are not Llama's. The decoder knows the fields only.
docs/new_model.md shows how to add one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from trainer.models.config_keys import Keys
from trainer.models.rope import Rope

Fields = dict[str, Any]


@dataclass(frozen=True)
class Layer:
    """window: how many tokens back a token sees, itself included; None: all. rope: None: positions do not matter."""

    window: int | None
    rope: Rope | None


@dataclass(frozen=True)
class Family:
    """read(keys, number of layers, head width, model width) -> fields of ModelConfig. defaults: of absent keys."""

    read: Callable[[Keys, int, int, int], Fields]
    defaults: Mapping[str, Any] = field(default_factory=dict)


HARMLESS_KEYS = frozenset(
    """
    architectures attn_implementation attention_dropout auto_map bos_token_id classifier_dropout dtype embd_pdrop
    embedding_dropout eos_token_id id2label initializer_range is_llama_config label2id model_type pad_token_id
    pretraining_tp resid_pdrop return_dict rope_interleaved tokenizer_class torch_dtype transformers.js_config
    transformers_version unk_token_id unsloth_fixed unsloth_version use_cache _name_or_path problem_type
    output_attentions output_hidden_states chunk_size_feed_forward is_encoder_decoder is_decoder add_cross_attention
    quantization_config cache_implementation hidden_dropout use_flash_attn
    _sliding_window_pattern logratio_prm
    """.split()
)
"""Keys without effect on what a model computes here: dropout is never applied."""


def _rms(keys: Keys) -> Fields:
    return {"norm_eps": keys.positive("rms_norm_eps")}


def _same_layers(keys: Keys, layers: int, head_dim: int, window: int | None = None, **rope: Any) -> tuple[Layer, ...]:
    return (Layer(window, keys.rope(head_dim, **rope)),) * layers


def _mixed_layers(
    keys: Keys, layers: int, slides: Callable[[int], bool], window: int | None, full: Rope | None, sliding: Rope | None
) -> tuple[Layer, ...]:
    """By `layer_types`, or `slides` where the config has none; window: None where no layer slides."""
    types = keys.list_of("layer_types", layers)
    if types is None:
        types = ["sliding_attention" if window and slides(index) else "full_attention" for index in range(layers)]
    kinds = {"full_attention": Layer(None, full), "sliding_attention": Layer(window, sliding)}
    for kind in types:
        if kind not in kinds:
            keys.refuse("layer_types", f"{kind!r} is not known; known: {', '.join(kinds)}")
    return tuple(kinds[kind] for kind in types)


def _llama(keys: Keys, layers: int, head_dim: int, width: int) -> Fields:
    bias = keys.flag("attention_bias")
    return {
        **_rms(keys),
        "layers": _same_layers(keys, layers, head_dim),
        "activation": keys.activation(),
        "qkv_bias": bias,
        "output_bias": bias,
        "mlp_bias": keys.flag("mlp_bias"),
    }


def _mistral(keys: Keys, layers: int, head_dim: int, width: int) -> Fields:
    return {
        **_rms(keys),
        "layers": _same_layers(keys, layers, head_dim, keys.size_or_none("sliding_window")),
        "activation": keys.activation(),
    }


def _qwen2(keys: Keys, layers: int, head_dim: int, width: int) -> Fields:
    window = keys.size_or_none("sliding_window") if keys.flag("use_sliding_window") else None
    first, rope = keys.get("max_window_layers"), keys.rope(head_dim)
    return {
        **_rms(keys),
        "layers": _mixed_layers(keys, layers, lambda index: index >= first, window, rope, rope),
        "activation": keys.activation(),
        "qkv_bias": True,
    }


def _qwen3(keys: Keys, layers: int, head_dim: int, width: int) -> Fields:
    bias = keys.flag("attention_bias")
    return {**_qwen2(keys, layers, head_dim, width), "qk_norm": "head", "qkv_bias": bias, "output_bias": bias}


def _smollm3(keys: Keys, layers: int, head_dim: int, width: int) -> Fields:
    window = keys.size_or_none("sliding_window") if keys.flag("use_sliding_window") else None
    every, turns = keys.size("no_rope_layer_interval"), keys.list_of("no_rope_layers", layers)  # 1: has RoPE
    turns = turns or [int((index + 1) % every != 0) for index in range(layers)]
    rope = keys.rope(head_dim)
    mixed = _mixed_layers(keys, layers, lambda index: not turns[index], window, rope, rope)
    plain = tuple(layer if turn else Layer(layer.window, None) for layer, turn in zip(mixed, turns, strict=True))
    return {**_llama(keys, layers, head_dim, width), "layers": plain}


def _gemma(keys: Keys, layers: int, head_dim: int, width: int) -> Fields:
    keys.refuse("use_bidirectional_attention", "only causal attention is supported")
    bias = keys.flag("attention_bias")
    return {
        **_rms(keys),
        "layers": _same_layers(keys, layers, head_dim),
        "norm": "rms_plus_one",
        "activation": keys.activation(),
        "qkv_bias": bias,
        "output_bias": bias,
        "embedding_scale": width**0.5,
    }


def _gemma2(keys: Keys, layers: int, head_dim: int, width: int) -> Fields:
    rope, window = keys.rope(head_dim), keys.size_or_none("sliding_window")
    return {
        **_gemma(keys, layers, head_dim, width),
        "layers": _mixed_layers(keys, layers, lambda index: index % 2 == 0, window, rope, rope),
        "placement": "sandwich",
        "activation": keys.activation("hidden_activation"),
        "attention_scale": keys.positive("query_pre_attn_scalar") ** -0.5,
        "attention_softcap": keys.positive_or_none("attn_logit_softcapping"),
        "logit_softcap": keys.positive_or_none("final_logit_softcapping"),
    }


def _gemma3(keys: Keys, layers: int, head_dim: int, width: int) -> Fields:
    """Two rotary embeddings: `rope_parameters` by kind of layer (transformers 5), or `rope_theta` with `rope_scaling`
    for full layers and `rope_local_base_freq` for sliding ones."""
    every, window = keys.size("sliding_window_pattern"), keys.size_or_none("sliding_window")
    by_kind = {"full_attention": {}, "sliding_attention": {}} | (keys.get("rope_parameters") or {})
    full = {"rope_theta": keys.get("rope_theta"), **(keys.get("rope_scaling") or {}), **by_kind["full_attention"]}
    sliding = {"rope_theta": keys.get("rope_local_base_freq"), **by_kind["sliding_attention"]}
    ropes = [
        Keys({**keys.raw, "rope_parameters": own}, keys.path, keys.defaults).rope(head_dim) for own in (full, sliding)
    ]
    plain = Keys({**keys.raw, "rope_parameters": None, "rope_scaling": None}, keys.path, keys.defaults)
    fields = _gemma2(plain, layers, head_dim, width)
    keys.seen |= plain.seen
    mixed = _mixed_layers(keys, layers, lambda index: (index + 1) % every != 0, window, *ropes)
    return {**fields, "layers": mixed, "qk_norm": "head"}


def _phi(keys: Keys, layers: int, head_dim: int, width: int) -> Fields:
    own = keys.flag("qk_layernorm")
    names = [("o_proj", "dense"), ("up_proj", "fc1"), ("down_proj", "fc2"), ("norm", "final_layernorm")]
    names += [("q_norm", "q_layernorm"), ("k_norm", "k_layernorm")]
    return {
        "layers": _same_layers(keys, layers, head_dim, partial=0.5),
        "norm": "layer",
        "norm_eps": keys.positive("layer_norm_eps"),
        "placement": "parallel",
        "qk_norm": "head" if own else "none",
        "activation": keys.activation(),
        "gated": False,
        **dict.fromkeys(("qkv_bias", "output_bias", "mlp_bias", "head_bias"), True),
        "names": tuple(names),
    }


def _phi3(keys: Keys, layers: int, head_dim: int, width: int) -> Fields:
    return {**_mistral(keys, layers, head_dim, width), "fused": True}


def _cohere(keys: Keys, layers: int, head_dim: int, width: int) -> Fields:
    bias = keys.flag("attention_bias")
    return {
        "layers": _same_layers(keys, layers, head_dim, interleaved=True),
        "norm": "layer_without_bias",
        "norm_eps": keys.positive("layer_norm_eps"),
        "placement": "parallel",
        "qk_norm": "each" if keys.flag("use_qk_norm") else "none",
        "activation": keys.activation(),
        "qkv_bias": bias,
        "output_bias": bias,
        "logit_scale": keys.positive("logit_scale"),
    }


def _cohere2(keys: Keys, layers: int, head_dim: int, width: int) -> Fields:
    """Sliding layers turn, full ones do not."""
    every, window = keys.size("sliding_window_pattern"), keys.size_or_none("sliding_window")
    rope = keys.rope(head_dim, interleaved=True)
    mixed = _mixed_layers(keys, layers, lambda index: (index + 1) % every != 0, window, None, rope)
    return {**_cohere(keys, layers, head_dim, width), "layers": mixed}


def _olmo2(keys: Keys, layers: int, head_dim: int, width: int) -> Fields:
    return {**_llama(keys, layers, head_dim, width), "placement": "post", "qk_norm": "all", "mlp_bias": False}


LLAMA = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "max_position_embeddings": 2048}
QWEN = {**LLAMA, "max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28}
GEMMA = {
    **LLAMA, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "head_dim": 256,
    "max_position_embeddings": 8192, "tie_word_embeddings": True,
}  # fmt: skip
GEMMA2 = {
    **GEMMA, "query_pre_attn_scalar": 256, "sliding_window": 4096, "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0, "num_key_value_heads": 4,
}  # fmt: skip
GEMMA3 = {
    **GEMMA2, "attn_logit_softcapping": None, "final_logit_softcapping": None, "max_position_embeddings": 131072,
    "rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 6,
}  # fmt: skip
LAYER_NORM = {**LLAMA, "layer_norm_eps": 1e-5}
COHERE = {
    **LAYER_NORM, "max_position_embeddings": 8192, "logit_scale": 0.0625, "tie_word_embeddings": True,
    "rope_theta": 500000.0,
}  # fmt: skip

FAMILIES = {
    "llama": Family(_llama, LLAMA),
    "mistral": Family(
        _mistral, {**LLAMA, "num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072}
    ),
    "qwen2": Family(_qwen2, QWEN),
    "qwen3": Family(_qwen3, {**QWEN, "head_dim": 128}),
    "smollm3": Family(
        _smollm3,
        {
            **LLAMA, "num_key_value_heads": 4, "max_position_embeddings": 32768, "rope_theta": 2e6,
            "no_rope_layer_interval": 4, "tie_word_embeddings": True,
        },
    ),
    "gemma": Family(_gemma, GEMMA),
    "gemma2": Family(_gemma2, GEMMA2),
    "gemma3_text": Family(_gemma3, GEMMA3),
    "phi": Family(_phi, {**LAYER_NORM, "hidden_act": "gelu_new"}),
    "phi3": Family(_phi3, {**LLAMA, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096}),
    "cohere": Family(_cohere, COHERE),
    "cohere2": Family(_cohere2, {**COHERE, "sliding_window": 4096, "sliding_window_pattern": 4, "rope_theta": 1e4}),
    "olmo2": Family(_olmo2, {**LLAMA, "rms_norm_eps": 1e-5}),
}  # fmt: skip
"""By the config's model_type."""

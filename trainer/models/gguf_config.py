"""config.json from a GGUF's metadata, and the metadata from config.json, by the table of families.

Keys are those that transformers 5.23 writes. A GGUF key that the family has no place for is refused unless it is off
(0, false, none): it would change what the model computes.
"""

from pathlib import Path
from typing import Any

import gguf
import numpy as np

from trainer.errors import ModelError
from trainer.models.gguf_families import FAMILIES, ROPE_TENSORS, SIZES, Family, Setting
from trainer.models.gguf_file import Metadata, Tensor
from trainer.models.gguf_rope import read_rope, write_rope

CONFIG_DTYPES = {"float32": "float32", "bf16": "bfloat16"}
HARMLESS = {
    "vocab_size",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.causal",  # true in every decoder
    "attention.sliding_window_pattern",  # llama.cpp 2026 writes what it computes anyway; checked below
    "rope.dimension_count",
    "rope.freq_base",
    "rope.freq_base_swa",
    "rope.scale_linear",
    "tensor_data_layout",  # says in words that llama's q and k are permuted
}
"""Own keys that are read in another place, or change nothing."""


def family_of(metadata: Metadata) -> Family:
    """The family of a GGUF; raises ModelError that lists the known ones."""
    name = metadata.architecture
    if name not in FAMILIES:
        raise ModelError(metadata.path, f"architecture '{name}' is not known; known: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[name]


def build_config(metadata: Metadata, tensors: dict[str, Tensor], dtype: str) -> dict[str, Any]:
    """The `config.json` of the model; raises ModelError for what it cannot express."""
    family = family_of(metadata)
    config: dict[str, Any] = {"architectures": [family.class_name], "model_type": family.model_type}
    config |= family.constants | {setting.config: _read(metadata, setting) for setting in (*SIZES, *family.settings)}
    if family.partial_rope and not config["sliding_window"]:
        config["sliding_window"] = None
    heads = config["num_attention_heads"]
    if heads < 1:
        raise ModelError(metadata.path, f"{family.architecture}.attention.head_count is {heads}")
    config["num_key_value_heads"] = metadata.own("attention.head_count_kv", int) or heads
    config["head_dim"] = _head_dim(metadata, family, config)
    for switch, names in family.switches.items():
        config[switch] = f"blk.0.{next(iter(names))}" in tensors
    factors = {
        name: gguf.quants.dequantize(tensors[name].data, tensors[name].kind) for name in ROPE_TENSORS if name in tensors
    }
    config |= read_rope(metadata, family, factors, config)
    config |= derived_keys(family, config)
    if not family.free_head_dim:
        del config["head_dim"]
    _refuse_unknown(metadata, family)
    config["tie_word_embeddings"] = "output.weight" not in tensors
    config["vocab_size"] = len(metadata.need("tokenizer.ggml.tokens", list))
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        config[f"{name}_token_id"] = metadata.get(f"tokenizer.ggml.{key}_token_id", int)
    config["dtype"] = CONFIG_DTYPES[dtype]
    return config


def _read(metadata: Metadata, setting: Setting) -> Any:
    value = metadata.own(setting.gguf, setting.kind)
    if value is None:
        value = setting.default
    return metadata.need(f"{metadata.architecture}.{setting.gguf}", setting.kind) if value is None else value


def _head_dim(metadata: Metadata, family: Family, config: dict[str, Any]) -> int:
    natural = config["hidden_size"] // config["num_attention_heads"]
    found = metadata.own("attention.key_length", int) or natural
    values = metadata.own("attention.value_length", int) or found
    if values != found:
        raise ModelError(metadata.path, f"keys have {found} dimensions a head, values {values}; both must be the same")
    if found != natural and not family.free_head_dim:
        problem = f"a head has {found} dimensions, a {family.model_type} model must have {natural} (width / heads)"
        raise ModelError(metadata.path, problem)
    return found


def derived_keys(family: Family, config: dict[str, Any]) -> dict[str, Any]:
    """Keys of config.json that llama.cpp computes from the architecture and the number of layers."""
    layers, found = config["num_hidden_layers"], {}
    if family.sliding_period:
        kinds = [bool((layer + 1) % family.sliding_period) for layer in range(layers)]
        found["layer_types"] = ["sliding_attention" if sliding else "full_attention" for sliding in kinds]
    if family.scaled_by_width_at:
        wide = layers == family.scaled_by_width_at
        natural = config["hidden_size"] // config["num_attention_heads"]
        found["query_pre_attn_scalar"] = natural if wide else config["head_dim"]
    if family.no_rope_period:
        found["no_rope_layers"] = [int((layer + 1) % family.no_rope_period != 0) for layer in range(layers)]
        found["no_rope_layer_interval"] = family.no_rope_period
    return found


def _refuse_unknown(metadata: Metadata, family: Family) -> None:
    known = HARMLESS | {setting.gguf for setting in (*SIZES, *family.settings)}
    for suffix in metadata.own_suffixes():
        if suffix in known or suffix.startswith("rope.scaling."):
            continue
        value = metadata.own(suffix, object)
        if value not in (0, False, "", "none"):
            key = f"{family.architecture}.{suffix}"
            raise ModelError(metadata.path, f"key '{key}' = {value} has no place in a {family.model_type} model")
    period = metadata.own("attention.sliding_window_pattern", object)
    if isinstance(period, list):
        layers = range(metadata.need(f"{family.architecture}.block_count", int))
        fits = family.sliding_period and period == [bool((i + 1) % family.sliding_period) for i in layers]
    else:
        fits = period in (None, 0, family.sliding_period)
    if not fits:
        problem = f"sliding windows by the pattern {period}, a {family.model_type} model has {family.sliding_period}"
        raise ModelError(metadata.path, problem)


def read_family(path: Path, config: dict[str, Any]) -> Family:
    """The family of a config.json; raises ModelError that lists the known ones."""
    model_type = config.get("model_type")
    families = {name: family for family in FAMILIES.values() for name in (family.model_type, *family.written_from)}
    if model_type in families:
        return families[model_type]
    known = ", ".join(sorted(families))
    raise ModelError(path, f"model_type '{model_type}' cannot be written as a GGUF; known: {known}")


def build_metadata(
    path: Path, family: Family, config: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, np.ndarray], dict[str, Any]]:
    """What a GGUF says for this config.json: its own keys (without the architecture), rotary tensors, and the config
    with all sizes filled in (for the tensors' shapes). Raises ModelError for what llama.cpp would compute differently.
    """
    config = {**family.constants, "tie_word_embeddings": family.tied, **config}
    if config.get("quantization_config"):
        raise ModelError(path, "the weights are quantised; export the unquantised model")
    for setting in (*SIZES, *family.settings):
        if config.get(setting.config) is None:
            config[setting.config] = setting.default
        if config[setting.config] is None:
            raise ModelError(path, f"key '{setting.config}' is missing")
    heads = config["num_attention_heads"]
    config["num_key_value_heads"] = config.get("num_key_value_heads") or heads
    natural = config["hidden_size"] // heads
    config["head_dim"] = config.get("head_dim") or family.default_head_dim or natural
    _refuse_other(path, family, config)

    keys = {setting.gguf: setting.kind(config[setting.config]) for setting in (*SIZES, *family.settings)}
    keys["attention.head_count_kv"] = config["num_key_value_heads"]
    keys["attention.key_length"] = keys["attention.value_length"] = config["head_dim"]
    keys["vocab_size"] = config["vocab_size"]
    rope, factors = write_rope(path, family, config, config["head_dim"])
    return keys | rope, factors, config


def _refuse_other(path: Path, family: Family, config: dict[str, Any]) -> None:
    """Raise ModelError where config.json departs from what llama.cpp does for the whole family."""
    wanted = {**family.constants, **family.written_from.get(config["model_type"], {})}
    if "hidden_activation" in wanted and config.get("hidden_activation") is None:
        config["hidden_activation"] = wanted["hidden_activation"]  # null means the default
    if family.model_type == "gemma":
        # two names; `gelu` was a mistake of the first checkpoints, which mean the tanh form too
        act = config.get("hidden_activation") or config.get("hidden_act")
        config["hidden_act"] = "gelu_pytorch_tanh" if act in (None, "gelu") else act
    for name, expected in derived_keys(family, config).items():
        if config.get(name) is not None:
            wanted[name] = expected
    wanted |= {name: config["num_hidden_layers"] >= layers for name, layers in family.switched_at.items()}
    config |= {name: bool(config.get(name)) for name in family.switches}
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if name not in {setting.config for setting in family.settings} and config.get(name) is not None:
            wanted[name] = None
    if config["head_dim"] != config["hidden_size"] // config["num_attention_heads"] and not family.free_head_dim:
        wanted["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
    for name, expected in wanted.items():
        if config.get(name) != expected:
            model_type = config["model_type"]
            problem = f"key '{name}' is {config.get(name)}, llama.cpp computes {model_type} models with {expected}"
            raise ModelError(path, f"{problem}; this model cannot be written as a GGUF")

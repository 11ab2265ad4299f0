"""Rotary embedding: what a GGUF says about it, as `rope_parameters` of config.json, and back.

Linear and YaRN scaling are metadata in both formats. Llama 3's scaling is a tensor of factors in a GGUF and four
numbers in config.json: they are found again, or the file is refused. Phi-3's LongRoPE is two tensors and two lists.

Letters: h rotated dimensions of a head.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from trainer.errors import ModelError
from trainer.models.gguf_families import Family
from trainer.models.gguf_file import Metadata

DEFAULT_THETA = 10000.0
GEMMA3_THETA = 1_000_000.0
LLAMA3_BANDS = (1.0, 4.0)
"""low_freq_factor and high_freq_factor of every Llama 3 that was published."""
LLAMA3_LENGTHS = (8192, 4096, 2048, 16384, 32768, 65536, 131072)
"""original_max_position_embeddings that are tried."""
FACTOR_TOLERANCE = 1e-4
"""Relative; the factors are computed in float32 or float64, depending on who wrote the file."""
YARN_DEFAULTS = {"beta_fast": 32.0, "beta_slow": 1.0}


def read_rope(
    metadata: Metadata, family: Family, factors: Mapping[str, np.ndarray], config: dict[str, Any]
) -> dict[str, Any]:
    """Keys of config.json: `rope_parameters`, and `original_max_position_embeddings` where Phi-3 has it.

    factors: the GGUF's rotary tensors, float32 (h / 2,). config: sizes and head_dim. Raises ModelError for what
    config.json cannot say.
    """
    head_dim, path = config["head_dim"], metadata.path
    rotary = metadata.own("rope.dimension_count", int) or head_dim
    if rotary > head_dim or rotary % 2 or (rotary != head_dim and not family.partial_rope):
        problem = f"RoPE turns {rotary} of {head_dim} dimensions of a head; a {family.model_type} model turns all"
        raise ModelError(path, problem)
    theta = metadata.own("rope.freq_base", float) or (GEMMA3_THETA if family.local_theta else DEFAULT_THETA)
    scaling = _scaling(metadata, family, factors, theta, rotary, config)
    full = {"rope_theta": theta, **scaling}
    if family.local_theta:
        local = metadata.own("rope.freq_base_swa", float) or family.local_theta
        sliding = {"rope_theta": local, "rope_type": "default"}
        return {"rope_parameters": {"sliding_attention": sliding, "full_attention": full}}
    if not family.partial_rope:
        return {"rope_parameters": full}
    full["partial_rotary_factor"] = rotary / head_dim
    original = full.get("original_max_position_embeddings", config["max_position_embeddings"])
    return {"rope_parameters": full, "original_max_position_embeddings": original}


def _scaling(
    metadata: Metadata,
    family: Family,
    factors: Mapping[str, np.ndarray],
    theta: float,
    rotary: int,
    config: dict[str, Any],
) -> dict[str, Any]:
    path = metadata.path
    kind = metadata.own("rope.scaling.type", str) or "none"
    factor = metadata.own("rope.scaling.factor", float)
    original = metadata.own("rope.scaling.original_context_length", int)
    old_linear = metadata.own("rope.scale_linear", float)  # files of 2023
    if kind == "none" and old_linear not in (None, 0.0, 1.0):
        kind, factor = "linear", old_linear
    if metadata.own("rope.scaling.yarn_log_multiplier", float):
        raise ModelError(path, "RoPE scaling with a 'yarn_log_multiplier' is not supported")
    if "rope_factors_long.weight" in factors or "rope_factors_short.weight" in factors:
        return _long_rope(metadata, factors, config, original)
    attention = metadata.own("rope.scaling.attn_factor", float)
    if attention not in (None, 1.0):
        raise ModelError(path, f"RoPE scaling with an attention factor of {attention} is not supported")
    if "rope_freqs.weight" in factors and not np.allclose(factors["rope_freqs.weight"], 1.0):
        if kind != "none":
            raise ModelError(path, f"has factors on the rotary frequencies beside RoPE scaling '{kind}'")
        return _llama3(path, factors["rope_freqs.weight"], theta, rotary, original)
    if kind == "none" or (kind == "linear" and factor in (None, 0.0, 1.0)):
        return {"rope_type": "default"}
    if kind not in ("linear", "yarn"):
        problem = f"RoPE scaling '{kind}' is not supported; known: none, linear, yarn, and Llama 3's by rope_freqs"
        raise ModelError(path, f"{problem}; start from the original checkpoint")
    if factor is None or (kind == "yarn" and (original is None or family.local_theta)):
        raise ModelError(path, f"RoPE scaling '{kind}' lacks its factor or its original context length")
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    yarn = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    for name, default in YARN_DEFAULTS.items():
        value = metadata.own(f"rope.scaling.yarn_{name}", float)
        if value not in (None, default):
            yarn[name] = value
    return yarn


def _long_rope(
    metadata: Metadata, factors: Mapping[str, np.ndarray], config: dict[str, Any], original: int | None
) -> dict[str, Any]:
    lists = [_decimals(factors.get(f"rope_factors_{name}.weight")) for name in ("short", "long")]
    if original is None or None in lists:
        raise ModelError(metadata.path, "LongRoPE needs both tensors of factors and the original context length")
    found = {"rope_type": "longrope", "short_factor": lists[0], "long_factor": lists[1]}
    found["original_max_position_embeddings"] = original
    attention = metadata.own("rope.scaling.attn_factor", float)
    natural = long_rope_attention(config["max_position_embeddings"], original)
    if attention is not None and not math.isclose(attention, natural, rel_tol=1e-6):
        found["attention_factor"] = attention
    return found


def long_rope_attention(length: int, original: int) -> float:
    """What LongRoPE multiplies queries and keys by, for a model stretched from `original` to `length` positions."""
    return 1.0 if length <= original else math.sqrt(1 + math.log(length / original) / math.log(original))


def _decimals(values: np.ndarray | None) -> list[float] | None:
    """float32 values as the shortest decimals that read back as the same."""
    return None if values is None else [float(str(np.float32(value))) for value in values]


def llama3_factors(theta: float, rotary: int, scaling: Mapping[str, Any]) -> np.ndarray:
    """float64 (h / 2,): by what Llama 3 divides each rotary frequency (its `apply_scaling`, 2024).

    Wavelengths that fit the original length `high_freq_factor` times stay, those that fit less than `low_freq_factor`
    times are stretched by `factor`, and the frequencies between are mixed.
    """
    frequencies = theta ** (-np.arange(0, rotary, 2, dtype=np.float64) / rotary)
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    share = np.clip((turns - low) / (high - low), 0.0, 1.0)  # of the unstretched frequency
    return 1.0 / ((1.0 - share) / scaling["factor"] + share)


def _llama3(path: Path, factors: np.ndarray, theta: float, rotary: int, original: int | None) -> dict[str, Any]:
    """The four numbers behind the factors. Raises ModelError when none that are known give them."""
    factor = float(str(np.float32(factors.max())))
    low, high = LLAMA3_BANDS
    for length in LLAMA3_LENGTHS if original is None else (original, *LLAMA3_LENGTHS):
        scaling = {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": length,
        }
        wanted = llama3_factors(theta, rotary, scaling)
        if wanted.shape == factors.shape and np.allclose(factors, wanted, rtol=FACTOR_TOLERANCE, atol=0.0):
            return scaling
    problem = "tensor 'rope_freqs.weight' holds factors that are not Llama 3's for any known original length"
    raise ModelError(path, f"{problem}; start from the original checkpoint")


def write_rope(
    path: Path, family: Family, config: dict[str, Any], head_dim: int
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What a GGUF holds for this config.json: its own keys (without the architecture) and float32 tensors.

    Raises ModelError for scaling that llama.cpp does not know.
    """
    parameters = _rope_parameters(config)
    sliding = parameters.pop("sliding_attention", None)
    full = parameters.pop("full_attention", None) or parameters
    theta = full.get("rope_theta") or (GEMMA3_THETA if family.local_theta else family.default_theta)
    share = full.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    rotary = int(head_dim * share)
    if rotary != head_dim and not family.partial_rope:
        raise ModelError(path, f"partial_rotary_factor {share} is not written for {family.model_type} models")
    keys: dict[str, Any] = {"rope.dimension_count": rotary, "rope.freq_base": float(theta)}
    if family.local_theta:
        local = (sliding or {}).get("rope_theta") or config.get("rope_local_base_freq") or family.local_theta
        keys["rope.freq_base_swa"] = float(local)
    kind = full.get("rope_type") or full.get("type") or "default"
    if kind == "default":
        return keys, {}
    if kind == "llama3":
        return keys, {"rope_freqs.weight": llama3_factors(theta, rotary, full).astype(np.float32)}
    if kind == "longrope" and family.partial_rope:
        return _write_long_rope(keys, config, full)
    if kind not in ("linear", "yarn"):
        raise ModelError(path, f"rope_type '{kind}' is not written; known: default, linear, yarn, llama3, longrope")
    keys |= {"rope.scaling.type": kind, "rope.scaling.factor": float(full["factor"])}
    if kind == "yarn":
        extra = [name for name in ("mscale", "mscale_all_dim", "attention_factor") if full.get(name) is not None]
        if extra or full.get("truncate") is False:
            raise ModelError(path, f"rope_type 'yarn' with '{(extra or ['truncate'])[0]}' is not written")
        original = full.get("original_max_position_embeddings") or config["max_position_embeddings"]
        keys["rope.scaling.original_context_length"] = int(original)
        for name, default in YARN_DEFAULTS.items():
            if full.get(name) not in (None, default):
                keys[f"rope.scaling.yarn_{name}"] = float(full[name])
    return keys, {}


def _rope_parameters(config: dict[str, Any]) -> dict[str, Any]:
    """In the spelling of transformers 5, from that or the older one (`rope_theta` and `rope_scaling`)."""
    if config.get("rope_parameters"):
        return dict(config["rope_parameters"])
    return {"rope_theta": config.get("rope_theta"), **(config.get("rope_scaling") or {})}


def _write_long_rope(
    keys: dict[str, Any], config: dict[str, Any], full: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    length = config["max_position_embeddings"]
    original = full.get("original_max_position_embeddings") or config.get("original_max_position_embeddings") or length
    keys["rope.scaling.type"] = "longrope"
    keys["rope.scaling.original_context_length"] = int(original)
    keys["rope.scaling.attn_factor"] = full.get("attention_factor") or long_rope_attention(length, original)
    names = {"rope_factors_long.weight": "long_factor", "rope_factors_short.weight": "short_factor"}
    return keys, {tensor: np.asarray(full[name], dtype=np.float32) for tensor, name in names.items()}

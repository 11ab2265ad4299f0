"""What a decoder looks like, read from a Hugging Face `config.json`. Llama family; others are refused by name."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from trainer.errors import ModelError

SUPPORTED_MODEL_TYPES = ("llama",)
REQUIRED_KEYS = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3's stretched frequencies (`rope_type: llama3` in config.json); independent of a sequence's length."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and constants of one decoder."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    max_positions: int

    @classmethod
    def from_folder(cls, folder: str | Path) -> "ModelConfig":
        """Read `folder/config.json`. Raises ModelError naming the file, the key and the remedy."""
        path = Path(folder) / "config.json"
        if not Path(folder).is_dir():
            raise ModelError(folder, "no such folder; give a Hugging Face model folder as model.path")
        if not path.is_file():
            raise ModelError(folder, "no config.json in it; give a Hugging Face model folder as model.path")
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ModelError(path, f"is not valid JSON ({error}); copy the file again") from None
        if not isinstance(raw, dict):
            raise ModelError(path, f"expected a JSON object, got {type(raw).__name__}")
        return cls.from_dict(raw, path)

    @classmethod
    def from_dict(cls, raw: dict, path: str | Path) -> "ModelConfig":
        """Check and convert the keys of a Hugging Face config; `path` is only for messages."""
        model_type = raw.get("model_type")
        if model_type not in SUPPORTED_MODEL_TYPES:
            raise ModelError(
                path, f"model_type {model_type!r} is not supported; supported: {', '.join(SUPPORTED_MODEL_TYPES)}"
            )
        vocab_size, hidden_size, num_layers, num_heads, intermediate_size = (
            _size(raw.get(key), key, path) for key in REQUIRED_KEYS
        )
        if raw.get("hidden_act", "silu") != "silu":
            raise ModelError(path, f"hidden_act {raw['hidden_act']!r} is not supported; supported: silu")
        if raw.get("quantization_config"):
            raise ModelError(path, "quantised weights are not supported as a starting point; use the unquantised model")
        num_kv_heads = _size(raw.get("num_key_value_heads") or num_heads, "num_key_value_heads", path)
        head_dim = _size(raw.get("head_dim") or hidden_size // num_heads, "head_dim", path)
        if num_heads % num_kv_heads:
            raise ModelError(
                path, f"num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv_heads}"
            )
        if head_dim % 2:
            raise ModelError(path, f"head_dim {head_dim} must be even for rotary embeddings")
        theta, scaling = _rope(raw, path)
        return cls(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            intermediate_size=intermediate_size,
            rms_norm_eps=_positive(raw, "rms_norm_eps", 1e-6, path),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            attention_bias=bool(raw.get("attention_bias", False)),
            mlp_bias=bool(raw.get("mlp_bias", False)),
            max_positions=_size(raw.get("max_position_embeddings") or 2048, "max_position_embeddings", path),
        )


def _size(value: object, key: str, path: str | Path) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ModelError(path, f"key {key!r} must be a positive integer, got {value!r}")
    return value


def _positive(raw: dict, key: str, default: float, path: str | Path) -> float:
    value = raw.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise ModelError(path, f"key {key!r} must be a positive number, got {value!r}")
    return float(value)


def _rope(raw: dict, path: str | Path) -> tuple[float, RopeScaling | None]:
    """Theta and scaling from either spelling: `rope_theta` + `rope_scaling`, or `rope_parameters` (transformers 5)."""
    parameters = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(parameters, dict):
        raise ModelError(path, f"rope_parameters must be an object, got {type(parameters).__name__}")
    theta = _positive(
        {"rope_theta": parameters.get("rope_theta", raw.get("rope_theta", 10000.0))}, "rope_theta", 1e4, path
    )
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ModelError(path, f"rope_type {kind!r} is not supported; supported: default, llama3")
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    values = {key: _positive(parameters, key, float("nan"), path) for key in keys}
    if values["low_freq_factor"] >= values["high_freq_factor"]:
        raise ModelError(path, "key 'low_freq_factor' must be below 'high_freq_factor'")
    return theta, RopeScaling(**{**values, "original_max_position_embeddings": int(values[keys[3]])})

"""What a decoder looks like, read from a Hugging Face `config.json`; `trainer.models.families` says how."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trainer.errors import ModelError
from trainer.models.config_keys import Keys
from trainer.models.families import FAMILIES, HARMLESS_KEYS, Layer


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and constants of one decoder. Defaults are Llama's."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_positions: int
    tie_word_embeddings: bool
    layers: tuple[Layer, ...]
    """What differs from layer to layer: sliding window, rotary embedding."""

    norm: Literal["rms", "rms_plus_one", "layer", "layer_without_bias"] = "rms"
    """rms_plus_one: the weight is stored less 1."""
    norm_eps: float = 1e-6
    placement: Literal["pre", "post", "sandwich", "parallel"] = "pre"
    """Norms before attention and MLP, behind them, both; or one norm before the two, which run side by side."""
    qk_norm: Literal["none", "head", "all", "each"] = "none"
    """Norm of queries and keys: of each head with one weight for all, of all heads together, of each with its own."""

    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    fused: bool = False
    """One matrix for queries, keys and values, and one for gate and up."""
    gated: bool = True
    """act(gate) * up, or act(up) alone."""
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    names: tuple[tuple[str, str], ...] = ()
    """Modules that this family calls otherwise: Llama's name, its name."""

    embedding_scale: float = 1.0
    attention_scale: float
    attention_softcap: float | None = None
    logit_scale: float = 1.0
    logit_softcap: float | None = None

    def name(self, module: str) -> str:
        """What this family calls a module of Llama's, such as "o_proj"."""
        return dict(self.names).get(module, module)

    @classmethod
    def from_folder(cls, folder: str | Path) -> "ModelConfig":
        """Read `folder/config.json`. Raises ModelError naming the file, the key and the remedy."""
        return cls.from_dict(*read_config(folder))

    @classmethod
    def from_dict(cls, raw: dict[str, Any], path: str | Path) -> "ModelConfig":
        """Check and convert the keys of a Hugging Face config; `path` is only for messages."""
        config, _ = cls.with_unknown_keys(raw, path)
        return config

    @classmethod
    def with_unknown_keys(cls, raw: dict[str, Any], path: str | Path) -> tuple["ModelConfig", list[str]]:
        """The config, and the keys in it that nothing here reads and that are not known to be without effect."""
        model_type = raw.get("model_type")
        family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
        if family is None:
            raise ModelError(path, _unknown_type(model_type, raw))
        keys = Keys(raw, path, family.defaults)
        if keys.get("quantization_config"):
            raise ModelError(path, "quantised weights are not supported as a starting point; use the unquantised model")
        vocab_size, hidden_size, num_layers, num_heads, intermediate_size = map(
            keys.size,
            ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
        )
        num_kv_heads = keys.size("num_key_value_heads", num_heads)
        head_dim = keys.size("head_dim", hidden_size // num_heads)
        if num_heads % num_kv_heads:
            raise ModelError(
                path, f"num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv_heads}"
            )
        if head_dim % 2:
            raise ModelError(path, f"head_dim {head_dim} must be even for rotary embeddings")
        sizes = {
            "model_type": model_type,
            "vocab_size": vocab_size,
            "hidden_size": hidden_size,
            "num_layers": num_layers,
            "num_heads": num_heads,
            "num_kv_heads": num_kv_heads,
            "head_dim": head_dim,
            "intermediate_size": intermediate_size,
            "max_positions": keys.size("max_position_embeddings"),
            "tie_word_embeddings": keys.flag("tie_word_embeddings"),
            "attention_scale": head_dim**-0.5,
        }
        config = cls(**{**sizes, **family.read(keys, num_layers, head_dim, hidden_size)})
        unknown = raw.keys() - keys.seen - HARMLESS_KEYS
        return config, sorted(name for name in unknown if raw[name] is not None)


def read_config(folder: str | Path) -> tuple[dict[str, Any], Path]:
    """The object in `folder/config.json`, and the file's path. Raises ModelError."""
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
    return raw, path


def _unknown_type(model_type: object, raw: dict[str, Any]) -> str:
    """What is wrong with an unknown model_type: the known ones, and which keys set this config apart from Llama's."""
    known = f"model_type {model_type!r} is not supported; supported: {', '.join(FAMILIES)}"
    if isinstance(raw.get("text_config"), dict):
        return f"{known}. It has a text_config: of a model of several modalities, only the text model alone can be used"
    keys = Keys({}, "", FAMILIES["llama"].defaults)
    FAMILIES["llama"].read(keys, 1, 64, 64)
    sizes = {"vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"}
    sizes |= {"num_key_value_heads", "head_dim", "max_position_embeddings", "tie_word_embeddings"}
    others = sorted(name for name in raw.keys() - keys.seen - sizes - HARMLESS_KEYS if raw[name] is not None)
    if not others:
        return known
    return f"{known}. Keys that Llama does not have: {', '.join(others[:12])}{', ...' if len(others) > 12 else ''}"

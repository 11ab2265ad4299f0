"""Reading a Hugging Face `config.json` key by key: every value is checked, and an error names file, key and remedy."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from trainer.errors import ModelError
from trainer.models.rope import Rope, RopeScaling

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
}
"""What configs call activations, and what the decoder calls them."""

SCALED_KINDS = ("linear", "llama3", "yarn", "dynamic", "longrope")


class Keys:
    """The keys of a config, over a family's defaults. `seen` are the names that were asked for."""

    def __init__(self, raw: Mapping[str, Any], path: str | Path, defaults: Mapping[str, Any]) -> None:
        self.raw, self.path, self.defaults = raw, path, defaults
        self.seen: set[str] = set()

    def get(self, name: str) -> Any:
        """The value, the family's default where the key is absent, else None."""
        self.seen.add(name)
        return self.raw.get(name, self.defaults.get(name))

    def size(self, name: str, default: int | None = None) -> int:
        """A positive integer; `default` where the value is null or absent."""
        value = self.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise ModelError(self.path, f"key {name!r} must be a positive integer, got {value!r}")
        return value

    def size_or_none(self, name: str) -> int | None:
        return None if self.get(name) is None else self.size(name)

    def positive(self, name: str, default: float | None = None) -> float:
        """A positive finite number; `default` where the value is null or absent."""
        value = self.get(name)
        return _positive(default if value is None else value, name, self.path)

    def positive_or_none(self, name: str) -> float | None:
        return None if self.get(name) is None else self.positive(name)

    def flag(self, name: str) -> bool:
        return bool(self.get(name))

    def activation(self, name: str = "hidden_act") -> str:
        value = self.get(name)
        if value not in ACTIVATIONS:
            raise ModelError(self.path, f"{name} {value!r} is not supported; supported: {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[value]

    def refuse(self, name: str, why: str) -> None:
        """Raise ModelError where the key is set to something."""
        if self.get(name):
            raise ModelError(self.path, f"key {name!r} = {self.raw[name]!r}: {why}")

    def list_of(self, name: str, length: int) -> list[Any] | None:
        """A list with an item a layer, or None."""
        value = self.get(name)
        if value is not None and (not isinstance(value, list) or len(value) != length):
            raise ModelError(self.path, f"key {name!r} must be a list of {length} items, one a layer")
        return value

    # --- rotary embedding ---------------------------------------------------------------------------------------------

    def rope(self, head_dim: int, *, interleaved: bool = False, partial: float = 1.0) -> Rope:
        """From either spelling: `rope_theta` + `rope_scaling`, or `rope_parameters` (transformers 5)."""
        self.get("rope_theta"), self.get("rope_scaling"), self.get("original_max_position_embeddings")
        parameters = self.get("rope_parameters") or self.get("rope_scaling") or {}
        if not isinstance(parameters, dict):
            raise ModelError(self.path, f"rope_parameters must be an object, got {type(parameters).__name__}")
        theta = _positive(parameters.get("rope_theta", self.get("rope_theta")), "rope_theta", self.path)
        partial = parameters.get("partial_rotary_factor", self.raw.get("partial_rotary_factor", partial))
        self.seen.add("partial_rotary_factor")
        dims = int(head_dim * _positive(partial, "partial_rotary_factor", self.path))
        if dims % 2 or (head_dim - dims) % 2 or dims > head_dim:
            raise ModelError(self.path, f"{dims} of a head's {head_dim} dimensions turn; both numbers must be even")
        return Rope(theta=theta, dims=dims, interleaved=interleaved, scaling=self.rope_scaling(parameters, dims))

    def rope_scaling(self, parameters: Mapping[str, Any], dims: int) -> RopeScaling | None:
        """The scaling in a config's rope parameters, or None for plain rotary embedding."""
        kind = parameters.get("rope_type") or parameters.get("type") or "default"
        kind = "longrope" if kind == "su" else kind
        if kind == "default":
            return None
        if kind not in SCALED_KINDS:
            known = ", ".join(("default", *SCALED_KINDS))
            raise ModelError(self.path, f"rope_type {kind!r} is not supported; supported: {known}")
        longest = self.size("max_position_embeddings")
        # Phi 3 keeps the original length beside the parameters, and that one counts
        original = self.raw.get("original_max_position_embeddings", parameters.get("original_max_position_embeddings"))
        original = longest if original is None or kind == "dynamic" else original
        if isinstance(original, bool) or not isinstance(original, int) or original <= 0:
            problem = f"key 'original_max_position_embeddings' must be a positive integer, got {original!r}"
            raise ModelError(self.path, problem)
        scaling = RopeScaling(kind=kind, original_max_position_embeddings=original)
        if kind == "longrope":
            return self._longrope(scaling, parameters, longest / original, dims)
        scaling = replace(scaling, factor=_positive(parameters.get("factor"), "factor", self.path))
        if kind == "llama3":
            low, high = (
                _positive(parameters.get(name), name, self.path) for name in ("low_freq_factor", "high_freq_factor")
            )
            if low >= high:
                raise ModelError(self.path, f"'low_freq_factor' {low} must be below 'high_freq_factor' {high}")
            return replace(scaling, low_freq_factor=low, high_freq_factor=high)
        return self._yarn(scaling, parameters) if kind == "yarn" else scaling

    def _yarn(self, scaling: RopeScaling, parameters: Mapping[str, Any]) -> RopeScaling:
        def number(name: str, default: float | None) -> float | None:
            value = parameters.get(name)
            return default if not value else _positive(value, name, self.path)

        def magnitude(scale: float = 1.0) -> float:
            return 1.0 if scaling.factor <= 1 else 0.1 * scale * math.log(scaling.factor) + 1.0

        scale, scale_all = number("mscale", None), number("mscale_all_dim", None)
        inferred = magnitude(scale) / magnitude(scale_all) if scale and scale_all else magnitude()
        return replace(
            scaling,
            beta_fast=number("beta_fast", 32.0),
            beta_slow=number("beta_slow", 1.0),
            truncate=bool(parameters.get("truncate", True)),
            attention_factor=number("attention_factor", inferred),
        )

    def _longrope(self, scaling: RopeScaling, parameters: Mapping[str, Any], ratio: float, dims: int) -> RopeScaling:
        factors, original = [], scaling.original_max_position_embeddings
        for name in ("short_factor", "long_factor"):
            values = parameters.get(name)
            if not isinstance(values, list) or len(values) != dims // 2:
                raise ModelError(self.path, f"key {name!r} must be a list of {dims // 2} numbers")
            factors.append(tuple(_positive(value, name, self.path) for value in values))
        factor = _positive(parameters.get("factor") or ratio, "factor", self.path)
        given = parameters.get("attention_factor")
        if given is None:  # Ding et al. 2024; at the original length nothing is stretched
            given = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
        given = _positive(given, "attention_factor", self.path)
        return replace(scaling, factor=factor, short_factor=factors[0], long_factor=factors[1], attention_factor=given)


def _positive(value: object, name: str, path: str | Path) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise ModelError(path, f"key {name!r} must be a positive number, got {value!r}")
    return float(value)

"""One tiny random model of transformers for each family of decoders, and what sets its variants apart. Not a test."""

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

VOCABULARY = 103  # more rows than any tokenizer here has tokens: a padded vocabulary
# no padding token: transformers gives that token's embedding no gradient
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 60, "intermediate_size": 74, "num_hidden_layers": 3,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10, "max_position_embeddings": 64,
    "initializer_range": 0.2, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 4.0, "beta_slow": 1.0,
    "rope_theta": 100.0,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
LONG = {"short_factor": [1.0, 1.1, 1.3, 1.7, 2.0], "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0]}


@dataclass(frozen=True)
class Variant:
    """A family of transformers (its config and model class begin with `prefix`) and the keys that differ."""

    prefix: str
    changes: dict[str, Any] = field(default_factory=dict)
    config_suffix: str = "Config"
    model_suffix: str = "ForCausalLM"

    def config(self) -> transformers.PretrainedConfig:
        sizes = {name: value for name, value in SIZES.items() if name != "head_dim" or self.prefix[:3] != "Phi"}
        return getattr(transformers, self.prefix + self.config_suffix)(**{**sizes, **self.changes})

    def model(self, seed: int = 0) -> PreTrainedModel:
        """Random weights, norms around what they are in a trained model, in evaluation mode."""
        config = self.config()
        config._attn_implementation = "eager"
        model = getattr(transformers, self.prefix + self.model_suffix)(config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                norm = "norm" in name and name.endswith("weight")
                center = 1.0 if norm and not self.prefix.startswith("Gemma") else 0.0
                parameter.copy_(center + 0.13 * torch.randn(parameter.shape, generator=generator))
        return model.eval()


VARIANTS: dict[str, Variant] = {
    "llama": Variant("Llama"),
    "llama biases, tied": Variant("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama 3 rope": Variant("Llama", {"rope_parameters": LLAMA3}),
    "llama linear rope": Variant(
        "Llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 50.0}}
    ),
    "llama dynamic rope": Variant(
        "Llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 50.0}}
    ),
    "llama yarn": Variant("Llama", {"rope_parameters": YARN}),
    "mistral": Variant("Mistral", {"sliding_window": None}),
    "mistral window": Variant("Mistral", {"sliding_window": 7}),
    "qwen2": Variant("Qwen2"),
    "qwen2 window": Variant("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen2 yarn": Variant("Qwen2", {"rope_parameters": {**YARN, "truncate": False}, "tie_word_embeddings": True}),
    "qwen3": Variant("Qwen3"),
    "smollm3": Variant("SmolLM3", {"no_rope_layer_interval": 2}),
    "smollm3 window": Variant(
        "SmolLM3", {"no_rope_layers": [1, 0, 1], "use_sliding_window": True, "sliding_window": 6}
    ),
    "gemma": Variant("Gemma"),
    "gemma2": Variant(
        "Gemma2", {"sliding_window": 6, "query_pre_attn_scalar": 7, "attn_logit_softcapping": 2.0,
                   "final_logit_softcapping": 3.0},
    ),
    "gemma3": Variant("Gemma3", {"sliding_window": 6, "query_pre_attn_scalar": 12, "layer_types": None},
                      "TextConfig"),
    "gemma3 scaled": Variant(
        "Gemma3",
        {"sliding_window": 6, "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "layer_types":
         ["sliding_attention", "full_attention", "sliding_attention"]},
        "TextConfig",
    ),
    "phi": Variant("Phi", {"partial_rotary_factor": 0.4}),
    "phi qk norm": Variant("Phi", {"partial_rotary_factor": 0.8, "qk_layernorm": True,
                                   "num_key_value_heads": 6}),
    "phi3": Variant("Phi3", {"sliding_window": 9}),
    "phi3 longrope": Variant(
        "Phi3",
        {"original_max_position_embeddings": 64, "max_position_embeddings": 256, "rope_parameters":
         {"rope_type": "longrope", "rope_theta": 100.0, **LONG}},
    ),
    "phi3 longrope, long": Variant(
        "Phi3",
        {
            "original_max_position_embeddings": 1,
            "rope_parameters": {"rope_type": "longrope", "rope_theta": 100.0, "attention_factor": 1.3, **LONG},
        },
    ),
    "cohere": Variant("Cohere", {"logit_scale": 0.25}),
    "cohere qk norm": Variant("Cohere", {"use_qk_norm": True, "attention_bias": True, "logit_scale": 0.5}),
    "cohere2": Variant("Cohere2", {"sliding_window": 6, "logit_scale": 0.5}),
    "olmo2": Variant("Olmo2"),
}  # fmt: skip

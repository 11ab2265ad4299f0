"""GGUF files written from tiny random `transformers` models, with the `gguf` package's own names. Not a test itself.

Nothing here uses the trainer's tables: names come from `gguf.get_tensor_name_map`, metadata from the writer's methods,
and what llama.cpp's converter changes (rows of q and k, norms plus one) is done again by hand.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from tokenizers import pre_tokenizers

KIND = gguf.GGMLQuantizationType
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENS = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), "12", "he", "Ġthe", "Ġt", "<tool>"]
MERGES = ["1 2", "h e", "Ġ t", "Ġt he"]
SIZES = {"vocab_size": len(TOKENS), "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
SIZES |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
ROPE = {"rope_type": "default", "rope_theta": 5000.0}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
YARN = {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 32}
GEMMA3_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 80000.0, "factor": 8.0},
}
LONGROPE = {"rope_type": "longrope", "rope_theta": 5000.0, "short_factor": [1.0, 1.1, 1.5, 2.0, 2.5, 3.0]}
LONGROPE |= {"long_factor": [1.0, 1.2, 3.0, 6.0, 7.5, 9.0], "partial_rotary_factor": 0.75}
LONGROPE |= {"original_max_position_embeddings": 256}

# name of the case -> (architecture, class of transformers, its config)
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "Llama", {"rope_parameters": ROPE, "head_dim": 24}),
    "llama3": ("llama", "Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama_biases": ("llama", "Llama", {"rope_parameters": ROPE, "attention_bias": True, "mlp_bias": True}),
    "smollm3": ("smollm3", "SmolLM3", {"rope_parameters": ROPE, "num_hidden_layers": 5}),
    "qwen2": ("qwen2", "Qwen2", {"rope_parameters": YARN}),
    "qwen3": ("qwen3", "Qwen3", {"rope_parameters": ROPE, "head_dim": 24}),
    "gemma": ("gemma", "Gemma", {"rope_parameters": ROPE, "head_dim": 24}),
    "gemma2": ("gemma2", "Gemma2", {"rope_parameters": ROPE, "head_dim": 24, "sliding_window": 5}),
    "gemma3": ("gemma3", "Gemma3", {"rope_parameters": GEMMA3_ROPE, "head_dim": 24, "sliding_window": 5}),
    "phi3": ("phi3", "Phi3", {"rope_parameters": ROPE, "sliding_window": 6}),
    "phi3_longrope": ("phi3", "Phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 256}),
    "olmo2": ("olmo2", "Olmo2", {"rope_parameters": ROPE}),
    "command-r": ("command-r", "Cohere", {"rope_parameters": ROPE, "logit_scale": 0.25}),
    "command-r-plus": ("command-r", "Cohere", {"rope_parameters": ROPE, "logit_scale": 0.25, "use_qk_norm": True}),
    "cohere2": ("cohere2", "Cohere2", {"rope_parameters": ROPE, "logit_scale": 0.25, "sliding_window": 5}),
}
FAMILIES["gemma2"][2]["query_pre_attn_scalar"] = 24
FAMILIES["gemma3"][2].update(query_pre_attn_scalar=24, num_hidden_layers=7)
FAMILIES["cohere2"][2].update(num_hidden_layers=5)
FAMILIES["phi3_longrope"][2]["max_position_embeddings"] = 1024


def random_model(case: str, seed: int = 0) -> transformers.PreTrainedModel:
    """A tiny model of a case, with weights large enough that every setting shows in its logits.

    Norms are multiples of 1/64, so that adding one and taking it away again is exact.
    """
    _, name, changes = FAMILIES[case]
    config_name = "Gemma3Text" if name == "Gemma3" else name
    config = getattr(transformers, f"{config_name}Config")(**{**SIZES, **changes}, attn_implementation="eager")
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("norm.weight"):
                center = 0 if name.startswith("Gemma") else 64
                shape, steps = parameter.shape, torch.arange(-24, 25)
                picked = steps[torch.randint(len(steps), shape, generator=generator)]
                parameter.copy_((center + picked) / 64)
            else:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def llama_cpp_rows(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows as llama.cpp wants them, one by one: a head's rows j and j + h/2 become neighbours 2j and 2j + 1."""
    out, head_dim = np.empty_like(weight), len(weight) // heads
    for head in range(heads):
        for j in range(head_dim // 2):
            out[head * head_dim + 2 * j] = weight[head * head_dim + j]
            out[head * head_dim + 2 * j + 1] = weight[head * head_dim + j + head_dim // 2]
    return out


def gguf_tensors(case: str, model: transformers.PreTrainedModel) -> dict[str, np.ndarray]:
    """The model's weights under llama.cpp's names and in its order, float32."""
    architecture, config = FAMILIES[case][0], model.config
    number = {text: key for key, text in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    found = {}
    for name, parameter in model.named_parameters():
        values = parameter.detach().numpy().copy()
        module = name.split(".")[-2]
        if architecture in ("llama", "smollm3") and module in heads:
            values = llama_cpp_rows(values, heads[module])
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            values = values + 1
        found[names.get_name(name, try_suffixes=(".weight", ".bias"))] = values
    scaling = config.rope_parameters
    if scaling.get("rope_type") == "llama3":
        found["rope_freqs.weight"] = llama3_divisors(scaling, config.head_dim)
    if scaling.get("rope_type") == "longrope":
        found["rope_factors_long.weight"] = np.array(scaling["long_factor"], np.float32)
        found["rope_factors_short.weight"] = np.array(scaling["short_factor"], np.float32)
    return found


def llama3_divisors(scaling: dict[str, Any], head_dim: int) -> np.ndarray:
    """By what transformers divides each rotary frequency: plain frequencies over its own, float32."""
    config = transformers.LlamaConfig(**SIZES | {"head_dim": head_dim}, rope_parameters=dict(scaling))
    scaled, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = scaling["rope_theta"] ** (-torch.arange(0, head_dim, 2).double() / head_dim)
    return (plain / scaled.double()).float().numpy()


def add_settings(writer: gguf.GGUFWriter, case: str, config: transformers.PreTrainedConfig) -> None:
    """The model's own metadata, by the writer's methods."""
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    if hasattr(config, "layer_norm_eps"):
        writer.add_layer_norm_eps(config.layer_norm_eps)
    else:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    for name in ("logit_scale", "attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, name, None) is not None:
            getattr(writer, f"add_{name}")(getattr(config, name))
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
    rope = config.rope_parameters
    if "full_attention" in rope:
        writer.add_rope_freq_base_swa(rope["sliding_attention"]["rope_theta"])
        rope = rope["full_attention"]
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1)))
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] in ("yarn", "longrope"):
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if rope["rope_type"] == "longrope":
        ratio = config.max_position_embeddings / rope["original_max_position_embeddings"]
        factor = np.sqrt(1 + np.log(ratio) / np.log(rope["original_max_position_embeddings"]))
        writer.add_rope_scaling_attn_factors(float(factor))


def add_byte_level_vocabulary(writer: gguf.GGUFWriter) -> None:
    """TOKENS as a byte-level BPE with the splitter of SmolLM."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * 3 + [1] * (len(TOKENS) - 4) + [4])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)


Pack = Callable[[str, np.ndarray], tuple[np.ndarray, gguf.GGMLQuantizationType]]
"""(GGUF name, float32 values) -> what is stored, and its type."""


def as_float32(name: str, values: np.ndarray) -> tuple[np.ndarray, gguf.GGMLQuantizationType]:
    return values, KIND.F32


def write_model(path: Path, case: str, model: transformers.PreTrainedModel, pack: Pack = as_float32) -> Path:
    """A GGUF of the model, tensors stored as `pack` says."""
    writer = gguf.GGUFWriter(path, FAMILIES[case][0])
    add_settings(writer, case, model.config)
    add_byte_level_vocabulary(writer)
    for name, values in gguf_tensors(case, model).items():
        stored, kind = pack(name, values)
        writer.add_tensor(name, stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@torch.no_grad()
def logits(model: transformers.PreTrainedModel, seed: int = 0) -> torch.Tensor:
    """(2, 20, V) for random ids: longer than the sliding windows, shorter than the lengths RoPE was stretched from."""
    ids = torch.randint(len(TOKENS), (2, 20), generator=torch.Generator().manual_seed(seed))
    return model(ids).logits

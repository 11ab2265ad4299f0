"""Tiny random decoders and groups, and a plain padded Llama to compare them with. Not a test itself."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from data_tools.encode import Group
from trainer.models.config import ModelConfig
from trainer.models.decoder import Decoder

VOCABULARY = 97


def tiny_config(**changes: object) -> ModelConfig:
    """Two layers, width 64, four query heads on two key-value heads; `changes` are keys of a Hugging Face config."""
    raw = {
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
    }
    return ModelConfig.from_dict({**raw, **changes}, "config.json")


def random_decoder(config: ModelConfig, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Decoder:
    """Weights large enough that attention is far from uniform and log-probs differ from token to token."""
    generator = torch.Generator().manual_seed(seed)
    model = Decoder(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            center = 1.0 if name.endswith("norm.weight") else 0.0
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(center + 0.2 * values)
    return model.to(dtype)


def random_group(lengths: Sequence[int], *, seed: int = 0, weight: float = 1.0) -> Group:
    """A group of branches of these lengths (prompt first) with random tokens; all tokens of completions are scored."""
    ids = np.random.default_rng(seed).integers(0, VOCABULARY, sum(lengths), dtype=np.int32)
    return Group(
        record_id=f"row{seed}",
        ids=ids,
        lengths=tuple(lengths),
        spans=((), *(((0, length),) for length in lengths[1:])),
        weight=weight,
    )


def random_pairs(number: int, *, seed: int = 0, weighted: bool = False) -> list[Group]:
    """Pairs of different lengths, a one-token completion and a one-token prompt among them."""
    generator = np.random.default_rng(seed)
    groups = []
    for index in range(number):
        lengths = (1, 1, 4) if index == 0 else tuple(generator.integers(1, 9, 3).tolist())
        weight = float(generator.choice([0.25, 1.0, 3.0])) if weighted else 1.0
        groups.append(random_group(lengths, seed=1000 * seed + index, weight=weight))
    return groups


def padded_token_logps(
    parameters: dict[str, Tensor], config: ModelConfig, groups: Sequence[Group], *, score_prompt: bool = False
) -> Tensor:
    """(N,) log-probs in stream order, from prompt + completion as one padded row each: nothing is shared.

    Written for these tests alone, batch first and without any of our kernels; config without biases or rope scaling.
    """
    rows: list[Tensor] = []
    scored: list[Tensor] = []
    for group in groups:
        parts = torch.from_numpy(group.ids.astype(np.int64)).split(group.lengths)
        prompt = parts[0]
        if score_prompt:
            rows.append(prompt)
            scored.append(torch.arange(1, len(prompt)))
        for part, spans in zip(parts[1:], group.spans[1:], strict=True):
            places = torch.cat([torch.arange(start, stop) for start, stop in spans]) + len(prompt)
            rows.append(torch.cat([prompt, part]))
            scored.append(places[places > 0])
    ids_BL = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    logps_BLV = torch.log_softmax(_padded_logits(parameters, config, ids_BL), dim=-1)
    picked = [
        logps_BLV[row, places - 1, ids[places]] for row, (ids, places) in enumerate(zip(rows, scored, strict=True))
    ]
    return torch.cat(picked)


def _padded_logits(parameters: dict[str, Tensor], config: ModelConfig, ids_BL: Tensor) -> Tensor:
    x = parameters["embed_tokens.weight"][ids_BL]
    length, half, rep = ids_BL.shape[1], config.head_dim // 2, config.num_heads // config.num_kv_heads
    rates = 1.0 / config.layers[0].rope.theta ** (torch.arange(half).float() * 2 / config.head_dim)
    angles = torch.arange(length).float()[:, None] * rates  # float32 whatever x is, as in transformers
    turn = torch.complex(angles.cos(), angles.sin()).to(x.dtype.to_complex())[:, None]
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    for layer in range(config.num_layers):
        own = {
            name.split(".", 2)[2].removesuffix(".weight"): value
            for name, value in parameters.items()
            if name.startswith(f"layers.{layer}.")
        }
        h = _norm(x, own["input_layernorm"], config)
        q, k, v = (
            (h @ own[f"self_attn.{name}_proj"].T).unflatten(-1, (-1, config.head_dim)) for name in ("q", "k", "v")
        )
        q, k = _turned(q, turn), _turned(k, turn).repeat_interleave(rep, dim=2)
        scores = torch.einsum("bihd,bjhd->bhij", q, k) / config.head_dim**0.5
        probs = scores.masked_fill(future, float("-inf")).softmax(-1)
        mixed = torch.einsum("bhij,bjhd->bihd", probs, v.repeat_interleave(rep, dim=2))
        x = x + mixed.flatten(2) @ own["self_attn.o_proj"].T
        h = _norm(x, own["post_attention_layernorm"], config)
        gate = h @ own["mlp.gate_proj"].T
        x = x + (gate * gate.sigmoid() * (h @ own["mlp.up_proj"].T)) @ own["mlp.down_proj"].T
    head = parameters["embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"]
    return _norm(x, parameters["norm.weight"], config) @ head.T


def _norm(x: Tensor, weight: Tensor, config: ModelConfig) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + config.norm_eps).sqrt() * weight


def _turned(x: Tensor, turn: Tensor) -> Tensor:
    """Rotary embedding as complex products: (B, L, H, h) with element i and i + h/2 as real and imaginary part."""
    product = torch.complex(*x.chunk(2, dim=-1)) * turn
    return torch.cat([product.real, product.imag], dim=-1)

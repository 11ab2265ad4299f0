"""A GGUF's tensors: which Hugging Face tensor each one is, its values, or its packed bytes as they are.

`iter_packed` is for weights that stay quantised in memory: it copies nothing and dequantises nothing. `read_tensor`
gives float32.

Letters: R rows, H heads, P pairs of a head's rows; others as in `gguf_families`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np

from trainer.errors import ModelError
from trainer.models.gguf_config import build_config, family_of
from trainer.models.gguf_families import GLOBAL_TENSORS, HEAD_TENSOR, ROPE_TENSORS, Family, Names
from trainer.models.gguf_file import Tensor, open_gguf


@dataclass(frozen=True)
class TensorPlan:
    """One tensor: where it comes from, what it is called, over how many heads its rows are permuted (None: not at all),
    and what is added to its values."""

    source: Tensor
    name: str
    shape: tuple[int, ...]
    rotary_heads: int | None
    offset: float


class PackedTensor(NamedTuple):
    """A tensor as the GGUF stores it.

    name, shape: Hugging Face's. kind: name of the GGUF type, "Q4_0", "F16", ... data: uint8 (*shape[:-1], bytes a row),
    a view of the mapped file. rows: int64 (R,), row i of the Hugging Face tensor is row rows[i] of `data`; None: the
    same order. offset: what to add to the dequantised values (-1 for Gemma's norms, else 0).
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    data: np.ndarray
    rows: np.ndarray | None
    offset: float


def iter_packed(path: str | Path) -> Iterator[PackedTensor]:
    """Every weight of a GGUF, as it is stored. Raises ModelError for a file or a model that cannot be imported."""
    path = Path(path)
    metadata, tensors = open_gguf(path)
    config = build_config(metadata, tensors, "float32")
    for plan in plan_tensors(path, tensors, family_of(metadata), config):
        rows = None if plan.rotary_heads is None else rotary_rows(plan.shape[0], plan.rotary_heads)
        yield PackedTensor(plan.name, plan.shape, plan.source.kind.name, plan.source.data, rows, plan.offset)


def tensor_names(family: Family, config: dict[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """GGUF name -> (Hugging Face name, shape) of every weight that a model with this config has, in file order.

    config: keys of config.json, all sizes present.
    """
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    sizes = {"V": config["vocab_size"], "D": config["hidden_size"], "F": config["intermediate_size"]}
    sizes |= {
        "G": 2 * sizes["F"],
        "h": head_dim,
        "N": heads,
        "M": groups,
        "Q": heads * head_dim,
        "K": groups * head_dim,
    }
    sizes["P"] = sizes["Q"] + 2 * sizes["K"]
    layer_names: Names = dict(family.layer)
    for switch, names in family.switches.items():
        layer_names = {**layer_names, **(names if config.get(switch) else {})}
    found = {**GLOBAL_TENSORS, **({} if config["tie_word_embeddings"] else HEAD_TENSOR)}
    for i in range(config["num_hidden_layers"]):
        for key, (name, letters) in layer_names.items():
            found[f"blk.{i}.{key}"] = (f"model.layers.{i}.{name}", letters)
    return {key: (name, tuple(sizes[letter] for letter in letters)) for key, (name, letters) in found.items()}


def rotary_heads(family: Family, key: str, config: dict[str, Any]) -> int | None:
    """Over how many heads the rows of the GGUF tensor `key` are permuted; None where they are not."""
    if not family.pairs_interleaved:
        return None
    module = key.split(".")[-2]
    return {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}.get(module)


def norm_offset(family: Family, key: str) -> float:
    """What is to be added to a GGUF tensor to have Hugging Face's values."""
    return -family.norm_shift if key.endswith("norm.weight") else 0.0


def plan_tensors(path: Path, present: dict[str, Tensor], family: Family, config: dict[str, Any]) -> list[TensorPlan]:
    """Every tensor of the model in the order it is written; raises ModelError if one is missing, odd or left over."""
    wanted = tensor_names(family, config)
    unknown = sorted(present.keys() - wanted.keys() - set(ROPE_TENSORS))
    if unknown:
        model = family.class_name.removesuffix("ForCausalLM")
        raise ModelError(path, f"tensor '{unknown[0]}' has no place in a {model} model ({len(unknown)} such)")
    plans = []
    for key, (name, shape) in wanted.items():
        if key not in present:
            raise ModelError(path, f"tensor '{key}' is missing")
        if present[key].shape != shape:
            raise ModelError(path, f"tensor '{key}' has shape {present[key].shape}, the metadata ask for {shape}")
        heads = rotary_heads(family, key, config)
        plans.append(TensorPlan(present[key], name, shape, heads, norm_offset(family, key)))
    return plans


def rotary_rows(rows: int, heads: int) -> np.ndarray:
    """int64 (R,): row i of a q or k projection in Hugging Face's order is row rotary_rows[i] of the GGUF's.

    llama.cpp turns neighbouring rows (2j, 2j+1) of a head together, Hugging Face rows (j, j + h/2): converting a Llama
    to GGUF interleaves the two halves of each head, and this puts them apart again.
    """
    order_HPR = np.arange(rows).reshape(heads, -1, 2)  # R the two rows of a pair
    return order_HPR.swapaxes(1, 2).reshape(-1)


def read_tensor(path: Path, plan: TensorPlan) -> np.ndarray:
    """The tensor as float32 in Hugging Face's order, `plan.shape`; raises ModelError if it cannot be dequantised."""
    kind = plan.source.kind
    try:
        values = gguf.quants.dequantize(plan.source.data, kind)
    except NotImplementedError as error:
        problem = f"tensor '{plan.source.name}' is quantised as {kind.name}, which cannot be dequantised"
        raise ModelError(path, f"{problem}; use a Q8_0 or F16 file") from error
    values = values.reshape(plan.shape)
    if plan.rotary_heads is not None:
        values = values[rotary_rows(plan.shape[0], plan.rotary_heads)]
    return values + np.float32(plan.offset) if plan.offset else values

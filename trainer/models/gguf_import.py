"""GGUF file -> Hugging Face folder, for Llama models with a byte-level BPE tokenizer.

The folder is made from the GGUF alone: weights are dequantised one tensor at a time into `model.safetensors`, the
metadata become `config.json`, `generation_config.json` and the tokenizer files. It appears by rename: complete or not
at all. Quantisation cannot be undone: they are the numbers llama.cpp computes with, not the original ones.

What cannot be carried over exactly is refused: other architectures, scaled RoPE, sentencepiece vocabularies, tensors
that no Llama model of Hugging Face has.

    python -m trainer.models.gguf_import --gguf MODEL.gguf --out models/MODEL [--dtype float32|bf16]

Letters: V vocabulary, D width, F feed-forward width, H heads, K key-value heads, h head dim.
"""

import argparse
import json
import os
import shutil
import struct
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import gguf
import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from trainer.errors import ModelError, UserError

DTYPES = {"float32": (torch.float32, "F32", 4), "bf16": (torch.bfloat16, "BF16", 2)}  # torch, safetensors, bytes

# GGUF name -> (Hugging Face name, shape in letters). "{i}" is the layer.
GLOBAL_TENSORS = {
    "token_embd.weight": ("model.embed_tokens.weight", "VD"),
    "output_norm.weight": ("model.norm.weight", "D"),
}
HEAD_TENSOR = {"output.weight": ("lm_head.weight", "VD")}
LAYER_TENSORS = {
    "blk.{i}.attn_norm.weight": ("model.layers.{i}.input_layernorm.weight", "D"),
    "blk.{i}.attn_q.weight": ("model.layers.{i}.self_attn.q_proj.weight", "QD"),
    "blk.{i}.attn_k.weight": ("model.layers.{i}.self_attn.k_proj.weight", "KD"),
    "blk.{i}.attn_v.weight": ("model.layers.{i}.self_attn.v_proj.weight", "KD"),
    "blk.{i}.attn_output.weight": ("model.layers.{i}.self_attn.o_proj.weight", "DQ"),
    "blk.{i}.ffn_norm.weight": ("model.layers.{i}.post_attention_layernorm.weight", "D"),
    "blk.{i}.ffn_gate.weight": ("model.layers.{i}.mlp.gate_proj.weight", "FD"),
    "blk.{i}.ffn_up.weight": ("model.layers.{i}.mlp.up_proj.weight", "FD"),
    "blk.{i}.ffn_down.weight": ("model.layers.{i}.mlp.down_proj.weight", "DF"),
}

# tokenizer.ggml.pre -> the splitter that the name stands for
PRE_TOKENIZERS = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    "smollm": lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    ),
}
CONTROL_TYPES = {gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL}

T = TypeVar("T")


@dataclass(frozen=True)
class TensorPlan:
    """One tensor to write: where it comes from, what it is called, and how many heads its rows are permuted over."""

    source: gguf.ReaderTensor
    name: str
    shape: tuple[int, ...]
    rotary_heads: int | None


class Metadata:
    """The key-value part of a GGUF, read with checked types."""

    def __init__(self, path: Path, reader: gguf.GGUFReader) -> None:
        self.path = path
        self._fields = reader.fields

    def need(self, key: str, kind: type[T]) -> T:
        """The value of `key`; raises ModelError if it is absent or not a `kind` (an int passes for a float)."""
        if key not in self._fields:
            raise ModelError(self.path, f"the GGUF has no key '{key}'; convert the model again with llama.cpp")
        value = self._fields[key].contents()
        if kind is float and isinstance(value, int):
            value = float(value)
        if not isinstance(value, kind):
            raise ModelError(self.path, f"key '{key}' is a {type(value).__name__}, expected {kind.__name__}")
        return value

    def get(self, key: str, kind: type[T]) -> T | None:
        """The value of `key`, or None if the file has no such key."""
        return self.need(key, kind) if key in self._fields else None


def convert(gguf_path: str | Path, out_dir: str | Path, *, dtype: str = "float32") -> None:
    """Write the model of `gguf_path` as a new Hugging Face folder `out_dir`, weights in `dtype` (a key of DTYPES).

    Raises ModelError when the file is not a readable GGUF, holds something that cannot be carried over, or when
    `out_dir` exists. Memory: one tensor at a time (a few copies of the largest), whatever the model's size.
    """
    source, target = Path(gguf_path), Path(out_dir)
    if target.exists():
        raise ModelError(target, "exists already; delete it or name another folder")
    reader = open_gguf(source)
    metadata = Metadata(source, reader)
    config = build_config(metadata, reader, dtype)
    plans = plan_tensors(source, reader, config)
    tokenizer, tokenizer_config = build_tokenizer(metadata, config)

    partial = target.parent / f".{target.name}.{os.getpid()}.tmp"
    try:
        partial.mkdir(parents=True)
        write_safetensors(partial / "model.safetensors", source, plans, dtype)
        _write_text(partial / "tokenizer.json", tokenizer.to_str(pretty=True))
        _write_text(partial / "tokenizer_config.json", _json(tokenizer_config))
        if "chat_template" in tokenizer_config:
            _write_text(partial / "chat_template.jinja", tokenizer_config["chat_template"])
        generation = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        _write_text(partial / "generation_config.json", _json(generation))
        _write_text(partial / "config.json", _json(config))
        partial.rename(target)
    except OSError as error:
        raise ModelError(target, f"cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def open_gguf(path: Path) -> gguf.GGUFReader:
    """Map the file and read its tables; raises ModelError for anything that is not a whole GGUF."""
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise ModelError(path, f"cannot be read: {error.strerror or error}") from error
    if magic != b"GGUF":
        raise ModelError(path, "is not a GGUF file (its first bytes are not 'GGUF')")
    try:
        return gguf.GGUFReader(path)
    # What the reader raises when a table or a tensor ends early depends on where the file was cut.
    except (ValueError, IndexError, KeyError, OverflowError, TypeError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(path, f"is a truncated or damaged GGUF ({reason}); download it again") from error


def build_config(metadata: Metadata, reader: gguf.GGUFReader, dtype: str) -> dict[str, Any]:
    """The `config.json` of a Llama model; raises ModelError for what it cannot express."""
    architecture = metadata.need("general.architecture", str)
    if architecture != "llama":
        raise ModelError(metadata.path, f"architecture '{architecture}' is not known; known: llama")
    width = metadata.need("llama.embedding_length", int)
    heads = metadata.need("llama.attention.head_count", int)
    if heads < 1:
        raise ModelError(metadata.path, f"llama.attention.head_count is {heads}")
    head_dim = metadata.get("llama.attention.key_length", int) or width // heads
    _refuse_changed_rope(metadata, head_dim)
    names = {tensor.name for tensor in reader.tensors}
    # 1e-5 is stored as float32: the shortest text that reads back as the same float32 is what its author wrote.
    norm_eps = float(str(np.float32(metadata.need("llama.attention.layer_norm_rms_epsilon", float))))
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": width,
        "intermediate_size": metadata.need("llama.feed_forward_length", int),
        "num_hidden_layers": metadata.need("llama.block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.get("llama.attention.head_count_kv", int) or heads,
        "head_dim": head_dim,
        "max_position_embeddings": metadata.need("llama.context_length", int),
        "rms_norm_eps": norm_eps,
        "rope_theta": metadata.get("llama.rope.freq_base", float) or 10000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": "output.weight" not in names,
        "vocab_size": len(metadata.need("tokenizer.ggml.tokens", list)),
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id", int),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id", int),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id", int),
        "torch_dtype": "bfloat16" if dtype == "bf16" else dtype,
    }


def _refuse_changed_rope(metadata: Metadata, head_dim: int) -> None:
    scaling = metadata.get("llama.rope.scaling.type", str)
    if scaling not in (None, "none"):
        raise ModelError(
            metadata.path, f"RoPE scaling '{scaling}' is not supported; start from the original checkpoint"
        )
    rotary = metadata.get("llama.rope.dimension_count", int)
    if rotary not in (None, head_dim):
        raise ModelError(
            metadata.path, f"RoPE turns {rotary} of {head_dim} dimensions of a head; only all is supported"
        )


def plan_tensors(path: Path, reader: gguf.GGUFReader, config: dict[str, Any]) -> list[TensorPlan]:
    """Every tensor of the model in the order it is written; raises ModelError if one is missing, odd or left over."""
    sizes = {
        "V": config["vocab_size"],
        "D": config["hidden_size"],
        "F": config["intermediate_size"],
        "Q": config["num_attention_heads"] * config["head_dim"],
        "K": config["num_key_value_heads"] * config["head_dim"],
    }
    wanted = GLOBAL_TENSORS | ({} if config["tie_word_embeddings"] else HEAD_TENSOR)
    for layer in range(config["num_hidden_layers"]):
        wanted |= {key.format(i=layer): (name.format(i=layer), shape) for key, (name, shape) in LAYER_TENSORS.items()}
    present = {tensor.name: tensor for tensor in reader.tensors}
    unknown = sorted(present.keys() - wanted.keys())
    if unknown:
        raise ModelError(path, f"tensor '{unknown[0]}' has no place in a Llama model ({len(unknown)} such)")
    plans = []
    for key, (name, letters) in wanted.items():
        if key not in present:
            raise ModelError(path, f"tensor '{key}' is missing")
        shape = tuple(sizes[letter] for letter in letters)
        found = tuple(int(size) for size in reversed(present[key].shape))  # GGUF counts from the fastest dimension
        if found != shape:
            raise ModelError(path, f"tensor '{key}' has shape {found}, the metadata ask for {shape}")
        heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
        plans.append(TensorPlan(present[key], name, shape, heads.get(key.split(".")[-2])))
    return plans


def unpermute_rotary(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a q or k projection (heads * h, D) back in Hugging Face's order.

    llama.cpp turns neighbouring rows (2j, 2j+1) of a head together, Hugging Face rows (j, j + h/2): converting a model
    to GGUF interleaves the two halves of each head, and this puts them apart again.
    """
    rows_HPR = weight.reshape(heads, -1, 2, *weight.shape[1:])  # P pairs of a head, R the pair's two rows
    return rows_HPR.swapaxes(1, 2).reshape(weight.shape)


def read_tensor(path: Path, plan: TensorPlan) -> np.ndarray:
    """The tensor as float32 in Hugging Face's order, `plan.shape`; raises ModelError if it cannot be dequantised."""
    kind = plan.source.tensor_type
    try:
        values = gguf.quants.dequantize(plan.source.data, kind)
    except NotImplementedError as error:
        problem = f"tensor '{plan.source.name}' is quantised as {kind.name}, which cannot be dequantised"
        raise ModelError(path, f"{problem}; use a Q8_0 or F16 file") from error
    values = values.reshape(plan.shape)
    return values if plan.rotary_heads is None else unpermute_rotary(values, plan.rotary_heads)


def write_safetensors(file_path: Path, source: Path, plans: Sequence[TensorPlan], dtype: str) -> None:
    """Write the planned tensors as one safetensors file, holding one tensor in memory at a time.

    The format (8 bytes of header length, a JSON header, the data in order) is written here because
    `safetensors.torch.save_file` wants all tensors at once.
    """
    torch_dtype, type_name, type_bytes = DTYPES[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for plan in plans:
        end = offset + int(np.prod(plan.shape)) * type_bytes
        header[plan.name] = {"dtype": type_name, "shape": list(plan.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the data start at a multiple of 8
    with file_path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for plan in plans:
            values = torch.tensor(read_tensor(source, plan)).to(torch_dtype)
            file.write(values.view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def build_tokenizer(metadata: Metadata, config: dict[str, Any]) -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer and its `tokenizer_config.json`; raises ModelError for a kind of vocabulary that is not known."""
    path = metadata.path
    model = metadata.need("tokenizer.ggml.model", str)
    if model != "gpt2":
        raise ModelError(path, f"tokenizer model '{model}' is not known; known: gpt2 (byte-level BPE)")
    pre = metadata.need("tokenizer.ggml.pre", str)
    if pre not in PRE_TOKENIZERS:
        raise ModelError(path, f"pre-tokenizer '{pre}' is not known; known: {', '.join(sorted(PRE_TOKENIZERS))}")
    tokens = metadata.need("tokenizer.ggml.tokens", list)
    merges = [tuple(merge.split(" ")) for merge in metadata.need("tokenizer.ggml.merges", list)]
    types = metadata.need("tokenizer.ggml.token_type", list)
    if len(set(tokens)) != len(tokens) or len(types) != len(tokens):
        raise ModelError(path, f"{len(tokens)} tokens ({len(set(tokens))} different) but {len(types)} token types")
    try:
        tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    # The library raises a bare Exception for a merge of tokens that the vocabulary lacks.
    except Exception as error:
        raise ModelError(path, f"the tokenizer's merges do not fit its vocabulary ({error})") from error
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(_added_tokens(tokens, types, CONTROL_TYPES, special=True)))
    tokenizer.add_tokens(list(_added_tokens(tokens, types, {gguf.TokenType.USER_DEFINED}, special=False)))

    named = {"bos_token": config["bos_token_id"], "eos_token": config["eos_token_id"]}
    named |= {"unk_token": metadata.get("tokenizer.ggml.unknown_token_id", int), "pad_token": config["pad_token_id"]}
    for name, index in named.items():
        if index is not None and not 0 <= index < len(tokens):
            raise ModelError(path, f"the {name} has id {index}, outside the vocabulary of {len(tokens)}")
    adds_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", bool)) and named["bos_token"] is not None
    if adds_bos:
        bos = tokens[named["bos_token"]]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, named["bos_token"])]
        )
    return tokenizer, {
        # A class of its own name would rebuild the splitter; this one takes tokenizer.json as it is.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": adds_bos,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config["max_position_embeddings"],
        **{name: tokens[index] for name, index in named.items() if index is not None},
        **_chat_template(metadata),
    }


def _chat_template(metadata: Metadata) -> dict[str, str]:
    template = metadata.get("tokenizer.chat_template", str)
    return {} if template is None else {"chat_template": template}


def _added_tokens(tokens: list[str], types: list[int], kinds: set[int], *, special: bool) -> Iterator[AddedToken]:
    for token, kind in zip(tokens, types, strict=True):
        if kind in kinds:
            yield AddedToken(token, special=special, normalized=False)


def _json(value: dict[str, Any]) -> str:
    return json.dumps({key: v for key, v in value.items() if v is not None}, indent=2, ensure_ascii=False) + "\n"


def _write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m trainer.models.gguf_import", description=__doc__.split("\n\n")[0])
    parser.add_argument("--gguf", required=True, help="the GGUF file")
    parser.add_argument("--out", required=True, help="the folder to make; it must not exist")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32", help="type of the weights written")
    options = parser.parse_args(argv)
    try:
        convert(options.gguf, options.out, dtype=options.dtype)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}: written from {options.gguf}, weights in {options.dtype}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""GGUF file -> Hugging Face folder: llama, qwen2, qwen3, gemma 1 to 3, phi3 and the others of `gguf_families`.

The folder is made from the GGUF alone: weights are dequantised one tensor at a time into `model.safetensors`, the
metadata become `config.json`, `generation_config.json` and the tokenizer files. It appears by rename: complete or not
at all. Quantisation cannot be undone: they are the numbers llama.cpp computes with, not the original ones.

What cannot be carried over exactly is refused: other architectures, RoPE scaling and vocabularies that are not known,
tensors and settings that no Hugging Face model of the family has.

    python -m trainer.models.gguf_import --gguf MODEL.gguf --out models/MODEL [--dtype float32|bf16]
"""

import argparse
import json
import os
import shutil
import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer.errors import ModelError, UserError
from trainer.models.gguf_config import build_config, family_of
from trainer.models.gguf_file import open_gguf
from trainer.models.gguf_tensors import TensorPlan, plan_tensors, read_tensor
from trainer.models.gguf_tokenizer import build_tokenizer

DTYPES = {"float32": (torch.float32, "F32", 4), "bf16": (torch.bfloat16, "BF16", 2)}  # torch, safetensors, bytes


def convert(gguf_path: str | Path, out_dir: str | Path, *, dtype: str = "float32") -> None:
    """Write the model of `gguf_path` as a new Hugging Face folder `out_dir`, weights in `dtype` (a key of DTYPES).

    Raises ModelError when the file is not a readable GGUF, holds something that cannot be carried over, or when
    `out_dir` exists. Memory: one tensor at a time (a few copies of the largest), whatever the model's size.
    """
    source, target = Path(gguf_path), Path(out_dir)
    if target.exists():
        raise ModelError(target, "exists already; delete it or name another folder")
    metadata, tensors = open_gguf(source)
    config = build_config(metadata, tensors, dtype)
    plans = plan_tensors(source, tensors, family_of(metadata), config)
    files = build_tokenizer(metadata, config)

    partial = target.parent / f".{target.name}.{os.getpid()}.tmp"
    try:
        partial.mkdir(parents=True)
        write_safetensors(partial / "model.safetensors", source, plans, dtype)
        _write_text(partial / "tokenizer.json", _json(files.tokenizer))
        _write_text(partial / "tokenizer_config.json", _json(files.config))
        if files.model is not None:
            (partial / "tokenizer.model").write_bytes(files.model)
        if "chat_template" in files.config:
            _write_text(partial / "chat_template.jinja", files.config["chat_template"])
        ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        _write_text(partial / "generation_config.json", _json({key: i for key, i in ids.items() if i is not None}))
        _write_text(partial / "config.json", _json(config))
        partial.rename(target)
    except OSError as error:
        raise ModelError(target, f"cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


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


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


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

"""Hugging Face folder -> GGUF file that llama.cpp runs: the families of `gguf_families`, trained here or elsewhere.

One tensor is in memory at a time. Norms and other 1-D tensors stay float32; `q8_0` keeps a tensor whose rows are no
multiple of 32 long as float16. The file appears by rename: whole or not at all. What llama.cpp would compute
differently (a setting it does not store, a tokenizer it cuts otherwise) is refused.

    python -m trainer.models.gguf_export --model DIR --out MODEL.gguf --type f16|bf16|q8_0|f32 [--name NAME]
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from data_tools.disk import sync
from data_tools.tokenizer import read_json
from trainer.errors import ModelError, UserError
from trainer.models.gguf_config import build_metadata, read_family
from trainer.models.gguf_families import Family
from trainer.models.gguf_tensors import norm_offset, rotary_heads, rotary_rows, tensor_names
from trainer.models.gguf_vocab import vocabulary
from trainer.models.hf_weights import weight_files

Kind = gguf.GGMLQuantizationType
TYPES = {
    "f32": (Kind.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (Kind.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (Kind.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (Kind.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
SKIPPED = ("rotary_emb.inv_freq", "lm_head.weight")
"""Tensors that old exports carry beside the model's own; a head that is not tied is never skipped."""


@dataclass(frozen=True)
class Stored:
    """One tensor to write: its name in the GGUF, where its values are, and how they are stored."""

    key: str
    file: Path
    name: str
    shape: tuple[int, ...]
    kind: Kind
    rotary_heads: int | None
    offset: float


def export(folder: str | Path, out: str | Path, *, kind: str = "f16", name: str | None = None) -> None:
    """Write the model of `folder` as the new file `out`. kind: a key of TYPES. name: `general.name`.

    Raises ModelError or TokenizerError for a model that cannot be written, or when `out` exists.
    """
    source, target = Path(folder), Path(out)
    if target.exists():
        raise ModelError(target, "exists already; delete it or name another file")
    raw = read_json(source / "config.json")
    if not raw:
        raise ModelError(source, "no config.json in it; give a Hugging Face model folder")
    family = read_family(source / "config.json", raw)
    own, factors, config = build_metadata(source / "config.json", family, raw)
    stored = plan(source, family, config, TYPES[kind][0])
    fields: dict[str, Any] = {
        "general.type": "model",
        "general.name": name or source.resolve().name,
        "general.file_type": int(TYPES[kind][1]),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        **{f"{family.architecture}.{key}": value for key, value in own.items()},
        **vocabulary(source, config),
    }
    partial = target.parent / f".{target.name}.{os.getpid()}.tmp"
    try:
        _write(partial, family, fields, factors, stored)
        sync(partial)
        partial.rename(target)
    except OSError as error:
        raise ModelError(target, f"cannot be written: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)


def plan(folder: Path, family: Family, config: dict[str, Any], kind: Kind) -> list[Stored]:
    """Every tensor in file order; raises ModelError if one is missing, has another shape or is left over."""
    present = _headers(folder)
    stored = []
    for key, (name, shape) in tensor_names(family, config).items():
        if name not in present:
            raise ModelError(folder, f"tensor '{name}' is missing")
        file, found = present.pop(name)
        if found != shape:
            raise ModelError(file, f"tensor '{name}' has shape {found}, config.json asks for {shape}")
        heads, offset = rotary_heads(family, key, config), -norm_offset(family, key)
        stored.append(Stored(key, file, name, shape, _kind_of(key, shape, kind), heads, offset))
    left = [name for name in present if not name.endswith(SKIPPED)]
    if left:
        raise ModelError(present[left[0]][0], f"tensor '{left[0]}' has no place in a {family.model_type} GGUF")
    return stored


def _headers(folder: Path) -> dict[str, tuple[Path, tuple[int, ...]]]:
    """File and shape of every tensor; reads no values."""
    found = {}
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - safe_open is not a mapping
                    found[name] = (path, tuple(file.get_slice(name).get_shape()))
        except (SafetensorError, OSError) as error:
            raise ModelError(path, f"is not a whole safetensors file ({error}); copy it again") from None
    return found


def _kind_of(key: str, shape: tuple[int, ...], kind: Kind) -> Kind:
    if len(shape) == 1 or key.endswith("_norm.weight"):
        return Kind.F32  # llama.cpp has no other code for them
    return Kind.F16 if kind == Kind.Q8_0 and shape[-1] % 32 else kind


def _write(
    path: Path, family: Family, fields: dict[str, Any], factors: dict[str, np.ndarray], stored: list[Stored]
) -> None:
    """The whole file, tensors one after another. Raises OSError, ModelError."""
    writer = gguf.GGUFWriter(path, family.architecture)
    try:
        for key, value in fields.items():
            _add_field(writer, key, value)
        for key, values in factors.items():
            writer.add_tensor_info(key, values.shape, values.dtype, values.nbytes)
        for tensor in stored:
            shape = gguf.quants.quant_shape_to_byte_shape(tensor.shape, tensor.kind)
            size = int(np.prod(shape))
            writer.add_tensor_info(tensor.key, shape, np.dtype(np.uint8), size, raw_dtype=tensor.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for values in factors.values():
            writer.write_tensor_data(values)
        for packed in _packed(stored):
            writer.write_tensor_data(packed)
    finally:
        writer.close()


def _add_field(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    add.get(type(value), writer.add_array)(key, value)


def _packed(stored: Sequence[Stored]) -> Iterator[np.ndarray]:
    """Each tensor's bytes in the GGUF's order; a file stays open while its tensors follow one another."""
    opened, file = None, None
    for tensor in stored:
        if tensor.file != opened:
            opened, file = tensor.file, safe_open(tensor.file, framework="pt")
        values = file.get_tensor(tensor.name).to(torch.float32).numpy()
        if tensor.rotary_heads is not None:
            values = values[np.argsort(rotary_rows(tensor.shape[0], tensor.rotary_heads))]
        if tensor.offset:
            values = values + np.float32(tensor.offset)
        with np.errstate(over="ignore"):
            packed = gguf.quants.quantize(values, tensor.kind)
        if tensor.kind == Kind.F16 and not np.isfinite(packed).all():
            raise ModelError(tensor.file, f"tensor '{tensor.name}' has values beyond float16's 65504; use --type bf16")
        yield np.ascontiguousarray(packed).view(np.uint8)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m trainer.models.gguf_export", description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", required=True, help="the Hugging Face folder")
    parser.add_argument("--out", required=True, help="the GGUF file to make; it must not exist")
    parser.add_argument("--type", choices=sorted(TYPES), default="f16", help="how matrices are stored (default: f16)")
    parser.add_argument("--name", help="the model's name in the file (default: the folder's)")
    options = parser.parse_args(argv)
    try:
        export(options.model, options.out, kind=options.type, name=options.name)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}: written from {options.model}, weights in {options.type}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

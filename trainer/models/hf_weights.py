"""Weights of a Hugging Face safetensors folder into a `Decoder`, one tensor at a time; trainer.export writes them."""

import json
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from trainer.errors import ModelError
from trainer.models.config import ModelConfig
from trainer.models.decoder import Decoder
from trainer.parts import is_sharded, part_of

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
REWARD_HEAD = "reward_head."
"""What the names of a reward head's tensors begin with (Decoder.add_reward_head)."""


def load_decoder(
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    wrap: Callable[[Decoder], None] = lambda model: None,
    weights: Callable[[Decoder], Iterable[tuple[Path, str, Tensor]]] | None = None,
) -> Decoder:
    """The model of a Hugging Face folder with parameters in `dtype`. Raises ModelError naming file and tensor.

    wrap: called with the model on the meta device, before it has weights: the place to shard it. weights: gives the
    tensors (as `iter_weights` does) from somewhere else than the folder.
    """
    config = ModelConfig.from_folder(folder)
    with torch.device("meta"):
        model = Decoder(config).to(dtype)
    wrap(model)
    load_weights(model, folder, dtype=dtype, weights=None if weights is None else weights(model))
    return model


def hf_name(name: str) -> str:
    """A decoder's parameter name as Hugging Face writes it; our reward head has none there and keeps its own."""
    return name if name.startswith(("lm_head.", REWARD_HEAD)) else f"model.{name}"


def is_adapter(name: str) -> bool:
    """Is a parameter of this name an adapter's (`trainer.lora.LoRALinear`), not the model's own?"""
    return name.rpartition(".")[2].startswith(("lora_", "start_"))


def load_weights(
    model: nn.Module,
    folder: str | Path,
    *,
    dtype: torch.dtype,
    weights: Iterable[tuple[Path, str, Tensor]] | None = None,
) -> None:
    """Replace every parameter of `model` (which may be on the meta device) by the folder's tensor of that name.
    Adapters (trainer.lora) are left alone. A reward head that the folder lacks becomes zeros: even odds everywhere; one
    that only the folder has is passed over.

    Of a sharded parameter only this rank's rows are read from the file, into the device of the shards' mesh
    unless they are in memory already.
    """
    if any(is_sharded(parameter) and parameter.is_meta for parameter in model.parameters()):
        device = next(model.parameters()).device_mesh.device_type
        model.to_empty(device=device)
    wanted = {hf_name(name): name for name, _ in model.named_parameters() if not is_adapter(name)}
    seen = set()
    zeros = _zeros_for(model, folder, seen)  # asked last, when it is known what was seen
    for path, name, tensor in chain(iter_weights(folder) if weights is None else weights, zeros):
        if name not in wanted:
            if name == "lm_head.weight" or name.endswith("rotary_emb.inv_freq") or name.startswith(REWARD_HEAD):
                continue  # a tied head stored twice, a constant that old exports carry, a head for another use
            raise ModelError(path, f"tensor {name!r} is not part of this model; config.json does not fit the weights")
        owner, _, leaf = wanted[name].rpartition(".")
        module = model.get_submodule(owner)
        expected = getattr(module, leaf)
        if expected.shape != tensor.shape:
            raise ModelError(
                path, f"tensor {name!r} has shape {tuple(tensor.shape)}, config.json asks for {tuple(expected.shape)}"
            )
        if not tensor.is_floating_point():
            raise ModelError(path, f"tensor {name!r} has dtype {tensor.dtype}; a floating-point tensor is needed")
        if is_sharded(expected):
            part = part_of(name, expected)
            part.tensor.copy_(tensor[part.start : part.start + len(part.tensor)])
            seen.add(name)
            continue
        # a copy: what safetensors gives is the mapped file itself, which changes when somebody overwrites the file
        own_dtype = expected.dtype if name.startswith(REWARD_HEAD) else dtype
        parameter = nn.Parameter(tensor.to(own_dtype, copy=True), requires_grad=expected.requires_grad)
        setattr(module, leaf, parameter)
        seen.add(name)
    missing = sorted(wanted.keys() - seen)
    if missing:
        raise ModelError(folder, f"{len(missing)} tensors are missing, the first is {missing[0]!r}; download it again")


def _zeros_for(model: nn.Module, folder: str | Path, seen: set[str]) -> Iterator[tuple[Path, str, Tensor]]:
    """Of a reward head whose tensors are not among those seen."""
    for name, parameter in model.named_parameters():
        if name.startswith(REWARD_HEAD) and name not in seen:
            yield Path(folder), name, torch.zeros(parameter.shape)


def weight_files(folder: str | Path) -> list[Path]:
    """The folder's safetensors files: the index's shards, or the single file. Raises ModelError."""
    folder = Path(folder)
    index = folder / INDEX_FILE
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(index, f"is not a safetensors index ({error!r}); copy the file again") from None
    elif (folder / SINGLE_FILE).is_file():
        names = [SINGLE_FILE]
    else:
        raise ModelError(folder, f"neither {SINGLE_FILE} nor {INDEX_FILE} in it; only safetensors weights are read")
    for name in names:
        if not isinstance(name, str) or not (folder / name).is_file():
            raise ModelError(folder, f"file {name!r} is named by {INDEX_FILE} but is not there; download it again")
    return [folder / name for name in names]


def iter_weights(folder: str | Path) -> Iterator[tuple[Path, str, Tensor]]:
    """(file, Hugging Face name, tensor) for every tensor of the folder, one in memory at a time."""
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - safe_open is not a mapping
                    yield path, name, file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ModelError(path, f"is not a whole safetensors file ({error}); copy it again") from None

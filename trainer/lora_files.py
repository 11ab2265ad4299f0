"""Adapters on disk, in the format of the PEFT library: adapter_config.json and adapter_model.safetensors.

Tensors are named `base_model.model.<Hugging Face layer>.lora_A.weight`, `.lora_B.weight` and, with DoRA,
`.lora_magnitude_vector` (the lengths themselves). Read and written so by peft 0.21 (tests/test_lora_files.py holds both
to equal logits). Settings that change what an adapter computes and that we do not have are refused by name.

A reward model's head lies beside them, in reward_head.safetensors and logratio_prm.json: other loaders see an adapter.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data_tools.file_digests import FileDigests
from trainer import dist
from trainer.checkpoint import make_empty, refusal, replace_folder
from trainer.errors import ModelError, RunError
from trainer.export import headers, whole_tensors, write_model
from trainer.lora import ALL_LINEAR, LoraSettings, block_linears, layer_name, lora_layers, merged_weight, put
from trainer.models.decoder import Decoder
from trainer.models.hf_weights import REWARD_HEAD
from trainer.parts import parts_of
from trainer.prm import TABLE
from trainer.tensor_files import Entry, widest_first, write_safetensors

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
HEAD_FILE, TABLE_FILE = "reward_head.safetensors", f"{TABLE}.json"
PREFIX = "base_model.model."
SUFFIXES = {"A": ".lora_A.weight", "B": ".lora_B.weight", "lengths": ".lora_magnitude_vector"}

WITHOUT_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "layers_pattern", "loftq_config", "lora_dropout",
    "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type",
}  # fmt: skip
"""Keys of adapter_config.json that do not change what the adapter computes, or only where another key is set."""
SETTINGS = {"peft_type", "r", "lora_alpha", "target_modules", "use_rslora", "use_dora", "init_lora_weights"}
NEUTRAL = (None, False, {}, [], "none")
HARMLESS_INITS = (True, False, "gaussian", "eva", "orthogonal")
"""Other ways to begin (pissa, olora, loftq, ...) change the base's weights as well, which an adapter's file lacks."""


class RewardHead(NamedTuple):
    """What goes along with an adapter of a reward model: tensors by name (on rank 0), and the table; {} and None of
    other models."""

    tensors: dict[str, Tensor]
    table: dict[str, Any] | None


NO_HEAD = RewardHead({}, None)


@dataclass(frozen=True)
class LayerTensors:
    """One layer's adapter: A (r, I), B (O, r) and, with DoRA, the lengths (O,)."""

    A: Tensor
    B: Tensor
    lengths: Tensor | None = None


def read_settings(folder: str | Path) -> LoraSettings:
    """What adapter_config.json says. Raises ModelError naming the key where this trainer cannot do that."""
    path = Path(folder) / CONFIG_FILE
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        found = dict(raw)
    except FileNotFoundError:
        raise ModelError(folder, f"has no {CONFIG_FILE}; give the folder of a PEFT adapter") from None
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(path, f"is not a JSON object ({error}); copy the file again") from None
    if found.get("peft_type") != "LORA":
        raise ModelError(path, f"key 'peft_type' is {found.get('peft_type')!r}; only LORA adapters are supported")
    for name, value in found.items():
        if name not in SETTINGS | WITHOUT_EFFECT and value not in NEUTRAL:
            raise ModelError(path, f"key {name!r} is {value!r}, which is not supported; merge the adapter with peft")
    if found.get("init_lora_weights", True) not in HARMLESS_INITS:
        problem = f"key 'init_lora_weights' is {found['init_lora_weights']!r}, which changes the base model's weights"
        raise ModelError(path, f"{problem}; convert the adapter to plain LoRA with peft")
    r, alpha, targets = found.get("r"), found.get("lora_alpha"), found.get("target_modules")
    if not isinstance(r, int) or isinstance(r, bool) or r < 1:
        raise ModelError(path, f"key 'r' must be a whole number of 1 or more, got {r!r}")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool):
        raise ModelError(path, f"key 'lora_alpha' must be a number, got {alpha!r}")
    if isinstance(targets, list) and all(isinstance(name, str) for name in targets) and targets:
        targets = tuple(sorted(targets))
    elif not isinstance(targets, str):
        raise ModelError(path, f"key 'target_modules' must be a text or a list of texts, got {targets!r}")
    return LoraSettings(
        r=r,
        alpha=float(alpha),
        target_modules=targets,
        use_rslora=found.get("use_rslora") is True,
        use_dora=found.get("use_dora") is True,
    )


def config_json(model: Decoder, settings: LoraSettings, *, dropout: float, base: str) -> dict[str, Any]:
    """adapter_config.json as peft 0.21 writes it, without the keys that are at their defaults there."""
    targets: Any = settings.target_modules
    if targets in (ALL_LINEAR, (ALL_LINEAR,)):  # loaders other than peft know lists of endings only
        targets = tuple({layer_name(model, name).rpartition(".")[2] for name in block_linears(model)})
    return {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(settings.alpha) if settings.alpha.is_integer() else settings.alpha,
        "lora_dropout": dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": settings.r,
        "target_modules": targets if isinstance(targets, str) else sorted(targets),
        "task_type": "CAUSAL_LM",
        "use_dora": settings.use_dora,
        "use_rslora": settings.use_rslora,
    }


def read_tensors(folder: str | Path, settings: LoraSettings) -> dict[str, LayerTensors]:
    """Every layer's tensors by its Hugging Face name. Raises ModelError for a tensor that is missing or unknown."""
    path = Path(folder) / WEIGHTS_FILE
    if not path.is_file():
        raise ModelError(folder, f"has no {WEIGHTS_FILE}; only safetensors adapters are read")
    found: dict[str, dict[str, Tensor]] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is not a mapping
                kind = next((kind for kind, suffix in SUFFIXES.items() if name.endswith(suffix)), None)
                if kind is None or not name.startswith(PREFIX):
                    raise ModelError(path, f"tensor {name!r} is not one of a LoRA adapter of linear layers")
                layer = name.removeprefix(PREFIX).removesuffix(SUFFIXES[kind])
                found.setdefault(layer, {})[kind] = file.get_tensor(name).clone()
    except (SafetensorError, OSError) as error:
        raise ModelError(path, f"is not a whole safetensors file ({error}); copy it again") from None
    wanted = {"A", "B", "lengths"} if settings.use_dora else {"A", "B"}
    for layer, tensors in found.items():
        if tensors.keys() != wanted:
            names = ", ".join(SUFFIXES[kind][1:] for kind in sorted(wanted))
            raise ModelError(path, f"layer {layer!r}: expected {names} as {CONFIG_FILE} has it, found other tensors")
    return {layer: LayerTensors(**tensors) for layer, tensors in found.items()}


def adapter_digest(folder: str | Path, base_digest: str, digests: FileDigests) -> str:
    """sha256 of base and adapter together: tensors and what is computed with them."""
    settings = read_settings(folder)
    kind = f"lora scaling {settings.scaling!r} dora {settings.use_dora}"
    text = f"{base_digest}\n{kind}\n{digests.sha256(Path(folder) / WEIGHTS_FILE)}\n"
    if (Path(folder) / HEAD_FILE).is_file():
        text += f"{digests.sha256(Path(folder) / HEAD_FILE)}\n"
    return hashlib.sha256(text.encode()).hexdigest()


@torch.no_grad()
def load_adapter(model: Decoder, folder: str | Path, device: torch.device | str = "cpu") -> None:
    """Give the adapters that `add_lora` put on `model` the values of `folder`; each rank takes its rows.

    Raises ModelError unless the file has just these layers in these shapes.
    """
    path = Path(folder) / WEIGHTS_FILE
    layers = {layer.name: layer for layer in lora_layers(model)}
    stored = read_tensors(folder, next(iter(layers.values())).settings)
    if stored.keys() != layers.keys():
        odd = sorted(stored.keys() ^ layers.keys())[0]
        place = "in the file and not chosen by" if odd in stored else "missing from the file and chosen by"
        raise ModelError(path, f"layer {odd!r} is {place} target_modules of {CONFIG_FILE}, or not in this model")
    for name, layer in layers.items():
        own = stored[name]
        for tensor, shape in ((own.A, layer.lora_A.shape), (own.B, layer.lora_B.shape)):
            if tensor.shape != shape:
                problem = f"a tensor of layer {name!r} is {tuple(tensor.shape)}, this model asks for {tuple(shape)}"
                raise ModelError(path, f"{problem}; use the base model that the adapter was made for")
        put(layer, "lora_A", own.A, device)
        put(layer, "lora_B", own.B, device)
        if hasattr(layer, "start_A"):
            put(layer, "start_A", own.A, device)
            put(layer, "start_B", own.B, device)
        if own.lengths is not None:
            layer.start_lengths = own.lengths.to(device=device, dtype=torch.float32, copy=True).flatten()
            put(layer, "lora_magnitude_change", torch.zeros(layer.out_features), device)


def read_head(folder: str | Path) -> dict[str, Tensor]:
    """The reward head beside an adapter by tensor names, {} where there is none. Raises ModelError."""
    path = Path(folder) / HEAD_FILE
    if not path.is_file():
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError) as error:
        raise ModelError(path, f"is not a whole safetensors file ({error}); copy it again") from None


@torch.no_grad()
def load_head(model: Decoder, folder: str | Path, device: torch.device | str = "cpu") -> None:
    """Give the model's reward head, where it has one, the values beside an adapter, where there are any."""
    if model.reward_head is None:
        return
    for name, tensor in read_head(folder).items():
        leaf = name.removeprefix(REWARD_HEAD)
        if getattr(model.reward_head, leaf).shape != tensor.shape:
            raise ModelError(Path(folder) / HEAD_FILE, f"tensor {name!r} does not fit this model; use its own base")
        put(model.reward_head, leaf, tensor, device)


def gather_head(named_masters: list[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """The trained reward head whole, in CPU memory, on rank 0; without values on the others. Every rank calls it."""
    return _gather((name, tensor) for name, tensor in named_masters if name.startswith(REWARD_HEAD))


def _gather(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    parts = {part.name: part for part in parts_of(named)}
    entries = [Entry(part.name, part.tensor.dtype, part.shape) for part in parts.values()]
    return dict(zip(parts, whole_tensors(parts, entries), strict=True))


def gather_adapter(model: Decoder, named_masters: list[tuple[str, Tensor]]) -> dict[str, LayerTensors] | None:
    """The trained adapter whole, in CPU memory, on rank 0; None on the others. Every rank calls it, after a forward."""
    whole = _gather((name, tensor) for name, tensor in named_masters if not name.startswith(REWARD_HEAD))
    if not dist.is_main():
        return None
    found = {}
    for name, layer in model.named_modules():
        if f"{name}.lora_A" in whole:
            lengths = None
            if layer.settings.use_dora:
                lengths = layer.start_lengths.cpu() + whole[f"{name}.lora_magnitude_change"].float()
            found[layer.name] = LayerTensors(whole[f"{name}.lora_A"], whole[f"{name}.lora_B"], lengths)
    return found


def save_adapter(
    adapter: dict[str, LayerTensors] | None,
    folder: Path,
    model: Decoder,
    *,
    dropout: float,
    base: str,
    head: RewardHead = NO_HEAD,
) -> None:
    """Write `folder`, whole or not at all. Every rank calls it, with what `gather_adapter` gave it.

    Raises RunError on every rank when the disk refuses.
    """
    problem = None
    if dist.is_main():
        settings = lora_layers(model)[0].settings
        content = config_json(model, settings, dropout=dropout, base=base)
        temporary = folder.with_name(folder.name + ".tmp")
        problem = refusal(lambda: _write(temporary, folder, content, adapter, head))
        if problem is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    problem = dist.broadcast_object(problem)
    if problem is not None:
        raise RunError(folder, f"the adapter cannot be written ({problem}); free space and start the run again")


def _write(
    temporary: Path, folder: Path, content: dict[str, Any], adapter: dict[str, LayerTensors], head: RewardHead
) -> None:
    make_empty(temporary)
    (temporary / CONFIG_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    named = {}
    for layer, own in sorted(adapter.items()):
        for kind, suffix in SUFFIXES.items():
            if (tensor := getattr(own, kind)) is not None:
                named[f"{PREFIX}{layer}{suffix}"] = tensor
    write_safetensors(temporary / WEIGHTS_FILE, named.items())
    if head.table is not None:
        write_safetensors(temporary / HEAD_FILE, ((name, tensor.float()) for name, tensor in head.tensors.items()))
        (temporary / TABLE_FILE).write_text(json.dumps(head.table, indent=2) + "\n", encoding="utf-8")
    replace_folder(temporary, folder)


def export_merged(
    adapter: dict[str, LayerTensors] | None,
    settings: LoraSettings,
    *,
    source: str | Path,
    folder: Path,
    head: RewardHead = NO_HEAD,
) -> None:
    """Write `folder`, whole or not at all: the Hugging Face folder `source` with the adapter worked into its weights.

    Sums are made in float32 and rounded once, to the dtype that `source` stores; tensors without an adapter go along as
    they are, one in memory at a time. Every rank calls it; rank 0 does the work. Raises RunError, and ModelError where
    `merged_entries` does.
    """
    problem = None
    entries = merged_entries(source)
    if dist.is_main():
        added = [Entry(name, torch.float32, tuple(tensor.shape)) for name, tensor in sorted(head.tensors.items())]
        entries = widest_first([*(entry for entry in entries if not entry.name.startswith(REWARD_HEAD)), *added])
        temporary = folder.with_name(folder.name + ".tmp")
        tensors = _merged_tensors(entries, source, adapter, settings, head.tensors)
        problem = refusal(lambda: write_model(temporary, folder, Path(source), entries, tensors, head.table))
        if problem is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    problem = dist.broadcast_object(problem)
    if problem is not None:
        raise RunError(folder, f"the export cannot be written ({problem}); free space and start the run again")


def merged_entries(source: str | Path, layers: dict[str, tuple[int, ...]] | None = None) -> list[Entry]:
    """The tensors of a merged export, in the order of its files. Called before training, too: raises ModelError unless
    `source` has every layer, of this shape, to merge into."""
    stored = headers(source)
    for layer, shape in (layers or {}).items():
        found = stored.get(f"{layer}.weight")
        if found is None or found[0] != shape:
            problem = f"tensor '{layer}.weight' is {found[0] if found else 'missing'}, the adapter is made for {shape}"
            raise ModelError(source, f"{problem}; use matching files or set lora.merge = false")
    unknown = [name for name, (_, dtype, _) in stored.items() if dtype is None]
    if unknown:
        raise ModelError(source, f"tensor {unknown[0]!r} has a dtype that is not written; set lora.merge = false")
    return widest_first(Entry(name, dtype, shape) for name, (shape, dtype, _) in stored.items())


def _merged_tensors(
    entries: list[Entry],
    source: str | Path,
    adapter: dict[str, LayerTensors],
    settings: LoraSettings,
    head: dict[str, Tensor],
) -> Iterator[Tensor]:
    stored = headers(source)
    for entry in entries:
        if entry.name in head:
            yield head[entry.name]
            continue
        with safe_open(stored[entry.name][2], framework="pt") as file:
            tensor = file.get_tensor(entry.name)
        own = adapter.get(entry.name.removesuffix(".weight"))
        yield tensor if own is None else merged_weight(tensor, own.A, own.B, own.lengths, settings)

"""What [lora] and model.quantise make of the starting model: how it is loaded, what its weights are called, and what
the run leaves behind.

The reference of a run is always the weights that the run starts from: base and, where it goes on from an adapter, that
adapter. A new adapter adds nothing, so its reference is the base itself, with the same digest and the same cache file
as without adapters.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from data_tools.file_digests import FileDigests
from trainer import dist, lora, lora_files, quantised
from trainer.batch import Stream, idle_stream
from trainer.config import Config
from trainer.config_sections import LoraConfig, section_defaults
from trainer.errors import ConfigError
from trainer.lora import ALL_LINEAR, LoraSettings
from trainer.models.decoder import Decoder
from trainer.models.hf_weights import INDEX_FILE, SINGLE_FILE, load_decoder, weight_files
from trainer.prm import PrmTable
from trainer.reference_cache import weights_digest
from trainer.run_folder import ADAPTER, EXPORT

ADAPTER_SETTINGS = ("r", "alpha", "target_modules", "use_rslora", "use_dora")


def changes_start(config: Config) -> bool:
    """Is the starting model anything else than the weights in model.path?"""
    return config.lora.adapter is not None or config.model.quantise != "none"


def lora_settings(config: Config) -> LoraSettings:
    """From the adapter to go on from, else from [lora]. Raises ModelError for the adapter, ConfigError where keys say
    otherwise than it does."""
    own = {name: getattr(config.lora, name) for name in ADAPTER_SETTINGS}
    own["target_modules"] = ALL_LINEAR if own["target_modules"] == (ALL_LINEAR,) else tuple(own["target_modules"])
    if config.lora.adapter is None:
        return LoraSettings(**own)
    found = lora_files.read_settings(config.lora.adapter)
    defaults = section_defaults(LoraConfig)
    for name in ADAPTER_SETTINGS:
        given = getattr(config.lora, name)
        stored = getattr(found, name)
        same = set(given) == set(stored) if isinstance(given, tuple) and isinstance(stored, tuple) else given == stored
        if given != defaults[name] and not same:
            problem = f"the adapter in lora.adapter has {stored}; leave this key out"
            raise ConfigError(f"lora.{name}", given, problem)
    return found


def start_digest(config: Config, digests: FileDigests) -> str:
    """sha256 of the weights that the policy starts from."""
    if config.model.gguf is None:
        base = weights_digest(config.model.path, digests)
    else:
        files = (Path(config.model.path) / "config.json", Path(config.model.gguf))
        base = hashlib.sha256("\n".join(digests.sha256(path) for path in files).encode()).hexdigest()
    return base if config.lora.adapter is None else lora_files.adapter_digest(config.lora.adapter, base, digests)


def start_keys(config: Config) -> str:
    """The keys that name those weights, for messages."""
    base = "model.path" if config.model.gguf is None else "model.gguf"
    return base if config.lora.adapter is None else f"{base} or lora.adapter"


def load_start(
    config: Config,
    *,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    wrap: Callable[[Decoder], None],
    train: bool,
) -> Decoder:
    """The starting model: its base in `dtype`, or packed, and its adapters in `adapter_dtype`.

    wrap: called with the model on the meta device, with its adapters. train: with adapters to train, new ones too, and
    what reference.mode = model needs of them; else frozen, with those of lora.adapter only.
    """
    settings = lora_settings(config) if train or config.lora.adapter is not None else None

    def prepare(model: Decoder) -> None:
        if config.model.quantise != "none":
            quantised.pack_linears(model)
        if settings is not None:
            keep = train and config.lora.adapter is not None and config.reference.mode == "model"
            dropout = config.lora.dropout if train else 0.0
            lora.add_lora(model, settings, dropout=dropout, dtype=adapter_dtype, keep_start=dtype if keep else None)
            for layer in lora.lora_layers(model):
                layer.in_place = config.train.activation_checkpointing != "selective"
        wrap(model)

    def weights(model: Decoder) -> quantised.Tensors:
        if config.model.quantise == "gguf":
            return quantised.pack_gguf(model, config.model.gguf, dtype=dtype)
        return quantised.pack_nf4(model, config.model.path)

    packed = config.model.quantise != "none"
    model = load_decoder(config.model.path, dtype=dtype, wrap=prepare, weights=weights if packed else None)
    if config.lora.adapter is not None:
        lora_files.load_adapter(model, config.lora.adapter)
        lora_files.load_head(model, config.lora.adapter)
    elif settings is not None:
        lora.init_new(model, config.train.seed)
    return model if train else model.requires_grad_(False)


class StartingState:
    """The reference of reference.mode = model with adapters: the policy itself, its adapters as the run began."""

    def __init__(self, model: Decoder, config: Config) -> None:
        self._model = model
        self._state: lora.State = "off" if config.lora.adapter is None else "start"

    def __call__(self, stream: Stream) -> Tensor:
        with lora.adapters(self._model, self._state):
            return self._model(stream)


def notes(config: Config) -> list[str]:
    """What somebody who switches adapters on should know of these settings."""
    found = []
    if config.lora.dropout:
        found.append("note: lora.dropout: with other micro-batches or ranks, other numbers are dropped")
    if config.lora.enabled and config.train.learning_rate <= 1e-6:
        rate = config.train.learning_rate
        found.append(
            f"note: train.learning_rate {rate:g} suits full fine-tuning; adapters usually take about ten times"
        )
    if config.lora.merge and config.run.export and config.model.quantise != "none":
        found.append(
            f"note: export/ will be the weights in {config.model.path}, not quantised, with the adapter in them"
        )
    return found


def check_results(config: Config, model: Decoder) -> None:
    """Before training: can the adapter be merged in the end? Raises ConfigError and ModelError."""
    if not (config.lora.merge and config.run.export):
        return
    folder = Path(config.model.path)
    if not any((folder / name).is_file() for name in (SINGLE_FILE, INDEX_FILE)):
        problem = f"there are no safetensors weights in {folder} to merge into; set it to false: adapter/ is written"
        raise ConfigError("lora.merge", True, problem)
    layers = {layer.name: (layer.out_features, layer.in_features) for layer in lora.lora_layers(model)}
    lora_files.merged_entries(folder, layers)


def merged_bytes(config: Config) -> int:
    """Of a merged export's weights, which are as large as those of model.path; 0: there will be none."""
    if not (config.lora.enabled and config.lora.merge and config.run.export):
        return 0
    return sum(path.stat().st_size for path in weight_files(config.model.path))


def write_results(config: Config, model: Decoder, named_masters: list[tuple[str, Tensor]], folder: Path) -> list[Path]:
    """`adapter/` and, where asked for, the merged `export/` in the run's folder; what was written. Every rank calls it.
    A reward head goes along. Raises RunError on every rank when the disk refuses."""
    settings = lora.lora_layers(model)[0].settings
    if settings.use_dora:  # a finished run that only writes has had no forward pass, which notes the base's row lengths
        with torch.no_grad():
            model(idle_stream().to(dist.choose_device(config.run.device)))
    adapter = lora_files.gather_adapter(model, named_masters)
    head = lora_files.NO_HEAD
    if config.train.objective == "prm":
        head = lora_files.RewardHead(lora_files.gather_head(named_masters), PrmTable.of(config.prm).as_json())
    written = [folder / ADAPTER]
    lora_files.save_adapter(adapter, written[0], model, dropout=config.lora.dropout, base=config.model.path, head=head)
    if config.lora.merge and config.run.export:
        written.append(folder / EXPORT)
        lora_files.export_merged(adapter, settings, source=config.model.path, folder=written[1], head=head)
    return written

"""What a model folder holds, in lines of text: family, sizes, weights, memory for training, tokenizer, anything odd.

Reads headers, not weights, unless asked to look for numbers that are not finite. Behind `python -m trainer.models
inspect DIR`.
"""

import json
import math
from collections import Counter
from pathlib import Path

import torch

from data_tools.chat_template import load_chat_template
from data_tools.errors import UserError
from data_tools.template_check import check_template
from data_tools.tokenizer import Tokenizer, load_tokenizer
from trainer.errors import ModelError
from trainer.export import headers
from trainer.memory_plan import activation_bytes, parameter_shapes
from trainer.models.config import ModelConfig, read_config
from trainer.models.hf_weights import REWARD_HEAD, hf_name, iter_weights

TRAINING_BYTES = {"float32": 16, "bf16": 18, "pure_bf16": 8}
"""A parameter: weight, gradient, two moments; of bf16 the working copy too."""
LORA_RANK = 16


class Findings:
    """Lines of the report, and what looks wrong."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.odd: list[str] = []

    def say(self, label: str, text: str) -> None:
        self.lines.append(f"{label:<16}{text}")


def inspect_model(folder: str | Path, *, read_weights: bool = False) -> Findings:
    """Look at a Hugging Face folder. Raises ModelError where config.json cannot be used at all."""
    found = Findings()
    raw, path = read_config(folder)
    config, unknown = ModelConfig.with_unknown_keys(raw, path)
    if unknown:
        found.odd.append(f"config.json has keys that nothing here reads: {', '.join(unknown)}")
    _describe_config(found, config, raw)
    _describe_weights(found, config, Path(folder), read_weights=read_weights)
    _describe_memory(found, config)
    tokenizer = _describe_tokenizer(found, config, Path(folder), raw)
    if tokenizer is not None:
        _describe_template(found, Path(folder), tokenizer)
    return found


def count(number: float) -> str:
    """134515008 as 134.5 M."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number:.0f}"


def _describe_config(found: Findings, config: ModelConfig, raw: dict) -> None:
    shapes = parameter_shapes(config)
    total = sum(map(math.prod, shapes.values()))
    embedding = math.prod(shapes["embed_tokens.weight"])
    architectures = ", ".join(map(str, raw.get("architectures") or [])) or "no architectures named"
    found.say("family", f"{config.model_type} ({architectures})")
    head = "tied to the embedding" if config.tie_word_embeddings else f"{count(embedding)} more in the head"
    found.say("parameters", f"{count(total)} ({total}), {count(embedding)} in the embedding, {head}")
    found.say(
        "layers",
        f"{config.num_layers} of width {config.hidden_size}, inner width {config.intermediate_size}, "
        f"{config.activation}{'' if config.gated else ' without gate'}, norms {config.norm} {config.placement}",
    )
    windows = Counter(layer.window for layer in config.layers)
    shown = ", ".join(f"{n} layers see {'all' if window is None else window} tokens" for window, n in windows.items())
    found.say(
        "attention",
        f"{config.num_heads} heads of {config.head_dim} on {config.num_kv_heads} for keys and values; {shown}",
    )
    for rope in dict.fromkeys(layer.rope for layer in config.layers):
        number = sum(layer.rope == rope for layer in config.layers)
        if rope is None:
            found.say("positions", f"{number} layers without")
            continue
        scaled = "" if rope.scaling is None else f", {rope.scaling.kind} scaling by {rope.scaling.factor:g}"
        found.say("positions", f"{number} layers, base {rope.theta:g}, {rope.dims} of {config.head_dim} turn{scaled}")
    found.say("context", f"{config.max_positions} tokens")


def _describe_weights(found: Findings, config: ModelConfig, folder: Path, *, read_weights: bool) -> None:
    try:
        stored = headers(folder)
    except ModelError as error:
        found.odd.append(str(error))
        return
    wanted = {hf_name(name): shape for name, shape in parameter_shapes(config).items()}
    heads = [name for name in stored if name.startswith(REWARD_HEAD)]
    if heads:
        found.say("reward head", "yes: python -m eval.prm scores answers with it")
    stored = {name: own for name, own in stored.items() if name not in heads}
    dtypes: Counter[str] = Counter()
    for name, (shape, dtype, _) in stored.items():
        dtypes["other kinds" if dtype is None else str(dtype).removeprefix("torch.")] += math.prod(shape)
        if shape != wanted.get(name, shape):
            found.odd.append(f"tensor {name} has shape {shape}, config.json asks for {wanted[name]}")
    files = {path for _, _, path in stored.values()}
    kinds = ", ".join(f"{count(number)} {dtype}" for dtype, number in dtypes.most_common())
    size = sum(path.stat().st_size for path in files)
    found.say("weights", f"{len(files)} file{'s' if len(files) > 1 else ''}, {size / 2**20:.0f} MiB: {kinds}")
    missing, extra = sorted(wanted.keys() - stored.keys()), sorted(stored.keys() - wanted.keys())
    extra = [name for name in extra if name != "lm_head.weight" and not name.endswith("rotary_emb.inv_freq")]
    if missing:
        found.odd.append(f"{len(missing)} tensors are missing, the first is {missing[0]}")
    if extra:
        found.odd.append(f"{len(extra)} tensors are not part of this model, the first is {extra[0]}")
    if len(dtypes) > 1:
        found.odd.append(f"weights of several dtypes ({', '.join(dtypes)}); an export keeps each as it is")
    if read_weights:
        bad = [name for _, name, tensor in iter_weights(folder) if not torch.isfinite(tensor).all()]
        if bad:
            found.odd.append(f"{len(bad)} tensors hold numbers that are not finite, the first is {bad[0]}")


def _describe_memory(found: Findings, config: ModelConfig) -> None:
    shapes = parameter_shapes(config)
    total = sum(map(math.prod, shapes.values()))
    each = ", ".join(f"{name} {total * size / 2**30:.2f}" for name, size in TRAINING_BYTES.items())
    found.say("training", f"GiB of weights, gradients and optimizer, all weights trained: {each}")
    adapters = sum(
        LORA_RANK * sum(shape) for name, shape in shapes.items() if len(shape) == 2 and name.startswith("layers.")
    )
    frozen = (2 * total + 18 * adapters) / 2**30
    found.say("", f"with LoRA of rank {LORA_RANK} on all linear layers: bf16 {frozen:.2f} ({count(adapters)} trained)")
    kept = {how: activation_bytes(config, 1024, itemsize=2, how=how) / 2**20 for how in ("none", "full")}
    found.say(
        "activations",
        f"MiB for 1,024 tokens in bf16: {kept['none']:.0f}, with train.activation_checkpointing = full "
        f"{kept['full']:.0f}; `trainer/main.py ... --run.dry_run=true` plans a whole run",
    )


def _describe_tokenizer(found: Findings, config: ModelConfig, folder: Path, raw: dict) -> Tokenizer | None:
    try:
        tokenizer = load_tokenizer(folder)
    except UserError as error:
        found.odd.append(f"tokenizer: {error}")
        return None
    spare = config.vocab_size - tokenizer.vocab_size
    found.say("vocabulary", f"{config.vocab_size} rows, {tokenizer.vocab_size} tokens ({spare} rows of padding)")
    if spare < 0:
        found.odd.append(f"the tokenizer has {-spare} tokens more than the model has rows: they do not belong together")
    names = {"bos": (tokenizer.bos_token, tokenizer.bos_id), "eos": (tokenizer.eos_token, tokenizer.eos_id)}
    shown = ", ".join(f"{name} {token!r} ({index})" for name, (token, index) in names.items() if token is not None)
    adds = "; plain text starts with BOS" if tokenizer.adds_bos else ""
    found.say("special tokens", (shown or "neither BOS nor EOS") + adds)
    if tokenizer.eos_id is None:
        found.odd.append("no eos_token: rows of plain strings cannot be trained on")
    ends = set(_ids(raw.get("eos_token_id"))) | set(_ids(generation_config(folder).get("eos_token_id")))
    if tokenizer.eos_id is not None and ends and tokenizer.eos_id not in ends:
        found.odd.append(
            f"the tokenizer's eos_token is {tokenizer.eos_id}, config.json and generation_config.json stop at "
            f"{sorted(ends)}: a trained end may not stop generation"
        )
    return tokenizer


def _ids(value: object) -> list[int]:
    return [value] if isinstance(value, int) else [each for each in value or [] if isinstance(each, int)]


def generation_config(folder: Path) -> dict:
    """The object in `generation_config.json`; {} where there is none that can be read."""
    try:
        value = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _describe_template(found: Findings, folder: Path, tokenizer: Tokenizer) -> None:
    try:
        template = load_chat_template(folder)
    except UserError as error:
        found.odd.append(f"chat template: {error}")
        return
    if template is None:
        found.say("chat template", "none: rows of messages need data.chat_template")
        return
    found.say("chat template", f"from {template.path.name}")
    checked = check_template(template, tokenizer)
    for line in checked.lines():
        found.say("", line)
    if not checked.fits:
        found.odd.append("the chat template does not fit training: see above")

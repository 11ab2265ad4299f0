"""The configuration of a run: from TOML and `--section.key=value` to a checked `Config`, and back to TOML.

The keys themselves, their defaults and ranges are in `trainer.config_sections`, single values in
`trainer.config_values`. Imports no torch: `--help` and errors come at once.
"""

import ast
import inspect
import re
import sys
import textwrap
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, cast

from trainer import config_sections
from trainer.config_sections import (
    SORTING_LOSS_TYPES,
    CheckpointConfig,
    Config,
    DataConfig,
    DistConfig,
    EvalConfig,
    KernelsConfig,
    LoraConfig,
    LossConfig,
    ModelConfig,
    PrmConfig,
    ReferenceConfig,
    RunConfig,
    Section,
    TrainConfig,
    section_defaults,
    section_hints,
)
from trainer.config_values import describe, nearest, parse_text, toml_value
from trainer.errors import ABSENT, ConfigError, UserError, show_value

__all__ = [
    "MATHS_KEYS",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "DistConfig",
    "EvalConfig",
    "KernelsConfig",
    "LoraConfig",
    "LossConfig",
    "ModelConfig",
    "PrmConfig",
    "ReferenceConfig",
    "RunConfig",
    "TrainConfig",
    "from_tables",
    "help_text",
    "load_config",
    "maths_changes",
    "parse_toml",
    "to_tables",
    "to_toml",
]

SECTIONS = cast(dict[str, type[Section]], {field.name: field.type for field in fields(Config)})

USAGE = "torchrun trainer/main.py CONFIG.toml [--section.key=value ...]"

NAMES_ELSEWHERE = {
    "adapter_name_or_path": "lora.adapter",
    "alpha": "loss.beta",
    "bf16": "train.dtype",
    "eval_steps": "eval.every",
    "f_divergence_type": "loss.f_divergence",
    "gradient_accumulation_steps": "train.tokens_per_microbatch",
    "gradient_checkpointing": "train.activation_checkpointing",
    "lambda": "loss.beta",
    "load_in_4bit": "model.quantise",
    "logging_steps": "run.log_every",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lora_r": "lora.r",
    "lora_rank": "lora.r",
    "lora_target": "lora.target_modules",
    "lora_target_modules": "lora.target_modules",
    "lr": "train.learning_rate",
    "lr_scheduler_type": "train.schedule",
    "model_name_or_path": "model.path",
    "num_train_epochs": "train.epochs",
    "orpo_alpha": "loss.beta",
    "output_dir": "run.dir",
    "per_device_train_batch_size": "train.global_batch",
    "precompute_ref_log_probs": "reference.mode",
    "pref_beta": "loss.beta",
    "resume_from_checkpoint": "run.resume",
    "rpo_alpha": "loss.loss_weights",
    "save_steps": "checkpoint.every",
    "save_total_limit": "checkpoint.keep_last",
    "truncation_mode": "data.overlong",
    "use_peft": "lora.r",
    "warmup_steps": "train.warmup_ratio",
}
"""What other trainers call our keys. They are not accepted (the meaning differs in places); the error names ours."""

FREE_ON_RESUME = frozenset(
    f"{section}.{name}"
    for section, names in {
        # where files lie; what they hold is compared by digest
        "model": ("path", "gguf"),
        "lora": ("adapter", "merge"),
        "data": ("train", "chat_template", "eval", "cache_dir", "lint"),
        "train": ("tokens_per_microbatch", "activation_checkpointing", "compile", "deterministic"),
        "prm": ("aggregation",),
        "reference": ("path", "mode", "cache_dir", "cache_file"),
        "kernels": ("impl", "stash"),
        "eval": section_hints(EvalConfig),
        "checkpoint": section_hints(CheckpointConfig),
        "run": section_hints(RunConfig),
        "dist": section_hints(DistConfig),
    }.items()
    for name in names
)
"""Keys that a resumed run may change: what is trained stays the same up to rounding."""

MATHS_KEYS = frozenset(f"{section}.{name}" for section, cls in SECTIONS.items() for name in section_hints(cls))
MATHS_KEYS -= FREE_ON_RESUME
"""Keys whose change on resume is refused: they would make it another training."""


def load_config(argv: Sequence[str]) -> Config:
    """The configuration of a command line: a TOML file and `--section.key=value` (or `--section.key value`) over it.

    The last of several values for one key wins. `--help` prints every key and exits with code 0.
    Raises UserError, one line, on anything that is not a valid configuration.
    """
    if "--help" in argv or "-h" in argv:
        print(help_text())
        sys.exit(0)
    path, overrides = _split_arguments(argv)
    tables = _read_tables(path)
    for key, text in overrides:
        section, name = _known_key(key)
        tables.setdefault(section, {})[name] = parse_text(key, text, section_hints(SECTIONS[section])[name])
    return from_tables(tables)


def parse_toml(text: str, source: str | Path) -> Config:
    """The configuration in a TOML text, as `to_toml` writes it; `source` names it in errors. Raises UserError."""
    return from_tables(_parse_tables(text, source))


def from_tables(tables: Mapping[str, Mapping[str, object]]) -> Config:
    """A configuration from `{section: {key: value}}`, keys left out take their defaults. Raises ConfigError."""
    for section, table in tables.items():
        for name in table:
            _known_key(f"{section}.{name}")
    sections: dict[str, Any] = {}
    for section, cls in SECTIONS.items():
        table = tables.get(section, {})
        for name, default in section_defaults(cls).items():
            if default is MISSING and name not in table:
                key = f"{section}.{name}"
                raise ConfigError(key, ABSENT, f"required; set it in the file or with --{key}=... ({_docs()[key]})")
        sections[section] = cls(**table)
    return Config(**sections)


def to_tables(config: Config) -> dict[str, dict[str, Any]]:
    """`{section: {key: value}}` with every key, fit for JSON; `from_tables` gives an equal configuration back."""
    tables: dict[str, dict[str, Any]] = {}
    for section, cls in SECTIONS.items():
        values = {name: getattr(getattr(config, section), name) for name in section_hints(cls)}
        tables[section] = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    return tables


def to_toml(config: Config) -> str:
    """TOML with every key, also those at their default; `parse_toml` gives an equal configuration back."""
    blocks = []
    for section, cls in SECTIONS.items():
        values = getattr(config, section)
        lines = [f"{name} = {toml_value(getattr(values, name))}" for name in section_hints(cls)]
        blocks.append("\n".join([f"[{section}]", *lines]) + "\n")
    return "\n".join(blocks)


def maths_changes(saved: Config, current: Config) -> list[str]:
    """What makes `current` another training than `saved`, a text for each key: `loss.beta: was 0.1, now 0.2`.

    Micro-batches may change on resume unless the loss sorts over the pairs of one, or dropout differs between them.
    """
    keys = set(MATHS_KEYS)
    if set(saved.loss.loss_type) & set(SORTING_LOSS_TYPES) or saved.lora.dropout:
        keys.add("train.tokens_per_microbatch")
    before, after = to_tables(saved), to_tables(current)
    pairs = [(key, *key.split(".")) for key in sorted(keys)]
    return [
        f"{key}: was {show_value(before[section][name])}, now {show_value(after[section][name])}"
        for key, section, name in pairs
        if before[section][name] != after[section][name]
    ]


def help_text() -> str:
    """Every key with what it takes, its default and its meaning, by section."""
    docs = _docs()
    lines = [
        f"usage: {USAGE}",
        "",
        "Trains a model from preference pairs. Keys, in CONFIG.toml as key = value under [section]:",
    ]
    for section, cls in SECTIONS.items():
        lines += ["", f"[{section}]  {cls.__doc__}"]
        defaults = section_defaults(cls)
        for name, hint in section_hints(cls).items():
            key, default = f"{section}.{name}", defaults[name]
            shown = "required" if default is MISSING else f"default {show_value(default) or 'empty'}"
            lines.append(f"  --{key}  ({describe(hint)}; {shown})")
            lines += textwrap.wrap(docs[key], 110, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)


def _docs() -> dict[str, str]:
    """The string under each field, by key, out of the source of the sections."""
    docs = {}
    tree = ast.parse(inspect.getsource(config_sections))
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    for section, cls in SECTIONS.items():
        body = classes[cls.__name__].body
        for field, after in zip(body, body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(after, ast.Expr):
                docs[f"{section}.{ast.unparse(field.target)}"] = ast.literal_eval(after.value)
    return docs


def _split_arguments(argv: Sequence[str]) -> tuple[str, list[tuple[str, str]]]:
    """The configuration file and the (key, text) pairs of a command line."""
    files, overrides = [], []
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("-"):
            files.append(argument)
            continue
        if not argument.startswith("--"):
            raise UserError(f"{argument}: unknown option; keys are written --section.key=value, see --help")
        key, equals, text = argument[2:].partition("=")
        _known_key(key)
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"--{key}", ABSENT, f"needs a value: --{key}=...")
            text = rest.pop(0)
        overrides.append((key, text))
    if len(files) != 1:
        found = f"got {len(files)}: {' '.join(files)}" if files else "got none"
        raise UserError(f"expected one configuration file, {found}; usage: {USAGE}")
    return files[0], overrides


def _read_tables(path: str) -> dict[str, dict[str, object]]:
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except FileNotFoundError:
        shipped = sorted(file.stem for file in (Path(__file__).parent / "configs").glob("*.toml"))
        raise UserError(f"{path}: no such file; trainer/configs/ has {', '.join(shipped)} (.toml)") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; name the TOML file in it") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text (byte {error.start})") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    return _parse_tables(text, path)


def _parse_tables(text: str, source: str | Path) -> dict[str, dict[str, object]]:
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        match = re.fullmatch(r"(.*) \(at (?:line (\d+), column \d+|end of document)\)", str(error), re.DOTALL)
        problem = match[1] if match else str(error)
        line = match[2] if match and match[2] else len(text.splitlines())
        raise UserError(f"{source}:{line}: not valid TOML: {problem}") from None
    for section, table in tables.items():
        if not isinstance(table, dict):
            known = f"write [{section}] and its keys below" if section in SECTIONS else _suggestion(section)
            raise ConfigError(section, table, f"stands outside a section; {known}")
    return tables


def _known_key(key: str) -> tuple[str, str]:
    """(section, name) of a key; raises ConfigError with the nearest known key."""
    section, _, name = key.partition(".")
    if section in SECTIONS and name in section_hints(SECTIONS[section]):
        return section, name
    raise ConfigError(key, ABSENT, f"unknown key; {_suggestion(key)}")


def _suggestion(key: str) -> str:
    """The key most likely meant: the same name in another section, what other trainers call ours, the nearest."""
    name = key.rpartition(".")[2]
    known = [f"{section}.{field}" for section, cls in SECTIONS.items() for field in section_hints(cls)]
    same_name = [other for other in known if other.endswith(f".{name}")]
    elsewhere = NAMES_ELSEWHERE.get(name.lower())
    if elsewhere is not None and (not same_name or elsewhere.partition(".")[0] == key.partition(".")[0]):
        guess = elsewhere
    elif same_name:
        guess = nearest(key, same_name)
    elif "." in key:
        guess = nearest(key, known)
    else:
        guess = nearest(f".{key}", known)
    return f"did you mean {guess}?"

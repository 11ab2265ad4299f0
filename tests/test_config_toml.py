"""A configuration as TOML and back, nothing changed on the way, and which keys a resumed run may change."""

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.config import (
    FREE_ON_RESUME,
    MATHS_KEYS,
    SECTIONS,
    Config,
    DataConfig,
    LossConfig,
    ModelConfig,
    TrainConfig,
    from_tables,
    load_config,
    maths_changes,
    parse_toml,
    to_tables,
    to_toml,
)
from trainer.config_sections import section_hints


@pytest.fixture
def minimal(tmp_path: Path) -> str:
    path = tmp_path / "c.toml"
    path.write_text('[model]\npath = "M"\n[data]\ntrain = "pairs.jsonl"\n', encoding="utf-8")
    return str(path)


# --- there and back --------------------------------------------------------------------------------------------------


def test_every_key_survives_toml_with_a_value_that_is_not_its_default() -> None:
    tables = {
        "model": {"path": 'C:\\models\\"x"\n\x7f é 模型'},
        "data": {"train": ["a.jsonl", "b,c.jsonl"], "eval": ["e.jsonl"], "max_length": 7,
                 "overlong": "truncate_completion", "chat_template": "t.jinja",
                 "special_tokens": "control", "cache_dir": "c", "lint": False},
        "train": {"objective": "dpo", "global_batch": 3, "tokens_per_microbatch": 5, "max_steps": 9, "epochs": 2,
                  "learning_rate": 1.2345678901234567e-7, "schedule": "cosine", "warmup_ratio": 0.1,
                  "weight_decay": 0.01, "adam_beta1": 0.8, "adam_beta2": 0.99, "adam_epsilon": 1e-20,
                  "max_grad_norm": 0.0, "dtype": "float32",
                  "activation_checkpointing": "full", "compile": True, "seed": 2**62, "deterministic": False},
        "lora": {"r": 4, "alpha": 3.0, "target_modules": ["q_proj", "v_proj"], "use_rslora": True, "use_dora": True,
                 "adapter": "A", "merge": False},
        "loss": {"loss_type": ["discopop", "exo_pair"], "loss_weights": [0.1, 1e22], "beta": 5.0,
                 "label_smoothing": 0.001, "f_divergence": "alpha_divergence", "f_alpha_divergence_coef": 0.25,
                 "ld_alpha": 0.5, "discopop_tau": 0.5},
        "reference": {"mode": "model", "path": "R", "cache_dir": "rc", "cache_file": "f"},
        "kernels": {"impl": "cpu", "attention": "merge", "stash": True, "matmul": "highest"},
        "eval": {"every": 4, "max_pairs": 6},
        "checkpoint": {"every": 1, "keep_last": 1, "asynchronous": False},
        "run": {"dir": "d", "resume": "never", "log_every": 2, "progress": False, "tensorboard": "off", "device": "cpu",
                "threads": 2, "dry_run": True, "export": False},
        "dist": {"strategy": "fsdp", "replicas": 2, "grad_sync": "last", "cpu_offload": True, "timeout_s": 30.0},
    }  # fmt: skip
    not_for_dpo = {"orpo_nll", "simpo_gamma", "cpo_alpha"}
    not_for_these = {"quantise", "gguf", "dropout", "stop_when_solved"}  # exclude others above
    of_prm = {"labels": "outcome", "loss": "mse", "outcome": "last", "separator": "<s>", "aggregation": "min"}
    known = {name for section in SECTIONS for name in to_tables(from_tables(tables))[section]}
    others = not_for_dpo | not_for_these | of_prm.keys()
    assert known == others | {name for table in tables.values() for name in table}
    prm = {"model": {"path": "M"}, "data": {"train": "a"}, "train": {"objective": "prm"}, "prm": of_prm}
    for config in (from_tables(tables), from_tables(prm)):
        assert parse_toml(to_toml(config), "config.toml") == config
        assert from_tables(to_tables(config)) == config


@given(
    path=st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip),
    rate=st.floats(0, 1e300),
    files=st.lists(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip), min_size=1, max_size=3
    ),
    alpha=st.none() | st.floats(0, 1),
)
def test_any_value_survives_toml(path: str, rate: float, files: list[str], alpha: float | None) -> None:
    config = Config(
        model=ModelConfig(path=path),
        data=DataConfig(train=tuple(files)),
        train=TrainConfig(learning_rate=rate),
        loss=LossConfig(ld_alpha=alpha),
    )
    assert parse_toml(to_toml(config), "config.toml") == config


def test_toml_names_every_key(minimal: str) -> None:
    tables = tomllib.loads(to_toml(load_config([minimal])))
    assert {s: list(t) for s, t in tables.items()} == {s: list(section_hints(cls)) for s, cls in SECTIONS.items()}


# --- resume ----------------------------------------------------------------------------------------------------------


def test_keys_of_the_maths() -> None:
    assert {"loss.beta", "train.learning_rate", "train.seed", "data.max_length"} <= MATHS_KEYS
    assert {
        "model.path",
        "data.train",
        "run.dir",
        "eval.every",
        "checkpoint.every",
        "data.cache_dir",
        "kernels.stash",
    } <= FREE_ON_RESUME
    every_key = {f"{section}.{name}" for section, cls in SECTIONS.items() for name in section_hints(cls)}
    assert MATHS_KEYS | FREE_ON_RESUME == every_key


def test_changes_that_alter_the_maths_are_named(minimal: str) -> None:
    saved = load_config([minimal])
    assert maths_changes(saved, load_config([minimal, "--run.dir=x", "--train.tokens_per_microbatch=64"])) == []
    changed = load_config([minimal, "--loss.beta=0.2", "--train.max_steps=5"])
    assert maths_changes(saved, changed) == ["loss.beta: was 0.1, now 0.2", "train.max_steps: was none, now 5"]


def test_micro_batches_belong_to_the_maths_of_sorting_losses(minimal: str) -> None:
    saved = load_config([minimal, "--loss.loss_type=aot"])
    other = load_config([minimal, "--loss.loss_type=aot", "--train.tokens_per_microbatch=64"])
    assert maths_changes(saved, other) == ["train.tokens_per_microbatch: was 4096, now 64"]

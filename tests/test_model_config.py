"""Reading config.json: what is understood, what is refused and in which words."""

import json
from pathlib import Path

import pytest
from model_fixtures import tiny_config
from transformers import LlamaConfig

from trainer.errors import ModelError
from trainer.models.config import ModelConfig
from trainer.models.families import Layer
from trainer.models.rope import Rope, RopeScaling

RAW = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def write(folder: Path, content: object) -> Path:
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "config.json").write_text(text, encoding="utf-8")
    return folder


def test_defaults_are_those_of_transformers(tmp_path: Path) -> None:
    config, theirs = ModelConfig.from_folder(write(tmp_path, RAW)), LlamaConfig(**RAW)
    assert config.num_kv_heads == theirs.num_key_value_heads == 4
    assert config.head_dim == theirs.head_dim == 16
    assert config.norm_eps == theirs.rms_norm_eps
    assert config.layers == (Layer(None, Rope(theta=theirs.rope_parameters["rope_theta"], dims=16)),) * 2
    assert config.max_positions == theirs.max_position_embeddings
    flags = [config.tie_word_embeddings, config.qkv_bias, config.mlp_bias]
    assert flags == [theirs.tie_word_embeddings, theirs.attention_bias, theirs.mlp_bias] == [False] * 3


@pytest.mark.parametrize(
    "keys",
    [
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **LLAMA3}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
    ],
    ids=["rope_scaling", "its older spelling", "rope_parameters"],
)
def test_both_spellings_of_llama3_rope(keys: dict) -> None:
    (rope,) = {layer.rope for layer in tiny_config(**keys).layers}
    assert rope.theta == 5e5
    assert rope.scaling == RopeScaling(
        kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    )


@pytest.mark.parametrize("keys", [{"rope_scaling": None}, {"rope_parameters": {"rope_type": "default"}}, {}])
def test_plain_rope(keys: dict) -> None:
    assert {layer.rope for layer in tiny_config(**keys, rope_theta=1234).layers} == {Rope(theta=1234.0, dims=16)}


REFUSED = [
    ({"model_type": "qwen9"}, "model_type 'qwen9' is not supported; supported: llama"),
    ({"model_type": None}, "model_type None"),
    ({"vocab_size": 0}, "key 'vocab_size' must be a positive integer, got 0"),
    ({"hidden_size": "64"}, "key 'hidden_size' must be a positive integer, got '64'"),
    ({"num_hidden_layers": 2.0}, "key 'num_hidden_layers' must be a positive integer, got 2.0"),
    ({"num_attention_heads": True}, "key 'num_attention_heads' must be a positive integer, got True"),
    ({"intermediate_size": None}, "key 'intermediate_size' must be a positive integer, got None"),
    ({"num_key_value_heads": "2"}, "key 'num_key_value_heads' must be a positive integer, got '2'"),
    ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
    ({"head_dim": 7}, "head_dim 7 must be even"),
    ({"head_dim": -8}, "key 'head_dim' must be a positive integer, got -8"),
    ({"num_attention_heads": 128}, "key 'head_dim' must be a positive integer, got 0"),
    ({"max_position_embeddings": "long"}, "key 'max_position_embeddings' must be a positive integer"),
    ({"hidden_act": "relu"}, "hidden_act 'relu' is not supported; supported: silu"),
    ({"quantization_config": {"bits": 4}}, "quantised weights are not supported"),
    ({"rms_norm_eps": 0}, "key 'rms_norm_eps' must be a positive number, got 0"),
    ({"rope_theta": "ten"}, "key 'rope_theta' must be a positive number, got 'ten'"),
    ({"rope_theta": float("inf")}, "key 'rope_theta' must be a positive number, got inf"),
    ({"rope_scaling": [1]}, "must be an object, got list"),
    ({"rope_scaling": {"rope_type": "axial", "factor": 2.0}}, "rope_type 'axial' is not supported; supported: default"),
    ({"rope_scaling": {"rope_type": "yarn"}}, "key 'factor' must be a positive number, got None"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "key 'low_freq_factor' must be a positive number"),
    ({"rope_scaling": {"rope_type": "llama3", **LLAMA3, "low_freq_factor": 4.0}}, "must be below 'high_freq_factor'"),
]


@pytest.mark.parametrize(("changes", "problem"), REFUSED, ids=[str(next(iter(case[0].items()))) for case in REFUSED])
def test_refused(changes: dict, problem: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        ModelConfig.from_folder(write(tmp_path, {**RAW, **changes}))
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: ")
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", [key for key in RAW if key != "model_type"])
def test_missing_keys_are_named(key: str, tmp_path: Path) -> None:
    raw = {name: value for name, value in RAW.items() if name != key}
    with pytest.raises(ModelError, match=f"key '{key}' must be a positive integer, got None"):
        ModelConfig.from_folder(write(tmp_path, raw))


@pytest.mark.parametrize(
    ("content", "problem"), [("{", "is not valid JSON"), ("[1]", "expected a JSON object, got list")]
)
def test_not_a_config(content: str, problem: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=problem):
        ModelConfig.from_folder(write(tmp_path, content))


def test_not_a_model_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ModelError, match="is not valid JSON"):
        ModelConfig.from_folder(tmp_path)
    with pytest.raises(ModelError, match="no such folder; give a Hugging Face model folder as model.path"):
        ModelConfig.from_folder(tmp_path / "absent")
    (tmp_path / "config.json").unlink()
    with pytest.raises(ModelError, match="no config.json in it"):
        ModelConfig.from_folder(tmp_path)

"""Hugging Face weight folders: what is read and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from model_fixtures import random_decoder, random_group, tiny_config
from safetensors.torch import save_file
from torch import Tensor

from trainer.batch import build_stream
from trainer.errors import ModelError
from trainer.models.decoder import Decoder
from trainer.models.hf_weights import INDEX_FILE, SINGLE_FILE, hf_name, load_decoder, weight_files
from trainer.tensor_files import write_safetensors

ROOT = Path(__file__).resolve().parent.parent
RAW_CONFIG = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
}


def tensors_of(model: Decoder) -> dict[str, Tensor]:
    return {hf_name(name): parameter.detach().clone() for name, parameter in model.named_parameters()}


def write_folder(folder: Path, tensors: dict[str, Tensor], **changes: object) -> Path:
    """A model folder with one weight file."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**RAW_CONFIG, **changes}), encoding="utf-8")
    save_file(tensors, folder / SINGLE_FILE)
    return folder


def shard(folder: Path, tensors: dict[str, Tensor], number: int = 3) -> None:
    """Replace the folder's single file by an index and `number` files."""
    names = sorted(tensors)
    weight_map = {}
    for part in range(number):
        file = f"model-{part + 1:05d}-of-{number:05d}.safetensors"
        own = names[part::number]
        save_file({name: tensors[name] for name in own}, folder / file)
        weight_map |= dict.fromkeys(own, file)
    (folder / SINGLE_FILE).unlink(missing_ok=True)
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")


def assert_same_weights(model: Decoder, tensors: dict[str, Tensor]) -> None:
    found = tensors_of(model)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor), name


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    return tensors_of(random_decoder(tiny_config()))


# --- reading ---------------------------------------------------------------------------------------------------------


def test_names_are_those_of_transformers(tensors: dict[str, Tensor]) -> None:
    assert {name for name in tensors if not name.startswith("model.layers.")} == {
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
    }
    assert "model.layers.1.self_attn.k_proj.weight" in tensors


def test_single_file(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    model = load_decoder(write_folder(tmp_path, tensors))
    assert_same_weights(model, tensors)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_sharded(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    write_folder(tmp_path, tensors)
    shard(tmp_path, tensors)
    assert [path.name for path in weight_files(tmp_path)] == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    assert_same_weights(load_decoder(tmp_path), tensors)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("wanted", [torch.bfloat16, torch.float32])
def test_dtypes(tensors: dict[str, Tensor], stored: torch.dtype, wanted: torch.dtype, tmp_path: Path) -> None:
    in_file = {name: tensor.to(stored) for name, tensor in tensors.items()}
    model = load_decoder(write_folder(tmp_path, in_file), dtype=wanted)
    assert {parameter.dtype for parameter in model.parameters()} == {wanted}
    assert_same_weights(model, {name: tensor.to(wanted) for name, tensor in in_file.items()})


def test_weights_do_not_follow_the_file(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    """safetensors maps the file; a training run must not change when somebody writes over the model."""
    model = load_decoder(write_folder(tmp_path, tensors))
    with open(tmp_path / SINGLE_FILE, "r+b") as file:
        size = file.seek(0, 2)
        file.seek(size // 2)
        file.write(bytes(size - size // 2))
    assert_same_weights(model, tensors)


def test_a_tied_head_stored_twice_is_read_once(tmp_path: Path) -> None:
    tensors = tensors_of(random_decoder(tiny_config(tie_word_embeddings=True)))
    twice = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    model = load_decoder(write_folder(tmp_path, twice, tie_word_embeddings=True))
    assert model.head_weight is model.embed_tokens.weight
    assert_same_weights(model, tensors)


def test_old_rotary_buffers_are_passed_over(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    buffers = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    assert_same_weights(load_decoder(write_folder(tmp_path, {**tensors, **buffers})), tensors)


# --- refusing --------------------------------------------------------------------------------------------------------


def refused(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        load_decoder(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_tensor(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    del tensors["model.layers.1.mlp.up_proj.weight"], tensors["model.norm.weight"]
    message = refused(write_folder(tmp_path, tensors))
    assert message == (
        f"{tmp_path}: 2 tensors are missing, the first is 'model.layers.1.mlp.up_proj.weight'; download it again"
    )


def test_untied_config_needs_its_head(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    del tensors["lm_head.weight"]
    assert "the first is 'lm_head.weight'" in refused(write_folder(tmp_path, tensors))


def test_unknown_tensor(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    message = refused(write_folder(tmp_path, {**tensors, "model.layers.2.mlp.up_proj.weight": torch.ones(96, 64)}))
    assert message.startswith(f"{tmp_path / SINGLE_FILE}: tensor 'model.layers.2.mlp.up_proj.weight' is not part of")


def test_wrong_shape(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    tensors["model.layers.0.self_attn.k_proj.weight"] = torch.ones(64, 64)
    message = refused(write_folder(tmp_path, tensors))
    assert "'model.layers.0.self_attn.k_proj.weight' has shape (64, 64), config.json asks for (32, 64)" in message


def test_integers(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    tensors["model.norm.weight"] = torch.ones(64, dtype=torch.int64)
    assert "'model.norm.weight' has dtype torch.int64; a floating-point tensor is needed" in refused(
        write_folder(tmp_path, tensors)
    )


@pytest.mark.parametrize("keep", [0.99, 0.5, 0.0])
def test_truncated_file(tensors: dict[str, Tensor], keep: float, tmp_path: Path) -> None:
    path = write_folder(tmp_path, tensors) / SINGLE_FILE
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    assert f"{path}: is not a whole safetensors file" in refused(tmp_path)


def test_another_kind_of_file(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    write_folder(tmp_path, tensors)
    (tmp_path / SINGLE_FILE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n")
    assert "is not a whole safetensors file" in refused(tmp_path)


def test_no_weights(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    (write_folder(tmp_path, tensors) / SINGLE_FILE).rename(tmp_path / "pytorch_model.bin")
    assert "neither model.safetensors nor model.safetensors.index.json in it" in refused(tmp_path)


def test_missing_shard(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    write_folder(tmp_path, tensors)
    shard(tmp_path, tensors)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    message = refused(tmp_path)
    assert "file 'model-00002-of-00003.safetensors' is named by model.safetensors.index.json but is not" in message


@pytest.mark.parametrize(
    "index", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": [1]}}', '{"weight_map": {"a": 3}}']
)
def test_bad_index(index: str, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    write_folder(tmp_path, tensors)
    (tmp_path / INDEX_FILE).write_text(index, encoding="utf-8")
    assert INDEX_FILE in refused(tmp_path)


def test_write_then_load(tmp_path: Path) -> None:
    model = random_decoder(tiny_config())
    write_folder(tmp_path, {})
    write_safetensors(tmp_path / SINGLE_FILE, tensors_of(model).items())
    stream = build_stream([random_group((4, 3, 5))])
    with torch.no_grad():
        assert torch.equal(load_decoder(tmp_path)(stream), model(stream))

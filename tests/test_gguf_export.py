"""GGUF files from Hugging Face folders, against files written by the `gguf` package's own names and methods."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.gguf_fixtures import FAMILIES, KIND, MERGES, SPECIAL, TOKENS, logits, random_model, write_model
from trainer.errors import ModelError
from trainer.models import gguf_export, gguf_import

TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>\n{% endfor %}"


def write_folder(folder: Path, case: str, **changes: Any) -> Path:
    """The case's model as transformers saves it, with TOKENS as its tokenizer; `changes` go into config.json."""
    random_model(case).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | changes), encoding="utf-8")
    vocabulary = {token: i for i, token in enumerate(TOKENS)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[tuple(merge.split(" ")) for merge in MERGES]))
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"bos_token": SPECIAL[1], "eos_token": SPECIAL[2], "pad_token": SPECIAL[2]}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False, "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(named | settings), encoding="utf-8")
    return folder


def contents(path: Path) -> tuple[dict[str, Any], dict[str, tuple[str, np.ndarray]]]:
    """Keys and tensors as the `gguf` package reads them."""
    reader = gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    return fields, {tensor.name: (tensor.tensor_type.name, tensor.data) for tensor in reader.tensors}


@pytest.mark.parametrize("case", sorted(set(FAMILIES) - {"command-r-plus"}))
def test_same_file_as_by_the_packages_own_names(case: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "in", case)
    gguf_export.export(folder, tmp_path / "out.gguf", kind="f32")
    fields, tensors = contents(tmp_path / "out.gguf")
    wanted_fields, wanted = contents(write_model(tmp_path / "wanted.gguf", case, random_model(case)))
    assert {key: fields.get(key) for key in wanted_fields} == wanted_fields
    assert fields["general.file_type"] == 0 and fields["tokenizer.chat_template"] == TEMPLATE
    assert tensors.keys() == wanted.keys()
    for name, (kind, values) in wanted.items():
        assert tensors[name][0] == kind == "F32"
        if name == "rope_freqs.weight":  # computed in another order
            np.testing.assert_allclose(tensors[name][1], values, rtol=1e-6)
        else:
            np.testing.assert_array_equal(tensors[name][1], values, err_msg=name)


@pytest.mark.parametrize(("kind", "dtype"), [("f32", "float32"), ("f16", "float32"), ("bf16", "bf16")])
@pytest.mark.parametrize("case", ["llama3", "qwen2", "gemma3"])
def test_there_and_back_twice_is_bit_equal(kind: str, dtype: str, case: str, tmp_path: Path) -> None:
    """The first file may round, and a folder in bf16 its biases; from then on nothing changes, file or folder."""
    gguf_export.export(write_folder(tmp_path / "in", case), tmp_path / "1.gguf", kind=kind, name="x")
    for i in (1, 2):
        gguf_import.convert(tmp_path / f"{i}.gguf", tmp_path / f"out{i}", dtype=dtype)
        gguf_export.export(tmp_path / f"out{i}", tmp_path / f"{i + 1}.gguf", kind=kind, name="x")
    if dtype == "float32":
        assert (tmp_path / "1.gguf").read_bytes() == (tmp_path / "2.gguf").read_bytes()
    assert (tmp_path / "2.gguf").read_bytes() == (tmp_path / "3.gguf").read_bytes()
    names = {path.name for path in (tmp_path / "out1").iterdir()}
    assert names == {path.name for path in (tmp_path / "out2").iterdir()} and "chat_template.jinja" in names
    for name in names:
        assert (tmp_path / "out1" / name).read_bytes() == (tmp_path / "out2" / name).read_bytes(), name
    if kind == "f32":
        before, after = load_file(tmp_path / "in" / "model.safetensors"), load_file(tmp_path / "out1/model.safetensors")
        assert before.keys() == after.keys()
        for name, tensor in before.items():
            torch.testing.assert_close(after[name], tensor, rtol=0, atol=0)


def test_folder_comes_back_with_its_tokenizer(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "in", "qwen3")
    gguf_export.export(folder, tmp_path / "out.gguf", kind="f32")
    gguf_import.convert(tmp_path / "out.gguf", tmp_path / "out")
    before, after = (AutoTokenizer.from_pretrained(path) for path in (folder, tmp_path / "out"))
    text = "<|im_start|>the 12 <tool> the<|im_end|> naïve"
    assert after(text)["input_ids"] == before(text)["input_ids"]
    assert after.chat_template == before.chat_template and after.special_tokens_map == before.special_tokens_map
    models_ = [AutoModelForCausalLM.from_pretrained(path) for path in (folder, tmp_path / "out")]
    torch.testing.assert_close(logits(models_[1]), logits(models_[0]), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0"])
def test_types_of_tensors(kind: str, tmp_path: Path) -> None:
    """Matrices in the type asked for, norms and biases in float32; rows that 32 does not divide in float16."""
    folder = write_folder(tmp_path / "in", "qwen2", hidden_size=64)
    gguf_export.export(folder, tmp_path / "out.gguf", kind=kind)
    fields, tensors = contents(tmp_path / "out.gguf")
    assert fields["general.file_type"] == {"f16": 1, "bf16": 32, "q8_0": 7}[kind]
    weights = load_file(folder / "model.safetensors")
    for name, (stored, data) in tensors.items():
        assert stored == ("F32" if "norm" in name or name.endswith("bias") else kind.upper()), name
        if name == "blk.1.ffn_down.weight":
            expected = gguf.quants.quantize(weights["model.layers.1.mlp.down_proj.weight"].numpy(), KIND[kind.upper()])
            np.testing.assert_array_equal(np.asarray(data), expected)

    for layer in range(3):
        prefix = f"model.layers.{layer}.mlp"
        for module in ("gate_proj", "up_proj"):
            weights[f"{prefix}.{module}.weight"] = weights[f"{prefix}.{module}.weight"][:90].clone()
        weights[f"{prefix}.down_proj.weight"] = weights[f"{prefix}.down_proj.weight"][:, :90].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 90}))
    gguf_export.export(folder, tmp_path / "narrow.gguf", kind=kind)
    assert contents(tmp_path / "narrow.gguf")[1]["blk.0.ffn_down.weight"][0] == (
        "F16" if kind == "q8_0" else kind.upper()
    )


def test_shards_and_older_spellings(tmp_path: Path) -> None:
    """Weights in several files, bf16, and config.json as transformers 4 wrote it: the same file."""
    folder = write_folder(tmp_path / "in", "llama3")
    gguf_export.export(folder, tmp_path / "1.gguf", kind="f16", name="x")
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="100KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    assert len(list(folder.glob("*.safetensors"))) > 2
    config = json.loads((folder / "config.json").read_text())
    scaling = config.pop("rope_parameters")
    config |= {"rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling}
    (folder / "config.json").write_text(json.dumps(config))
    gguf_export.export(folder, tmp_path / "2.gguf", kind="f16", name="x")
    assert (tmp_path / "1.gguf").read_bytes() == (tmp_path / "2.gguf").read_bytes()


REFUSED = [
    (
        "llama",
        {"model_type": "mamba"},
        "model_type 'mamba' cannot be written as a GGUF; known: cohere, cohere2, gemma, ",
    ),
    ("llama", {"quantization_config": {"bits": 4}}, "the weights are quantised; export the unquantised model"),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic' is not written"),
    ("llama", {"hidden_act": "gelu"}, "key 'hidden_act' is gelu, llama.cpp computes llama models with silu"),
    ("llama", {"intermediate_size": 97}, "tensor 'model.layers.0.mlp.gate_proj.weight' has shape \\(96, 64\\), config"),
    ("llama", {"num_hidden_layers": 4}, "tensor 'model.layers.3.input_layernorm.weight' is missing"),
    ("llama", {"num_hidden_layers": 2}, "tensor 'model.layers.2.\\S+' has no place in a llama GGUF"),
    ("llama", {"num_hidden_layers": None}, "key 'num_hidden_layers' is missing"),
    ("llama", {"model_type": "mistral", "sliding_window": 64}, "'sliding_window' is 64, .* mistral models with None"),
    ("qwen2", {"use_sliding_window": True}, "key 'use_sliding_window' is True, llama.cpp computes qwen2 models with"),
    ("gemma2", {"query_pre_attn_scalar": 100}, "key 'query_pre_attn_scalar' is 100, llama.cpp .* with 24; this model"),
    ("gemma3", {"layer_types": ["full_attention"] * 7}, "key 'layer_types' is "),
    ("gemma3", {"final_logit_softcapping": 30.0}, "key 'final_logit_softcapping' is 30.0, .* with None"),
    ("command-r-plus", {}, "key 'use_qk_norm' is True, llama.cpp computes cohere models with False"),
    ("smollm3", {"no_rope_layers": [1, 0, 1, 0, 1]}, "key 'no_rope_layers' is "),
]


@pytest.mark.parametrize(
    ("case", "changes", "message"), REFUSED, ids=[f"{c}-{next(iter(k), '')}" for c, k, _ in REFUSED]
)
def test_what_llama_cpp_would_compute_differently(
    case: str, changes: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_folder(tmp_path / "in", case, **changes)
    with pytest.raises(ModelError, match=message):
        gguf_export.export(folder, tmp_path / "out.gguf")
    capsys.readouterr()
    assert gguf_export.main(["--model", str(folder), "--out", str(tmp_path / "out.gguf")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path / 'in'}") and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_mistral_is_llama_to_llama_cpp(tmp_path: Path) -> None:
    for name, changes in (("a", {}), ("b", {"model_type": "mistral", "sliding_window": None})):
        gguf_export.export(write_folder(tmp_path / name, "llama", **changes), tmp_path / f"{name}.gguf", name="x")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_values_beyond_float16(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "in", "llama")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][5, 7] = 70000.0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="'model.layers.1.mlp.up_proj.weight' has values beyond float16's 65504; use"):
        gguf_export.export(folder, tmp_path / "out.gguf", kind="f16")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    gguf_export.export(folder, tmp_path / "out.gguf", kind="bf16")


def test_places_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_folder(tmp_path / "in", "llama")
    (tmp_path / "mine.gguf").write_text("keep me")
    for out, message in (
        ("mine.gguf", "exists already; delete it"),
        ("no/such.gguf", "cannot be written: No such file"),
    ):
        assert gguf_export.main(["--model", str(folder), "--out", str(tmp_path / out)]) == 2
        assert f"{tmp_path / out}: {message}" in capsys.readouterr().err
    assert (tmp_path / "mine.gguf").read_text() == "keep me"
    with pytest.raises(ModelError, match="no config.json in it"):
        gguf_export.export(tmp_path / "nothing", tmp_path / "out.gguf")
    assert gguf_export.main(["--model", str(folder), "--out", str(tmp_path / "out.gguf"), "--type", "q8_0"]) == 0
    assert "weights in q8_0" in capsys.readouterr().out

"""Frozen bases that stay quantised: the model is that of the dequantised weights, and nothing whole is kept."""

import importlib.util
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from conftest import CHATML
from gguf_fixtures import random_model, write_model
from model_fixtures import random_group
from prm_fixtures import write_steps
from run_fixtures import arguments, run_here, run_ranks
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trainer.adapt import load_start
from trainer.batch import build_stream
from trainer.config import Config, from_tables
from trainer.errors import ModelError
from trainer.lora import lora_layers
from trainer.metrics import read_metrics
from trainer.models import gguf_import
from trainer.models.decoder import Decoder
from trainer.models.hf_weights import load_decoder
from trainer.quantised import GgufWeight, Nf4Weight, PackedWeight, packed_layers, packed_linear
from trainer.reference_cache import read_cache_file

KIND = gguf.GGMLQuantizationType
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
LN2 = 0.693147


def gguf_weight(kind: str, rows: int = 48, columns: int = 64) -> tuple[GgufWeight, Tensor]:
    """A packed random weight, and its values."""
    values = np.random.default_rng(3).normal(0, 0.2, (rows, columns)).astype(np.float32)
    data = gguf.quants.quantize(values, KIND[kind])
    return GgufWeight(torch.from_numpy(data), kind, values.shape), torch.from_numpy(
        gguf.quants.dequantize(data, KIND[kind])
    )


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
@pytest.mark.parametrize("biased", [False, True])
def test_products_and_gradients(kind: str, biased: bool) -> None:
    packed, values = gguf_weight(kind)
    bias = torch.randn(48) if biased else None
    x, grad = torch.randn(7, 64, requires_grad=True), torch.randn(7, 48)
    found = packed_linear(x, packed, bias)
    torch.testing.assert_close(found, nn.functional.linear(x, values, bias))
    found.backward(grad)
    torch.testing.assert_close(x.grad, grad @ values)


def test_neither_the_whole_weight_nor_the_input_is_kept_for_the_backward() -> None:
    packed, _ = gguf_weight("Q4_0")
    saved: list[tuple[int, ...]] = []
    x = torch.randn(7, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tuple(tensor.shape)), lambda _: None):
        packed_linear(x, packed, None)
    assert saved == []
    assert packed.num_bytes == 48 * 64 // 32 * 18


def q8(name: str, values: np.ndarray) -> tuple[np.ndarray, gguf.GGMLQuantizationType]:
    kind = KIND.F32 if values.ndim < 2 else KIND.Q4_1 if "ffn" in name else KIND.Q8_0 if "attn" in name else KIND.BF16
    return gguf.quants.quantize(values, kind), kind


@pytest.fixture(scope="module")
def gguf_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny Llama as a GGUF of several types, and as the folder that the import makes of it."""
    return make_gguf(tmp_path_factory.mktemp("gguf"), "llama")


def make_gguf(folder: Path, case: str) -> tuple[Path, Path]:
    path = write_model(folder / "m.gguf", case, random_model(case), q8)
    gguf_import.convert(path, folder / "hf")
    (folder / "chatml.jinja").write_text(CHATML, encoding="utf-8")
    return path, folder / "hf"


def config_of(folder: Path, path: Path | None, **lora: object) -> Config:
    quantise = {"quantise": "nf4"} if path is None else {"quantise": "gguf", "gguf": str(path)}
    return from_tables({"model": {"path": str(folder), **quantise}, "data": {"train": ["x"]}, "lora": lora})


def start(config: Config, dtype: torch.dtype = torch.float32, train: bool = True) -> Decoder:
    return load_start(config, dtype=dtype, adapter_dtype=torch.float32, wrap=lambda model: None, train=train)


@pytest.mark.parametrize("case", ["llama", "llama_biases", "phi3", "gemma2"])
def test_a_packed_gguf_is_the_imported_model(case: str, tmp_path: Path) -> None:
    """Log-probs and the gradients of adapters on half of the layers, against the dequantised base."""
    path, folder = make_gguf(tmp_path, case)
    targets = ["o_proj", "down_proj"]
    packed = start(config_of(folder, path, r=4, target_modules=targets))
    plain_config = from_tables(
        {"model": {"path": str(folder)}, "data": {"train": ["x"]}, "lora": {"r": 4, "target_modules": targets}}
    )
    plain = start(plain_config)
    stream = build_stream([random_group((9, 5, 6), seed=index) for index in range(3)])
    for model in (packed, plain):
        torch.manual_seed(0)
        for layer in lora_layers(model):
            layer.lora_B.data.normal_(0, 0.1)
        model(stream).sum().backward()
    with torch.no_grad():
        torch.testing.assert_close(packed(stream), plain(stream), rtol=1e-5, atol=2e-5)
    gradients = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    assert len(gradients) == 4 * len(plain.layers)
    for name, parameter in packed.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, gradients.pop(name), rtol=1e-4, atol=1e-4)
    assert not gradients
    with torch.no_grad():
        frozen = start(config_of(folder, path, r=4), train=False)
        torch.testing.assert_close(frozen(stream), load_decoder(folder)(stream), rtol=1e-5, atol=2e-5)
    kept = sum(layer.packed.num_bytes for layer in packed_layers(packed).values())
    weights = sum(layer.in_features * layer.out_features for layer in packed_layers(packed).values())
    assert kept / weights < 34 / 32, "bytes a weight: at most those of Q8_0"
    assert all(layer.weight is None for layer in packed_layers(packed).values())


def test_files_that_do_not_fit_are_refused(gguf_model: tuple[Path, Path], tmp_path: Path) -> None:
    path, folder = gguf_model
    smaller = tmp_path / "smaller"
    shutil.copytree(folder, smaller)
    text = (folder / "config.json").read_text(encoding="utf-8")
    (smaller / "config.json").write_text(text.replace('"intermediate_size": 96', '"intermediate_size": 128'))
    with pytest.raises(ModelError, match=r"shape \(96, 64\), config.json asks for \(128, 64\)"):
        start(config_of(smaller, path, r=4))
    (smaller / "config.json").write_text(text.replace('"num_hidden_layers": 3', '"num_hidden_layers": 4'))
    with pytest.raises(ModelError, match="tensors are missing, the first is 'model.layers.3"):
        start(config_of(smaller, path, r=4))


LORA = ("lora.r=4", "lora.alpha=8", "train.learning_rate=1e-2", "data.max_length=1000")


def run(folder: Path, name: str, model: Path, *overrides: str) -> list[dict]:
    argv = arguments(folder / name, model, *LORA, *overrides, f"data.chat_template={model.parent / 'chatml.jinja'}")
    assert run_here(argv) == 0
    return read_metrics(folder / name)


def losses(found: list[dict]) -> list[float]:
    return [row["loss"] for row in found]


def test_runs_on_a_gguf(gguf_model: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The curve of the imported model; its own reference; merged into the folder's weights, which are the same."""
    path, folder = gguf_model
    packed = ("model.quantise=gguf", f"model.gguf={path}")
    cache = f"reference.cache_dir={tmp_path / 'cache'}"
    found = run(tmp_path, "packed", folder, *packed, cache)
    assert f"note: export/ will be the weights in {folder}" in capsys.readouterr().out
    wanted = run(tmp_path, "plain", folder, cache)
    assert losses(found)[0] == pytest.approx(LN2, abs=1e-5)
    assert losses(found) == pytest.approx(losses(wanted), rel=1e-4)
    caches = (tmp_path / "cache").glob("*.safetensors")
    assert sorted(str(read_cache_file(file)[0]["quantisation"]) for file in caches) == ["gguf", "none"]
    merged, plain = (load_file(tmp_path / name / "export" / "model.safetensors") for name in ("packed", "plain"))
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, plain[name], rtol=1e-3, atol=1e-3)
    on = run(tmp_path, "on", folder, *packed, "lora.r=0", "lora.alpha=32", "reference.mode=model",
             f"lora.adapter={tmp_path / 'packed' / 'adapter'}")  # fmt: skip
    assert losses(on)[0] == pytest.approx(LN2, abs=1e-5)
    again = run(tmp_path, "mode", folder, *packed, "reference.mode=model", "train.activation_checkpointing=full")
    assert losses(again) == pytest.approx(losses(found), rel=1e-5)


def test_process_rewards_on_a_gguf(gguf_model: tuple[Path, Path], tmp_path: Path) -> None:
    """The curve of the imported model, the reward head included, which no GGUF has: it begins as zeros."""
    path, folder = gguf_model
    steps = (f"data.train={write_steps(tmp_path / 'steps.jsonl')}", "train.objective=prm")
    found = run(tmp_path, "packed", folder, *steps, "model.quantise=gguf", f"model.gguf={path}")
    wanted = run(tmp_path, "plain", folder, *steps)
    assert losses(found)[0] == pytest.approx(LN2, abs=1e-6) and abs(losses(found)[-1] - LN2) > 0.01
    assert losses(found) == pytest.approx(losses(wanted), rel=1e-4)
    heads = [
        load_file(tmp_path / name / "export" / "model.safetensors")["reward_head.weight"]
        for name in ("packed", "plain")
    ]
    torch.testing.assert_close(*heads, rtol=1e-3, atol=1e-4)


@pytest.mark.long
def test_two_ranks_hold_the_packed_weights_whole(gguf_model: tuple[Path, Path], tmp_path: Path) -> None:
    path, folder = gguf_model
    packed = ("model.quantise=gguf", f"model.gguf={path}")
    found = run(tmp_path, "one", folder, *packed)
    argv = arguments(tmp_path / "two", folder, *LORA, *packed, f"data.chat_template={folder.parent / 'chatml.jinja'}")
    assert run_ranks(argv, tmp_path, 2) == [0, 0]
    assert losses(read_metrics(tmp_path / "two")) == pytest.approx(losses(found), rel=2e-5)


def test_without_whole_weights_there_is_no_merge(
    gguf_model: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, folder = gguf_model
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "chatml.jinja").write_text(CHATML, encoding="utf-8")
    packed = ("model.quantise=gguf", f"model.gguf={path}", f"data.chat_template={tmp_path / 'chatml.jinja'}")
    assert run_here(arguments(tmp_path / "run", bare, *LORA, *packed)) == 2
    assert "lora.merge = true: there are no safetensors weights in" in capsys.readouterr().err
    run(tmp_path, "run", bare, *packed, "lora.merge=false", "train.max_steps=1")
    assert (tmp_path / "run" / "adapter").is_dir() and not (tmp_path / "run" / "export").exists()


def test_nf4_without_bitsandbytes_says_so(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    assert run_here(arguments(tmp_path / "run", tiny_model_dir, *LORA, "model.quantise=nf4")) == 2
    assert "model.quantise = nf4: the package bitsandbytes is not installed; pip install" in capsys.readouterr().err


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_values_and_bytes(dtype: torch.dtype) -> None:
    """Error and size of 4-bit NormalFloat with double quantisation (Dettmers et al. 2023, section 3)."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(576, 1536, generator=generator) * 0.02
    packed: PackedWeight = Nf4Weight(weight)
    found = packed.dequantise(dtype)
    assert found.dtype == dtype and found.shape == weight.shape
    # of normal weights, blocks of 64 lose about 9 % in 2-norm
    assert ((found.float() - weight).norm() / weight.norm()).item() == pytest.approx(0.092, abs=0.005)
    assert 8 * packed.num_bytes / weight.numel() < 4.15


@needs_bitsandbytes
def test_runs_on_nf4(tiny_model_dir: Path, tmp_path: Path) -> None:
    """The curve of a base that was rounded to NF4 and stored whole."""
    rounded = tmp_path / "rounded"
    shutil.copytree(tiny_model_dir, rounded)
    tensors = load_file(tiny_model_dir / "model.safetensors")
    for name, tensor in tensors.items():
        if "_proj" in name:
            tensors[name] = Nf4Weight(tensor).dequantise(torch.float32)
    save_file(tensors, rounded / "model.safetensors", metadata={"format": "pt"})

    def found(name: str, model: Path, *overrides: str) -> list[float]:
        assert run_here(arguments(tmp_path / name, model, *LORA, *overrides)) == 0
        return losses(read_metrics(tmp_path / name))

    own, wanted = found("own", tiny_model_dir, "model.quantise=nf4"), found("wanted", rounded)
    assert own[0] == pytest.approx(LN2, abs=1e-5)
    assert own == pytest.approx(wanted, rel=1e-4)
    merged = load_file(tmp_path / "own" / "export" / "model.safetensors")
    original = load_file(tiny_model_dir / "model.safetensors")
    gap = merged["model.layers.0.self_attn.q_proj.weight"] - original["model.layers.0.self_attn.q_proj.weight"]
    assert torch.linalg.matrix_rank(gap.double(), rtol=1e-5) == 4, "merged into the weights that were not quantised"

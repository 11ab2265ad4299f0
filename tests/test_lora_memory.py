"""The memory plan of runs with adapters against bytes counted in real tensors."""

from pathlib import Path

import pytest
import torch
from gguf_fixtures import random_model, write_model
from model_fixtures import random_decoder, random_group, tiny_config
from run_fixtures import arguments
from test_memory_plan import blocks_alone, kept_by, planned
from test_quantised import q8

from kernels.linear_logps import linear_logps
from kernels.rms_norm import rms_norm
from trainer.adapt import load_start
from trainer.batch import build_stream
from trainer.config import from_tables, load_config
from trainer.lora import LoraSettings, add_lora, init_new
from trainer.lora_memory import adapter_sizes
from trainer.memory_plan import Work, kept_per_token, plan_memory
from trainer.models.config import ModelConfig
from trainer.models.gguf_import import convert
from trainer.optim import AdamW, MasterWeights
from trainer.quantised import packed_layers


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("targets", ["all-linear", "q_proj,v_proj"])
def test_activations_are_what_blocks_with_adapters_keep(dora: bool, targets: str, tmp_path: Path) -> None:
    chosen = ("all-linear",) if targets == "all-linear" else tuple(targets.split(","))

    def kept(layers: int) -> int:
        model = random_decoder(tiny_config(num_hidden_layers=layers))
        settings = LoraSettings(r=4, alpha=8.0, target_modules=chosen, use_dora=dora)
        add_lora(model, settings)
        init_new(model, 0)
        run = blocks_alone(model, torch.float32)
        run()  # lengths of DoRA's rows are there from then on
        return sum(kept_by(run).values())

    settings = (f"lora.target_modules={targets}", f"lora.use_dora={str(dora).lower()}", "train.dtype=float32")
    config = load_config(arguments(tmp_path / "run", Path("x"), "lora.r=4", *settings))
    counted = 64 * 4 * (adapter_sizes(tiny_config(), config, 0).kept + kept_per_token(tiny_config(), 4) // 4)
    found = (kept(5) - kept(3)) / 2
    if targets == "all-linear":
        # DoRA also keeps each row's factor, and lengths between them
        assert counted <= found <= counted * (1.02 if dora else 1)
    else:
        assert found <= counted, "inputs of layers without an adapter are not kept, and not taken off"


def test_a_frozen_head_keeps_what_is_counted(tmp_path: Path) -> None:
    states = torch.randn(160, 64).requires_grad_()
    weight, scale, targets = torch.randn(4096, 64), torch.ones(64), torch.zeros(160, dtype=torch.int64)
    found = kept_by(lambda: linear_logps(rms_norm(states * 1, scale, 1e-5), weight, targets))
    counted = 160 * 64 * (2 * 4 + 4)
    assert sum(found.values()) <= counted + 160 * 4 * 8  # a few numbers a row
    assert sum(found.values()) >= 160 * 64 * 2 * 4


@pytest.mark.parametrize("dtype", ["float32", "bf16", "pure_bf16"])
def test_what_stays_is_counted_tensor_by_tensor(dtype: str, tmp_path: Path) -> None:
    compute = torch.float32 if dtype == "float32" else torch.bfloat16
    model = random_decoder(tiny_config(tie_word_embeddings=True), dtype=compute)
    add_lora(model, LoraSettings(r=4, alpha=8.0), dtype=torch.bfloat16 if dtype == "pure_bf16" else torch.float32)
    init_new(model, 0)
    masters = MasterWeights(model, compute_dtype=compute, pure=dtype == "pure_bf16")
    model(build_stream([random_group((4, 3, 5))])).sum().backward()
    masters.finish_backward()
    optimizer = AdamW(masters.masters, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    optimizer.step()
    plan = planned(tmp_path, f"train.dtype={dtype}", "lora.r=4")
    weights = {parameter.data_ptr(): parameter.nbytes for parameter in (*model.parameters(), *masters.masters)}
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert plan.parameters == sum(weights.values())
    assert plan.gradients == sum(master.grad.nbytes for master in masters.masters)
    assert plan.optimizer == sum(moment.nbytes for moment in moments)
    assert plan.snapshot == plan.optimizer + sum(master.nbytes for master in masters.masters)
    full = planned(tmp_path, f"train.dtype={dtype}")
    assert plan.gradients < full.gradients / 4 and plan.peak < full.peak


def test_packed_bytes_are_those_of_the_file(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", "llama", random_model("llama"), q8)
    convert(path, tmp_path / "hf")
    tables = {"model": {"path": str(tmp_path / "hf"), "quantise": "gguf", "gguf": str(path)}}
    config = from_tables({**tables, "data": {"train": ["x"]}, "lora": {"r": 4}})
    model = load_start(config, dtype=torch.bfloat16, adapter_dtype=torch.float32, wrap=lambda model: None, train=True)
    held = sum(layer.packed.num_bytes for layer in packed_layers(model).values())
    held += sum(parameter.nbytes for parameter in model.parameters() if not parameter.requires_grad)
    sizes = adapter_sizes(ModelConfig.from_folder(tmp_path / "hf"), config, 0)
    assert sizes.frozen == held
    assert sizes.dequantised == 96 * 64  # the query projection, or one of the MLP
    plan = plan_memory(ModelConfig.from_folder(tmp_path / "hf"), config, Work(100, 60, 2), 4)
    assert plan.gathered == 0, "packed weights are not sharded"

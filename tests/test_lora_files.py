"""Adapters in PEFT's format, both ways: peft computes with ours what we do, and we with theirs what peft does."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from family_fixtures import VARIANTS
from model_fixtures import random_group
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from data_tools.file_digests import FileDigests
from trainer.batch import build_stream
from trainer.errors import ModelError
from trainer.lora import LoraSettings, add_lora, init_new, lora_layers
from trainer.lora_files import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    adapter_digest,
    export_merged,
    gather_adapter,
    load_adapter,
    read_settings,
    save_adapter,
)
from trainer.models.decoder import Decoder
from trainer.models.hf_weights import load_decoder

CASES = {
    "plain": LoraSettings(r=4, alpha=8.0),
    "rslora": LoraSettings(r=4, alpha=3.5, use_rslora=True),
    "dora": LoraSettings(r=4, alpha=8.0, use_dora=True),
    "subset": LoraSettings(r=2, alpha=8.0, target_modules=("q_proj", "down_proj")),
    "dora_subset": LoraSettings(r=2, alpha=2.0, target_modules=("v_proj", "up_proj"), use_dora=True, use_rslora=True),
    "pattern": LoraSettings(r=3, alpha=6.0, target_modules=r".*layers\.1\.self_attn\.[qk]_proj"),
}
CLOSE = {"rtol": 1e-5, "atol": 2e-5}
"""float32, logits of a few units; products are summed in another order (2e-6 seen)."""
TOKENS = 17


def logits(model: Decoder) -> Tensor:
    with torch.no_grad():
        return model(build_stream([random_group((TOKENS, 1, 1))]), output="logits")[:TOKENS]


def their_logits(model: torch.nn.Module) -> Tensor:
    ids = torch.from_numpy(random_group((TOKENS, 1, 1)).ids[:TOKENS]).long()
    with torch.no_grad():
        return model(ids[None]).logits[0]


def our_model(folder: Path, settings: LoraSettings) -> Decoder:
    """With an adapter that is far from nothing."""
    model = load_decoder(folder)
    add_lora(model, settings)
    init_new(model, seed=3)
    torch.manual_seed(0)
    with torch.no_grad():
        for layer in lora_layers(model):
            layer.lora_B.normal_(0, 0.1)
            if settings.use_dora:
                layer.lora_magnitude_change.normal_(0, 0.1)
    return model


def save_ours(model: Decoder, folder: Path, base: Path) -> None:
    logits(model)
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    save_adapter(gather_adapter(model, named), folder, model, dropout=0.0, base=str(base))


@pytest.mark.parametrize("case", CASES)
def test_peft_loads_ours_and_we_load_ours(case: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    model = our_model(tiny_model_dir, CASES[case])
    wanted = logits(model)
    assert (wanted - logits(load_decoder(tiny_model_dir))).abs().max() > 0.1
    save_ours(model, tmp_path / "adapter", tiny_model_dir)
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {CONFIG_FILE, WEIGHTS_FILE}

    theirs = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_model_dir), tmp_path / "adapter"
    ).eval()
    torch.testing.assert_close(wanted, their_logits(theirs), **CLOSE)

    again = load_decoder(tiny_model_dir)
    add_lora(again, read_settings(tmp_path / "adapter"))
    load_adapter(again, tmp_path / "adapter")
    torch.testing.assert_close(logits(again), wanted, **CLOSE)

    export_merged(adapter_of(model), CASES[case], source=tiny_model_dir, folder=tmp_path / "merged")
    torch.testing.assert_close(logits(load_decoder(tmp_path / "merged")), wanted, **CLOSE)
    merged = their_logits(theirs.merge_and_unload())
    torch.testing.assert_close(their_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), merged, **CLOSE)


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "phi", "phi3", "cohere", "olmo2"])
@pytest.mark.parametrize("case", ["plain", "dora"])
def test_families(name: str, case: str, tmp_path: Path) -> None:
    """Fused and biased layers, plain MLPs, other names: all of them get an adapter, and peft finds them again."""
    VARIANTS[name].model().save_pretrained(tmp_path / "base")
    model = our_model(tmp_path / "base", CASES[case])
    wanted = logits(model)
    save_ours(model, tmp_path / "adapter", tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(wanted, their_logits(theirs), rtol=1e-4, atol=1e-4)
    linears = [module for module in theirs.modules() if hasattr(module, "lora_A") and len(module.lora_A)]
    assert len(linears) == len(lora_layers(model)) > 0
    export_merged(adapter_of(model), CASES[case], source=tmp_path / "base", folder=tmp_path / "merged")
    torch.testing.assert_close(logits(load_decoder(tmp_path / "merged")), wanted, rtol=1e-4, atol=1e-4)


def adapter_of(model: Decoder) -> dict:
    return gather_adapter(model, [(name, p) for name, p in model.named_parameters() if p.requires_grad])


@pytest.mark.parametrize("case", CASES)
def test_we_load_theirs(case: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    settings = CASES[case]
    targets = settings.target_modules
    config = peft.LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        target_modules=list(targets) if isinstance(targets, tuple) else targets,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        task_type="CAUSAL_LM",
        lora_dropout=0.05,
    )
    torch.manual_seed(1)
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_dir), config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name or "magnitude" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs.save_pretrained(tmp_path / "adapter")
    ours = load_decoder(tiny_model_dir)
    found = read_settings(tmp_path / "adapter")
    assert (found.r, found.scaling, found.use_dora) == (settings.r, settings.scaling, settings.use_dora)
    add_lora(ours, found)
    load_adapter(ours, tmp_path / "adapter")
    torch.testing.assert_close(logits(ours), their_logits(theirs), **CLOSE)
    # and what we make of it, saved again without a step, is theirs to the bit, lengths of DoRA too
    save_ours(ours, tmp_path / "again", tiny_model_dir)
    before, after = (load_file(tmp_path / name / WEIGHTS_FILE) for name in ("adapter", "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_merge_is_rounded_once_and_leaves_the_rest_alone(tiny_model_dir: Path, tmp_path: Path) -> None:
    """A base stored in bf16: float32 sums, one rounding; every other tensor and file byte for byte."""
    base = tmp_path / "base"
    shutil.copytree(tiny_model_dir, base)
    stored = {name: tensor.bfloat16() for name, tensor in load_file(tiny_model_dir / "model.safetensors").items()}
    save_file(stored, base / "model.safetensors", metadata={"format": "pt"})
    settings = LoraSettings(r=4, alpha=8.0, target_modules=("q_proj",))
    adapter = adapter_of(our_model(base, settings))
    export_merged(adapter, settings, source=base, folder=tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert merged.keys() == stored.keys()
    for name, tensor in merged.items():
        layer = adapter.get(name.removesuffix(".weight"))
        if layer is None:
            assert torch.equal(tensor, stored[name]), name
        else:
            exact = stored[name].double() + 2.0 * layer.B.double() @ layer.A.double()
            assert torch.equal(tensor, exact.float().bfloat16()), name
    for path in base.iterdir():
        if path.suffix != ".safetensors":
            assert (tmp_path / "merged" / path.name).read_bytes() == path.read_bytes()


def saved_adapter(tiny_model_dir: Path, folder: Path) -> dict:
    save_ours(our_model(tiny_model_dir, CASES["plain"]), folder, tiny_model_dir)
    return json.loads((folder / CONFIG_FILE).read_text())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("peft_type", "IA3"),
        ("bias", "all"),
        ("modules_to_save", ["lm_head"]),
        ("rank_pattern", {"q_proj": 8}),
        ("alpha_pattern", {"q_proj": 8}),
        ("layers_to_transform", [0]),
        ("layer_replication", [[0, 1]]),
        ("fan_in_fan_out", True),
        ("lora_bias", True),
        ("trainable_token_indices", [3]),
        ("exclude_modules", ["q_proj"]),
        ("init_lora_weights", "pissa"),
        ("use_something_new", True),
        ("r", 0),
        ("lora_alpha", "8"),
        ("target_modules", None),
    ],
)
def test_settings_that_we_do_not_have_are_refused_by_name(
    key: str, value: object, tiny_model_dir: Path, tmp_path: Path
) -> None:
    content = saved_adapter(tiny_model_dir, tmp_path / "a")
    (tmp_path / "a" / CONFIG_FILE).write_text(json.dumps({**content, key: value}))
    with pytest.raises(ModelError, match=f"key '{key}'"):
        read_settings(tmp_path / "a")


def test_tensors_that_do_not_fit_are_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    content = saved_adapter(tiny_model_dir, folder)
    tensors = load_file(folder / WEIGHTS_FILE)
    first = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"

    def refused(changed: dict[str, Tensor], match: str, **settings: object) -> None:
        save_file(changed, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        (folder / CONFIG_FILE).write_text(json.dumps({**content, **settings}))
        model = load_decoder(tiny_model_dir)
        with pytest.raises(ModelError, match=match):
            add_lora(model, read_settings(folder))
            load_adapter(model, folder)

    refused({name: tensor for name, tensor in tensors.items() if name != first}, "down_proj")
    refused({**tensors, first: tensors[first][:, :5].contiguous()}, r"is \(4, 5\), this model asks for \(4, 128\)")
    refused({**tensors, "base_model.model.lm_head.weight": tensors[first].clone()}, "lm_head")
    refused(tensors, "in the file and not chosen by", target_modules=["q_proj"])
    refused(tensors, "lora_magnitude_vector", use_dora=True)
    (folder / WEIGHTS_FILE).write_bytes(b"x")
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        load_adapter(our_model(tiny_model_dir, CASES["plain"]), folder)


def test_the_digest_is_of_tensors_scaling_and_base(tiny_model_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    content = saved_adapter(tiny_model_dir, folder)

    def digest(base: str = "base", **settings: object) -> str:
        (folder / CONFIG_FILE).write_text(json.dumps({**content, **settings}))
        return adapter_digest(folder, base, FileDigests(tmp_path / "digests.json"))

    own = digest()
    assert own == digest(base_model_name_or_path="moved", lora_dropout=0.1)
    others = {digest("other"), digest(lora_alpha=9), digest(use_dora=True), digest(use_rslora=True)}
    assert len(others) == 4 and own not in others

"""The exported folder: transformers loads it as it is and gives our decoder's logits; files go along byte for byte."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from run_fixtures import contents
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from data_tools.encode import Group
from data_tools.tokenizer import load_tokenizer
from trainer import export as export_module
from trainer.batch import build_stream
from trainer.errors import ModelError, RunError
from trainer.export import export, planned_entries
from trainer.models.decoder import Decoder
from trainer.models.hf_weights import hf_name, load_decoder
from trainer.parts import Part, parts_of

TEXT = "<|im_start|>user\nIs it so? Ça va, 你好!<|im_end|>\n<|im_start|>assistant\nyes <|im_end|>\n"


def trained(folder: Path) -> Decoder:
    """The folder's model with every weight moved, as after training."""
    model = load_decoder(folder)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model


def logits_of(model: Decoder, ids: list[int]) -> torch.Tensor:
    group = Group("x", np.array(ids, dtype=np.int32), (len(ids) - 1, 1), ((), ((0, 1),)))
    with torch.no_grad():
        return model(build_stream([group]), output="logits")


def assert_transformers_agrees(folder: Path, model: Decoder, *, tolerance: float) -> None:
    ids = load_tokenizer(folder).encode(TEXT)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer(TEXT, add_special_tokens=False)["input_ids"] == ids
    found, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report  # no key missing, unexpected or of another shape
    with torch.no_grad():
        theirs = found(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(theirs, logits_of(model, ids), atol=tolerance, rtol=tolerance)


@pytest.fixture
def tied_dir(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """The tiny model with its embedding as the head."""
    folder = tmp_path / "tied"
    shutil.copytree(tiny_model_dir, folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_transformers_loads_it_with_our_logits(tiny_model_dir: Path, tmp_path: Path) -> None:
    model = trained(tiny_model_dir)
    export(model.named_parameters(), source=tiny_model_dir, folder=tmp_path / "export")
    assert_transformers_agrees(tmp_path / "export", model, tolerance=1e-5)
    assert not torch.equal(model.norm.weight, load_decoder(tiny_model_dir).norm.weight)


def test_a_tied_head_is_not_written_twice(tied_dir: Path, tmp_path: Path) -> None:
    model = trained(tied_dir)
    export(model.named_parameters(), source=tied_dir, folder=tmp_path / "export")
    assert "lm_head.weight" not in load_file(tmp_path / "export" / "model.safetensors")
    assert_transformers_agrees(tmp_path / "export", model, tolerance=1e-5)


def test_a_large_model_is_cut_into_files_with_an_index(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_module, "MAX_FILE_BYTES", 100_000)
    model, folder = trained(tiny_model_dir), tmp_path / "export"
    export(model.named_parameters(), source=tiny_model_dir, folder=folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert sorted(set(index["weight_map"].values())) == files
    sizes = [tensor.numel() * 4 for tensor in model.parameters()]
    assert index["metadata"] == {"total_size": sum(sizes)}
    for name in files:
        with safe_open(folder / name, framework="pt") as file:
            assert {key for key, owner in index["weight_map"].items() if owner == name} == set(file.keys())
    assert_transformers_agrees(folder, model, tolerance=1e-5)
    # a sharded start leaves no index behind when the export fits one file
    monkeypatch.setattr(export_module, "MAX_FILE_BYTES", 10**9)
    export(model.named_parameters(), source=folder, folder=tmp_path / "again")
    assert {path.name for path in (tmp_path / "again").glob("model*")} == {"model.safetensors"}
    assert_transformers_agrees(tmp_path / "again", model, tolerance=1e-5)


def test_weights_are_written_in_the_dtype_they_came_in(tiny_model_dir: Path, tmp_path: Path) -> None:
    source = tmp_path / "bf16"
    shutil.copytree(tiny_model_dir, source)
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(source / "model.safetensors").items()}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    model = trained(source)
    export(model.named_parameters(), source=source, folder=tmp_path / "export")
    written = load_file(tmp_path / "export" / "model.safetensors")
    for name, parameter in model.named_parameters():
        key = name if name.startswith("lm_head") else f"model.{name}"
        assert torch.equal(written[key], parameter.bfloat16()), name
    rounded = load_decoder(tmp_path / "export")
    assert_transformers_agrees(tmp_path / "export", rounded, tolerance=1e-5)


def test_each_weight_keeps_the_dtype_it_came_in(tiny_model_dir: Path, tmp_path: Path) -> None:
    source = tmp_path / "mixed"
    shutil.copytree(tiny_model_dir, source)
    tensors = load_file(source / "model.safetensors")
    stored = {name: tensor if "norm" in name else tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(stored, source / "model.safetensors", metadata={"format": "pt"})
    export(load_decoder(source).named_parameters(), source=source, folder=tmp_path / "export")
    written = load_file(tmp_path / "export" / "model.safetensors")
    assert {name: tensor.dtype for name, tensor in written.items()} == {n: t.dtype for n, t in stored.items()}
    assert all(torch.equal(written[name], stored[name]) for name in stored)


def parts_of_model(folder: Path) -> list[Part]:
    return parts_of((hf_name(name), tensor) for name, tensor in load_decoder(folder).named_parameters())


def test_what_would_not_fit_the_source_is_found_without_writing(tiny_model_dir: Path, tmp_path: Path) -> None:
    parts = parts_of_model(tiny_model_dir)
    entries = planned_entries(parts, tiny_model_dir)
    stored = load_file(tiny_model_dir / "model.safetensors")
    assert {entry.name: (entry.dtype, entry.shape) for entry in entries} == {
        name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in stored.items()
    }
    renamed = [part._replace(name="model.other.weight") if "q_proj" in part.name else part for part in parts]
    with pytest.raises(ModelError, match=r"has no tensor 'model.other.weight', which this model would export"):
        planned_entries(renamed, tiny_model_dir)
    wider = [part._replace(shape=(part.shape[0] + 1, *part.shape[1:])) for part in parts]
    with pytest.raises(ModelError, match=r"is \(\d+, 64\) torch.float32, this model would export \(\d+, 64\); use"):
        planned_entries(wider, tiny_model_dir)
    with pytest.raises(ModelError, match=r"tensor 'model.norm.weight' would be missing from the export"):
        planned_entries([part for part in parts if part.name != "model.norm.weight"], tiny_model_dir)
    save_file({name: tensor.int() for name, tensor in stored.items()}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"None, this model would export"):  # a dtype that no export has
        planned_entries(parts, tmp_path)


def test_what_is_beside_the_weights_goes_along_byte_for_byte(tiny_model_dir: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_model_dir, source)
    others = {"generation_config.json": b"{ }\r\n", "chat_template.jinja": b"{{ 1 }}", "LICENSE": b"free\n"}
    for name, content in others.items():
        (source / name).write_bytes(content)
    (source / "training_args.bin").write_bytes(b"pickle")
    export(trained(source).named_parameters(), source=source, folder=tmp_path / "export")
    before, after = contents(source), contents(tmp_path / "export")
    assert after.keys() == before.keys() - {"training_args.bin"}
    for name in after.keys() - {"model.safetensors"}:
        assert after[name] == before[name], name


def test_a_failed_export_leaves_the_old_one_whole(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = trained(tiny_model_dir), tmp_path / "export"
    export(model.named_parameters(), source=tiny_model_dir, folder=folder)
    before = contents(tmp_path)

    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_module, "SafetensorsWriter", refuse)
    with pytest.raises(
        RunError, match="export: the export cannot be written \\(No space left on device\\); free space"
    ):
        export(model.named_parameters(), source=tiny_model_dir, folder=folder)
    assert contents(tmp_path) == before

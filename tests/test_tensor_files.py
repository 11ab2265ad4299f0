"""Safetensors files: a writer that keeps no second copy, and rows that any number of ranks wrote and others read."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint import load as dcp_load

from data_tools.file_digests import hash_file
from trainer.errors import CheckpointError
from trainer.parts import Part, parts_of
from trainer.tensor_files import Entry, RowReader, SafetensorsWriter, write_parts, write_safetensors

ROOT = Path(__file__).resolve().parent.parent

# --- writing ---------------------------------------------------------------------------------------------------------


def mixed_tensors() -> dict[str, Tensor]:
    """Every dtype of a checkpoint, in an order that would put wide numbers at odd places, and views of all kinds."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(5, 7, generator=generator)
    return {
        "bytes": torch.arange(5, dtype=torch.uint8),
        "half": numbers.half(),
        "transposed": numbers.T,
        "wide": numbers.double(),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "brain": numbers.bfloat16(),
        "part": numbers[1:3, ::2],
        "counts": torch.tensor([2**40, -1]),
        "parameter": torch.nn.Parameter(numbers),
    }


def test_written_tensors_are_read_back_bit_for_bit(tmp_path: Path) -> None:
    tensors = mixed_tensors()
    write_safetensors(tmp_path / "x.safetensors", tensors.items())
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(found[name], tensor), name
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}  # transformers refuses files without it


def test_every_tensor_lies_at_a_multiple_of_its_item_size(tmp_path: Path) -> None:
    tensors = mixed_tensors()
    write_safetensors(tmp_path / "x.safetensors", tensors.items())
    raw = (tmp_path / "x.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    assert size % 8 == 0
    for name, tensor in tensors.items():
        assert header[name]["data_offsets"][0] % tensor.element_size() == 0, name


def test_a_tensor_is_written_in_the_dtype_that_was_announced(tmp_path: Path) -> None:
    numbers = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    write_converted(tmp_path / "x.safetensors", {"a": numbers, "b": numbers.double()}, torch.bfloat16)
    found = load_file(tmp_path / "x.safetensors")
    assert found["a"].dtype == torch.bfloat16 and torch.equal(found["a"], numbers.bfloat16())
    assert torch.equal(found["b"], numbers.double().bfloat16())


def write_converted(path: Path, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    entries = [Entry(name, dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    with SafetensorsWriter(path, entries) as writer:
        for entry in writer.entries:
            writer.write(tensors[entry.name])


def test_the_digest_is_that_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    parts = parts_of(mixed_tensors().items())
    assert write_parts(path, parts, sharded=False) == {"bytes": path.stat().st_size, "sha256": hash_file(path)}
    assert path.read_bytes()  # and of a file with rows of tensors
    assert write_parts(path, pieces_of(mixed_tensors(), 2)[1], sharded=True)["sha256"] == hash_file(path)


WRITE_AND_MEASURE = """
import sys, torch
sys.path.insert(0, "tests")
from test_tensor_files import write_converted
from trainer.metrics import peak_memory_mib
tensors = {f"t{i}": torch.ones(2**24) for i in range(4)}
write_converted(sys.argv[1], {"warm": torch.ones(8)}, torch.bfloat16)
for dtype in (torch.float32, torch.bfloat16):
    before = peak_memory_mib()
    write_converted(sys.argv[1], tensors, dtype)
    print(peak_memory_mib() - before)
"""


def test_no_second_copy_in_memory(tmp_path: Path) -> None:
    """Four float32 tensors of 64 MiB in a process of its own; converted ones have 32, of which one is held at a time.

    (Smaller ones would show what malloc keeps for later rather than what is held.)
    """
    path = tmp_path / "x.safetensors"
    command = [sys.executable, "-c", WRITE_AND_MEASURE, str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    as_they_are, converted = (float(line) for line in done.stdout.split())
    assert path.stat().st_size > 4 * 2**24 * torch.bfloat16.itemsize
    assert as_they_are <= 2
    assert converted <= 1.5 * 32
    path.unlink()


# --- by rows ---------------------------------------------------------------------------------------------------------


def pieces_of(tensors: dict[str, Tensor], ranks: int) -> list[list[Part]]:
    """What each of so many ranks holds, cut as torch.chunk cuts: later ranks may have fewer rows, or none."""
    held: list[list[Part]] = [[] for _ in range(ranks)]
    for name, tensor in tensors.items():
        if tensor.ndim == 0:
            held[0].append(Part(name, tensor, (), 0))
            continue
        each = -(-len(tensor) // ranks)
        for rank in range(ranks):
            start = min(rank * each, len(tensor))
            rows = tensor[start : start + each]
            if len(rows):
                held[rank].append(Part(name, rows, tuple(tensor.shape), start))
    return held


def tensors_of_all_kinds() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "matrix": torch.randn(7, 3, generator=generator),
        "vector": torch.randn(5, generator=generator),
        "few rows": torch.randn(2, 4, generator=generator).bfloat16(),
        "scalar": torch.tensor(12.0),
    }


def write_ranks(folder: Path, tensors: dict[str, Tensor], ranks: int) -> list[Path]:
    paths = [folder / f"model-{rank + 1:05d}-of-{ranks:05d}.safetensors" for rank in range(ranks)]
    for path, parts in zip(paths, pieces_of(tensors, ranks), strict=True):
        write_parts(path, parts, sharded=ranks > 1)
    return paths


@pytest.mark.parametrize("wrote", [1, 2, 3, 4])
@pytest.mark.parametrize("reads", [1, 2, 4])
def test_what_some_ranks_wrote_others_read(wrote: int, reads: int, tmp_path: Path) -> None:
    tensors = tensors_of_all_kinds()
    with RowReader(tmp_path, write_ranks(tmp_path, tensors, wrote)) as reader:
        for part in (part for parts in pieces_of(tensors, reads) for part in parts):
            wanted, found = part.tensor, torch.full_like(part.tensor, float("nan"))
            reader.read(part._replace(tensor=found))
            assert torch.equal(found, wanted), part.name


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("wrote", [1, 3])
def test_torch_distributed_checkpoint_reads_rows(wrote: int, tmp_path: Path) -> None:
    tensors = tensors_of_all_kinds()
    write_ranks(tmp_path, tensors, wrote)
    found = {name: torch.full_like(tensor, float("nan")) for name, tensor in tensors.items()}
    dcp_load(found, storage_reader=HuggingFaceStorageReader(str(tmp_path)), no_dist=True)
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor), name


def read_matrix(folder: Path, paths: list[Path], shape: tuple[int, ...] = (7, 3)) -> None:
    with RowReader(folder, paths) as reader:
        reader.read(Part("matrix", torch.empty(shape), shape, 0))


def test_rows_that_are_missing_or_there_twice_are_named(tmp_path: Path) -> None:
    paths = write_ranks(tmp_path, tensors_of_all_kinds(), 3)  # rows 0-2, 3-5, 6
    read_matrix(tmp_path, paths)
    with pytest.raises(CheckpointError, match="rows 3 to 6 of tensor 'matrix' are missing; resume from another step"):
        read_matrix(tmp_path, [paths[0], paths[2]])
    with pytest.raises(CheckpointError, match=r"tensor 'matrix' is \(6, 3\) torch.float32, this run has \(7, 3\)"):
        read_matrix(tmp_path, paths[:2])
    with pytest.raises(CheckpointError, match="rows 3 to 6 of tensor 'matrix' are in it twice"):
        read_matrix(tmp_path, [paths[0], paths[1], paths[1], paths[2]])
    with pytest.raises(CheckpointError, match=r"tensor 'matrix' is \(7, 3\) .* this run has \(7, 4\)"):
        read_matrix(tmp_path, paths, (7, 4))
    with pytest.raises(CheckpointError, match="no tensor 'matrix' in it"):
        read_matrix(tmp_path, [])


@pytest.mark.parametrize("content", [b"", b"\0" * 20, b"PK\x03\x04 a pickle"])
def test_a_file_of_another_kind_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="x.safetensors: is not a whole safetensors file"):
        read_matrix(tmp_path, [tmp_path / "x.safetensors"])


def test_offsets_that_are_no_offsets_are_named(tmp_path: Path) -> None:
    for text in ("[1", '{"matrix": {}}', '{"matrix": {"saved_offsets": ["a"]}}'):
        save_file({"matrix": torch.ones(7, 3)}, tmp_path / "x.safetensors", metadata={"DCP_SHARDING_INFO": text})
        with pytest.raises(CheckpointError, match="x.safetensors: is not a whole safetensors file"):
            read_matrix(tmp_path, [tmp_path / "x.safetensors"])

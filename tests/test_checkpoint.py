"""Checkpoints: every bit comes back, others read them, a save needs no second copy, damage and strangers are named."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from run_fixtures import call_in_child, contents
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint import load as dcp_load

from trainer import checkpoint
from trainer.checkpoint import Manifest, find_damage, read_manifest, remove_old, replace_folder
from trainer.errors import CheckpointError, RunError
from trainer.models.decoder import Decoder
from trainer.models.hf_weights import iter_weights, load_decoder
from trainer.optim import MasterWeights
from trainer.tensor_files import write_safetensors

MANIFEST = Manifest(
    step=7, config="[run]\n", data_digest="d", weights_digest="w", world_size=1, threads=2, choices={"impl": "cpu"}
)


class State:
    """A model with master weights and an optimizer; `update` makes one step with gradients drawn from a seed."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32, *, pure: bool = False) -> None:
        model: Decoder = load_decoder(folder, dtype=torch.bfloat16 if pure else torch.float32)
        self.masters = MasterWeights(model, compute_dtype=dtype, pure=pure)
        self.optimizer = torch.optim.AdamW(self.masters.masters, lr=1e-2, fused=True)

    def update(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for tensor in self.masters.masters:
            tensor.grad = torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
        self.optimizer.step()

    def tensors(self) -> dict[str, torch.Tensor]:
        """Masters and optimizer state by name, as they are (not copies)."""
        found = dict(self.masters.named())
        for name, tensor in self.masters.named():
            found |= {f"{key}.{name}": value for key, value in self.optimizer.state[tensor].items()}
        return found


def save(folder: Path, state: State) -> None:
    checkpoint.save(folder, MANIFEST, checkpoint.state_of(state.masters.named(), state.optimizer))


def load(folder: Path, state: State) -> None:
    checkpoint.load(folder, state.masters.named(), state.optimizer)


@pytest.fixture(scope="module")
def trained(tiny_model_dir: Path) -> State:
    state = State(tiny_model_dir)
    state.update(1)
    state.update(2)
    return state


@pytest.fixture
def saved(trained: State, tmp_path: Path) -> Path:
    save(tmp_path / "step_7", trained)
    return tmp_path / "step_7"


# --- back and forth --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "pure"), [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)], ids=str
)
def test_every_bit_comes_back_and_the_next_update_is_the_same(
    dtype: torch.dtype, pure: bool, tiny_model_dir: Path, tmp_path: Path
) -> None:
    state, other = State(tiny_model_dir, dtype, pure=pure), State(tiny_model_dir, dtype, pure=pure)
    state.update(1)
    state.update(2)
    save(tmp_path / "step_2", state)
    load(tmp_path / "step_2", other)
    for _ in range(2):
        assert state.tensors().keys() == other.tensors().keys()
        for name, tensor in state.tensors().items():
            assert tensor.dtype == other.tensors()[name].dtype and torch.equal(tensor, other.tensors()[name]), name
        state.update(3)
        other.update(3)


def test_the_manifest_says_what_the_folder_holds(saved: Path) -> None:
    raw = json.loads((saved / "manifest.json").read_text(encoding="utf-8"))
    assert read_manifest(saved) == MANIFEST
    assert set(raw["files"]) == {"model.safetensors", "optimizer.safetensors"}
    assert {path.name for path in saved.iterdir()} == {*raw["files"], "manifest.json"}
    for name, entry in raw["files"].items():
        content = (saved / name).read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert raw["format"] == 1 and raw["torch"] == torch.__version__ and raw["choices"] == {"impl": "cpu"}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torch_distributed_checkpoint_reads_it(saved: Path, trained: State) -> None:
    names = {
        name if name.startswith("lm_head") else f"model.{name}": tensor for name, tensor in trained.masters.named()
    }
    wanted = dict(names)
    for name, tensor in names.items():
        wanted |= {f"{key}.{name}": value for key, value in trained.optimizer.state[tensor].items()}
    found = {name: torch.full_like(tensor, float("nan")) for name, tensor in wanted.items()}
    dcp_load(found, storage_reader=HuggingFaceStorageReader(str(saved)), no_dist=True)
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


def _measure_save(out: Path) -> None:
    """Writes MiB held before a save and the most held during it, with 64 MiB of weights in tensors of 4 MiB."""
    model = nn.ParameterDict({f"w{i}": nn.Parameter(torch.full((1024, 1024), float(i))) for i in range(16)})
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    checkpoint.save(out / "warm", MANIFEST, checkpoint.state_of([("w0", model["w0"])], optimizer))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status("VmRSS")
    checkpoint.save(out / "step_1", MANIFEST, checkpoint.state_of(model.items(), optimizer))
    (out / "memory").write_text(json.dumps([before, _status("VmHWM")]))


def _status(name: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to reset the peak of memory")
def test_a_save_holds_no_second_copy(tmp_path: Path) -> None:
    call_in_child(_measure_save, tmp_path)
    before, peak = json.loads((tmp_path / "memory").read_text())
    files = sum(path.stat().st_size for path in (tmp_path / "step_1").glob("*.safetensors")) / 2**20
    assert files > 190  # weights and two moments
    assert before > 190
    assert peak - before < 24, (before, peak)  # a tensor or two of 4 MiB, not 64, let alone 192


# --- whole or not at all ---------------------------------------------------------------------------------------------


def test_a_new_folder_takes_the_place_of_an_old_one(tmp_path: Path) -> None:
    for name in ("step_1", "step_1.tmp", "step_1.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    replace_folder(tmp_path / "step_1.tmp", tmp_path / "step_1")
    assert contents(tmp_path) == {"step_1/file": b"step_1.tmp"}
    assert [path.name for path in tmp_path.iterdir()] == ["step_1"]


def test_a_failed_save_names_the_reason_and_leaves_what_was_there(
    saved: Path, trained: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(saved.parent)

    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_parts", refuse)
    with pytest.raises(
        RunError, match="step_7: the checkpoint cannot be written \\(No space left on device\\); earlier"
    ):
        save(saved, trained)
    assert contents(saved.parent) == before and [path.name for path in saved.parent.iterdir()] == ["step_7"]


def test_old_steps_go_by_number_and_later_ones_are_left_alone(tmp_path: Path) -> None:
    for name in ("step_2", "step_9", "step_10", "step_11", "step_30", "step_5.tmp", "notes"):
        (tmp_path / name).mkdir()
    remove_old(tmp_path, 2, step=11)
    assert {path.name for path in tmp_path.iterdir()} == {"step_10", "step_11", "step_30", "step_5.tmp", "notes"}
    remove_old(tmp_path, 2, step=11)
    assert (tmp_path / "step_10").is_dir()


# --- damage and strangers --------------------------------------------------------------------------------------------


def edit(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """A change of manifest.json; what `change` returns (if anything) takes the place of the whole."""

    def apply(folder: Path) -> None:
        path = folder / "manifest.json"
        raw = json.loads(path.read_text(encoding="utf-8"))
        replacement = change(raw)
        path.write_text(json.dumps(raw if replacement is None else replacement), encoding="utf-8")

    return apply


def cut(name: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / name
        path.write_bytes(path.read_bytes()[:-1])

    return apply


BAD_FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "has no manifest.json: not a complete checkpoint"),
    "no folder": (shutil.rmtree, "has no manifest.json: not a complete checkpoint"),
    "torn manifest": (cut("manifest.json"), "manifest.json: is not a checkpoint manifest"),
    "a list": (edit(lambda raw: [raw]), "manifest.json: is not a checkpoint manifest"),
    "not UTF-8": (lambda f: (f / "manifest.json").write_bytes(b"\xff"), "manifest.json: is not a checkpoint manifest"),
    "no files": (edit(lambda raw: raw.pop("files") and None), "manifest.json: is not a checkpoint manifest"),
    "files without sizes": (
        edit(lambda raw: raw.update(files={"a": 1})),
        "manifest.json: is not a checkpoint manifest",
    ),
    "no step": (edit(lambda raw: raw.pop("step") and None), "manifest.json: is not a checkpoint manifest"),
    "an unknown key": (edit(lambda raw: raw.update(colour=1)), "manifest.json: is not a checkpoint manifest"),
    "a step of words": (edit(lambda raw: raw.update(step="seven")), "manifest.json: 'step' must be a whole number"),
    "another format": (edit(lambda raw: raw.update(format=9, shards=3)), "manifest.json: has format 9, this version"),
    "a lost file": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors: is missing or cut short"),
    "a cut file": (cut("optimizer.safetensors"), "optimizer.safetensors: is missing or cut short"),
}


@pytest.mark.parametrize("kind", BAD_FOLDERS)
def test_a_folder_that_is_no_whole_checkpoint_is_named(kind: str, saved: Path) -> None:
    damage, words = BAD_FOLDERS[kind]
    damage(saved)
    with pytest.raises(CheckpointError) as caught:
        read_manifest(saved)
    message = str(caught.value)
    assert message.startswith(str(saved)) and words in message and "\n" not in message, message
    assert "resume from another step" in message or "use the version that wrote it" in message


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize("place", [0.1, 0.5, 0.999])
def test_a_flipped_bit_is_found_by_the_rank_that_hashes_the_file(name: str, place: float, saved: Path) -> None:
    assert find_damage(saved) is None
    raw = bytearray((saved / name).read_bytes())
    raw[int(len(raw) * place)] ^= 4
    (saved / name).write_bytes(bytes(raw))
    wanted = f"{name} differs from its sha256 in the manifest; resume from another step"
    assert find_damage(saved) == wanted
    found = [find_damage(saved, rank=rank, world_size=3) for rank in range(3)]
    assert found == ([wanted, None, None] if name.startswith("model") else [None, wanted, None])


@pytest.mark.parametrize("old, new", [('"step": 7', '"step": 6'), ('"data_digest": "d"', '"data_digest": "e"')])
def test_a_changed_letter_of_the_manifest_is_found(old: str, new: str, saved: Path) -> None:
    text = (saved / "manifest.json").read_text(encoding="utf-8")
    assert old in text
    (saved / "manifest.json").write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(CheckpointError, match="manifest.json: differs from its own digest; resume from another step"):
        read_manifest(saved)


def test_a_checkpoint_of_another_dtype_or_model_is_refused(saved: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"float32, this run has \(\d+, \d+\) torch.bfloat16"):
        load(saved, State(tiny_model_dir, torch.bfloat16, pure=True))
    smaller = tmp_path / "smaller"
    shutil.copytree(tiny_model_dir, smaller)
    config = json.loads((smaller / "config.json").read_text(encoding="utf-8")) | {"intermediate_size": 96}
    (smaller / "config.json").write_text(json.dumps(config), encoding="utf-8")
    _cut_intermediate(smaller, 96)
    with pytest.raises(
        CheckpointError, match=r"gate_proj.weight' is \(128, 64\) torch.float32, this run has \(96, 64\)"
    ):
        load(saved, State(smaller))


def test_a_checkpoint_that_lacks_a_tensor_is_refused(trained: State, tiny_model_dir: Path, tmp_path: Path) -> None:
    named = [(name, tensor) for name, tensor in trained.masters.named() if name != "norm.weight"]
    checkpoint.save(tmp_path / "step_1", MANIFEST, checkpoint.state_of(named, trained.optimizer))
    with pytest.raises(CheckpointError, match=r"step_1: does not fit this model \(.*model\.norm\.weight"):
        load(tmp_path / "step_1", State(tiny_model_dir))


def _cut_intermediate(folder: Path, width: int) -> None:
    tensors = {name: tensor.clone() for _, name, tensor in iter_weights(folder)}
    for name, tensor in tensors.items():
        if "gate_proj" in name or "up_proj" in name:
            tensors[name] = tensor[:width]
        if "down_proj" in name:
            tensors[name] = tensor[:, :width]
    write_safetensors(folder / "model.safetensors", tensors.items())

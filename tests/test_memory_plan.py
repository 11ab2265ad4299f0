"""The memory plan against bytes counted in real tensors: exact for what stays and what the forward pass keeps.

The long test compares with the peak of resident memory of real steps, within 20%.
"""

import gc
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from family_fixtures import VARIANTS
from model_fixtures import random_decoder, random_group, tiny_config
from run_fixtures import OWN_PAIRS, arguments, run_here
from torch import Tensor

from kernels.linear_logps import linear_logps
from kernels.rms_norm import rms_norm
from trainer.batch import build_stream
from trainer.config import Config, load_config
from trainer.dry_run import survey
from trainer.memory_plan import (
    MemoryPlan,
    Work,
    activation_bytes,
    head_kept_bytes,
    num_shards,
    parameter_shapes,
    plan_memory,
)
from trainer.models.config import ModelConfig
from trainer.models.decoder import Decoder
from trainer.models.shared_by_layers import SharedByLayers
from trainer.optim import AdamW, MasterWeights
from trainer.parallelize import recompute_activations
from trainer.startup import is_sharded, open_data

WORK = Work(tokens=100, scored=60, micro_batches=2)


def config_of(tmp_path: Path, *settings: str) -> Config:
    return load_config(arguments(tmp_path / "run", Path("unused"), *settings))


def planned(tmp_path: Path, *settings: str, ranks: int = 1, work: Work = WORK) -> MemoryPlan:
    return plan_memory(tiny_config(tie_word_embeddings=True), config_of(tmp_path, *settings), work, ranks)


def kept_by(run: Callable[[], object]) -> dict[int, int]:
    """Bytes by address of the tensors that `run` leaves behind: saved for the backward pass, or in a closure."""
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    gc.collect()
    before = {tensor.data_ptr() for tensor in living_tensors()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = run()
    assert result is not None
    found: dict[int, int] = {}
    for tensor in (*saved, *living_tensors()):
        if tensor.data_ptr() not in before:
            found.setdefault(tensor.data_ptr(), tensor.nbytes)
    return found


def living_tensors() -> list[Tensor]:
    """By exact type: some objects do things when asked for their class."""
    return [thing for thing in gc.get_objects() if type(thing) in (Tensor, torch.nn.Parameter)]


def blocks_alone(model: Decoder, dtype: torch.dtype) -> Callable[[], tuple[Tensor, Tensor, Tensor]]:
    """The blocks of a model on a stream of 45 tokens, which the decoder pads to 64."""
    stream = build_stream([random_group((20, 10, 15))])
    shared = SharedByLayers(stream, model.config, "auto", "auto", dtype)
    first = torch.randn(64, model.config.hidden_size, dtype=dtype, requires_grad=True)

    def run() -> tuple[Tensor, Tensor, Tensor]:
        x, added = first * 1, None
        entered = x
        for layer in model.layers:
            x, added = layer(x, added, shared)
        return x, added, entered

    return run


@pytest.mark.parametrize(
    ("how", "dtype"),
    [
        ("none", torch.float32),
        ("none", torch.bfloat16),
        ("full", torch.bfloat16),
        ("every_2", torch.float32),
        ("selective", torch.bfloat16),
    ],
)
def test_activations_are_what_the_blocks_keep(how: str, dtype: torch.dtype) -> None:
    def kept(layers: int) -> int:
        model = random_decoder(tiny_config(num_hidden_layers=layers), dtype=dtype)
        recompute_activations(model, how)
        found = kept_by(blocks_alone(model, dtype))
        return sum(found.values())

    def counted(layers: int) -> int:
        config = tiny_config(num_hidden_layers=layers)
        return activation_bytes(config, 45, itemsize=dtype.itemsize, how=how)

    # two more layers: what is shared by all, and what goes in and comes out, cancels
    assert kept(5) - kept(3) == counted(5) - counted(3) > 0


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "phi", "phi3", "olmo2"])
def test_activations_of_other_families(name: str) -> None:
    """To 5%: single numbers a row, of float32 copies of a weight and of fused matrices, are not counted."""
    raw = {**VARIANTS[name].config().to_dict(), "layer_types": None, "no_rope_layers": None}

    def kept(layers: int) -> int:
        config = ModelConfig.from_dict({**raw, "num_hidden_layers": layers}, "config.json")
        return sum(kept_by(blocks_alone(random_decoder(config), torch.float32)).values())

    def counted(layers: int) -> int:
        config = ModelConfig.from_dict({**raw, "num_hidden_layers": layers}, "config.json")
        return activation_bytes(config, 45, itemsize=4, how="none")

    assert counted(7) - counted(1) == pytest.approx(kept(7) - kept(1), rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stash", [False, True])
def test_the_head_keeps_what_is_counted(stash: bool, dtype: torch.dtype) -> None:
    """Width 64, vocabulary 4096, 160 rows: one slab lies in the gradient's memory, one beside it, two are not kept."""
    config = tiny_config(vocab_size=4096)
    states = torch.randn(160, 64).to(dtype).requires_grad_()
    weight, scale = torch.randn(4096, 64).to(dtype).requires_grad_(), torch.ones(64, dtype=dtype)
    targets = torch.randint(0, 4096, (160,), generator=torch.Generator().manual_seed(0))

    def run() -> Tensor:
        return linear_logps(rms_norm(states * 1, scale, 1e-5), weight, targets, stash=stash)

    found = kept_by(run)
    result = 160 * 4
    gradient = 4096 * 64 * dtype.itemsize
    centers = 4 * 160 * 4
    expected = head_kept_bytes(config, 155, itemsize=dtype.itemsize, stash=stash) + gradient + result
    assert expected <= sum(found.values()) <= expected + centers
    assert expected - gradient > 160 * 1024 * dtype.itemsize * (2 if stash else 1)


@pytest.mark.parametrize("objective", ["dpo", "prm"])
@pytest.mark.parametrize("dtype", ["float32", "bf16", "pure_bf16"])
def test_what_stays_is_counted_tensor_by_tensor(dtype: str, objective: str, tmp_path: Path) -> None:
    """For prm of an untied model, whose own head is not trained."""
    config = tiny_config(tie_word_embeddings=objective == "dpo")
    model = random_decoder(config)
    if objective == "prm":
        model.add_reward_head(torch.float32)
    if dtype == "pure_bf16":
        model = model.to(torch.bfloat16)
    compute = torch.float32 if dtype == "float32" else torch.bfloat16
    masters = MasterWeights(model, compute_dtype=compute, pure=dtype == "pure_bf16")
    stream = build_stream([random_group((4, 3, 5))])
    model(stream, output="logps" if objective == "dpo" else "rewards").sum().backward()
    masters.finish_backward()
    optimizer = AdamW(masters.masters, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    optimizer.step()
    settings = (f"train.dtype={dtype}", f"train.objective={objective}")
    plan = plan_memory(config, config_of(tmp_path, *settings), WORK, 1)
    weights = {parameter.data_ptr(): parameter.nbytes for parameter in (*model.parameters(), *masters.masters)}
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert plan.parameters == sum(weights.values())
    assert plan.gradients == sum(master.grad.nbytes for master in masters.masters)
    assert plan.optimizer == sum(moment.nbytes for moment in moments)
    assert plan.snapshot == plan.optimizer + sum(master.nbytes for master in masters.masters)


def test_shards_are_rows_rounded_up(tmp_path: Path) -> None:
    """97 rows of the vocabulary over 4 ranks are 25 on the fullest, 3 norms per... each of 64 numbers 16."""
    one, four = planned(tmp_path), planned(tmp_path, ranks=4)
    shapes = parameter_shapes(tiny_config(tie_word_embeddings=True))
    assert shapes["embed_tokens.weight"] == (97, 64)
    assert "lm_head.weight" not in shapes
    others = one.gradients - 97 * 64 * 4
    assert four.gradients == four.parameters == others // 4 + 25 * 64 * 4
    assert four.optimizer == 2 * four.gradients
    assert one.gathered == 0 < four.gathered


def test_settings_move_the_peak_as_they_should(tmp_path: Path) -> None:
    """Each a difference that is known: a snapshot, a stash, whole gradients that wait, buffers of gradients."""
    small = Work(tokens=32, scored=32, micro_batches=2)

    def peak(*settings: str, ranks: int = 1, work: Work = small) -> int:
        return planned(tmp_path, "checkpoint.asynchronous=false", *settings, ranks=ranks, work=work).peak

    whole = planned(tmp_path).gradients
    assert planned(tmp_path, work=small).peak - peak() == 3 * whole
    assert peak("dist.grad_sync=last", ranks=2) - peak(ranks=2) == whole
    assert peak(work=Work(32, 32, 1)) < peak()
    assert peak("reference.mode=model") - peak() == whole
    assert peak("reference.mode=model", "train.dtype=bf16") - peak("train.dtype=bf16") == whole // 2
    assert peak("train.activation_checkpointing=full", work=WORK) < peak(work=WORK)


@pytest.mark.parametrize("strategy", ["auto", "fsdp", "replicas"])
@pytest.mark.parametrize("ranks", [1, 4])
def test_who_shards_is_the_runs_own_answer(
    strategy: str, ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tmp_path, f"dist.strategy={strategy}")
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    assert (num_shards(config, ranks) > 0) is is_sharded(config)
    assert num_shards(config, ranks) in (0, ranks)


def test_the_largest_micro_batch_of_any_rank(tiny_model_dir: Path, tmp_path: Path) -> None:
    """With room for one pair a micro-batch, the largest is the longest pair; with room for all, a step's share."""
    settings = (f"data.cache_dir={tmp_path}", "train.max_steps=4", "train.global_batch=4")
    config = load_config(arguments(tmp_path / "run", tiny_model_dir, *settings, "train.tokens_per_microbatch=1"))
    shard, _ = open_data(config)
    assert survey(config, shard, 1).tokens == max(shard.group_tokens)
    assert survey(config, shard, 1).micro_batches == 4
    roomy = load_config(arguments(tmp_path / "run", tiny_model_dir, *settings, "train.tokens_per_microbatch=100000"))
    work = survey(roomy, shard, 1)
    assert work.micro_batches == 1
    assert work.reference_rows == 32
    assert work.scored < work.tokens <= sum(shard.group_tokens)
    completions = sum(sum(group.lengths[1:]) for group in shard)
    assert work.reference_numbers == completions
    assert survey(roomy, shard, 4).tokens == max(shard.group_tokens)  # a pair a rank


def test_dry_run_prints_the_plan_and_leaves_nothing(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    (tiny_model_dir / "model.safetensors").rename(tiny_model_dir / "away")  # weights are not needed
    try:
        assert run_here(arguments(tmp_path / "run", tiny_model_dir, "run.dry_run=true")) == 0
    finally:
        (tiny_model_dir / "away").rename(tiny_model_dir / "model.safetensors")
    table = capsys.readouterr().out.split("dry run: ")[1]
    assert "3 (this run)" in table
    rows = {line[:38].strip(): line[38:].split() for line in table.splitlines() if line.startswith("  ")}
    assert len(rows["expected peak"]) == 5
    config = json.loads((tiny_model_dir / "config.json").read_text())
    numbers = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128 + 2 * 64) + 64 + 2 * config["vocab_size"] * 64
    assert float(rows["gradients"][0]) == pytest.approx(4 * numbers / 2**20, abs=0.05)
    assert not (tmp_path / "run").exists()
    assert OWN_PAIRS.exists()

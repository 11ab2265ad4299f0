"""Whole runs on a small model: the right numbers for every objective, the right files, the right words."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from run_fixtures import OWN_PAIRS, ROOT, arguments, contents, rows, run_child, run_here
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from data_tools.encode import EncodeOptions, Group
from data_tools.shards import Shard, open_or_build
from trainer.config import load_config, parse_toml
from trainer.loader import Loader
from trainer.metrics import read_metrics

REWARDS = {f"rewards/{name}" for name in ("chosen", "rejected", "accuracies", "margins")}
PAIRWISE = REWARDS | {"logps/chosen", "logps/rejected", "lengths/chosen", "lengths/rejected"}
ALWAYS = {"step", "epoch", "time", "loss", "grad_norm", "learning_rate"}
ALWAYS |= {
    f"perf/{name}"
    for name in ("step_s", "pairs_per_s", "tokens_per_s", "token_imbalance", "peak_memory_mib", "save_blocked_s")
}
METRICS = {
    "dpo": PAIRWISE,
    "orpo": PAIRWISE | {"nll_loss", "log_odds_ratio", "log_odds_chosen"},
    "simpo": PAIRWISE,
    "cpo": PAIRWISE | {"nll_loss"},
    "sft": {"nll_loss"},
}


def losses(run_dir: Path) -> list[float]:
    return [json.loads(row)["loss"] for row in rows(run_dir)]


def assert_alike(run_dir: Path, other: Path, *, rel: float, abs: float) -> None:
    for found, wanted in zip(rows(run_dir), rows(other), strict=True):
        assert json.loads(found) == pytest.approx(json.loads(wanted), rel=rel, abs=abs)


# --- the numbers -----------------------------------------------------------------------------------------------------


def completion_logps(model: torch.nn.Module, group: Group, branch: int) -> Tensor:
    """Summed log-prob of one completion by a Hugging Face model on prompt + completion alone."""
    first = sum(group.lengths[:branch])
    prompt = group.ids[: group.lengths[0]].tolist()
    ids = torch.tensor([prompt + group.ids[first : first + group.lengths[branch]].tolist()])
    logps = model(ids).logits[0, :-1].log_softmax(-1)
    return logps.gather(1, ids[0, 1:, None])[len(prompt) - 1 :].sum()


def own_shard(model_dir: Path) -> Shard:
    return open_or_build([str(OWN_PAIRS)], model_dir=model_dir, options=EncodeOptions())


def test_dpo_is_what_plain_pytorch_does_with_a_transformers_model(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Rafailov et al. 2023, eq. 7, two sequences a pair, AdamW and clipping of torch: the same five steps."""
    argv = arguments(
        tmp_path / "run", tiny_model_dir, "train.global_batch=5", "train.max_steps=5", "train.warmup_ratio=0.3",
        "train.weight_decay=0.1", "train.max_grad_norm=2.0",
    )  # fmt: skip
    assert run_here(argv) == 0
    shard = own_shard(tiny_model_dir)
    loader = Loader(shard, global_batch=5, tokens_per_microbatch=500, seed=42)
    policy, reference = (AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32) for _ in range(2))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, weight_decay=0.1)
    for step, row in enumerate(read_metrics(tmp_path / "run")):
        groups = [shard[int(index)] for index in loader.step_indices(step)]
        assert len(groups) == (1 if step == 3 else 5)  # 16 pairs: the fourth batch of an epoch is short
        margins = []
        for group in groups:
            with torch.no_grad():
                start = completion_logps(reference, group, 1) - completion_logps(reference, group, 2)
            margins.append(completion_logps(policy, group, 1) - completion_logps(policy, group, 2) - start)
        loss = -F.logsigmoid(0.1 * torch.stack(margins)).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 2.0)
        # warm-up over ceil(0.3 * 5) = 2 steps, then down to 0 over the other 3
        optimizer.param_groups[0]["lr"] = rate = 1e-3 * [0, 1 / 2, 1, 2 / 3, 1 / 3][step]
        optimizer.step()
        assert row["learning_rate"] == pytest.approx(rate, rel=1e-12)
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
        assert row["rewards/margins"] == pytest.approx(0.1 * torch.stack(margins).mean().item(), abs=1e-5)
    exported = load_file(tmp_path / "run" / "export" / "model.safetensors")
    for name, parameter in policy.named_parameters():
        # Adam turns the sign of a vanishing gradient into a whole step, so single entries may differ by rounding
        assert (exported[name] - parameter).abs().mean() < 1e-6, name


@pytest.mark.parametrize("objective", METRICS)
def test_every_objective_learns_and_writes_its_metrics(objective: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    settings = (f"train.objective={objective}", "train.max_steps=5", "train.learning_rate=5e-3")
    assert run_here(arguments(tmp_path / "run", tiny_model_dir, *settings, "train.global_batch=16")) == 0
    table = read_metrics(tmp_path / "run")
    assert [set(row) - {"perf/save_s"} for row in table] == [ALWAYS | METRICS[objective]] * 5
    assert [row["epoch"] for row in table] == [float(step) for step in range(1, 6)]
    assert all(row["grad_norm"] > 0 for row in table)
    assert table[-1]["loss"] < 0.97 * table[0]["loss"]
    if objective == "dpo":
        assert table[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert table[0]["rewards/accuracies"] == 0.0 and table[-1]["rewards/accuracies"] >= 0.75  # a tie is wrong
    if objective == "orpo":
        parts = [row["nll_loss"] - 0.1 * row["log_odds_ratio"] for row in table]
        assert [row["loss"] for row in table] == pytest.approx(parts, rel=1e-6)
    if objective in ("dpo", "simpo", "cpo"):
        assert table[-1]["rewards/margins"] > table[0]["rewards/margins"]
    for row in table:
        if objective != "sft":
            assert row["rewards/margins"] == pytest.approx(row["rewards/chosen"] - row["rewards/rejected"], abs=1e-7)


def test_sft_starts_at_the_mean_over_all_answer_tokens(tiny_model_dir: Path, tmp_path: Path) -> None:
    settings = ("train.objective=sft", "train.max_steps=1", "train.global_batch=16")
    assert run_here(arguments(tmp_path / "run", tiny_model_dir, *settings)) == 0
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    with torch.no_grad():
        sums = [(completion_logps(model, group, 1), group.lengths[1]) for group in own_shard(tiny_model_dir)]
    wanted = -sum(total.item() for total, _ in sums) / sum(tokens for _, tokens in sums)
    assert losses(tmp_path / "run") == [pytest.approx(wanted, rel=1e-5)]


@pytest.mark.parametrize("change", [
    "train.tokens_per_microbatch=1", "train.tokens_per_microbatch=100000", "train.activation_checkpointing=full",
    "kernels.stash=true", "kernels.impl=reference",
])  # fmt: skip
def test_what_saves_memory_or_time_does_not_change_the_training(
    change: str, tiny_model_dir: Path, tmp_path: Path, plain_run: Path
) -> None:
    assert run_here(arguments(tmp_path / "run", tiny_model_dir, change)) == 0
    assert_alike(tmp_path / "run", plain_run, rel=1e-4, abs=1e-4)
    assert losses(tmp_path / "run") == pytest.approx(losses(plain_run), rel=1e-5)


@pytest.fixture(scope="module")
def plain_run(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "run"
    assert run_here(arguments(folder, tiny_model_dir)) == 0
    return folder


@pytest.mark.parametrize("dtype", ["bf16", "pure_bf16"])
def test_bf16_stays_near_float32(dtype: str, tiny_model_dir: Path, tmp_path: Path, plain_run: Path) -> None:
    assert run_here(arguments(tmp_path / "run", tiny_model_dir, f"train.dtype={dtype}")) == 0
    found, wanted = read_metrics(tmp_path / "run"), read_metrics(plain_run)
    assert found[0]["loss"] == pytest.approx(math.log(2), abs=0.02)  # policy and reference batch their rows differently
    for a, b in zip(found, wanted, strict=True):
        assert a["logps/chosen"] == pytest.approx(b["logps/chosen"], rel=0.02)  # 8 bits of mantissa through two layers
        assert a["loss"] == pytest.approx(b["loss"], abs=0.2)
    weights = load_file(tmp_path / "run" / "checkpoints" / "step_4" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16 if dtype == "pure_bf16" else torch.float32}
    exported = load_file(tmp_path / "run" / "export" / "model.safetensors")
    assert {tensor.dtype for tensor in exported.values()} == {torch.float32}  # as the start was stored


def test_a_weight_counts_like_repeated_rows(tiny_model_dir: Path, tmp_path: Path) -> None:
    lines = OWN_PAIRS.read_text(encoding="utf-8").splitlines()[:3]
    parsed = [json.loads(line) for line in lines]
    weighted, repeated = tmp_path / "weighted.jsonl", tmp_path / "repeated.jsonl"
    weighted.write_text("".join(json.dumps(row | {"weight": 1 + index}) + "\n" for index, row in enumerate(parsed)))
    again = [row | {"id": f"{index}-{copy}"} for index, row in enumerate(parsed) for copy in range(1 + index)]
    repeated.write_text("".join(json.dumps(row) + "\n" for row in again))
    for name, data in (("w", weighted), ("r", repeated)):
        settings = ("train.global_batch=6", "train.max_steps=3", "train.epochs=3")
        assert run_here(arguments(tmp_path / name, tiny_model_dir, *settings, data=data)) == 0
    assert losses(tmp_path / "w") == pytest.approx(losses(tmp_path / "r"), rel=1e-5)


# --- evaluation ------------------------------------------------------------------------------------------------------


def test_evaluation_comes_when_asked_for_and_at_the_end(tiny_model_dir: Path, tmp_path: Path) -> None:
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("".join(OWN_PAIRS.read_text(encoding="utf-8").splitlines(keepends=True)[:5]), encoding="utf-8")
    settings = ("train.max_steps=7", "train.epochs=9", "eval.every=3", "run.log_every=5", f"data.eval={held_out}")
    assert run_here(arguments(tmp_path / "run", tiny_model_dir, *settings)) == 0
    table = read_metrics(tmp_path / "run")
    # 5 by log_every, 3 and 6 by eval.every, 7 is the last
    assert [row["step"] for row in table] == [3, 5, 6, 7]
    assert ["eval_loss" in row for row in table] == [True, False, True, True]
    assert {name for name in table[-1] if name.startswith("eval_")} == {f"eval_{n}" for n in PAIRWISE | {"loss"}}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "export", dtype=torch.float32)
    shard = open_or_build([str(held_out)], model_dir=tiny_model_dir, options=EncodeOptions())
    with torch.no_grad():
        wanted = sum(completion_logps(model, group, 1).item() for group in shard) / 5
    assert table[-1]["eval_logps/chosen"] == pytest.approx(wanted, rel=1e-5)


# --- files and words -------------------------------------------------------------------------------------------------


def test_a_run_folder_and_what_is_said(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    argv = arguments(folder, tiny_model_dir, "data.lint=true", f"data.cache_dir={tmp_path / 'shards'}")
    assert run_here(argv) == 0
    said = capsys.readouterr()
    assert said.err == ""
    for words in (
        "data.train: 16 groups, 3452 tokens (new)",
        "16 of 16 rows kept",
        "[[First, 24 - 10 = 14.",
        "end-of-turn token trained: yes (<|im_end|>)",
        "the sigmoid loss starts at ln 2",
        f"model: {folder / 'export'}",
    ):
        assert words in said.out, words
    assert {path.name for path in folder.iterdir()} == {
        ".lock",
        "config.toml",
        "metrics.jsonl",
        "checkpoints",
        "export",
    }
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step_3", "step_4"]
    config = load_config(argv)
    assert parse_toml((folder / "config.toml").read_text(encoding="utf-8"), "config.toml") == config
    manifest = json.loads((folder / "checkpoints" / "step_4" / "manifest.json").read_text(encoding="utf-8"))
    assert parse_toml(manifest["config"], "manifest") == config
    assert (manifest["step"], manifest["threads"], manifest["world_size"]) == (4, 1, 1)
    assert manifest["choices"] == {"impl": "cpu", "matmul": "highest"}


def test_no_export_when_none_is_wanted(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = arguments(tmp_path / "run", tiny_model_dir, "run.export=false", "train.max_steps=1")
    assert run_here(argv) == 0
    assert not (tmp_path / "run" / "export").exists()
    capsys.readouterr()
    assert run_here(argv) == 0
    assert "finished: step 1 of 1" in capsys.readouterr().out
    assert run_here([*argv, "--run.export=true"]) == 0
    assert (tmp_path / "run" / "export" / "model.safetensors").is_file()


def test_epochs_decide_the_steps_where_max_steps_does_not(tiny_model_dir: Path, tmp_path: Path) -> None:
    config, *rest = arguments(tmp_path / "run", tiny_model_dir, "train.global_batch=6", "train.epochs=2")
    Path(config).write_text(Path(config).read_text(encoding="utf-8").replace("max_steps = 4\n", ""), encoding="utf-8")
    assert run_here([config, *rest]) == 0
    table = read_metrics(tmp_path / "run")
    assert [row["epoch"] for row in table] == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2])  # batches of 6, 6, 4


def test_a_run_ends_where_the_pairs_are_solved(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exported and finished there, at the same step after a resumption; without the setting it goes on."""
    folder, stop = tmp_path / "run", "train.stop_when_solved=3"
    given = "train.max_steps=60", "train.learning_rate=5e-3", "loss.beta=1", "train.schedule=constant"
    argv = arguments(folder, tiny_model_dir, *given, stop)
    assert run_here(argv) == 0
    table, whole = read_metrics(folder), rows(folder)
    solved = [row["rewards/accuracies"] > 0.99 and row["loss"] < 0.02 for row in table]
    assert 3 < len(table) < 60 and solved[-3:] == [True] * 3
    assert not any(all(solved[start : start + 3]) for start in range(len(solved) - 3))
    assert f"step {len(table)} of 60: the last 3 were solved, so the run ends here" in capsys.readouterr().out
    weights = load_file(folder / "export" / "model.safetensors")
    assert run_here(argv) == 0
    assert f"finished: step {len(table)} of 60" in capsys.readouterr().out and rows(folder) == whole
    for name in ("export", f"checkpoints/step_{len(table)}"):
        shutil.rmtree(folder / name)
    assert run_here(argv) == 0
    assert f"resuming from {folder}/checkpoints/step_{len(table) - 1}" in capsys.readouterr().out
    assert rows(folder) == whole
    again = load_file(folder / "export" / "model.safetensors")
    assert all(torch.equal(again[name], weight) for name, weight in weights.items())
    assert run_here(arguments(tmp_path / "longer", tiny_model_dir, *given, f"train.max_steps={len(table) + 1}")) == 0
    assert rows(tmp_path / "longer")[:-1] == whole and len(rows(tmp_path / "longer")) == len(whole) + 1


def test_the_command_in_a_process_of_its_own(tiny_model_dir: Path, tmp_path: Path) -> None:
    """From another folder, in a process that has seen no test: bit for bit what a run in this process gives."""
    argv = arguments(tmp_path / "command", tiny_model_dir)
    command = [sys.executable, str(ROOT / "trainer" / "main.py"), *argv]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert run_here(arguments(tmp_path / "here", tiny_model_dir)) == 0
    assert rows(tmp_path / "command") == rows(tmp_path / "here")
    assert contents(tmp_path / "command" / "export") == contents(tmp_path / "here" / "export")


def test_a_run_with_two_threads_repeats_itself(tiny_model_dir: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        settings = ("run.threads=2", "train.dtype=bf16", "train.max_steps=2", "train.global_batch=2")
        argv = arguments(tmp_path / name, tiny_model_dir, *settings)
        assert run_child(argv, tmp_path / "out") == 0
    assert rows(tmp_path / "a") == rows(tmp_path / "b")

"""Runs with adapters: what trains, what the reference is, what is left behind, resume, ranks."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from run_fixtures import HELD_OUT, OWN_PAIRS, arguments, contents, rows, run_child, run_here, run_ranks, tensors
from safetensors.torch import load_file

from trainer import merge, reference
from trainer.entry import exit_code
from trainer.metrics import read_metrics

LORA = ("lora.r=4", "lora.alpha=8", "train.learning_rate=1e-2")
"""A rate at which the adapter of a random model moves in four steps."""
LN2 = 0.693147


def adapter_files(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(folder)]


@pytest.fixture(scope="module")
def trained(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps with a new adapter on every linear layer."""
    folder = tmp_path_factory.mktemp("lora") / "run"
    argv = arguments(folder, tiny_model_dir, *LORA, "checkpoint.keep_last=9", f"data.eval={OWN_PAIRS}")
    assert run_here(argv) == 0
    return folder


def test_a_run_trains_the_adapter_alone_and_leaves_it_and_the_merged_model(trained: Path, tiny_model_dir: Path) -> None:
    assert losses(trained)[0] == pytest.approx(LN2, abs=1e-5)
    assert read_metrics(trained)[-1]["eval_loss"] < LN2 - 0.01, "on the training data"
    saved = load_file(trained / "checkpoints" / "step_4" / "model.safetensors")
    assert len(saved) == 2 * 14 and all(".lora_" in name for name in saved)
    assert len(adapter_files(trained)) == 2 * 14
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_model_dir, trained / "export"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "_proj" in name}
    assert {path.name for path in trained.iterdir()} >= {"adapter", "export"}


def test_the_export_is_the_trained_model(trained: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    """Log-probs of the merged model at step 0 of another run are those of the adapter continued."""
    common = ("train.learning_rate=0", "train.max_steps=1")
    assert run_here(arguments(tmp_path / "merged", trained / "export", *common)) == 0
    assert run_here(arguments(tmp_path / "on", tiny_model_dir, *common, f"lora.adapter={trained / 'adapter'}")) == 0
    merged, on = (read_metrics(tmp_path / name)[0]["logps/chosen"] for name in ("merged", "on"))
    base = read_metrics(trained)[0]["logps/chosen"]
    assert merged == pytest.approx(on, rel=1e-6) and abs(merged - base) > 1e-2


@pytest.mark.parametrize("mode", ["cache", "model"])
@pytest.mark.parametrize("dtype", ["float32", "bf16"])
@pytest.mark.parametrize("dora", ["false", "true"])
def test_a_continued_adapter_starts_at_ln_2(
    mode: str, dtype: str, dora: str, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The reference is the weights this run started from, adapter included; in both modes the same curve."""
    first = arguments(tmp_path / "one", tiny_model_dir, *LORA, f"lora.use_dora={dora}", f"train.dtype={dtype}")
    assert run_here(first) == 0
    capsys.readouterr()
    second = (f"lora.adapter={tmp_path / 'one' / 'adapter'}", "train.learning_rate=1e-2", f"train.dtype={dtype}")
    argv = arguments(tmp_path / "two", tiny_model_dir, *second, f"reference.mode={mode}")
    assert run_here(argv) == 0
    assert "the sigmoid loss starts at ln 2" in capsys.readouterr().out
    found = losses(tmp_path / "two")
    assert found[0] == pytest.approx(LN2, abs=1e-5 if dtype == "float32" else 2e-2)
    assert found[-1] < found[0] - 0.01
    config = json.loads((tmp_path / "two" / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_dora"]) == (4, 8, dora == "true")


def test_both_modes_of_the_reference_agree(trained: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    assert run_here(arguments(tmp_path / "new", tiny_model_dir, *LORA, "reference.mode=model")) == 0
    assert losses(tmp_path / "new") == pytest.approx(losses(trained), rel=1e-5)
    on = ("train.learning_rate=1e-2", f"lora.adapter={trained / 'adapter'}")
    for mode in ("cache", "model"):
        assert run_here(arguments(tmp_path / mode, tiny_model_dir, *on, f"reference.mode={mode}")) == 0
    assert losses(tmp_path / "model") == pytest.approx(losses(tmp_path / "cache"), rel=1e-5)
    assert losses(tmp_path / "cache")[0] == pytest.approx(LN2, abs=1e-5)
    # the base as reference is the user's choice: then the run starts elsewhere
    argv = arguments(tmp_path / "base", tiny_model_dir, *on, f"reference.path={tiny_model_dir}")
    assert run_here(argv) == 0
    assert abs(losses(tmp_path / "base")[0] - LN2) > 0.01


def test_cache_files(trained: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    """A new adapter uses the file of full fine-tuning, a continued one has its own."""

    def files(run: str, *overrides: str) -> set[str]:
        argv = arguments(tmp_path / run, tiny_model_dir, *overrides, f"reference.cache_dir={tmp_path / 'cache'}")
        assert run_here([*argv, "--train.max_steps=1"]) == 0
        return {path.name for path in (tmp_path / "cache").glob("*.safetensors")}

    full = files("full")
    assert len(full) == 1
    assert files("new", *LORA) == full
    on = files("on", f"lora.adapter={trained / 'adapter'}")
    assert len(on) == 2 and full < on
    (own,) = (tmp_path / "cache" / name for name in on - full)
    check = ["--check", str(own), "--model", str(tiny_model_dir), "--data", str(OWN_PAIRS)]
    assert exit_code(reference.main, check) == 2
    assert exit_code(reference.main, [*check, "--adapter", str(trained / "adapter")]) == 0


@pytest.mark.parametrize("extra", [(), ("lora.dropout=0.2",), ("lora.use_dora=true", "train.dtype=bf16")])
def test_a_resumed_run_goes_on_bit_for_bit(extra: tuple[str, ...], tiny_model_dir: Path, tmp_path: Path) -> None:
    argv = arguments(tmp_path / "run", tiny_model_dir, *LORA, *extra, "checkpoint.keep_last=9", *HELD_OUT)
    assert run_here(argv) == 0
    whole, last = rows(tmp_path / "run"), tensors(tmp_path / "run" / "checkpoints" / "step_4")
    adapter = (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes()
    for step in (3, 4):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step_{step}")
    shutil.rmtree(tmp_path / "run" / "adapter")
    assert run_here(argv) == 0
    assert rows(tmp_path / "run") == whole
    assert tensors(tmp_path / "run" / "checkpoints" / "step_4") == last
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes() == adapter
    shutil.rmtree(tmp_path / "run" / "adapter")  # only that is missing: it is written again, nothing is trained
    assert run_here(argv) == 0
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes() == adapter


def test_dropout(trained: Path, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It changes the curve, recomputation does not; a continued adapter is compared with its reference without it."""
    for name, extra in (("one", ()), ("again", ("train.activation_checkpointing=full",))):
        argv = arguments(tmp_path / name, tiny_model_dir, *LORA, "lora.dropout=0.2", *extra)
        assert run_here(argv) == 0
    assert "note: lora.dropout" in capsys.readouterr().out
    assert losses(tmp_path / "again") == pytest.approx(losses(tmp_path / "one"), rel=1e-6)
    assert losses(tmp_path / "one")[1:] != pytest.approx(losses(trained)[1:], rel=1e-3)
    on = arguments(tmp_path / "on", tiny_model_dir, f"lora.adapter={trained / 'adapter'}", "lora.dropout=0.2")
    assert run_here(on) == 0
    other = ("train.tokens_per_microbatch=250", "checkpoint.every=1", "train.max_steps=5")
    assert run_here(arguments(tmp_path / "one", tiny_model_dir, *LORA, "lora.dropout=0.2", *other)) == 2
    assert "train.tokens_per_microbatch: was 500, now 250" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["full", "selective", "every_2"])
def test_activation_checkpointing_changes_nothing(
    how: str, trained: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    argv = arguments(tmp_path / "run", tiny_model_dir, *LORA, f"train.activation_checkpointing={how}")
    assert run_here(argv) == 0
    assert losses(tmp_path / "run") == pytest.approx(losses(trained), rel=1e-6)


def test_the_merge_command_writes_what_the_run_did(
    trained: Path, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--model", str(tiny_model_dir), "--adapter", str(trained / "adapter"), "--out", str(tmp_path / "out")]
    assert exit_code(merge.main, argv) == 0
    assert contents(tmp_path / "out") == contents(trained / "export")
    assert exit_code(merge.main, argv) == 2
    assert "exists already" in capsys.readouterr().err
    argv[1], argv[-1] = str(trained / "adapter"), str(tmp_path / "other")
    assert exit_code(merge.main, argv) == 2
    assert "neither model.safetensors" in capsys.readouterr().err


def test_settings_are_checked_before_training(
    trained: Path, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*overrides: str) -> str:
        assert run_here(arguments(tmp_path / "run", tiny_model_dir, *overrides)) == 2
        assert not (tmp_path / "run" / "metrics.jsonl").exists()
        return capsys.readouterr().err

    on = f"lora.adapter={trained / 'adapter'}"
    assert "lora.r = 5: the adapter in lora.adapter has 4; leave this key out" in refused(on, "lora.r=5")
    assert "lora.target_modules = q_proj" in refused(on, "lora.target_modules=q_proj")
    assert "'lm_head' is no linear layer of a block" in refused("lora.r=4", "lora.target_modules=lm_head")
    assert "has no adapter_config.json" in refused(f"lora.adapter={tiny_model_dir}")
    shutil.copytree(trained, tmp_path / "run", dirs_exist_ok=True)
    (tmp_path / "run" / "metrics.jsonl").unlink()
    assert "lora.r: was 4, now 6" in refused("lora.r=6", "train.learning_rate=1e-2", "lora.alpha=8")


def test_without_a_merge(tiny_model_dir: Path, tmp_path: Path) -> None:
    assert run_here(arguments(tmp_path / "run", tiny_model_dir, *LORA, "lora.merge=false", "train.max_steps=1")) == 0
    assert (tmp_path / "run" / "adapter").is_dir() and not (tmp_path / "run" / "export").exists()


def test_a_full_disk_leaves_no_adapter(tiny_model_dir: Path, tmp_path: Path) -> None:
    argv = arguments(tmp_path / "run", tiny_model_dir, *LORA, "train.max_steps=1")
    limit = ("os.mkdir adapter.tmp", 20_000)  # more than what is printed
    assert run_child(argv, tmp_path / "out", limit_at=limit) == 1
    assert "the adapter cannot be written" in (tmp_path / "out").read_text()
    assert {path.name for path in (tmp_path / "run").iterdir()} & {"adapter", "adapter.tmp", "export"} == set()
    assert run_child(argv, tmp_path / "out") == 0
    assert (tmp_path / "run" / "adapter").is_dir() and (tmp_path / "run" / "export").is_dir()


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(("train.activation_checkpointing=full",), marks=pytest.mark.long),
        ("train.activation_checkpointing=full", "train.dtype=bf16"),
        ("lora.use_dora=true", "reference.mode=model", "dist.grad_sync=last"),
        pytest.param(("dist.strategy=replicas",), marks=pytest.mark.long),
    ],
    ids=lambda settings: "_".join(settings),
)
def test_two_ranks_have_the_curve_of_one(settings: tuple[str, ...], tiny_model_dir: Path, tmp_path: Path) -> None:
    """A frozen base, sharded in the compute dtype, beside float32 adapters."""
    common = (*LORA, *settings, "train.global_batch=5", "train.tokens_per_microbatch=150")
    alone = [item for item in common if not item.startswith("dist.")]
    assert run_here(arguments(tmp_path / "one", tiny_model_dir, *alone)) == 0
    assert run_ranks(arguments(tmp_path / "two", tiny_model_dir, *common), tmp_path, 2) == [0, 0]
    close = {"rel": 2e-2} if "train.dtype=bf16" in settings else {"rel": 2e-5, "abs": 1e-6}
    for ours, theirs in zip(read_metrics(tmp_path / "two"), read_metrics(tmp_path / "one"), strict=True):
        for name in ("loss", "grad_norm", "logps/chosen"):
            assert ours[name] == pytest.approx(theirs[name], **close), (ours["step"], name)
    one, two = adapter_files(tmp_path / "one"), adapter_files(tmp_path / "two")
    assert one.keys() == two.keys()
    assert sum(path.stat().st_size for path in (tmp_path / "two" / "export").glob("*.safetensors")) > 0


@pytest.mark.long
def test_another_number_of_ranks_goes_on_from_a_continued_adapter(
    trained: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    on = (f"lora.adapter={trained / 'adapter'}", "train.learning_rate=1e-2", "reference.mode=model")
    argv = arguments(tmp_path / "run", tiny_model_dir, *on, "checkpoint.keep_last=9")
    assert run_ranks(argv, tmp_path, 2) == [0, 0]
    two = losses(tmp_path / "run")
    assert two[0] == pytest.approx(LN2, abs=1e-5)
    for step in (3, 4):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step_{step}")
    assert run_here(argv) == 0
    assert losses(tmp_path / "run") == pytest.approx(two, rel=2e-5)

"""What users get wrong in config, model folder and reference: one clear line, exit code 2, nothing lost."""

import json
import shutil
from pathlib import Path

import pytest
from bad_input_fixtures import (
    ABSENT,
    Kind,
    Setup,
    assert_refused,
    assert_training_refused,
    config,
    index,
    kinds,
    make_setup,
    model_file,
    setting,
    tensors,
)
from run_fixtures import contents, run_here

NORM = "model.norm.weight"
LOST_SHARD = json.dumps({"weight_map": {NORM: "model-00002-of-00002.safetensors"}})
NOT_WHOLE = "is not a whole safetensors file"
INTEGER = "must be a positive integer"

CONFIG = kinds(
    "",
    {
        "an unknown key": (setting("loss.betta=1"), "loss.betta: unknown key; did you mean loss.beta?"),
        "a value out of range": (setting("loss.beta=-1"), "loss.beta = -1"),
        "a word for a number": (setting("train.max_steps=many"), "train.max_steps = many: expected a whole number"),
        "a key of another objective": (
            setting("train.objective=sft", "loss.beta=1"),
            "loss.beta = 1.0: is not used by",
        ),
        "evaluation without rows": (setting("eval.every=3"), "eval.every = 3: needs data.eval"),
        "kernels that are not here": (setting("kernels.impl=triton"), "kernels.impl = triton"),
    },
)
FOLDER = kinds(
    "{model}: ",
    {
        "no folder": (lambda s: shutil.rmtree(s.model), "no such folder"),
        "a file": (lambda s: (shutil.rmtree(s.model), s.model.write_text("x")), "no such folder"),
        "no config.json": (model_file("config.json", None), "no config.json in it"),
        "no weights": (model_file("model.safetensors", None), "only safetensors weights are read"),
        "pickled weights": (lambda s: s.weights.rename(s.model / "pytorch_model.bin"), "only safetensors weights"),
        "a missing tensor": (tensors(lambda t: t.pop(NORM)), "tensors are missing, the first is 'model.norm.weight'"),
        "a missing shard": (index(LOST_SHARD), "'model-00002-of-00002.safetensors' is named by"),
        "an index with numbers": (index(json.dumps({"weight_map": {NORM: 5}})), "file 5 is named by"),
    },
)
CONFIG_JSON = kinds(
    "{model}/config.json: ",
    {
        "torn": (model_file("config.json", '{"model_type": "lla'), "is not valid JSON"),
        "Latin-1": (model_file("config.json", b'{"a": "\xe4"}'), "is not valid JSON"),
        "a list": (model_file("config.json", "[]"), "expected a JSON object, got list"),
        "no hidden_size": (config(hidden_size=ABSENT), f"'hidden_size' {INTEGER}, got None"),
        "hidden_size in words": (config(hidden_size="64"), f"'hidden_size' {INTEGER}"),
        "no layers": (config(num_hidden_layers=0), f"'num_hidden_layers' {INTEGER}"),
        "key-value heads in words": (config(num_key_value_heads="2"), f"'num_key_value_heads' {INTEGER}"),
        "heads that do not divide": (config(num_key_value_heads=3), "is not a multiple of"),
        "an odd head": (config(head_dim=15), "head_dim 15 must be even"),
        "an unknown family": (config(model_type="mamba"), "model_type 'mamba' is not supported; supported: llama"),
        "no family": (config(model_type=ABSENT), "model_type None is not supported"),
        "an unknown activation": (config(hidden_act="relu"), "hidden_act 'relu' is not supported"),
        "quantised": (config(quantization_config={"bits": 4}), "quantised weights are not supported"),
        "an unknown rope": (config(rope_scaling={"rope_type": "axial", "factor": 2}), "rope_type 'axial' is not"),
        "theta in words": (config(rope_theta="high"), "'rope_theta' must be a positive number"),
        "positions in words": (config(max_position_embeddings="many"), f"'max_position_embeddings' {INTEGER}"),
    },
)
WEIGHTS = kinds(
    "{model}/model.safetensors: ",
    {
        "cut": (lambda s: s.weights.write_bytes(s.weights.read_bytes()[:100_000]), NOT_WHOLE),
        "empty": (model_file("model.safetensors", b""), NOT_WHOLE),
        "an HTML page": (model_file("model.safetensors", "<html>404 not found</html>"), NOT_WHOLE),
        "a Git LFS pointer": (model_file("model.safetensors", "version https://git-lfs.github.com/spec\n"), NOT_WHOLE),
        "a tensor too many": (tensors(lambda t: t.update(extra=t[NORM].clone())), "'extra' is not part of this model"),
        "another shape": (tensors(lambda t: t.update({NORM: t[NORM][:7].clone()})), "has shape (7,), config.json asks"),
        "another vocabulary": (config(vocab_size=999), "has shape (300, 64), config.json asks for (999, 64)"),
        "other layers": (config(num_hidden_layers=1), "is not part of this model"),
        "whole numbers": (tensors(lambda t: t.update({NORM: t[NORM].long()})), "has dtype torch.int64"),
    },
)
INDEX = kinds(
    "{model}/model.safetensors.index.json: ",
    {
        "torn": (index("{"), "is not a safetensors index"),
        "without a map": (index('{"metadata": {}}'), "is not a safetensors index"),
        "a map that is a list": (index('{"weight_map": []}'), "is not a safetensors index"),
    },
)
REFERENCE = [
    *kinds("{model}-old: ", {"not there": (setting("reference.path={model}-old"), "no such folder")}),
    *kinds(
        "{model}/model.safetensors: ",
        {
            "a cache file of another kind": (
                setting("reference.cache_file={model}/model.safetensors"),
                "is not a whole reference cache",
            ),
        },
    ),
    *kinds(
        "{model}/config.json: ",
        {
            "a cache folder that is a file": (
                setting("reference.cache_dir={model}/config.json"),
                "a file stands where a folder should be",
            ),
            "a shard folder that is a file": (
                setting("data.cache_dir={model}/config.json"),
                "cannot write the shard cache",
            ),
        },
    ),
]


@pytest.fixture
def setup(tiny_model_dir: Path, tmp_path: Path) -> Setup:
    return make_setup(tmp_path, tiny_model_dir)


@pytest.mark.parametrize("kind", CONFIG)
def test_bad_config(kind: Kind, setup: Setup, capsys: pytest.CaptureFixture[str]) -> None:
    assert_training_refused(kind, setup, capsys)


@pytest.mark.parametrize("kind", [*FOLDER, *CONFIG_JSON])
def test_bad_model_folder(kind: Kind, setup: Setup, capsys: pytest.CaptureFixture[str]) -> None:
    assert_training_refused(kind, setup, capsys)


@pytest.mark.parametrize("kind", [*WEIGHTS, *INDEX])
def test_bad_weights(kind: Kind, setup: Setup, capsys: pytest.CaptureFixture[str]) -> None:
    assert_training_refused(kind, setup, capsys)


@pytest.mark.parametrize("kind", REFERENCE)
def test_bad_reference(kind: Kind, setup: Setup, capsys: pytest.CaptureFixture[str]) -> None:
    assert_training_refused(kind, setup, capsys)


def test_a_reference_with_a_smaller_vocabulary(
    setup: Setup, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = Setup(Path(shutil.copytree(setup.model, tmp_path / "small")), setup.data, setup.run_dir)
    names = ("model.embed_tokens.weight", "lm_head.weight")
    tensors(lambda t: t.update({name: t[name][:100].clone() for name in names}))(small)
    config(vocab_size=100)(small)
    setup.overrides.append(f"reference.path={small.model}")
    before = contents(setup.run_dir)
    assert_refused(run_here(setup.argv()), capsys.readouterr().err, f"error: {small.model}: the tokenizer gives id")
    assert contents(setup.run_dir) == before


BAD_FILES = {
    "no such file": (lambda path: path.unlink(), "no such file; trainer/configs/ has dpo, "),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "is a folder; name the TOML file in it"),
    "not UTF-8": (lambda path: path.write_bytes(b"\xff\xfe"), "is not UTF-8 text"),
    "not TOML": (lambda path: path.write_text("[train]\nseed == 1\n"), ":2: not valid TOML"),
    "a key outside a section": (lambda path: path.write_text("beta = 1\n"), "stands outside a section"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_config_file(name: str, setup: Setup, capsys: pytest.CaptureFixture[str]) -> None:
    break_it, words = BAD_FILES[name]
    argv = setup.argv()
    break_it(Path(argv[0]))
    before = contents(setup.run_dir)
    assert_refused(run_here(argv), capsys.readouterr().err, words)
    assert contents(setup.run_dir) == before


def test_a_required_key_is_asked_for(setup: Setup, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [item for item in setup.argv() if not item.startswith("--model.path")]
    assert_refused(run_here(argv), capsys.readouterr().err, "model.path: required; set it in the file or with")

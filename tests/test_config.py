"""The configuration: what is accepted, and what is refused with which line."""

from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from trainer.config import (
    Config,
    DataConfig,
    LossConfig,
    ModelConfig,
    TrainConfig,
    load_config,
)
from trainer.errors import CheckpointError, ConfigError, ModelError, RunError, UserError

ROOT = Path(__file__).parent.parent
MINIMAL = '[model]\npath = "M"\n[data]\ntrain = "pairs.jsonl"\n'


@pytest.fixture
def minimal(tmp_path: Path) -> str:
    path = tmp_path / "c.toml"
    path.write_text(MINIMAL, encoding="utf-8")
    return str(path)


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "own.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


# --- what is accepted ------------------------------------------------------------------------------------------------


def test_defaults_are_those_dpo_users_know(minimal: str) -> None:
    config = load_config([minimal])
    assert config.loss == LossConfig(loss_type=("sigmoid",), beta=0.1, label_smoothing=0.0)
    assert (config.train.learning_rate, config.train.max_grad_norm, config.train.seed) == (1e-6, 1.0, 42)
    assert (config.data.max_length, config.data.train, config.data.eval) == (1024, ("pairs.jsonl",), ())
    assert (config.train.max_steps, config.reference.mode, config.run.resume) == (None, "cache", "auto")


def test_command_line_is_parsed_by_the_type_of_the_key(minimal: str) -> None:
    arguments = [
        "--train.learning_rate=5e-6",
        "--train.max_steps=10",
        "--run.progress=false",
        "--train.weight_decay=1",
        "--data.train=a.jsonl, b.jsonl.gz",
        "--data.eval",
        '["with,comma.jsonl"]',
        "--loss.loss_type=sigmoid,bco_pair,sft",
        "--loss.loss_weights=0.8,0.2,1",
        "--loss.ld_alpha=0.5",
    ]
    config = load_config([*arguments, minimal])
    assert (config.train.learning_rate, config.train.max_steps, config.run.progress) == (5e-6, 10, False)
    assert isinstance(config.train.weight_decay, float)
    assert config.data.train == ("a.jsonl", "b.jsonl.gz")
    assert config.data.eval == ("with,comma.jsonl",)
    assert config.loss.loss_type == ("sigmoid", "bco_pair", "sft")
    assert config.loss.loss_weights == (0.8, 0.2, 1.0)


def test_toml_values_are_typed_and_none_is_written_as_text(tmp_path: Path) -> None:
    text = (
        MINIMAL + '[train]\nlearning_rate = 1e-7\nmax_steps = "none"\n[loss]\nloss_type = ["ipo"]\nld_alpha = "none"\n'
    )
    config = load_config([write(tmp_path, text)])
    assert (config.train.learning_rate, config.train.max_steps) == (1e-7, None)
    assert (config.loss.loss_type, config.loss.ld_alpha) == (("ipo",), None)


def test_command_line_wins_over_the_file_and_later_over_earlier(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL + "[loss]\nbeta = 0.5\n")
    assert load_config([path]).loss.beta == 0.5
    assert load_config([path, "--loss.beta=0.2", "--loss.beta", "0.3"]).loss.beta == 0.3


def test_none_on_the_command_line_clears_what_the_file_sets(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL + "[train]\nmax_steps = 5\n")
    assert load_config([path, "--train.max_steps=none"]).train.max_steps is None


def test_activation_checkpointing_none_stays_a_word(minimal: str) -> None:
    assert load_config([minimal, "--train.activation_checkpointing=none"]).train.activation_checkpointing == "none"


@pytest.mark.parametrize("name", ["quickstart", "dpo", "lora", "orpo", "simpo", "sft"])
def test_shipped_configs_load(name: str) -> None:
    path = str(ROOT / "trainer" / "configs" / f"{name}.toml")
    config = load_config([path, "--data.train=pairs.jsonl", "--model.path=DIR"])
    assert config.train.objective == ("dpo" if name in ("quickstart", "lora") else name)
    assert config.lora.enabled is (name == "lora")
    assert config.run.dir == f"runs/{name}"


def test_config_cannot_be_changed_after_it_was_checked(minimal: str) -> None:
    config = load_config([minimal])
    with pytest.raises(FrozenInstanceError):
        config.loss.beta = -1.0  # type: ignore[misc]


# --- what is refused -------------------------------------------------------------------------------------------------

BAD_ARGUMENTS = [
    # wrong type or spelling
    ("--loss.beta=abc", "loss.beta = abc: expected a finite number"),
    ("--loss.beta=nan", "loss.beta = nan: expected a finite number"),
    ("--train.learning_rate=inf", "train.learning_rate = inf: expected a finite number"),
    ("--loss.beta=", "loss.beta = : expected a finite number"),
    ("--train.seed=1.5", "train.seed = 1.5: expected a whole number"),
    ("--train.seed=99999999999999999999", "train.seed = 99999999999999999999: expected a whole number"),
    ("--train.max_steps=ten", "train.max_steps = ten: expected a whole number or none"),
    ("--run.progress=yes", "run.progress = yes: expected true or false"),
    ("--run.progress=True", "run.progress = True: expected true or false"),
    ("--train.epochs=none", "train.epochs = none: expected a whole number"),
    ("--model.path=", "model.path = : expected text"),
    ("--model.path=  ", "model.path =   : expected text"),
    ("--model.path=\udcff", "model.path = \\udcff: expected text"),
    ("--data.train=a.jsonl,,b.jsonl", "data.train = : expected text"),
    ('--data.train=["a.jsonl"', 'data.train = ["a.jsonl": starts like a list but is none'),
    ("--data.train=[]", "data.train = : must name at least one file"),
    (
        "--train.objective=dp0",
        "train.objective = dp0: expected dpo | orpo | simpo | cpo | sft | prm; did you mean dpo?",
    ),
    ("--train.dtype=fp32", "train.dtype = fp32: expected float32 | bf16 | pure_bf16; did you mean"),
    ("--loss.f_divergence=reverse_k", "did you mean reverse_kl?"),
    # out of range
    ("--loss.beta=-1", "loss.beta = -1.0: must be > 0"),
    ("--loss.beta=0", "loss.beta = 0.0: must be > 0"),
    ("--loss.label_smoothing=0.5", "loss.label_smoothing = 0.5: must be at least 0 and below 0.5"),
    ("--loss.label_smoothing=-0.1", "loss.label_smoothing = -0.1: must be at least 0 and below 0.5"),
    ("--loss.ld_alpha=1.5", "loss.ld_alpha = 1.5: must be from 0 to 1"),
    ("--loss.discopop_tau=0", "loss.discopop_tau = 0.0: must be above 0 and at most 1"),
    ("--loss.simpo_gamma=-1", "loss.simpo_gamma = -1.0: must be 0 or more"),
    ("--train.warmup_ratio=1.1", "train.warmup_ratio = 1.1: must be from 0 to 1"),
    ("--train.learning_rate=-1e-6", "train.learning_rate = -1e-06: must be 0 or more"),
    ("--train.adam_beta2=1", "train.adam_beta2 = 1.0: must be at least 0 and below 1"),
    ("--train.adam_epsilon=0", "train.adam_epsilon = 0.0: must be > 0"),
    ("--train.global_batch=0", "train.global_batch = 0: must be 1 or more"),
    ("--train.tokens_per_microbatch=-5", "train.tokens_per_microbatch = -5: must be 1 or more"),
    ("--train.max_steps=0", "train.max_steps = 0: must be 1 or more"),
    ("--train.epochs=0", "train.epochs = 0: must be 1 or more"),
    ("--train.seed=-1", "train.seed = -1: must be 0 or more"),
    ("--data.max_length=1", "data.max_length = 1: must be 2 or more"),
    ("--checkpoint.every=0", "checkpoint.every = 0: must be 1 or more"),
    ("--checkpoint.keep_last=0", "checkpoint.keep_last = 0: must be 1 or more"),
    ("--dist.timeout_s=0", "dist.timeout_s = 0.0: must be 1 or more"),
    ("--eval.max_pairs=0", "eval.max_pairs = 0: must be 1 or more"),
    ("--run.log_every=0", "run.log_every = 0: must be 1 or more"),
    ("--run.threads=0", "run.threads = 0: must be 1 or more"),
    # losses and what they use
    ("--loss.loss_type=sigmoyd", "loss.loss_type = sigmoyd: unknown loss 'sigmoyd', did you mean sigmoid?"),
    ("--loss.loss_type=ipo,ipo", "loss.loss_type = ipo,ipo: names a loss twice"),
    ("--loss.loss_type=[]", "loss.loss_type = : must name at least one loss"),
    ("--loss.loss_weights=1,2", "loss.loss_weights = 1.0,2.0: has 2 weights for the 1 losses of loss.loss_type"),
    ("--loss.loss_weights=-1", "loss.loss_weights = -1.0: must be 0 or more"),
    ("--loss.loss_weights=0", "loss.loss_weights = 0.0: must be 0 or more, one above 0"),
    ("--loss.loss_type=exo_pair", "loss.label_smoothing = 0.0: must be > 0 for exo_pair"),
    ("--loss.loss_type=hinge --loss.label_smoothing=0.1", "loss.label_smoothing = 0.1: only used by sigmoid"),
    ("--loss.discopop_tau=0.1", "loss.discopop_tau = 0.1: only used with loss.loss_type = discopop"),
    ("--loss.f_alpha_divergence_coef=0.3", "loss.f_alpha_divergence_coef = 0.3: only used with loss.f_divergence"),
    ("--loss.loss_type=aot --loss.f_divergence=forward_kl", "loss.f_divergence = forward_kl: is not defined for"),
    ("--loss.simpo_gamma=2", "loss.simpo_gamma = 2.0: is not used by train.objective = dpo; leave it out"),
    ("--train.objective=orpo --loss.loss_type=ipo", "loss.loss_type = ipo: is not used by train.objective = orpo"),
    ("--train.objective=sft --loss.beta=0.2", "loss.beta = 0.2: is not used by train.objective = sft"),
    ("--train.objective=simpo --loss.ld_alpha=0.5", "loss.ld_alpha = 0.5: is not used by train.objective = simpo"),
    ("--train.objective=cpo --loss.loss_type=aot", "loss.loss_type = aot: train.objective = cpo takes one of"),
    ("--train.objective=cpo --loss.loss_type=ipo --loss.label_smoothing=0.1", "loss.label_smoothing = 0.1: train.obj"),
    ("--prm.labels=soft", "prm.labels = soft: is only used by train.objective = prm; leave it out"),
    ("--train.objective=prm --prm.outcome=last", "prm.outcome = last: only used with prm.labels = outcome"),
    ("--train.objective=prm --loss.beta=0.2", "loss.beta = 0.2: is not used by train.objective = prm"),
    ("--train.objective=orpo --reference.path=R", "reference.path = R: train.objective = orpo has no reference"),
    ("--eval.every=10", "eval.every = 10: needs data.eval"),
    # adapters and quantised bases
    ("--lora.r=-1", "lora.r = -1: must be 0 or more"),
    ("--lora.r=8 --lora.alpha=0", "lora.alpha = 0.0: must be > 0"),
    ("--lora.r=8 --lora.dropout=1", "lora.dropout = 1.0: must be at least 0 and below 1"),
    ("--lora.r=8 --lora.target_modules=[]", "lora.target_modules = : must name at least one layer, or all-linear"),
    ("--lora.dropout=0.1", "lora.dropout = 0.1: is not used without adapters; set lora.r or leave it out"),
    ("--lora.use_dora=true", "lora.use_dora = true: is not used without adapters"),
    ("--model.quantise=nf4", "model.quantise = nf4: quantised weights cannot be trained; set lora.r"),
    ("--model.quantise=gguf --lora.r=8", "model.gguf = none: needed by model.quantise = gguf"),
    ("--model.gguf=f.gguf", "model.gguf = f.gguf: only used with model.quantise = gguf"),
    ("--model.quantise=nf4 --lora.r=8 --dist.strategy=fsdp", "dist.strategy = fsdp: cannot shard the weights of"),
    ("--lora.r=8 --lora.dropout=0.1 --train.compile=true", "train.compile = true: cannot go with lora.dropout"),
    # keys
    ("--loss.betta=0.2", "loss.betta: unknown key; did you mean loss.beta?"),
    ("--loss.bet=0.2", "loss.bet: unknown key; did you mean loss.beta?"),
    ("--beta=0.2", "beta: unknown key; did you mean loss.beta?"),
    ("--train.beta=0.2", "train.beta: unknown key; did you mean loss.beta?"),
    ("--loss.lambda=0.2", "loss.lambda: unknown key; did you mean loss.beta?"),
    ("--loss.orpo_alpha=0.2", "loss.orpo_alpha: unknown key; did you mean loss.beta?"),
    ("--per_device_train_batch_size=4", "did you mean train.global_batch?"),
    ("--train.lora_r=4", "train.lora_r: unknown key; did you mean lora.r?"),
    ("--use_dora=true", "use_dora: unknown key; did you mean lora.use_dora?"),
    ("--loss.alpha=0.2", "loss.alpha: unknown key; did you mean loss.beta?"),
    ("--model.load_in_4bit=true", "model.load_in_4bit: unknown key; did you mean model.quantise?"),
    ("--loss=sigmoid", "loss: unknown key; did you mean"),
    ("--loss.beta.x=1", "loss.beta.x: unknown key; did you mean loss.beta?"),
    ("--lr", "lr: unknown key; did you mean train.learning_rate?"),
    ("--loss.beta", "--loss.beta: needs a value: --loss.beta=..."),
    ("--loss.beta --run.progress=true", "--loss.beta: needs a value"),
    ("-x", "-x: unknown option"),
    ("other.toml", "expected one configuration file, got 2"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS, ids=[bad for bad, _ in BAD_ARGUMENTS])
def test_bad_argument_gives_one_line(minimal: str, arguments: str, message: str) -> None:
    split = arguments.split(" --")
    with pytest.raises(UserError) as caught:
        load_config([minimal, split[0], *(f"--{argument}" for argument in split[1:])])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


BAD_FILES = [
    ("[loss]\nbeta = 0.1\n", "model.path: required"),
    ('[model]\npath = "M"\n', "data.train: required; set it in the file or with --data.train=..."),
    (MINIMAL + "[loss]\nbeta = \n", "own.toml:6: not valid TOML"),
    (MINIMAL + "[loss\n", "own.toml:5: not valid TOML"),
    (MINIMAL + "[loss]\nbeta = 0.1\nbeta = 0.2\n", "own.toml:7: not valid TOML"),
    (MINIMAL + "[loss]\nbeta = '''", "own.toml:6: not valid TOML"),
    ("\ufeff" + MINIMAL, "own.toml:1: not valid TOML"),
    ("beta = 0.1\n" + MINIMAL, "beta = 0.1: stands outside a section; did you mean loss.beta?"),
    ('loss = "sigmoid"\n' + MINIMAL, "loss = sigmoid: stands outside a section; write [loss]"),
    (MINIMAL + "[[loss]]\nbeta = 0.1\n", "stands outside a section"),
    (MINIMAL + "[lossy]\nbeta = 0.1\n", "lossy.beta: unknown key; did you mean loss.beta?"),
    (MINIMAL + "[loss]\nbeta = true\n", "loss.beta = true: expected a finite number"),
    (MINIMAL + '[loss]\nbeta = "0.1"\n', "loss.beta = 0.1: expected a finite number"),
    (MINIMAL + "[loss]\nbeta = nan\n", "loss.beta = nan: expected a finite number"),
    (MINIMAL + "[loss.beta]\nx = 1\n", "loss.beta = {'x': 1}: expected a finite number"),
    (MINIMAL + "[train]\nseed = true\n", "train.seed = true: expected a whole number"),
    (MINIMAL + "[train]\nseed = 1e3\n", "train.seed = 1000.0: expected a whole number"),
    (MINIMAL + "[run]\nprogress = 1\n", "run.progress = 1: expected true or false"),
    (MINIMAL + "[run]\ndir = 3\n", "run.dir = 3: expected text"),
    (MINIMAL + "[run]\ndir = 2026-01-01\n", "run.dir = 2026-01-01: expected text"),
    (MINIMAL + "[eval]\nevery = [1]\n", "eval.every = 1: expected a whole number"),
    (MINIMAL + "[loss]\nloss_type = [1]\n", "loss.loss_type = 1: expected text"),
    (MINIMAL + '[loss]\nloss_type = "a\\nb"\n', "loss.loss_type = a\\nb: unknown loss"),
]


@pytest.mark.parametrize(("text", "message"), BAD_FILES, ids=[message for _, message in BAD_FILES])
def test_bad_file_gives_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config([write(tmp_path, text)])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value).replace("a\nb", "")


def test_missing_file_names_the_shipped_ones(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"no.toml: no such file; trainer/configs/ has dpo, lora, orpo, prm, quickstart, sft, simpo"
    ):
        load_config([str(tmp_path / "no.toml")])


def test_folder_binary_and_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder; name the TOML file in it"):
        load_config([str(tmp_path)])
    binary = tmp_path / "b.toml"
    binary.write_bytes(b"[loss]\n\xff\xfe")
    with pytest.raises(UserError, match=r"b.toml: is not UTF-8 text \(byte 7\)"):
        load_config([str(binary)])
    with pytest.raises(UserError, match="expected one configuration file, got none; usage: torchrun"):
        load_config(["--loss.beta=0.1"])
    with pytest.raises(UserError, match="cannot be read"):
        load_config([str(binary / "below-a-file.toml")])


def test_sections_check_themselves_without_any_file() -> None:
    with pytest.raises(ConfigError, match=r"loss.beta = -1.0: must be > 0") as caught:
        LossConfig(beta=-1)
    assert caught.value.key == "loss.beta"
    with pytest.raises(ConfigError, match=r"train.learning_rate = x: expected a finite number"):
        TrainConfig(learning_rate="x")  # type: ignore[arg-type]
    config = Config(model=ModelConfig(path="M"), data=DataConfig(train="one.jsonl"))  # type: ignore[arg-type]
    assert config.data.train == ("one.jsonl",)


def test_long_values_are_shortened_and_letters_kept() -> None:
    assert str(ConfigError("run.dir", "داده" + "x" * 500, "no")) == "run.dir = داده" + "x" * 73 + "...: no"


@pytest.mark.parametrize("error", [ModelError, CheckpointError, RunError])
def test_path_errors_are_user_errors_with_the_path_as_given(error: type[ModelError]) -> None:
    assert issubclass(error, UserError)
    assert str(error("../m", "has no config.json")) == "../m: has no config.json"


@pytest.mark.parametrize(
    ("overrides", "allowed"),
    [
        (["--loss.loss_type=ipo"], True),
        (["--train.objective=simpo"], True),
        (["--train.objective=cpo", "--loss.cpo_alpha=0"], True),
        (["--train.objective=cpo"], False),
        (["--train.objective=orpo"], False),
        (["--train.objective=sft"], False),
        (["--loss.loss_type=sigmoid,sft"], False),
        (["--loss.loss_type=robust", "--loss.label_smoothing=0.2"], False),
        (["--loss.loss_type=sigmoid", "--loss.loss_weights=0.1"], False),
    ],
)
def test_a_run_ends_as_solved_where_the_loss_says_so(overrides: list[str], allowed: bool, tmp_path: Path) -> None:
    (tmp_path / "c.toml").touch()
    argv = [
        str(tmp_path / "c.toml"),
        "--model.path=M",
        "--data.train=d.jsonl",
        "--train.stop_when_solved=5",
        *overrides,
    ]
    if allowed:
        assert load_config(argv).train.stop_when_solved == 5
        return
    with pytest.raises(ConfigError, match=r"train\.stop_when_solved = 5: needs a loss that goes to 0"):
        load_config(argv)

"""Every key of a run's configuration with its meaning, default and range. Import it from `trainer.config`.

The string under a field is its documentation: `--help` prints it. Sections check themselves when they are made, so a
`Config` in hand is a valid one; what one key means for another is checked in `Config`. Imports no torch. One table,
which is read as a whole and not cut in files.
"""

import re
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, get_type_hints

from trainer.config_values import nearest, typed
from trainer.errors import ConfigError

LOSS_TYPES = (
    "sigmoid", "hinge", "ipo", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sigmoid_norm", "sft",
)  # fmt: skip
"""Losses of objective dpo. These tables repeat trainer.losses, which needs torch; a test holds them together."""
CPO_LOSS_TYPES = ("sigmoid", "hinge", "ipo")
SMOOTHED_LOSS_TYPES = ("sigmoid", "robust", "exo_pair", "aot", "aot_unpaired")
F_DIVERGENCE_LOSS_TYPES = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft")
SORTING_LOSS_TYPES = ("aot", "aot_unpaired")

LOSS_KEYS = {
    "dpo": {
        "loss_type", "loss_weights", "beta", "label_smoothing", "f_divergence", "f_alpha_divergence_coef", "ld_alpha",
        "discopop_tau",
    },
    "orpo": {"beta", "orpo_nll"},
    "simpo": {"beta", "simpo_gamma", "label_smoothing"},
    "cpo": {"beta", "cpo_alpha", "loss_type", "label_smoothing"},
    "sft": set(),
    "prm": set(),
}  # fmt: skip
"""The keys of [loss] that each objective uses; setting another one is an error, not silence."""


class Section:
    """A table of the TOML file. Making one brings every value to its field's type and checks the ranges."""

    section: ClassVar[str]

    def __post_init__(self) -> None:
        for name, hint in section_hints(type(self)).items():
            object.__setattr__(self, name, typed(f"{self.section}.{name}", getattr(self, name), hint))
        self.check()

    def check(self) -> None:
        """Raise ConfigError where a value is out of its range."""

    def require(self, condition: object, name: str, problem: str) -> None:
        """Raise ConfigError about the key `name` of this section unless `condition` is true."""
        if not condition:
            raise ConfigError(f"{self.section}.{name}", getattr(self, name), problem)

    def require_at_least(self, least: int, *names: str) -> None:
        """Raise ConfigError about the first of these keys whose value is set and below `least`."""
        for name in names:
            value = getattr(self, name)
            self.require(value is None or value >= least, name, f"must be {least} or more")


def section_hints(cls: type[Any]) -> dict[str, Any]:
    """The keys of a section with their types, in the order of the source."""
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in fields(cls)}


def section_defaults(cls: type[Any]) -> dict[str, Any]:
    """The keys of a section with their defaults; `dataclasses.MISSING` where the user has to say."""
    return {field.name: field.default for field in fields(cls)}


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    """The model that is trained."""

    section = "model"

    path: str
    """Hugging Face folder of the starting model: config.json, *.safetensors, tokenizer files."""
    quantise: Literal["none", "nf4", "gguf"] = "none"
    """Keep the layers' weights quantised in memory, for LoRA: nf4: 4 bits, made from model.path by bitsandbytes; gguf:
    as they are in model.gguf."""
    gguf: str | None = None
    """With model.quantise = gguf: the GGUF file of all weights; model.path gives config.json and the tokenizer."""

    def check(self) -> None:
        if self.quantise == "gguf":
            self.require(self.gguf is not None, "gguf", "needed by model.quantise = gguf: name the GGUF file")
        else:
            self.require(self.gguf is None, "gguf", "only used with model.quantise = gguf; leave it out")


@dataclass(frozen=True, kw_only=True)
class LoraConfig(Section):
    """Low-rank adapters: train two thin matrices beside each chosen layer, the model's own weights stay as they are."""

    section = "lora"

    r: int = 0
    """Rank of the adapters; 0: no adapters, all weights are trained."""
    alpha: float = 32.0
    """Scaling of what an adapter adds: alpha / r."""
    dropout: float = 0.0
    """Share of an adapter's inputs dropped while training; above 0, micro-batches and ranks change the result."""
    target_modules: tuple[str, ...] = ("all-linear",)
    """Layers with an adapter, by the ends of their names, such as q_proj,v_proj; all-linear: all but the head."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r) instead (rsLoRA)."""
    use_dora: bool = False
    """Train the length of each weight's rows apart from their direction (DoRA)."""
    adapter: str | None = None
    """Folder of an adapter in PEFT's format to go on from; r, alpha, target_modules and use_* are then its own."""
    merge: bool = True
    """Work the adapter into the weights for run.dir/export; run.dir/adapter holds the adapter itself in any case."""

    @property
    def enabled(self) -> bool:
        return self.r > 0 or self.adapter is not None

    def check(self) -> None:
        self.require_at_least(0, "r")
        self.require(self.alpha > 0, "alpha", "must be > 0")
        self.require(0 <= self.dropout < 1, "dropout", "must be at least 0 and below 1")
        self.require(len(self.target_modules) > 0, "target_modules", "must name at least one layer, or all-linear")
        for name, default in section_defaults(LoraConfig).items():
            used = self.enabled or getattr(self, name) == default
            self.require(used, name, "is not used without adapters; set lora.r or leave it out")


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """Files of pairs (of single answers for sft, of labelled steps for prm) and how they become tokens."""

    section = "data"

    train: tuple[str, ...]
    """JSON Lines files to train on (.jsonl or .jsonl.gz)."""
    eval: tuple[str, ...] = ()
    """JSON Lines files of held-out rows."""
    max_length: int = 1024
    """Most tokens of a prompt with its longest completion."""
    overlong: Literal["drop", "truncate_prompt_left", "truncate_completion"] = "drop"
    """What becomes of a row beyond data.max_length; counts are reported."""
    chat_template: str | None = None
    """A jinja file used instead of the model's own chat template."""
    special_tokens: Literal["text", "control"] = "text"
    """What a row's own text that spells a special token (<|im_end|>) is read as; the template's are always tokens."""
    cache_dir: str | None = None
    """Where tokenized data is kept; none: the user's cache folder."""
    lint: bool = True
    """Look before training for what a model could learn instead of the content: length, case, duplicates, leaks."""

    def check(self) -> None:
        self.require(len(self.train) > 0, "train", "must name at least one file")
        self.require_at_least(2, "max_length")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Section):
    """What is optimised, in which steps and with which arithmetic."""

    section = "train"

    objective: Literal["dpo", "orpo", "simpo", "cpo", "sft", "prm"] = "dpo"
    """The training objective; dpo has variants, see loss.loss_type; prm trains a process reward model, see [prm]."""
    global_batch: int = 8
    """Pairs (rows for sft and prm) of one optimizer step, over all ranks and micro-batches."""
    tokens_per_microbatch: int = 4096
    """Most tokens of one forward pass on one rank; lower it when memory runs out, the result stays the same."""
    max_steps: int | None = None
    """Optimizer steps; none: as many as train.epochs needs. Wins over train.epochs where both are set."""
    epochs: int = 1
    """Passes over the training data."""
    stop_when_solved: int = 0
    """End after so many steps in a row with reward accuracy > 0.99 and loss < 0.02; 0: never. Preferences only."""
    learning_rate: float = 1e-6
    """Highest learning rate, reached after the warm-up."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Course of the learning rate after the warm-up: down to 0 at the last step, or constant."""
    warmup_ratio: float = 0.0
    """Share of the steps over which the learning rate rises from 0; 0 to 1."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    adam_beta1: float = 0.9
    """AdamW's decay of the gradient average."""
    adam_beta2: float = 0.999
    """AdamW's decay of the squared-gradient average."""
    adam_epsilon: float = 1e-8
    """AdamW's guard against division by 0."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0 switches clipping off."""
    dtype: Literal["float32", "bf16", "pure_bf16"] = "bf16"
    """bf16: computes in bfloat16 on float32 master weights; pure_bf16: weights and optimizer in bfloat16 as well."""
    activation_checkpointing: str = "none"
    """Recompute in the backward pass: full: every layer; every_K: each K-th; selective: all but narrow products."""
    compile: bool = False
    """Let torch.compile fuse what layers do beside attention: the first step takes long, others may be faster."""
    seed: int = 42
    """Decides the order of the data and every random number of the run."""
    deterministic: bool = True
    """Use only algorithms that give the same bits in every run."""

    def check(self) -> None:
        self.require_at_least(1, "global_batch", "tokens_per_microbatch", "max_steps", "epochs")
        self.require_at_least(0, "stop_when_solved", "learning_rate", "weight_decay", "max_grad_norm", "seed")
        self.require(0 <= self.warmup_ratio <= 1, "warmup_ratio", "must be from 0 to 1")
        for name in ("adam_beta1", "adam_beta2"):
            self.require(0 <= getattr(self, name) < 1, name, "must be at least 0 and below 1")
        self.require(self.adam_epsilon > 0, "adam_epsilon", "must be > 0")
        known = re.fullmatch("none|full|selective|every_[1-9][0-9]*", self.activation_checkpointing)
        self.require(known, "activation_checkpointing", "must be none, full, selective or every_K, such as every_2")
        chooses = self.compile and self.activation_checkpointing == "selective"  # products inside compiled code
        self.require(not chooses, "compile", "cannot go with train.activation_checkpointing = selective; use every_K")


@dataclass(frozen=True, kw_only=True)
class LossConfig(Section):
    """The loss of the objective. A key that the chosen loss does not use must keep its default."""

    section = "loss"

    loss_type: tuple[str, ...] = ("sigmoid",)
    """Variant of dpo (docs/losses.md lists them) or of cpo (sigmoid, hinge, ipo); dpo adds up several."""
    loss_weights: tuple[float, ...] | None = None
    """One weight for each loss of loss.loss_type; none: 1 each."""
    beta: float = 0.1
    """Tie to the reference (dpo), scale of the margin (simpo, cpo), weight of the odds-ratio term (orpo)."""
    label_smoothing: float = 0.0
    """Share of pairs taken to be labelled the wrong way round; at least 0 and below 0.5."""
    f_divergence: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = "reverse_kl"
    """Divergence that ties the policy to the reference (dpo)."""
    f_alpha_divergence_coef: float = 0.5
    """Coefficient of alpha_divergence."""
    ld_alpha: float | None = None
    """LD-DPO: weight of the tokens past the shorter completion's length, 0 to 1; none: plain sums."""
    discopop_tau: float = 0.05
    """Temperature of the discopop loss, above 0 and at most 1."""
    orpo_nll: Literal["full", "completion"] = "full"
    """Tokens in ORPO's likelihood term: prompt and chosen (paper, TRL) or chosen alone."""
    simpo_gamma: float = 0.5
    """Margin that SimPO asks for."""
    cpo_alpha: float = 1.0
    """Weight of CPO's likelihood term."""

    def check(self) -> None:
        self.require(len(self.loss_type) > 0, "loss_type", "must name at least one loss")
        for name in self.loss_type:
            known = ", ".join(LOSS_TYPES)
            hint = f"unknown loss '{name}', did you mean {nearest(name, LOSS_TYPES)}? Known: {known}"
            self.require(name in LOSS_TYPES, "loss_type", hint)
        self.require(len(set(self.loss_type)) == len(self.loss_type), "loss_type", "names a loss twice")
        weights = self.loss_weights
        if weights is not None:
            counts = f"has {len(weights)} weights for the {len(self.loss_type)} losses of loss.loss_type"
            self.require(len(weights) == len(self.loss_type), "loss_weights", counts)
            self.require(min(weights) >= 0 and max(weights) > 0, "loss_weights", "must be 0 or more, one above 0")
        self.require(self.beta > 0, "beta", "must be > 0")
        self.require(0 <= self.label_smoothing < 0.5, "label_smoothing", "must be at least 0 and below 0.5")
        self.require(self.ld_alpha is None or 0 <= self.ld_alpha <= 1, "ld_alpha", "must be from 0 to 1")
        self.require(0 < self.discopop_tau <= 1, "discopop_tau", "must be above 0 and at most 1")
        self.require_at_least(0, "simpo_gamma", "cpo_alpha")


@dataclass(frozen=True, kw_only=True)
class PrmConfig(Section):
    """Process reward models (train.objective = prm): how right each step of an answer is (docs/prm.md)."""

    section = "prm"

    labels: Literal["hard", "soft", "outcome"] = "hard"
    """What is learnt of a step: hard, 0 or 1; soft, a share; outcome, is the whole answer right: the control."""
    loss: Literal["bce", "mse"] = "bce"
    """bce: cross-entropy, also with shares as targets; mse: squared error of the probability."""
    outcome: Literal["every", "last"] = "every"
    """With prm.labels = outcome: which steps carry the label."""
    separator: str | None = None
    """Text or special token put behind each step, where the step is then read; none: at the step's own last token."""
    aggregation: Literal["mean", "min", "last", "product"] = "mean"
    """How a score of an answer is made of those of its steps, unless eval.prm is told otherwise."""

    def check(self) -> None:
        default = section_defaults(PrmConfig)["outcome"]
        used = self.labels == "outcome" or self.outcome == default
        self.require(used, "outcome", "only used with prm.labels = outcome; leave it out")


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig(Section):
    """The frozen model that dpo holds the policy to."""

    section = "reference"

    mode: Literal["cache", "model"] = "cache"
    """cache: score each completion once and keep the numbers on disk; model: a frozen copy in memory."""
    path: str | None = None
    """Hugging Face folder of the reference; none: model.path."""
    cache_dir: str | None = None
    """Where reference log-probs are kept; none: the user's cache folder."""
    cache_file: str | None = None
    """One cache file to use; refused if other weights or settings made it."""


@dataclass(frozen=True, kw_only=True)
class KernelsConfig(Section):
    """How the operators are computed."""

    section = "kernels"

    impl: Literal["auto", "reference", "cpu", "triton"] = "auto"
    """auto: triton on a GPU, the CPU path elsewhere; reference: plain PyTorch."""
    attention: Literal["auto", "blocks", "flex", "merge"] = "auto"
    """blocks: matrix products a block; flex: PyTorch's flex attention; merge: flash kernels, two parts; auto: flex on a
    GPU, blocks elsewhere."""
    stash: bool = False
    """Keep the head's logits between forward and backward: faster, for 2 bytes a vocabulary entry and scored token."""
    matmul: Literal["auto", "highest", "medium"] = "auto"
    """Precision inside float32 matrix products; auto: the faster one, measured once and kept for the whole run."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig(Section):
    """Evaluation on the held-out rows of data.eval."""

    section = "eval"

    every: int = 0
    """Steps between evaluations; 0: only at the end."""
    max_pairs: int | None = None
    """Evaluate on the first so many rows; none: on all."""

    def check(self) -> None:
        self.require_at_least(0, "every")
        self.require_at_least(1, "max_pairs")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Section):
    """What a run can be resumed from."""

    section = "checkpoint"

    every: int = 500
    """Steps between checkpoints; the last step always leaves one."""
    keep_last: int = 2
    """Older checkpoints than the last so many are removed."""
    asynchronous: bool = True
    """Save from a copy in CPU memory while training goes on; false: training waits, nothing is copied."""

    def check(self) -> None:
        self.require_at_least(1, "every", "keep_last")


@dataclass(frozen=True, kw_only=True)
class RunConfig(Section):
    """The run's folder and what is written there."""

    section = "run"

    dir: str = "runs/default"
    """Folder of config.toml, metrics.jsonl, checkpoints/ and export/."""
    resume: str = "auto"
    """auto: go on from the newest whole checkpoint in run.dir; never: start at step 0; or a checkpoint's path."""
    log_every: int = 1
    """Steps between rows of metrics.jsonl."""
    progress: bool = True
    """Show a progress bar on a terminal."""
    tensorboard: Literal["auto", "on", "off"] = "auto"
    """Write TensorBoard files; auto: if it is installed."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model is trained; auto: on a GPU if PyTorch finds one, one for each rank of a machine."""
    threads: int | None = None
    """CPU threads of one rank; none: PyTorch's choice."""
    dry_run: bool = False
    """Print how much memory each rank would need, for this world size and others, and end: nothing is loaded."""
    export: bool = True
    """Leave the trained model in run.dir/export as a Hugging Face folder."""

    def check(self) -> None:
        self.require_at_least(1, "log_every", "threads")


@dataclass(frozen=True, kw_only=True)
class DistConfig(Section):
    """How several ranks (torchrun --nproc-per-node) share the work. The result is the same up to rounding."""

    section = "dist"

    strategy: Literal["auto", "fsdp", "replicas"] = "auto"
    """fsdp: each rank holds its part of weights and optimizer (FSDP2); replicas: all of it (DDP); auto: fsdp."""
    replicas: int = 1
    """With fsdp: how many sharded copies of the model there are (HSDP), such as the number of machines."""
    grad_sync: Literal["every", "last"] = "every"
    """With fsdp: sum gradients after every micro-batch (less memory) or after a step's last (less traffic)."""
    cpu_offload: bool = False
    """With fsdp on a GPU: keep sharded weights and optimizer in CPU memory."""
    timeout_s: float = 600.0
    """Seconds that a rank waits for another one before the run ends."""

    def check(self) -> None:
        self.require_at_least(1, "replicas", "timeout_s")
        for name in ("replicas", "grad_sync", "cpu_offload"):
            unused = self.strategy != "replicas" or getattr(self, name) == section_defaults(DistConfig)[name]
            self.require(unused, name, "is not used by dist.strategy = replicas; leave it out")


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole, valid configuration; what keys of different sections mean for each other is checked here."""

    model: ModelConfig
    data: DataConfig
    train: TrainConfig = TrainConfig()
    lora: LoraConfig = LoraConfig()
    loss: LossConfig = LossConfig()
    prm: PrmConfig = PrmConfig()
    reference: ReferenceConfig = ReferenceConfig()
    kernels: KernelsConfig = KernelsConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    run: RunConfig = RunConfig()
    dist: DistConfig = DistConfig()

    def __post_init__(self) -> None:
        objective = self.train.objective
        for name, default in section_defaults(LossConfig).items():
            used = name in LOSS_KEYS[objective] or getattr(self.loss, name) == default
            self.loss.require(used, name, f"is not used by train.objective = {objective}; leave it out")
        for name, default in section_defaults(PrmConfig).items():
            used = objective == "prm" or getattr(self.prm, name) == default
            self.prm.require(used, name, "is only used by train.objective = prm; leave it out")
        if objective == "dpo":
            self._check_dpo()
        if objective == "cpo":
            self._check_cpo()
        if objective != "dpo":
            for name in ("path", "cache_file"):
                unused = f"train.objective = {objective} has no reference; leave it out"
                self.reference.require(getattr(self.reference, name) is None, name, unused)
        self.eval.require(self.eval.every == 0 or self.data.eval, "every", "needs data.eval, the held-out files")
        self._check_stop()
        self._check_lora()

    def _check_stop(self) -> None:
        loss, objective = self.loss, self.train.objective
        to_zero = objective in ("dpo", "simpo") or (objective == "cpo" and not loss.cpo_alpha)
        to_zero = to_zero and "sft" not in loss.loss_type and not loss.label_smoothing and loss.loss_weights is None
        problem = (
            "needs a loss that goes to 0 as pairs are solved: dpo, simpo or cpo without cpo_alpha, and without sft, "
        )
        problem += "label_smoothing and loss_weights; leave it out"
        self.train.require(to_zero or not self.train.stop_when_solved, "stop_when_solved", problem)

    def _check_lora(self) -> None:
        if self.model.quantise != "none":
            frozen = "quantised weights cannot be trained; set lora.r or lora.adapter"
            self.model.require(self.lora.enabled, "quantise", frozen)
            whole = f"cannot shard the weights of model.quantise = {self.model.quantise}; use replicas or auto"
            self.dist.require(self.dist.strategy != "fsdp", "strategy", whole)
            self.train.require(not self.train.compile, "compile", "cannot go with model.quantise")
        dropped = "cannot go with lora.dropout, which changes with every micro-batch"
        self.train.require(not (self.train.compile and self.lora.dropout), "compile", dropped)

    def _check_dpo(self) -> None:
        loss, names = self.loss, set(self.loss.loss_type)
        smoothed = f"only used by {', '.join(SMOOTHED_LOSS_TYPES)}; leave it out"
        loss.require(not loss.label_smoothing or names & set(SMOOTHED_LOSS_TYPES), "label_smoothing", smoothed)
        exo = "must be > 0 for exo_pair, which takes its logarithm (its paper uses 0.001)"
        loss.require("exo_pair" not in names or loss.label_smoothing > 0, "label_smoothing", exo)
        undefined = sorted(names - set(F_DIVERGENCE_LOSS_TYPES))
        other = f"is not defined for loss.loss_type {', '.join(undefined)}; use reverse_kl"
        loss.require(loss.f_divergence == "reverse_kl" or not undefined, "f_divergence", other)
        for name, user, in_use in (
            ("discopop_tau", "loss.loss_type = discopop", "discopop" in names),
            (
                "f_alpha_divergence_coef",
                "loss.f_divergence = alpha_divergence",
                loss.f_divergence == "alpha_divergence",
            ),
        ):
            default = section_defaults(LossConfig)[name]
            loss.require(in_use or getattr(loss, name) == default, name, f"only used with {user}; leave it out")

    def _check_cpo(self) -> None:
        loss = self.loss
        known = len(loss.loss_type) == 1 and loss.loss_type[0] in CPO_LOSS_TYPES
        loss.require(known, "loss_type", f"train.objective = cpo takes one of {', '.join(CPO_LOSS_TYPES)}")
        smoothed = not loss.label_smoothing or loss.loss_type == ("sigmoid",)
        loss.require(smoothed, "label_smoothing", "train.objective = cpo uses it with loss.loss_type = sigmoid only")

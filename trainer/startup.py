"""From a checked config to a `Run`: what can be wrong is found here, before the first collective or update."""

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from data_tools.disk import user_cache
from data_tools.encode import EncodeOptions, Group
from data_tools.file_digests import FileDigests
from data_tools.jsonl import read_records
from data_tools.lint import lint_groups, lint_pairs
from data_tools.shards import Shard, open_or_build
from data_tools.show import describe_group
from data_tools.step_rows import StepLabel
from data_tools.tokenizer import load_tokenizer
from kernels.dispatch import choose_matmul_precision, resolve
from trainer import adapt, checkpoint, dist, numerics, parallelize
from trainer.config import Config, maths_changes, parse_toml, to_toml
from trainer.config_sections import SORTING_LOSS_TYPES
from trainer.errors import CheckpointError, ConfigError, ModelError, UserError
from trainer.loader import Loader
from trainer.loop import Run
from trainer.lora import lora_layers
from trainer.models.attention_form import choose_form
from trainer.models.config import ModelConfig
from trainer.models.decoder import Decoder
from trainer.models.hf_weights import load_decoder
from trainer.objective import Objective
from trainer.optim import AdamW, MasterWeights
from trainer.prm import ProcessObjective
from trainer.reference_cache import Header, ReferenceCache, weights_digest
from trainer.reference_pass import score_missing
from trainer.run_folder import ensure_writable

KINDS: dict[str, Literal["sft", "prm"]] = {"sft": "sft", "prm": "prm"}
"""Kinds of rows by objective; of all others, pairs."""
SCORING_TOKENS = 2
"""Scoring keeps no activations, so its batches may be this many times `train.tokens_per_microbatch`."""


def open_data(config: Config) -> tuple[Shard, Sequence[Group]]:
    """Training shard and held-out groups, checked against the model. Runs before any process group exists."""
    check_ranks(config)
    if config.train.compile:
        parallelize.check_compiler(dist.choose_device(config.run.device))
    model_config = ModelConfig.from_folder(config.model.path)
    options = EncodeOptions(
        kind=KINDS.get(config.train.objective, "pair"),
        max_length=config.data.max_length,
        overlong=config.data.overlong,
        chat_template=config.data.chat_template,
        special_tokens=config.data.special_tokens,
        step_separator=config.prm.separator or "",
    )
    shards = []
    for name, files in (("train", config.data.train), ("eval", config.data.eval)):
        if not files:
            shards.append(None)
            continue
        shard = open_or_build(files, model_dir=config.model.path, options=options, cache_dir=config.data.cache_dir)
        check_fits_model(shard, model_config, config)
        say(
            f"data.{name}: {len(shard)} groups, {int(shard.group_tokens.sum())} tokens"
            + ("" if shard.reused else " (new)")
        )
        for line in shard.report.lines():
            say(f"  {line}")
        shards.append(shard)
    held_out = shards[1] or ()
    if config.eval.max_pairs is not None:
        held_out = [held_out[index] for index in range(min(len(held_out), config.eval.max_pairs))]
    return shards[0], held_out


def check_fits_model(shard: Shard, model_config: ModelConfig, config: Config) -> None:
    """Token ids inside the vocabulary, positions inside the model's reach. Raises ModelError."""
    check_vocabulary(shard, model_config, config.model.path)
    check_weights(shard, config)
    check_labels(shard, config)
    if config.reference.path is not None:
        check_vocabulary(shard, ModelConfig.from_folder(config.reference.path), config.reference.path)
    for rope in {layer.rope for layer in model_config.layers if layer.rope is not None and layer.rope.by_length}:
        for group in shard:
            rope.is_beyond(group.lengths)
    if config.data.max_length > model_config.max_positions:
        say(
            f"note: data.max_length {config.data.max_length} is beyond the {model_config.max_positions} positions "
            "that the model was made for"
        )


def check_weights(shard: Shard, config: Config) -> None:
    """Sorted losses pair values of different rows, so a row's weight has nothing to act on. Raises ConfigError."""
    sorting = sorted(set(config.loss.loss_type) & set(SORTING_LOSS_TYPES))
    if config.train.objective == "dpo" and sorting and any(group.weight != 1 for group in shard):
        problem = "sorts over rows and cannot weigh them; remove 'weight' from the data or choose another loss"
        raise ConfigError("loss.loss_type", sorting, problem)


def check_labels(shard: Shard, config: Config) -> None:
    """Every row has the labels that are trained on. Raises ConfigError."""
    if config.train.objective != "prm" or config.prm.labels == "hard":
        return
    column = StepLabel._fields.index(config.prm.labels)
    if np.isnan(shard.labels[:, column]).any():
        lacks = next(group.record_id for group in shard if any(math.isnan(own[column]) for own in group.labels[1]))
        field = {"soft": "soft", "outcome": "correct"}[config.prm.labels]
        raise ConfigError("prm.labels", config.prm.labels, f"row '{lacks}' has no '{field}'; add it, or train on hard")


def make_objective(config: Config) -> Objective | ProcessObjective:
    """What the run trains."""
    if config.train.objective == "prm":
        return ProcessObjective(config.prm)
    return Objective(config.train.objective, config.loss)


def sorted_pairs_line(run: Run) -> str | None:
    """How many pairs a sorting loss sorts together in the run's next step; None for other losses."""
    if run.config.train.objective != "dpo" or not set(run.config.loss.loss_type) & set(SORTING_LOSS_TYPES):
        return None
    sizes = [len(members) for members in run.loader.micro_batches(run.loader.step_indices(run.step)) if members]
    shown = " + ".join(map(str, sizes))
    return f"aot sorts over the pairs of a micro-batch: {shown} on this rank in the next step"


def check_vocabulary(groups: Sequence[Group], model_config: ModelConfig, path: str | Path) -> None:
    """Raise ModelError where a token id has no row in the weights of the model at `path`."""
    largest = max(int(group.ids.max()) for group in groups)
    if largest >= model_config.vocab_size:
        problem = f"the tokenizer gives id {largest}, vocab_size in config.json is {model_config.vocab_size}"
        raise ModelError(path, f"{problem}: tokenizer and weights do not belong together")


def look_at_data(config: Config, shard: Shard) -> None:
    """Print the first rendered row with its scored tokens, and the data lint's findings."""
    tokenizer = load_tokenizer(config.model.path)
    say(describe_group(shard[0], tokenizer, color=False))
    if config.data.lint and config.train.objective not in KINDS:
        held_out = read_records(config.data.eval, kind="pair") if config.data.eval else []
        for finding in [*lint_pairs(read_records(config.data.train, kind="pair"), held_out), *lint_groups(shard)]:
            say(f"lint: {finding.text}")


def make_run(
    config: Config,
    shard: Shard,
    held_out: Sequence[Group],
    resume_from: Path | None,
    loader_type: type[Loader] = Loader,
) -> Run:
    """Score what the reference has not scored yet, load the model, then put the checkpoint's state in place."""
    objective = make_objective(config)
    device = dist.choose_device(config.run.device)
    old = checkpoint.read_manifest(resume_from) if resume_from is not None else None
    same_device = old is not None and old.device == device.type
    choices = dict(old.choices) if same_device else measured_choices(config, device)
    numerics.set_up(threads=config.run.threads, deterministic=config.train.deterministic, matmul=str(choices["matmul"]))
    if is_sharded(config):
        numerics.give_back_buffers()
    ensure_writable(cache_folder(config))
    digests = FileDigests(cache_folder(config) / "digests.json")
    start, other = adapt.start_digest(config, digests), config.reference.path  # none: the policy's start is it
    manifest = checkpoint.Manifest(
        step=0,
        config=to_toml(config),
        data_digest=shard.digest,
        weights_digest=start,
        world_size=dist.world_size(),
        threads=torch.get_num_threads(),
        device=device.type,
        choices=choices,
        reference_digest=(weights_digest(other, digests) if other else start) if objective.needs_reference else "",
    )
    digests.save()
    if old is not None:
        check_belongs(old, manifest, config, resume_from)
    loader = loader_type(shard, config.train.global_batch, config.train.tokens_per_microbatch, config.train.seed)
    total_steps = config.train.max_steps or config.train.epochs * loader.steps_per_epoch
    cache, reference_model = None, None
    if objective.needs_reference:  # before the policy is loaded: neither it nor its float32 masters wait in memory
        groups = [shard[index] for index in loader.used_indices(total_steps)] + list(held_out)
        cache, reference_model = attach_reference(config, manifest, groups, other or config.model.path)
    model = load_model(config, str(choices["impl"]))
    if objective.needs_reference and cache is None and reference_model is None:
        reference_model = adapt.StartingState(model, config)
    compute_dtype = numerics.COMPUTE_DTYPES[config.train.dtype]
    masters = MasterWeights(model, compute_dtype=compute_dtype, pure=config.train.dtype == "pure_bf16")
    run = Run(
        config=config,
        model=model,
        masters=masters,
        optimizer=make_optimizer(config, masters),
        objective=objective,
        loader=loader,
        eval_groups=held_out,
        cache=cache,
        reference_model=reference_model,
        starts_at_reference=manifest.reference_digest == start and (not other or config.model.quantise == "none"),
        manifest=manifest,
        total_steps=total_steps,
        dropout=lora_layers(model)[0].dropout if config.lora.dropout else None,
    )
    if old is not None:
        checkpoint.load(resume_from, masters.named(), run.optimizer)
        masters.refresh()
        run.step, run.solved_steps = old.step, old.solved_steps
    return run


def make_optimizer(config: Config, masters: MasterWeights) -> AdamW:
    return AdamW(
        masters.masters,
        lr=config.train.learning_rate,
        betas=(config.train.adam_beta1, config.train.adam_beta2),
        eps=config.train.adam_epsilon,
        weight_decay=config.train.weight_decay,
    )


def attach_reference(
    config: Config, manifest: checkpoint.Manifest, groups: Sequence[Group], path: str
) -> tuple[ReferenceCache | None, Decoder | None]:
    """What the reference at `path` says of `groups`: a cache that holds all of them, or the frozen model itself;
    neither where the policy's own adapters give it (`adapt.StartingState`)."""
    impl, is_start = str(manifest.choices["impl"]), config.reference.path is None
    if config.reference.mode == "model":
        return None, None if is_start and config.lora.enabled else frozen_copy(config, path, impl)
    dtype = str(numerics.COMPUTE_DTYPES[config.train.dtype]).removeprefix("torch.")
    packed = config.model.quantise if is_start else "none"
    header = Header(manifest.reference_digest, dtype=dtype, kernel=impl, quantisation=packed)
    form = attention_form(config, dist.choose_device(config.run.device))
    cache = open_cache(config, header if form == "blocks" else replace(header, attention=form))
    fill_cache(cache, groups, config, path, impl)
    return cache, None


def attention_form(config: Config, device: torch.device) -> str:
    """The form of attention on `device`. Raises ConfigError."""
    try:
        return choose_form(config.kernels.attention, device)
    except ValueError as error:
        raise ConfigError("kernels.attention", config.kernels.attention, str(error)) from None


def measured_choices(config: Config, device: torch.device) -> dict[str, object]:
    """What is decided by measurement: made by rank 0, the same on all ranks, kept in the manifest, reused on resume."""
    try:
        impl = resolve(config.kernels.impl, device, numerics.COMPUTE_DTYPES[config.train.dtype])
    except ValueError as error:
        raise ConfigError("kernels.impl", config.kernels.impl, str(error)) from None
    choices: dict[str, object] = {"impl": impl, "matmul": config.kernels.matmul}
    if config.kernels.matmul == "auto":
        # only float32 GEMMs are affected: a bf16 run need not measure. On a GPU "medium" rounds to about 10 bits.
        needed = config.train.dtype == "float32" and device.type == "cpu" and dist.is_main()
        choices["matmul"] = choose_matmul_precision().precision if needed else "highest"
    return dist.broadcast_object(choices)


def load_model(config: Config, impl: str, path: str | None = None, dtype: torch.dtype | None = None) -> Decoder:
    """A decoder on this rank's device, ready for the run's arithmetic. path: of the reference; none: the policy, with
    its adapters. dtype: float32 by default unless the run is pure bf16 (masters start from float32)."""
    master_dtype = torch.bfloat16 if config.train.dtype == "pure_bf16" else torch.float32
    device = dist.choose_device(config.run.device)
    form, wrap = attention_form(config, device), partial(wrap_model, config, device)
    is_policy = path is None
    if is_policy and config.lora.enabled:
        compute_dtype = numerics.COMPUTE_DTYPES[config.train.dtype]
        model = adapt.load_start(config, dtype=compute_dtype, adapter_dtype=master_dtype, wrap=wrap, train=True)
    elif not is_policy and config.reference.path is None and adapt.changes_start(config):
        model = adapt.load_start(config, dtype=dtype, adapter_dtype=dtype, wrap=wrap, train=False)
    else:
        model = load_decoder(path or config.model.path, dtype=dtype or master_dtype, wrap=wrap)
    if not is_sharded(config):
        model = model.to(device)
    model.stash_logits = config.kernels.stash
    model.kernel_impl = impl
    model.attention_form = form
    return model


def is_sharded(config: Config) -> bool:
    """Does each rank hold a part of the model only?"""
    several = dist.world_size() > 1 and config.model.quantise == "none"  # packed weights are not sharded
    return config.dist.strategy == "fsdp" or (config.dist.strategy == "auto" and several)


def check_ranks(config: Config) -> None:
    """Raise ConfigError where the ranks cannot be cut into `dist.replicas` equal parts."""
    if dist.world_size() % config.dist.replicas:
        problem = f"must divide the number of ranks, {dist.world_size()}"
        raise ConfigError("dist.replicas", config.dist.replicas, problem)


def wrap_model(config: Config, device: torch.device, model: Decoder) -> None:
    """A reward head for prm, activation checkpointing, then compilation, then sharding, of a model that has no weights
    yet."""
    if config.train.objective == "prm":
        model.add_reward_head(torch.bfloat16 if config.train.dtype == "pure_bf16" else torch.float32)
    parallelize.recompute_activations(model, config.train.activation_checkpointing)
    if config.train.compile:
        parallelize.compile_blocks(model)
    if is_sharded(config):
        mesh = dist.mesh(device.type, config.dist.replicas)
        compute_dtype = numerics.COMPUTE_DTYPES[config.train.dtype]
        parallelize.shard(model, mesh, compute_dtype=compute_dtype, cpu_offload=config.dist.cpu_offload)


def frozen_copy(config: Config, path: str, impl: str) -> Decoder:
    """The reference model in the compute dtype, without gradients; not compiled, so that caches stay the same."""
    config = replace(config, train=replace(config.train, compile=False))
    return load_model(config, impl, path, numerics.COMPUTE_DTYPES[config.train.dtype]).requires_grad_(False)


def cache_folder(config: Config) -> Path:
    if config.reference.cache_dir is not None:
        return Path(config.reference.cache_dir).expanduser()
    return user_cache("reference")


def open_cache(config: Config, header: Header) -> ReferenceCache:
    named = config.reference.cache_file
    path = Path(named) if named else cache_folder(config) / f"{header.digest()}.safetensors"
    return ReferenceCache.open(path, header, named_by_user=named is not None)


def fill_cache(cache: ReferenceCache, groups: Sequence[Group], config: Config, path: str, impl: str) -> None:
    """Score what is missing with the model at `path`, which is in memory for as long as that takes."""
    missing = cache.missing(groups)
    say(
        f"reference: {len(groups) - len(missing)} of {len(groups)} groups cached, {len(missing)} to score: {cache.path}"
    )
    if not missing:
        return
    model, started = frozen_copy(config, path, impl), time.monotonic()
    device, budget = dist.choose_device(config.run.device), SCORING_TOKENS * config.train.tokens_per_microbatch
    score_missing(cache, missing, model, device=device, tokens_per_batch=budget, progress=config.run.progress)
    seconds, tokens = time.monotonic() - started, sum(len(group.ids) for group in missing)
    say(f"reference pass: {tokens} tokens scored in {seconds:.1f} s, {tokens / seconds:.0f} a second")


def check_belongs(old: checkpoint.Manifest, new: checkpoint.Manifest, config: Config, folder: Path) -> None:
    """Raise CheckpointError unless the checkpoint `old` in `folder` is of this very training; note what may differ."""
    try:
        saved = parse_toml(old.config, folder)
    except UserError as error:
        problem = f"its config is not one of this version ({error})"
        raise CheckpointError(folder, f"{problem}; use the version that wrote it") from None
    changes = maths_changes(saved, config)
    if changes:
        raise CheckpointError(
            folder, f"{'; '.join(changes)}. That would be another training: restore it or set another run.dir"
        )
    for name, changed in (
        ("data_digest", "the training data"),
        ("weights_digest", f"the weights in {adapt.start_keys(config)}"),
        ("reference_digest", "the weights in reference.path"),
    ):
        if getattr(old, name) != getattr(new, name):
            raise CheckpointError(folder, f"{changed} changed since this run began; restore it or set another run.dir")
    for name in ("threads", "world_size", "device"):
        if getattr(old, name) != getattr(new, name):
            before, now = getattr(old, name), getattr(new, name)
            say(f"note: {name} was {before}, is {now}: results agree up to rounding only")


def say(text: str) -> None:
    """Print on rank 0."""
    if dist.is_main():
        print(text, flush=True)

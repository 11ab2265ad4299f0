"""From a checked config to a `Run`: what can be wrong is found here, before the first collective or update."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from data_tools.encode import EncodeOptions, Group
from data_tools.file_digests import FileDigests
from data_tools.jsonl import read_records
from data_tools.lint import lint_groups, lint_pairs
from data_tools.shards import Shard, open_or_build
from data_tools.show import describe_group
from data_tools.tokenizer import load_tokenizer
from kernels.dispatch import choose_matmul_precision, resolve
from trainer import checkpoint, dist, numerics
from trainer.config import Config, maths_changes, parse_toml, to_toml
from trainer.errors import CheckpointError, ConfigError, ModelError, UserError
from trainer.loader import Loader
from trainer.loop import Run
from trainer.models.config import ModelConfig
from trainer.models.decoder import Decoder
from trainer.models.hf_weights import load_decoder
from trainer.objective import Objective
from trainer.optim import MasterWeights
from trainer.reference import Header, ReferenceCache, score_rows, weights_digest
from trainer.run_folder import ensure_writable

SCORING_TOKENS = 2
"""Scoring keeps no activations, so its batches may be this many times `train.tokens_per_microbatch`."""


def open_data(config: Config) -> tuple[Shard, Sequence[Group]]:
    """Training shard and held-out groups, checked against the model. Runs before any process group exists."""
    model_config = ModelConfig.from_folder(config.model.path)
    options = EncodeOptions(
        kind="sft" if config.train.objective == "sft" else "pair",
        max_length=config.data.max_length,
        overlong=config.data.overlong,
        chat_template=config.data.chat_template,
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
    if config.reference.path is not None:
        check_vocabulary(shard, ModelConfig.from_folder(config.reference.path), config.reference.path)
    if config.data.max_length > model_config.max_positions:
        say(
            f"note: data.max_length {config.data.max_length} is beyond the {model_config.max_positions} positions "
            "that the model was made for"
        )


def check_vocabulary(groups: Sequence[Group], model_config: ModelConfig, path: str) -> None:
    """Raise ModelError where a token id has no row in the weights of the model at `path`."""
    largest = max(int(group.ids.max()) for group in groups)
    if largest >= model_config.vocab_size:
        problem = f"the tokenizer gives id {largest}, vocab_size in config.json is {model_config.vocab_size}"
        raise ModelError(path, f"{problem}: tokenizer and weights do not belong together")


def look_at_data(config: Config, shard: Shard) -> None:
    """Print the first rendered row with its scored tokens, and the data lint's findings."""
    tokenizer = load_tokenizer(config.model.path)
    say(describe_group(shard[0], tokenizer, color=False))
    if config.data.lint and config.train.objective != "sft":
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
    """Load the model, score what the reference has not scored yet, then put the checkpoint's state in place."""
    objective = Objective(config.train.objective, config.loss)
    old = checkpoint.read_manifest(resume_from) if resume_from is not None else None
    choices = dict(old.choices) if old is not None else measured_choices(config)
    numerics.set_up(threads=config.run.threads, deterministic=config.train.deterministic, matmul=str(choices["matmul"]))
    ensure_writable(cache_folder(config))
    digests = FileDigests(cache_folder(config) / "digests.json")
    policy_weights = weights_digest(config.model.path, digests)
    model = load_model(config, str(choices["impl"]))
    compute_dtype = numerics.COMPUTE_DTYPES[config.train.dtype]
    masters = MasterWeights(model, compute_dtype=compute_dtype, pure=config.train.dtype == "pure_bf16")
    loader = loader_type(shard, config.train.global_batch, config.train.tokens_per_microbatch, config.train.seed)
    total_steps = config.train.max_steps or config.train.epochs * loader.steps_per_epoch
    same_weights, cache, reference_model, reference_weights = True, None, None, ""
    if objective.needs_reference:
        reference_path = config.reference.path or config.model.path
        reference_weights = weights_digest(reference_path, digests)
        same_weights = reference_weights == policy_weights
        frozen = model if same_weights else None
        if config.reference.mode == "model":
            reference_model = frozen_copy(config, reference_path, str(choices["impl"]))
        else:
            header = Header(
                reference_weights, dtype=str(compute_dtype).removeprefix("torch."), kernel=str(choices["impl"])
            )
            cache = open_cache(config, header)
            groups = [shard[index] for index in loader.used_indices(total_steps)] + list(held_out)
            fill_cache(cache, groups, config, frozen, reference_path, str(choices["impl"]))
    digests.save()
    optimizer = torch.optim.AdamW(
        masters.masters,
        lr=config.train.learning_rate,
        betas=(config.train.adam_beta1, config.train.adam_beta2),
        eps=config.train.adam_epsilon,
        weight_decay=config.train.weight_decay,
        fused=True,
    )
    manifest = checkpoint.Manifest(
        step=0,
        config=to_toml(config),
        data_digest=shard.digest,
        weights_digest=policy_weights,
        world_size=dist.world_size(),
        threads=torch.get_num_threads(),
        choices=choices,
        reference_digest=reference_weights,
    )
    run = Run(
        config=config,
        model=model,
        masters=masters,
        optimizer=optimizer,
        objective=objective,
        loader=loader,
        eval_groups=held_out,
        cache=cache,
        reference_model=reference_model,
        starts_at_reference=objective.needs_reference and same_weights,
        manifest=manifest,
        total_steps=total_steps,
    )
    if old is not None:
        continue_from(run, resume_from, old)
    return run


def measured_choices(config: Config) -> dict[str, object]:
    """What is decided by measurement: made by rank 0, the same on all ranks, kept in the manifest, reused on resume."""
    try:
        impl = resolve(config.kernels.impl)
    except ValueError as error:
        raise ConfigError("kernels.impl", config.kernels.impl, str(error)) from None
    choices: dict[str, object] = {"impl": impl, "matmul": config.kernels.matmul}
    if config.kernels.matmul == "auto":
        # only float32 GEMMs are affected: a bf16 run need not measure
        needed = config.train.dtype == "float32" and dist.is_main()
        choices["matmul"] = choose_matmul_precision().precision if needed else "highest"
    return dist.broadcast_object(choices)


def load_model(config: Config, impl: str, path: str | None = None) -> Decoder:
    """A decoder ready for this run's arithmetic; float32 unless the run is pure bf16 (masters start from float32)."""
    dtype = torch.bfloat16 if config.train.dtype == "pure_bf16" else torch.float32
    model = load_decoder(path or config.model.path, dtype=dtype)
    model.checkpoint_blocks = config.train.activation_checkpointing == "full"
    model.stash_logits = config.kernels.stash
    model.kernel_impl = impl
    return model


def frozen_copy(config: Config, path: str, impl: str) -> Decoder:
    """The reference model in the compute dtype, without gradients."""
    model = load_model(config, impl, path).to(numerics.COMPUTE_DTYPES[config.train.dtype])
    return model.requires_grad_(False)


def cache_folder(config: Config) -> Path:
    if config.reference.cache_dir is not None:
        return Path(config.reference.cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "logratio" / "reference"


def open_cache(config: Config, header: Header) -> ReferenceCache:
    named = config.reference.cache_file
    path = Path(named) if named else cache_folder(config) / f"{header.digest()}.safetensors"
    return ReferenceCache.open(path, header, named_by_user=named is not None)


def fill_cache(
    cache: ReferenceCache, groups: list[Group], config: Config, frozen: Decoder | None, path: str, impl: str
) -> None:
    """Score what is missing with the starting weights in `frozen`, or with the model at `path` loaded for it."""
    missing = cache.missing(groups)
    say(
        f"reference: {len(groups) - len(missing)} of {len(groups)} groups cached, {len(missing)} to score: {cache.path}"
    )
    if not missing:
        return
    model = frozen if frozen is not None else frozen_copy(config, path, impl)
    cache.add(score_rows(model, missing, tokens_per_batch=SCORING_TOKENS * config.train.tokens_per_microbatch))
    if dist.is_main():
        cache.save()


def continue_from(run: Run, folder: Path, old: checkpoint.Manifest) -> None:
    """Check that the checkpoint belongs to this run, then load its state."""
    try:
        saved = parse_toml(old.config, folder)
    except UserError as error:
        raise CheckpointError(
            folder, f"its config is not one of this version ({error}); use the version that wrote it"
        ) from None
    changes = maths_changes(saved, run.config)
    if changes:
        raise CheckpointError(
            folder, f"{'; '.join(changes)}. That would be another training: restore it or set another run.dir"
        )
    for name, changed in (
        ("data_digest", "the training data"),
        ("weights_digest", "the weights in model.path"),
        ("reference_digest", "the weights in reference.path"),
    ):
        if getattr(old, name) != getattr(run.manifest, name):
            raise CheckpointError(folder, f"{changed} changed since this run began; restore it or set another run.dir")
    for name in ("threads", "world_size"):
        if getattr(old, name) != getattr(run.manifest, name):
            before, now = getattr(old, name), getattr(run.manifest, name)
            say(f"note: {name} was {before}, is {now}: results agree up to rounding only")
    checkpoint.load(folder, run.masters.named(), run.optimizer)
    run.masters.refresh()
    run.step = old.step


def say(text: str) -> None:
    """Print on rank 0."""
    if dist.is_main():
        print(text, flush=True)

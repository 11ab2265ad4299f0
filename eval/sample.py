"""Draw samples for a file of prompts: `python -m eval.sample --model DIR --prompts P.jsonl --out S.jsonl --n 4`.

With `--url` the samples come from an OpenAI-compatible server: the options are then those of `data_tools.endpoint`. The
formats of both files are in data_tools/samples.py. The same command again goes on where it was: rows of --out stay.
Ctrl-C or a signal ends it between two tokens; what is finished is in the file.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path

from tqdm import tqdm

from data_tools import endpoint
from data_tools.chat_template import load_chat_template
from data_tools.encode import encode_prefixes, encode_prompts
from data_tools.errors import DataError, check_each
from data_tools.jsonl import read_records
from data_tools.samples import Prompt, Sample, SampleWriter, begin_from, digest_of, read_prompts
from data_tools.schema import Record
from data_tools.tokenizer import Tokenizer, load_tokenizer
from eval.few_shot import with_examples
from eval.generate import Request, end_tokens, generate
from eval.sampling import SamplingOptions
from trainer.entry import run_command
from trainer.errors import TrainingStopped, UserError
from trainer.models.config import ModelConfig, read_config
from trainer.models.decoder import Decoder
from trainer.models.inspection import generation_config
from trainer.models.packed import pack_for_sampling
from trainer.score import load_for_scoring
from trainer.stop import StopRequest

DTYPES = ("bf16", "float32")
ROW_SETTINGS = tuple(field.name for field in fields(SamplingOptions))


def main(argv: list[str]) -> None:
    """The command; see the module's text. Raises UserError, and TrainingStopped where it was asked to end."""
    if any(argument == "--url" or argument.startswith("--url=") for argument in argv):
        sys.exit(endpoint.main(argv))
    args = _parser().parse_args(argv)
    prompts = read_prompts(args.prompts)
    tokenizer = load_tokenizer(args.model)
    requests = _requests(prompts, args, tokenizer)
    options = _options_of_rows(prompts, _options(args))
    if args.earlier is not None:
        begin_from(args.out, args.earlier)
    with SampleWriter(args.out) as writer:
        missing = [
            writer.missing(
                prompt.id,
                range(own.n),
                model=args.model,
                settings_digest=settings_digest(own, args),
                prompt_digest=prompt.digest,
            )
            for prompt, own in zip(prompts, options, strict=True)
        ]
        wanted = sum(each.n for each in options)
        todo = sum(map(len, missing))
        if writer.torn:
            print(f"{args.out}: a torn last row was cut off")
        if todo:
            _draw(args, tokenizer, prompts, requests, options, missing, writer)
    print(f"{wanted} of {wanted} samples in {args.out}: {wanted - todo} were there, {todo} drawn")


def _draw(
    args: argparse.Namespace,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    requests: Sequence[Request],
    options: Sequence[SamplingOptions],
    missing: Sequence[Sequence[int]],
    writer: SampleWriter,
) -> None:
    """Draw what is missing, rows of equal settings together."""
    model = load_model(args.model, args.dtype)
    ends = end_tokens(tokenizer, read_config(args.model)[0], generation_config(Path(args.model)))
    by_id = {prompt.id: (prompt, own) for prompt, own in zip(prompts, options, strict=True)}
    bar = tqdm(total=sum(map(len, missing)), unit="sample", dynamic_ncols=True, disable=None)
    tokens = 0
    with bar, StopRequest() as stop:
        for kind in dict.fromkeys(replace(own, n=1) for own in options):
            rows = [index for index, own in enumerate(options) if replace(own, n=1) == kind and missing[index]]
            drawn = generate(
                model,
                tokenizer,
                [requests[index] for index in rows],
                kind,
                stop_ids=ends,
                slots=args.slots,
                samples=[missing[index] for index in rows],
                stopped=stop.asked,
            )
            for done in drawn:
                prompt, own = by_id[done.request_id]
                tokens += len(done.token_ids)
                writer.append(
                    Sample(
                        id=prompt.id,
                        sample=done.sample,
                        text=done.text,
                        finish_reason=done.finish_reason,
                        model=args.model,
                        settings_digest=settings_digest(own, args),
                        prompt_digest=prompt.digest,
                        prompt_tokens=done.prompt_tokens,
                        completion_tokens=len(done.token_ids),
                        logprobs=tuple(done.logps) if args.logprobs else None,
                    )
                )
                bar.update()
                bar.set_postfix_str(f"{tokens} tokens", refresh=False)
            if stop.asked():
                problem = f"{bar.total - bar.n} samples are missing, start the same command again to go on"
                raise TrainingStopped(f"{args.out}: {problem}")


def load_model(folder: str, dtype: str) -> Decoder:
    """A frozen model, ready to draw from, on a GPU where PyTorch finds one."""
    model = load_for_scoring(folder, dtype)
    pack_for_sampling(model)
    return model


def settings_digest(options: SamplingOptions, args: argparse.Namespace) -> str:
    """Of all that decides what a sample is, but its number and the model's name."""
    settings = {name: value for name, value in asdict(options).items() if name != "n"}
    few_shot = digest_of(Path(args.few_shot).read_text(encoding="utf-8")) if args.few_shot else None
    template = digest_of(Path(args.chat_template).read_text(encoding="utf-8")) if args.chat_template else None
    return digest_of({**settings, "dtype": args.dtype, "api": args.api, "few_shot": few_shot, "template": template})


def _requests(prompts: Sequence[Prompt], args: argparse.Namespace, tokenizer: Tokenizer) -> list[Request]:
    """Every prompt as tokens, behind the examples of --few-shot, with how its answer begins."""
    template = load_chat_template(args.model, args.chat_template)
    shots = read_records([args.few_shot], kind="sft") if args.few_shot else []
    examples = [(shot.prompt, shot.completions[0]) for shot in shots]
    records = []
    for prompt in prompts:
        text = with_examples(prompt.prompt, examples, args.api)
        records.append(Record(id=prompt.id, prompt=text, completions=(), path=prompt.path, line=prompt.line))
    ids = encode_prompts(records, tokenizer, template, special_tokens=args.special_tokens)
    begun = encode_prefixes([own.prefix for own in prompts], ids, tokenizer, special_tokens=args.special_tokens)
    vocabulary = ModelConfig.from_folder(args.model).vocab_size
    largest = max((token for own in (*ids, *begun) for token in own), default=0)
    if largest >= vocabulary:
        problem = f"the tokenizer gives id {largest}, the model has {vocabulary}: they do not belong together"
        raise UserError(f"{args.model}: {problem}")
    rows = zip(prompts, ids, begun, strict=True)
    return [Request(prompt.id, (*own, *prefix), len(prefix)) for prompt, own, prefix in rows]


def _options_of_rows(prompts: Sequence[Prompt], common: SamplingOptions) -> list[SamplingOptions]:
    """The common options with each row's settings over them. Raises DataErrors."""

    def check(prompt: Prompt) -> SamplingOptions:
        try:
            unknown = sorted(set(prompt.settings) - set(ROW_SETTINGS))
            if unknown:
                raise UserError(f"'{unknown[0]}' is not known; known: {', '.join(ROW_SETTINGS)}")
            own = {
                name: tuple([value] if isinstance(value, str) else value) if name in ("stop", "stop_ids") else value
                for name, value in prompt.settings.items()
            }
            return replace(common, **own)
        except (UserError, TypeError) as error:
            raise DataError(prompt.path, prompt.line, field="settings", problem=str(error)) from None

    return check_each(prompts, check)


def _options(args: argparse.Namespace) -> SamplingOptions:
    names = ("n", "max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    return SamplingOptions(stop=tuple(args.stop), **{name: getattr(args, name) for name in names})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m eval.sample", description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", required=True, help="Hugging Face model folder")
    parser.add_argument("--prompts", required=True, help="JSON Lines: id, prompt (text or messages), prefix, settings")
    parser.add_argument("--out", required=True, type=Path, help="JSON Lines of samples; rows that are there stay")
    parser.add_argument("--earlier", metavar="F", help="samples that a missing --out begins with, of an earlier turn")
    parser.add_argument(
        "--api", choices=["chat", "completions"], default="chat", help="chat (default), or plain text that goes on"
    )
    default = SamplingOptions()
    for name, kind, words in (
        ("n", int, "samples a prompt"),
        ("max_tokens", int, "longest completion"),
        ("temperature", float, "0: always the likeliest token"),
        ("top_k", int, "only the k likeliest tokens; 0: all"),
        ("top_p", float, "only the likeliest tokens that reach this probability together"),
        ("min_p", float, "only tokens at least this share as likely as the likeliest"),
        ("repetition_penalty", float, "above 1: tokens that were there are less likely"),
        ("seed", int, "with the prompt's id and the sample's number it decides what is drawn"),
    ):
        value = getattr(default, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=value, help=f"{words} (default {value})")
    parser.add_argument("--stop", action="append", default=[], help="text that ends a completion; may be repeated")
    parser.add_argument("--logprobs", action="store_true", help="keep the tokens' log-probs")
    parser.add_argument("--few-shot", metavar="F", help="JSON Lines of prompts with answers, put before each prompt")
    parser.add_argument("--chat-template", metavar="F", help="a jinja file used instead of the model's own template")
    parser.add_argument("--special-tokens", choices=["text", "control"], default="text", help="as data.special_tokens")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="arithmetic (default bf16)")
    parser.add_argument("--slots", type=int, default=16, help="sequences at a time (default 16)")
    return parser


if __name__ == "__main__":
    run_command(main, sys.argv[1:])

"""Sample from an OpenAI-compatible server: prompts JSONL -> samples JSONL (formats: data_tools/samples.py).

    python -m data_tools.endpoint --url http://localhost:8000/v1 --model M --prompts P.jsonl --out S.jsonl --n 4

The same command again goes on where it was: rows in --out stay, answers in the cache are not paid for again, failed
prompts are asked once more. Ctrl-C (or SIGTERM) asks nothing more and writes what is in flight; a second one drops it.
Sampling itself is in `endpoint_client`.
"""

import argparse
import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType

from tqdm import tqdm

from data_tools.disk import user_cache
from data_tools.endpoint_cache import AnswerCache
from data_tools.endpoint_client import Endpoint, Result
from data_tools.endpoint_config import DEFAULT_KEY, EndpointConfig, Totals
from data_tools.endpoint_limits import RetryPolicy
from data_tools.endpoint_request import PATHS, Question, Sampling, SettingsError, body_of
from data_tools.errors import DataError, UserError, check_each
from data_tools.samples import Prompt, Sample, SampleWriter, begin_from, prompt_digest, read_prompts

NO_PREFIX = (
    "most servers begin a new answer after the assistant's message; for one that goes on with it (vLLM, SGLang) give "
    "--continue-final-message, or use --api completions"
)
QUIET_S = 10.0
"""Seconds between lines of progress where nobody watches a terminal."""


def questions_of(prompts: Sequence[Prompt], sampling: Sampling, config: EndpointConfig) -> list[Question]:
    """Every prompt as a question for all of its samples. Raises DataErrors for rows that cannot be asked."""

    def check(prompt: Prompt) -> Question:
        if prompt.prefix and config.api == "chat" and not config.continue_final_message:
            raise DataError(prompt.path, prompt.line, field="prefix", problem=NO_PREFIX)
        try:
            own = sampling.changed(prompt.settings)
            numbers = tuple(range(own.n))
            question = Question(id=prompt.id, prompt=prompt.prompt, sampling=own, samples=numbers, prefix=prompt.prefix)
            body_of(question, model=config.model, api=config.api, sample=0)
            if own.seed is not None and config.samples_per_request > 1:
                raise SettingsError("seed: cannot be with samples_per_request above 1; leave one of them out")
            return question
        except UserError as error:
            field = "settings" if isinstance(error, SettingsError) else "prompt"
            raise DataError(prompt.path, prompt.line, field=field, problem=str(error)) from None

    return check_each(prompts, check)


def still_wanted(questions: Sequence[Question], writer: SampleWriter, config: EndpointConfig) -> list[Question]:
    """The questions without the samples that the file has. Raises UserError where it has them of another kind."""
    wanted = []
    for question in questions:
        missing = writer.missing(
            question.id,
            question.samples,
            model=config.model,
            settings_digest=question.sampling.digest(config.api),
            prompt_digest=prompt_digest(question.prompt, question.prefix),
        )
        if missing:
            wanted.append(replace(question, samples=missing))
    return wanted


def sample_of(result: Result, config: EndpointConfig) -> Sample:
    """A result with an answer as a row of samples."""
    answer, question = result.answer, result.question
    assert answer is not None
    return Sample(
        id=question.id,
        sample=result.sample,
        text=answer.text,
        finish_reason=answer.finish_reason,
        model=config.model,
        settings_digest=question.sampling.digest(config.api),
        prompt_digest=prompt_digest(question.prompt, question.prefix),
        prompt_tokens=answer.prompt_tokens,
        completion_tokens=answer.completion_tokens,
        logprobs=answer.logprobs,
        reasoning=answer.reasoning,
    )


@contextlib.contextmanager
def stopping(endpoint: Endpoint) -> Iterator[None]:
    """Inside, SIGINT and SIGTERM stop the endpoint in good order, a second one at once."""

    def take(number: int, frame: FrameType | None) -> None:
        if endpoint.stop_reason is not None:
            endpoint.cancel()
            return
        endpoint.stop()
        # not print: the signal may have come in the middle of one
        os.write(2, b"\nstopping: waiting for the answers in flight (once more drops them)\n")

    before = {number: signal.signal(number, take) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def sample_to_file(
    config: EndpointConfig, sampling: Sampling, prompts: Sequence[Prompt], out: Path, cache: AnswerCache | None
) -> int:
    """Draw what is missing in `out`, print progress, failures and one last line; the exit code. Raises UserError."""
    questions = questions_of(prompts, sampling, config)
    with SampleWriter(out) as writer, contextlib.ExitStack() as stack:
        wanted = still_wanted(questions, writer, config)
        count, all_of_them = (sum(len(q.samples) for q in some) for some in (wanted, questions))
        bar = stack.enter_context(
            tqdm(total=count, unit="sample", dynamic_ncols=True, mininterval=0.1 if sys.stderr.isatty() else QUIET_S)
        )
        endpoint = Endpoint(config, cache, progress=lambda totals: bar.set_postfix_str(_state(totals), refresh=False))
        failure: UserError | None = None
        with stopping(endpoint):
            try:
                for result in endpoint.results(wanted):
                    if result.error is not None:
                        tqdm.write(f"failed: {result.error}", file=sys.stderr)
                    else:
                        writer.append(sample_of(result, config))
                    bar.update()
            except UserError as error:
                failure = error
        bar.close()
        totals, missing = endpoint.totals, count - endpoint.totals.samples
        print(last_line(totals, out, all_of_them, missing, writer.torn, cache))
    if failure is not None:
        raise failure
    if endpoint.stop_reason == "max_cost":
        raise UserError(f"max_cost {config.max_cost:g} is spent, {missing} samples are missing; raise it to go on")
    if totals.failed:
        raise UserError(f"{missing} samples are missing, {totals.failed} failed; the same command asks for them again")
    return 1 if missing else 0


def last_line(totals: Totals, out: Path, wanted: int, missing: int, torn: int, cache: AnswerCache | None) -> str:
    """What a run came to, in one line."""
    there = wanted - missing - totals.samples
    parts = [
        f"{wanted - missing} of {wanted} samples in {out}: {there} were there, {totals.cached} from the cache, "
        f"{totals.samples - totals.cached} asked for",
        f"{totals.prompt_tokens} prompt and {totals.completion_tokens} completion tokens"
        + (f" (not counted: {totals.uncounted} requests)" if totals.uncounted else ""),
    ]
    if totals.cost is not None:
        parts.append(f"cost {totals.cost:.4f}")
    if totals.retries:
        parts.append(
            f"{totals.retries} retries" + (f" ({totals.lost_answers} may be billed)" * bool(totals.lost_answers))
        )
    if totals.failed:
        parts.append(f"{totals.failed} failed")
    if torn:
        parts.append("a torn last row was cut off")
    if cache is not None and cache.damaged:
        parts.append(f"{cache.damaged} damaged lines in the cache skipped")
    return "; ".join(parts)


def _state(totals: Totals) -> str:
    shown = {"cached": totals.cached, "failed": totals.failed, "retries": totals.retries}
    parts = [f"{name} {value}" for name, value in shown.items() if value]
    return ", ".join(parts + ([f"cost {totals.cost:.4f}"] if totals.cost is not None else []))


def _parser() -> argparse.ArgumentParser:
    about = (__doc__ or "").split("\n\n")[0]
    parser = argparse.ArgumentParser(prog="python -m data_tools.endpoint", description=about)
    parser.add_argument("--url", required=True, help="the API's base, as far as the version: http://localhost:8000/v1")
    parser.add_argument("--model", required=True, help="name of the model at the server")
    parser.add_argument("--prompts", required=True, help="JSON Lines: id, prompt (text or messages), prefix, settings")
    parser.add_argument("--out", required=True, type=Path, help="JSON Lines of samples; rows that are there stay")
    parser.add_argument("--earlier", metavar="F", help="samples that a missing --out begins with, of an earlier turn")
    parser.add_argument(
        "--api", choices=list(PATHS), default="chat", help="chat (default), or completions of plain text"
    )
    group = parser.add_argument_group(
        "sampling", "what is not given is the server's choice; a row's settings come first"
    )
    group.add_argument("--n", type=int, default=1, help="samples a prompt (default 1)")
    group.add_argument("--temperature", type=float)
    group.add_argument("--top-p", type=float)
    group.add_argument("--max-tokens", type=int, help="longest completion")
    group.add_argument("--stop", action="append", default=[], help="string that ends a completion; may be repeated")
    group.add_argument("--seed", type=int, help="sample k is asked for with seed + k")
    group.add_argument(
        "--logprobs", action="store_true", help="keep the tokens' log-probs, where the server gives them"
    )
    group.add_argument("--extra", default="{}", help="JSON object of further fields of the request: '{\"top_k\": 20}'")
    group = parser.add_argument_group("server")
    group.add_argument("--api-key-env", help=f"environment variable with the key; '' for none (default {DEFAULT_KEY})")
    group.add_argument(
        "--continue-final-message", action="store_true", help="it can go on with the assistant's message: row's prefix"
    )
    group.add_argument("--concurrency", type=int, default=8, help="requests in flight (default 8)")
    group.add_argument("--samples-per-request", type=int, default=1, help="ask for so many at once (default 1)")
    group.add_argument("--rpm", type=float, help="requests a minute, at most")
    group.add_argument("--tpm", type=float, help="tokens a minute, at most")
    group.add_argument("--retries", type=int, default=RetryPolicy().retries, help="tries after the first (default 8)")
    group.add_argument("--connect-timeout", type=float, default=EndpointConfig.connect_s, help="seconds (default 10)")
    group.add_argument("--read-timeout", type=float, default=EndpointConfig.read_s, help="of silence, s (default 600)")
    group.add_argument("--total-timeout", type=float, default=EndpointConfig.total_s, help="seconds (default 1200)")
    group = parser.add_argument_group("cache and money")
    group.add_argument(
        "--cache", type=Path, help="file of answers (default: endpoint/answers.jsonl in the user's cache)"
    )
    group.add_argument("--no-cache", action="store_true", help="keep no answers but in --out")
    group.add_argument("--price-prompt", type=float, help="money per million prompt tokens")
    group.add_argument("--price-completion", type=float, help="money per million completion tokens")
    group.add_argument("--max-cost", type=float, help="send nothing more once so much is spent")
    return parser


def _config(args: argparse.Namespace) -> EndpointConfig:
    return EndpointConfig(
        base_url=args.url,
        model=args.model,
        api=args.api,
        api_key_env=args.api_key_env,
        concurrency=args.concurrency,
        retry=RetryPolicy(retries=args.retries),
        requests_per_minute=args.rpm,
        tokens_per_minute=args.tpm,
        connect_s=args.connect_timeout,
        read_s=args.read_timeout,
        total_s=args.total_timeout,
        samples_per_request=args.samples_per_request,
        continue_final_message=args.continue_final_message,
        price_prompt=args.price_prompt,
        price_completion=args.price_completion,
        max_cost=args.max_cost,
    )


def _sampling(args: argparse.Namespace) -> Sampling:
    try:
        extra = json.loads(args.extra)
    except ValueError as error:
        raise UserError(f"--extra: is not JSON ({error})") from None
    names = ("n", "temperature", "top_p", "max_tokens", "seed", "logprobs")
    return Sampling(extra=extra, stop=tuple(args.stop), **{name: getattr(args, name) for name in names})


def _sample(args: argparse.Namespace) -> int:
    config, sampling = _config(args), _sampling(args)
    prompts = read_prompts(args.prompts)
    if args.earlier is not None:
        begin_from(args.out, args.earlier)
    if args.no_cache:
        return sample_to_file(config, sampling, prompts, args.out, None)
    with contextlib.closing(AnswerCache(args.cache or user_cache("endpoint") / "answers.jsonl")) as cache:
        return sample_to_file(config, sampling, prompts, args.out, cache)


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 0 when all samples are there, 2 with a line for what the user can mend, 1 when it was stopped."""
    args = _parser().parse_args(argv)
    try:
        return _sample(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

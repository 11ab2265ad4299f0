"""`python -m data_tools.show --data F --model DIR`: rows as the model will see them, scored tokens marked.

The first thing to look at before a run: is the prompt rendered as the model expects, is exactly the answer scored, and
is the end-of-turn token among what is trained (a model that never learns it never stops)?
"""

import argparse
import itertools
import sys
from collections.abc import Sequence

from data_tools.chat_template import load_chat_template
from data_tools.encode import SPECIAL_TOKENS, EncodeOptions, Group, encode_records
from data_tools.errors import UserError
from data_tools.jsonl import iter_jsonl
from data_tools.schema import Record, check_record
from data_tools.template_check import check_template
from data_tools.tokenizer import Tokenizer, load_tokenizer

SCORED, CONTEXT, RESET = "\x1b[32m", "\x1b[2m", "\x1b[0m"
BRANCH_NAMES = {2: ("prompt", "completion"), 3: ("prompt", "chosen", "rejected")}


def describe_group(group: Group, tokenizer: Tokenizer, color: bool) -> str:
    """A group as text of several lines: counts, each branch with its scored tokens marked, and what ends an answer.

    Scored text is green (`color`) or stands in [[ ]]; context is dim or plain.
    """
    names = BRANCH_NAMES.get(len(group.lengths)) or ["prompt", *(f"branch {k}" for k in range(1, len(group.lengths)))]
    counts, texts = [], []
    start = 0
    for name, length, spans in zip(names, group.lengths, group.spans, strict=True):
        ids = group.ids[start : start + length].tolist()
        start += length
        scored = sum(end - begin for begin, end in spans)
        counts.append(f"{name} {length} tokens" + (f", {scored} scored" if scored else ""))
        texts.append(f"--- {name}\n{_marked(ids, spans, tokenizer, color)}")
    return "\n".join([f"{group.record_id}: {'; '.join(counts)}", *texts, end_of_turn_line(group, tokenizer)])


def end_of_turn_line(group: Group, tokenizer: Tokenizer) -> str:
    """`end-of-turn token trained: yes (<|im_end|>)`, or no with the completions that lack one; of steps, their hard
    labels."""
    if group.labels:
        return f"labels at the marked tokens: {' '.join(f'{label.hard:.0f}' for own in group.labels for label in own)}"
    ends = _end_tokens(group, tokenizer)
    missing = [str(k) for k, end in enumerate(ends, start=1) if end is None]
    if missing:
        return f"end-of-turn token trained: no (missing in completion {' and '.join(missing)} of {len(ends)})"
    return f"end-of-turn token trained: yes ({', '.join(sorted({str(end) for end in ends}))})"


def _end_tokens(group: Group, tokenizer: Tokenizer) -> list[str | None]:
    """For each completion the special token that ends its scored text, white space after it aside."""
    found: list[str | None] = []
    start = group.lengths[0]
    for length, spans in zip(group.lengths[1:], group.spans[1:], strict=True):
        scored = group.ids[start + spans[-1][0] : start + spans[-1][1]].tolist() if spans else []
        start += length
        while scored and not tokenizer.is_special(scored[-1]) and not tokenizer.decode(scored[-1:]).strip():
            scored.pop()
        ends = bool(scored) and (tokenizer.is_special(scored[-1]) or scored[-1] == tokenizer.eos_id)
        found.append(tokenizer.decode(scored[-1:]) if ends else None)
    return found


def _marked(ids: list[int], spans: Sequence[tuple[int, int]], tokenizer: Tokenizer, color: bool) -> str:
    before, after = (SCORED, RESET) if color else ("[[", "]]")
    dim, plain = (CONTEXT, RESET) if color else ("", "")
    out, done = "", 0
    for begin, end in spans:
        out += _wrap(tokenizer.decode(ids[done:begin]), dim, plain) + _wrap(
            tokenizer.decode(ids[begin:end]), before, after
        )
        done = end
    return out + _wrap(tokenizer.decode(ids[done:]), dim, plain)


def _wrap(text: str, before: str, after: str) -> str:
    """Text between marks, its control characters spelt out: data must not steer the terminal."""
    visible = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
    return f"{before}{visible}{after}" if visible else ""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m data_tools.show", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("--data", required=True, help="JSON Lines file, plain or gzip")
    parser.add_argument("--model", required=True, help="model folder with tokenizer and chat template")
    parser.add_argument("-n", type=int, default=3, help="rows to show, from the start (default 3)")
    parser.add_argument("--kind", choices=("pair", "sft", "prm"), default="pair", help="what the rows are (pair)")
    parser.add_argument("--max-length", type=int, help="drop longer rows, in tokens (default: no limit)")
    parser.add_argument("--chat-template", help="jinja file that replaces the model's template")
    parser.add_argument("--special-tokens", choices=SPECIAL_TOKENS, default="text", help="as data.special_tokens")
    parser.add_argument("--no-color", action="store_true", help="mark scored text by [[ ]] also on a terminal")
    return parser


def _show(args: argparse.Namespace) -> None:
    if args.n < 1:
        raise UserError(f"-n {args.n}: must be at least 1")
    options = EncodeOptions(
        kind=args.kind,
        max_length=args.max_length,
        chat_template=args.chat_template,
        special_tokens=args.special_tokens,
    )
    tokenizer = load_tokenizer(args.model)
    template = load_chat_template(args.model, args.chat_template)
    records: list[Record] = []
    for line, value in itertools.islice(iter_jsonl(args.data), args.n):
        records.append(check_record(value, kind=args.kind, path=args.data, line=line))
    groups, report = encode_records(records, tokenizer, template, options)
    color = sys.stdout.isatty() and not args.no_color
    for group in groups:
        print(describe_group(group, tokenizer, color), end="\n\n")
    if template is not None:
        print("\n".join(f"template: {line}" for line in check_template(template, tokenizer).lines()))
    print("\n".join(report.lines()))


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code: 0, or 2 with one line a fault of the input."""
    args = _parser().parse_args(argv)
    try:
        _show(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""From textbook passages to multiple-choice questions that a model wrote on them.

    python -m data_tools.textbook chunks --passages P.jsonl --words 300 --out C.jsonl
    python -m data_tools.textbook requests --chunks C.jsonl --prompts P.toml --count 2 --options 4 --out R.jsonl
    python -m eval.sample ... --prompts R.jsonl --out S.jsonl
    python -m data_tools.textbook questions --requests R.jsonl --samples S.jsonl --options 4 --out Q.jsonl

Passages are rows with `id` and `text`; the columns named by --titles (title, section) stand over each chunk. The table
[question] of P.toml may use {text}, {titles}, {count}, {options} (how many), {format} (below) and columns of the
passage. Each question of a reply is read by itself and strictly:

    <item> <question>..</question> <option_A>..</option_A> ... <answer>B</answer> <explanation>..</explanation> </item>

(explanation may be left out). Dropped, and counted: what cannot be read, equal options, short questions, what --forbid
finds (say "according to the (passage|text)"), and near-duplicates: questions of which 80% of the short word runs stand
in one that was kept before. Whether the key is right is not known here: let models answer and keep what they agree on
(`data_tools.distill agree`). How often each letter is the key, and the key the longest option, is printed: models have
habits that a learner will find.
"""

import argparse
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from data_tools.chunks import clean_paragraphs, cut_chunks, words_in
from data_tools.command import counted, positive, run
from data_tools.errors import DataError, UserError, check_each
from data_tools.fields import BadReply, read_fields, without_thinking, write_fields
from data_tools.jsonl import iter_jsonl, write_rows
from data_tools.overlap import SHINGLE, grams_of, units_of
from data_tools.pairs.carried import CUT
from data_tools.pairs.exchange import Answer, RequestRow, read_answers, read_prompt_texts, write_requests
from data_tools.pairs.record import made_by
from data_tools.questions import id_of
from data_tools.steps import compiled

ITEM = re.compile(r"<item>(.*?)</item>", re.DOTALL)
MOST_OPTIONS = 10
KEPT = ("lang", "subject", "book", "chapter", "url")
"""Columns of a passage that its questions bear, where it has them."""
Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code: 0, or 2 with one line a fault of the input."""
    return run(_parser(), argv, {"chunks": write_chunks, "requests": write_asked, "questions": write_questions})


def write_chunks(args: argparse.Namespace) -> None:
    """The chunks of every passage."""
    if args.least >= args.words:
        raise UserError(f"--least {args.least}: must be below --words {args.words}")
    seen: dict[str, int] = {}

    def check(item: tuple[int, object]) -> list[Row]:
        line, value = item
        text = value.get("text") if isinstance(value, dict) else None
        if not isinstance(value, dict) or not isinstance(text, str):
            raise DataError(args.passages, line, field="text", problem="expected a text")
        name = id_of(value, args.passages, line)
        if (first := seen.setdefault(name, line)) != line:
            raise DataError(args.passages, line, field="id", problem=f"'{name}' already stands in line {first}")
        above = [str(value[title]) for title in args.titles if value.get(title)]
        chunks = cut_chunks(clean_paragraphs(text, join_hyphens=args.join_hyphens), args.words, args.least)
        kept = {column: value[column] for column in KEPT if value.get(column) is not None}
        return [
            {
                "id": f"{name}#{number}",
                "passage_id": name,
                **kept,
                "titles": [*above, *own.titles],
                "words": own.words,
                "text": own.text,
            }
            for number, own in enumerate(chunks)
        ]

    rows = check_each(iter_jsonl(args.passages), check)
    cut = [chunk for own in rows for chunk in own]
    chunks = [chunk for chunk in cut if chunk["words"] >= args.least]
    write_rows(args.out, chunks)
    words = sum(chunk["words"] for chunk in chunks)
    short = Counter({f"of less than {args.least} words": len(cut) - len(chunks)})
    print(f"{len(rows)} passages: {len(chunks)} chunks, {words} words, in {args.out}{counted(short)}")


def item_format(options: int) -> str:
    """What a written question must look like, for the prompt."""
    fields = {"question": "..."} | {f"option_{label}": "..." for label in _labels(options)}
    body = write_fields({**fields, "answer": "the right option's letter", "explanation": "why it is right"})
    return f"<item>\n{body}\n</item>"


def write_asked(args: argparse.Namespace) -> None:
    """A request a chunk."""
    text = read_prompt_texts(args.prompts, ["question"])["question"]
    asked = {"count": args.count, "options": args.options, "format": item_format(args.options)}
    requests = []
    for line, chunk in iter_jsonl(args.chunks, may_be_empty=True):
        if not isinstance(chunk, dict) or not isinstance(chunk.get("titles"), list) or "text" not in chunk:
            raise DataError(args.chunks, line, field="titles", problem="missing: this is no row of `textbook chunks`")
        values = {**chunk, **asked, "titles": " > ".join(chunk["titles"])}
        more = {"chunk": {name: value for name, value in chunk.items() if name != "text"}}
        requests.append(RequestRow(id=chunk["id"], prompt=text.messages(values), more=more))
    write_requests(args.out, requests)
    print(f"{len(requests)} chunks: {len(requests)} requests for {args.count} questions each, in {args.out}")


def read_items(text: str, options: int) -> Iterator[Row | BadReply]:
    """Every question of a reply as a row without id, or why it is none. Raises BadReply where there is none at all."""
    body = without_thinking(text)
    items = ITEM.findall(body)
    if not items:
        raise BadReply("no <item>")
    if body.count("<item>") > len(items):
        yield BadReply("an item without end")
    labels = _labels(options)
    names = ["question", *(f"option_{label}" for label in labels), "answer", "explanation"]
    for item in items:
        try:
            found = read_fields(item, names, optional=["explanation"])
            if re.search(r"<option_[^<>]*>", re.sub("|".join(f"<option_{label}>" for label in labels), "", item)):
                raise BadReply(f"more than {options} options")
            row: Row = {"question": found["question"], "options": {own: found[f"option_{own}"] for own in labels}}
            if found["answer"] not in labels:
                raise BadReply("an answer that is no letter of the options")
            if len({" ".join(own.casefold().split()) for own in row["options"].values()}) < options:
                raise BadReply("two options are equal")
            explained = {"explanation": found["explanation"]} if "explanation" in found else {}
            yield {**row, "answer": found["answer"], **explained}
        except BadReply as error:
            yield error


class NearDuplicates:
    """Texts seen so far, by their short word runs (data_tools.overlap); equal ones, spaces and case aside, too."""

    def __init__(self, near: float) -> None:
        self.near = near
        self._texts: set[str] = set()
        self._holders: dict[tuple[str, ...], list[int]] = defaultdict(list)
        self._count = 0

    def add(self, text: str) -> bool:
        """Take up a text; False where one that is there has the share `near` of its runs, or is equal."""
        units, kind = units_of(text)
        grams = set(grams_of(units, SHINGLE[kind]))
        shared = Counter(holder for gram in grams for holder in self._holders.get(gram, ()))
        most = max(shared.values(), default=0)
        if " ".join(units) in self._texts or (grams and most / len(grams) >= self.near):
            return False
        self._texts.add(" ".join(units))
        for gram in grams:
            self._holders[gram].append(self._count)
        self._count += 1
        return True


def write_questions(args: argparse.Namespace) -> None:
    """The questions of the replies that pass."""
    if not 0 < args.near <= 1:
        raise UserError(f"--near {args.near:g}: must be above 0 and at most 1")
    forbidden = [compiled(pattern, "--forbid") for pattern in args.forbid]
    carried = {
        str(row["id"]): row["chunk"]
        for _, row in iter_jsonl(args.requests, may_be_empty=True)
        if isinstance(row, dict) and isinstance(row.get("chunk"), dict)
    }
    answers = read_answers(args.requests, args.samples)
    if missing := next((own.id for own in answers if own.id not in carried), None):
        raise UserError(f"{args.requests}: id '{missing}' is no request of `textbook requests`")
    seen, dropped, rows = NearDuplicates(args.near), Counter[str](), []
    for answer in answers:
        for number, item in enumerate(_items_of(answer, args.options)):
            why = str(item) if isinstance(item, BadReply) else _refused(item, forbidden, args.least_words)
            if why is None and not seen.add(f"{item['question']} {' '.join(item['options'].values())}"):  # type: ignore[index]
                why = "a near-duplicate"
            if why is not None:
                dropped[why] += 1
                continue
            assert not isinstance(item, BadReply)
            rows.append(_question_row(answer, number, item, carried[answer.id]))
    write_rows(args.out, rows)
    print(_key_habits(rows))
    print(f"{len(carried)} requests, {len(answers)} replies: {len(rows)} questions in {args.out}{counted(dropped)}")


def _items_of(answer: Answer, options: int) -> Iterator[Row | BadReply]:
    try:
        yield from read_items(answer.sample.text, options)
    except BadReply as error:
        yield BadReply(CUT) if answer.sample.finish_reason == "length" else error


def _refused(item: Row, forbidden: Sequence[re.Pattern[str]], least: int) -> str | None:
    if words_in(item["question"]) < least:
        return f"a question of less than {least} words"
    texts = [item["question"], *item["options"].values()]
    for pattern in forbidden:
        if any(pattern.search(text) for text in texts):
            return f"has {pattern.pattern!r}"
    return None


def _question_row(answer: Answer, number: int, item: Row, chunk: Mapping[str, Any]) -> Row:
    kept = {column: chunk[column] for column in KEPT if column in chunk}
    return {
        "id": f"{answer.id}#{answer.sample.sample}#{number}",
        **kept,
        **item,
        "source": "textbook",
        "passage_id": chunk.get("passage_id"),
        "chunk_id": chunk.get("id"),
        "titles": chunk.get("titles"),
        "made_by": {"question": made_by(answer.sample)},
    }


def _key_habits(rows: Sequence[Row]) -> str:
    letters = Counter(row["answer"] for row in rows)
    longest = sum(len(row["options"][row["answer"]]) == max(map(len, row["options"].values())) for row in rows)
    said = ", ".join(f"{letters[label]} {label}" for label in sorted(letters)) or "none"
    return f"keys: {said}; the key is the longest option in {longest} of {len(rows)}"


def _labels(options: int) -> list[str]:
    return [chr(ord("A") + number) for number in range(options)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.textbook",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    cutting = commands.add_parser("chunks", allow_abbrev=False, help="passages cut into chunks")
    cutting.add_argument("--passages", required=True, help="JSON Lines with id and text")
    cutting.add_argument("--words", type=positive, default=300, help="longest chunk (default 300)")
    cutting.add_argument(
        "--least", type=int, default=50, help="a shorter rest joins the chunk before it, or is dropped (default 50)"
    )
    cutting.add_argument("--titles", nargs="+", default=["title", "section"], help="columns (default title section)")
    cutting.add_argument("--join-hyphens", action="store_true", help="join words parted at the ends of lines")
    asking = commands.add_parser("requests", allow_abbrev=False, help="what the writer of questions is asked")
    asking.add_argument("--chunks", required=True, help="JSON Lines, of `chunks`")
    asking.add_argument("--prompts", required=True, help="TOML with a table [question]")
    asking.add_argument("--count", type=positive, default=1, help="questions asked of a chunk (default 1)")
    reading = commands.add_parser("questions", allow_abbrev=False, help="the questions of what came back")
    reading.add_argument("--requests", required=True, help="JSON Lines, of `requests`")
    reading.add_argument("--samples", required=True, help="JSON Lines of replies")
    reading.add_argument("--least-words", type=int, default=5, help="of a question (default 5)")
    reading.add_argument("--forbid", action="append", default=[], metavar="REGEX", help="may be repeated")
    reading.add_argument("--near", type=float, default=0.8, help="share that makes a near-duplicate (default 0.8)")
    for own in (asking, reading):
        numbers = range(2, MOST_OPTIONS + 1)
        own.add_argument("--options", type=int, default=4, choices=numbers, metavar="K", help="2 to 10 (default 4)")
    for own in (cutting, asking, reading):
        own.add_argument("--out", required=True, help="JSON Lines, written anew and whole")
    return parser


if __name__ == "__main__":
    sys.exit(main())

"""`python tests/tokenizer_parity.py`: token ids beside the original libraries', rendered chats beside transformers'.

Prints two tables; the tests assert that every row of them is equal. The reference ids were made once by each format's
own library; they lie in ../shared/data/tokenizers, and where that folder is missing the first table is skipped.
"""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, tzinfo
from pathlib import Path
from unittest import mock

import tokenizers

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

from template_fixtures import CONVERSATIONS, FAMILIES, FEATURES

from data_tools.chat_template import TEMPLATE_DATE, ChatTemplate
from data_tools.errors import TemplateError
from data_tools.tokenizer import load_tokenizer

SHARED = Path(os.environ.get("LOGRATIO_SHARED", Path(__file__).parent.parent.parent / "shared"))
TOKENIZERS = SHARED / "data" / "tokenizers"
# What the files do not say themselves: how text is split.
SPLIT = {"smollm2/vocab.json": "smollm", "torchtune_tiny/tiktoken_small.model": "llama3"}


@dataclass(frozen=True)
class Row:
    """One line of a table: what was compared, how many comparisons, and how many were equal."""

    name: str
    compared: int
    equal: int
    note: str = ""

    @property
    def all_equal(self) -> bool:
        return self.equal == self.compared > 0


def reference_files(root: Path = TOKENIZERS) -> list[str]:
    """The tokenizer files that have reference ids."""
    return list(dict.fromkeys(row["file"] for row in _reference_rows(root)))


def reference_folder(folder: Path, name: str, root: Path = TOKENIZERS) -> Path:
    """A model folder that holds the tokenizer file `name` under the name that models give it."""
    file = root / name
    target = "tokenizer.json" if name.endswith(".json") and name != "smollm2/vocab.json" else file.name
    shutil.copy(file, folder / target)
    if target == "vocab.json":
        shutil.copy(file.with_name("merges.txt"), folder)
    if name in SPLIT:
        (folder / "tokenizer_config.json").write_text(json.dumps({"pat_str": SPLIT[name]}), encoding="utf-8")
    return folder


def token_id_row(name: str, root: Path = TOKENIZERS) -> Row:
    """One tokenizer file: its 20 reference texts, all at once and one by one."""
    rows = [row for row in _reference_rows(root) if row["file"] == name]
    texts, ids = [row["text"] for row in rows], [row["ids"] for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = load_tokenizer(reference_folder(Path(folder), name, root))
    together, alone = tokenizer.encode_batch(texts), [tokenizer.encode(text) for text in texts]
    equal = sum(a == b == expected for a, b, expected in zip(together, alone, ids, strict=True))
    return Row(name, len(ids), equal, rows[0]["library"])


def token_id_rows(root: Path = TOKENIZERS) -> Iterator[Row]:
    """The first table."""
    for name in reference_files(root):
        yield token_id_row(name, root)


def template_row(name: str, source: str, tokens: dict[str, str]) -> Row:
    """One template: every conversation, with and without generation prompt, as text or refused by both."""
    template = ChatTemplate(source, path=Path(name), tokens=tokens)
    compared = equal = refused = 0
    for messages in CONVERSATIONS.values():
        for prompt in (False, True):
            rows = [{"role": message.role, "content": message.content} for message in messages]
            theirs = render_as_transformers(source, rows, prompt, tokens)
            try:
                ours = template.render(messages, add_generation_prompt=prompt)
            except TemplateError:
                ours = None
            compared += 1
            equal += ours == theirs
            refused += theirs is None
    return Row(name, compared, equal, f"of them refused by both: {refused}" if refused else "")


def template_rows() -> Iterator[Row]:
    """The second table: the families, then what templates use of jinja2."""
    for name, family in FAMILIES.items():
        yield template_row(name, family.template, family.tokens)
    for name, source in FEATURES.items():
        yield template_row(name, source, FAMILIES["Llama 2"].tokens)


def render_as_transformers(source: str, rows: list[dict[str, str]], prompt: bool, tokens: dict[str, str]) -> str | None:
    """Its text, None where it raises; on the day that our templates are told."""
    from transformers import PreTrainedTokenizerFast  # slow to import, needed here only
    from transformers.utils import chat_template_utils

    class FixedDay(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
            return TEMPLATE_DATE

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE()))
    options = {"tokenize": False, "add_generation_prompt": prompt, **tokens}
    with mock.patch.object(chat_template_utils, "datetime", FixedDay):
        try:
            return tokenizer.apply_chat_template(rows, chat_template=source, **options)  # type: ignore[return-value]
        except Exception:  # a template is a program: it may raise anything
            return None


def _reference_rows(root: Path) -> list[dict[str, object]]:
    with open(root / "reference_ids.jsonl", encoding="utf-8") as file:
        return list(map(json.loads, file))


def print_table(title: str, rows: Iterator[Row]) -> bool:
    """Print rows as they come; returns whether all were equal."""
    print(f"{title}\n{'':40} {'compared':>8} {'equal':>6}")
    good = True
    for row in rows:
        good &= row.all_equal
        print(f"{row.name:40} {row.compared:8} {row.equal:6}  {row.note}", flush=True)
    print()
    return good


def main() -> int:
    """Both tables; 0 where all is equal, else 1."""
    good = True
    if TOKENIZERS.is_dir():
        good = print_table("token ids beside the library in the last column", token_id_rows())
    else:
        print(f"token ids: skipped, no reference ids at {TOKENIZERS}\n")
    good &= print_table("rendered chats beside transformers", template_rows())
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())

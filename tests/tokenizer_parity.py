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
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

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
    if TOKENIZERS.is_dir():
        return int(not print_table("token ids beside the library in the last column", token_id_rows()))
    print(f"token ids: skipped, no reference ids at {TOKENIZERS}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Text to token ids and back, from the tokenizer files of a model folder.

Read are, in this order: `tokenizer.json`; `*.model`, which is sentencepiece's or a rank file of tiktoken; `*.tiktoken`;
`vocab.json` with `merges.txt`. Each has its engine: `tokenizer_library`, `tokenizer_pieces`, `tokenizer_bytes`.

No special token is ever added here. Those that stand in the text (a chat template writes them) are recognised by
`encode_batch`; to `encode_plain_batch` nothing is a control token, and `encode_marked_batch` reads what is marked as
text and the rest as tokens.

Some vocabularies mark a word's start by a space and put one in front of every text ("Hi" is read as " Hi"). A
completion continues a prompt, so `after` (the token before it) tells `encode_batch` to leave that space out where a
tokenizer that saw the whole text would have.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from data_tools.errors import TokenizerError
from data_tools.tokenizer_bytes import family_of, from_ranks, from_vocab_and_merges, is_rank_file, model_type
from data_tools.tokenizer_library import LibraryEngine, read_library_file
from data_tools.tokenizer_pieces import PiecesEngine, load_pieces
from data_tools.tokenizer_specials import AddedToken, ControlTokens

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
MODEL_NAME = re.compile(r".+\.model(\.v\d+\w*)?")


class Engine(Protocol):
    """What `Tokenizer` needs of a library; `special_ids` are the control tokens, `control` finds them in text."""

    special_ids: frozenset[int]
    control: ControlTokens
    vocab_size: int

    def encode_batch(self, texts: Sequence[str], after: Sequence[int | None]) -> list[list[int]]: ...
    def encode_plain_batch(self, texts: Sequence[str], after: Sequence[int | None]) -> list[list[int]]: ...
    def hidden_special(self, text: str) -> str | None: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def token_id(self, token: str) -> int | None: ...
    def adds_bos(self, bos_id: int) -> bool: ...


class Tokenizer:
    """A model's tokenizer.

    path: the model folder. bos_id, eos_id and their tokens: None where the model has none. adds_bos: plain text starts
    with BOS. vocab_size: ids are below it. digest: sha256 over the vocabulary files and the settings that decide ids.
    """

    def __init__(
        self, path: Path, engine: Engine, files: Sequence[Path], tokens: dict[str, str], config: dict[str, Any]
    ) -> None:
        self.path, self._engine = path, engine
        self.bos_token, self.eos_token = tokens.get("bos_token"), tokens.get("eos_token")
        self.bos_id = self._id_of("bos_token", self.bos_token)
        self.eos_id = self._id_of("eos_token", self.eos_token)
        self.vocab_size = engine.vocab_size
        said = config.get("add_bos_token")
        if said and self.bos_id is None:
            raise TokenizerError(path / "tokenizer_config.json", "'add_bos_token' is true but there is no 'bos_token'")
        natural = self.bos_id is not None and engine.adds_bos(self.bos_id)
        self.adds_bos: bool = said if isinstance(said, bool) else natural
        said_of_ids = [config.get(name) for name in ("added_tokens_decoder", "legacy", "pat_str", "tokenizer_class")]
        settings = json.dumps([self.bos_id, self.eos_id, self.adds_bos, said_of_ids, sorted(engine.special_ids)])
        self.digest = hashlib.sha256(b"".join(file.read_bytes() for file in files) + settings.encode()).hexdigest()

    def _id_of(self, name: str, token: str | None) -> int | None:
        if token is None:
            return None
        found = self._engine.token_id(token)
        if found is None:
            raise TokenizerError(self.path, f"{name} '{token}' is not in the vocabulary; mend tokenizer_config.json")
        return found

    def encode(self, text: str) -> list[int]:
        """Token ids of a text that begins a sequence; special tokens in it are recognised, none is added."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str], after: Sequence[int | None] | None = None) -> list[list[int]]:
        """Token ids of many texts at once, on all cores.

        after: for each text the last token of what it continues, or None where it begins a sequence.
        """
        return self._engine.encode_batch(texts, after if after is not None else [None] * len(texts))

    def encode_plain_batch(self, texts: Sequence[str], after: Sequence[int | None] | None = None) -> list[list[int]]:
        """As `encode_batch`, but what spells a control token is text: as if the tokenizer had no such token.

        Added tokens that are no control tokens (not `special`, such as Qwen's <think>) are still tokens.
        """
        return self._engine.encode_plain_batch(texts, after if after is not None else [None] * len(texts))

    def encode_marked(self, text: str, mark: str, after: int | None) -> list[int]:
        """Token ids of one text in which `mark` stands before what only spells a control token (see `mark_special`).

        The other control tokens are tokens; the marks are taken out. after: as in `encode_batch`, of the one text.
        """
        ids: list[int] = []
        for part, is_token in self._engine.control.cut(text, mark):
            encode = self._engine.encode_plain_batch if mark in part and not is_token else self._engine.encode_batch
            ids += encode([part.replace(mark, "")], [ids[-1] if ids else after])[0]
        return ids

    def spelled_special(self, text: str) -> str | None:
        """The first control token that a text spells, or None. Fast: every row is asked."""
        return self._engine.control.first(text) or self._engine.hidden_special(text)

    def mark_special(self, text: str, mark: str) -> str:
        """The text with `mark`, a character that it lacks, before everything in it that spells a control token."""
        marked = self._engine.control.mark(text, mark)
        if mark not in marked and self._engine.hidden_special(text) is not None:
            return mark + text
        return marked

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens spelt out."""
        return self._engine.decode([int(i) for i in ids])

    def is_special(self, token_id: int) -> bool:
        """Is it a control token (end of turn, BOS, ...) and not a piece of text?"""
        return int(token_id) in self._engine.special_ids


def load_tokenizer(model_dir: str | Path) -> Tokenizer:
    """The tokenizer of a model folder, from the first of the files that the module's text names.

    Raises TokenizerError when there is none, when it cannot be read, or when the files contradict each other.
    """
    folder = Path(model_dir)
    if not folder.is_dir():
        raise TokenizerError(folder, "no such model folder")
    config = read_json(folder / "tokenizer_config.json")
    file = _vocabulary_file(folder)
    added, named = _added_tokens(folder, config), special_tokens(folder)
    files = [file]
    engine: Engine
    if file.name == "tokenizer.json":
        whole = read_library_file(file)
        added = _in_vocabulary(whole.token_to_id, named.values()) | added
        engine = LibraryEngine(whole, file, added, named.values())
    elif file.name == "vocab.json":
        family = family_of(file, config, model_type(folder))
        files.append(file.with_name("merges.txt"))
        whole = from_vocab_and_merges(file, family, config)
        added = _in_vocabulary(whole.token_to_id, [*family.control, *named.values()]) | added
        engine = LibraryEngine(whole, file, added, named.values())
    elif is_rank_file(file):
        whole, control = from_ranks(file, family_of(file, config, model_type(folder)))
        added = {i: AddedToken(token) for i, token in control.items()} | added
        engine = LibraryEngine(whole, file, added, named.values())
    else:
        engine = PiecesEngine(file, added, legacy=bool(config.get("legacy")))
    return Tokenizer(folder, engine, files, named, config)


def special_tokens(folder: Path) -> dict[str, str]:
    """The special tokens by name (`bos_token`, ...), from the tokenizer's config files, else its model or family."""
    config = read_json(folder / "tokenizer_config.json")
    named = read_json(folder / "special_tokens_map.json") | config
    found = {name: _content(named[name]) for name in SPECIAL_NAMES if named.get(name) is not None}
    if found or (folder / "tokenizer.json").exists():
        return found
    file = _vocabulary_file(folder)
    if file.name == "vocab.json" or is_rank_file(file):
        return dict(family_of(file, config, model_type(folder)).named)
    pieces = load_pieces(file.read_bytes(), folder)
    ids = {"bos_token": pieces.bos_id(), "eos_token": pieces.eos_id()}
    return {name: pieces.id_to_piece(i) for name, i in ids.items() if i >= 0}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, {} where there is no file; TokenizerError where it is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, OSError) as error:
        raise TokenizerError(path, f"cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise TokenizerError(path, "expected a JSON object")
    return value


def _content(token: Any) -> str:
    """A token is written as a string, or as an object with its text in `content`."""
    return str(token["content"]) if isinstance(token, dict) else str(token)


def _added_tokens(folder: Path, config: dict[str, Any]) -> dict[int, AddedToken]:
    """Tokens that stand beside the vocabulary file, by id. Where no flag says otherwise they are control tokens."""
    listed = read_json(folder / "added_tokens.json")
    flags = [name for name in asdict(AddedToken("")) if name != "content"]
    try:
        found = {int(i): AddedToken(str(text)) for text, i in listed.items()}
        for i, spec in config.get("added_tokens_decoder", {}).items():
            said = {name: bool(spec[name]) for name in flags if name in spec}
            found[int(i)] = AddedToken(str(spec["content"]), **said)
    except (ValueError, TypeError, AttributeError, KeyError):
        problem = "'added_tokens_decoder' must map ids to objects with a 'content'"
        raise TokenizerError(folder / "tokenizer_config.json", problem) from None
    return found


def _in_vocabulary(token_id: Callable[[str], int | None], tokens: Iterable[str]) -> dict[int, AddedToken]:
    """Those of the control tokens that the vocabulary has, by id."""
    found = {token_id(token): AddedToken(token) for token in tokens}
    return {i: token for i, token in found.items() if i is not None}


def _vocabulary_file(folder: Path) -> Path:
    """The file that holds the vocabulary, see the module's text. Raises TokenizerError where there is none."""
    if (folder / "tokenizer.json").exists():
        return folder / "tokenizer.json"
    names = sorted(path.name for path in folder.iterdir())
    models = [name for name in names if MODEL_NAME.fullmatch(name)]
    ranks = [name for name in names if name.endswith(".tiktoken")]
    found = ["tokenizer.model"] if "tokenizer.model" in models else models or ranks
    if len(found) > 1:
        problem = f"several tokenizer files ({', '.join(found)}); keep one"
        raise TokenizerError(folder, problem + (", as tokenizer.model" if models else ""))
    if found:
        return folder / found[0]
    if "vocab.json" in names and "merges.txt" in names:
        return folder / "vocab.json"
    others = [name for name in ("vocab.json", "tekken.json") if name in names]
    missing = "has no merges.txt beside it" if others == ["vocab.json"] else "is not supported"
    hint = f"; {others[0]} alone {missing}, convert it to tokenizer.json" if others else ""
    raise TokenizerError(folder, f"no tokenizer.json and no tokenizer.model{hint}")

"""Text to token ids and back, from a model folder's `tokenizer.json` or sentencepiece `.model`.

No special token is ever added here, but those that stand in the text (a chat template writes them) are recognised.
What only rank files (tiktoken) describe is not supported.

Some vocabularies mark a word's start by a space and put one in front of every text ("Hi" is read as " Hi"). A
completion continues a prompt, so `after` (the token before it) tells `encode_batch` to leave that space out where a
tokenizer that saw the whole text would have.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import sentencepiece
import tokenizers

from data_tools.errors import TokenizerError

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
MODEL_NAME = re.compile(r".+\.model(\.v\d+\w*)?")
RANK_LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")
# Appended to a serialised sentencepiece model it overrides one setting, as protobuf merges a message that stands twice:
# field 3 (normalizer_spec), 2 bytes: field 3 (add_dummy_prefix) = 0.
NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


class Engine(Protocol):
    """What `Tokenizer` needs of a library; `special_ids` are the tokens recognised in text, never built from words."""

    special_ids: frozenset[int]
    vocab_size: int

    def encode_batch(self, texts: Sequence[str], after: Sequence[int | None]) -> list[list[int]]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def token_id(self, token: str) -> int | None: ...
    def adds_bos(self, bos_id: int) -> bool: ...


class Tokenizer:
    """A model's tokenizer.

    path: the model folder. bos_id, eos_id and their tokens: None where the model has none. adds_bos: plain text starts
    with BOS. vocab_size: ids are below it. digest: sha256 over the vocabulary file and the settings that decide ids.
    """

    def __init__(self, path: Path, engine: Engine, file: Path, tokens: dict[str, str], config: dict[str, Any]) -> None:
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
        added = [config.get("added_tokens_decoder"), config.get("legacy")]
        settings = json.dumps([self.bos_id, self.eos_id, self.adds_bos, added, sorted(engine.special_ids)])
        self.digest = hashlib.sha256(file.read_bytes() + settings.encode()).hexdigest()

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

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens spelt out."""
        return self._engine.decode([int(i) for i in ids])

    def is_special(self, token_id: int) -> bool:
        """Is it a control token (end of turn, BOS, ...) and not a piece of text?"""
        return int(token_id) in self._engine.special_ids


def load_tokenizer(model_dir: str | Path) -> Tokenizer:
    """The tokenizer of a model folder: `tokenizer.json`, else `tokenizer.model` or the only `*.model`.

    Raises TokenizerError when there is none, when it cannot be read, or when the files contradict each other.
    """
    folder = Path(model_dir)
    if not folder.is_dir():
        raise TokenizerError(folder, "no such model folder")
    config = read_json(folder / "tokenizer_config.json")
    engine: Engine
    if (folder / "tokenizer.json").exists():
        file = folder / "tokenizer.json"
        engine = _JsonEngine(file, _added_tokens(folder, config))
    else:
        file = _sentencepiece_file(folder)
        engine = _SentencePieceEngine(file, _added_tokens(folder, config), legacy=bool(config.get("legacy")))
    return Tokenizer(folder, engine, file, special_tokens(folder), config)


def special_tokens(folder: Path) -> dict[str, str]:
    """The special tokens by name (`bos_token`, ...), from the tokenizer's config files or its sentencepiece model."""
    named = read_json(folder / "special_tokens_map.json") | read_json(folder / "tokenizer_config.json")
    found = {name: _content(named[name]) for name in SPECIAL_NAMES if named.get(name) is not None}
    if not found and not (folder / "tokenizer.json").exists():
        pieces = _load_sentencepiece(_sentencepiece_file(folder).read_bytes(), folder)
        ids = {"bos_token": pieces.bos_id(), "eos_token": pieces.eos_id()}
        found = {name: pieces.id_to_piece(i) for name, i in ids.items() if i >= 0}
    return found


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


def _added_tokens(folder: Path, config: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Tokens that stand beside the vocabulary file: id to its text and flags."""
    found = {int(i): {"content": text} for text, i in read_json(folder / "added_tokens.json").items()}
    try:
        return found | {int(i): dict(spec) for i, spec in config.get("added_tokens_decoder", {}).items()}
    except (ValueError, TypeError, AttributeError):
        problem = "'added_tokens_decoder' must map ids to objects"
        raise TokenizerError(folder / "tokenizer_config.json", problem) from None


class _JsonEngine:
    """`tokenizer.json` through the `tokenizers` library."""

    def __init__(self, file: Path, added: dict[int, dict[str, Any]]) -> None:
        try:
            raw = file.read_text(encoding="utf-8")
            spec = json.loads(raw)
            self._whole = _from_json(raw)
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(file, f"cannot be read as a tokenizer: {error}") from None
        _add_missing(self._whole, added, file)
        self._bare: tokenizers.Tokenizer | None = None
        self._every_section = _remove_prefix(spec)
        if self._every_section is not None:
            self._bare = _from_json(json.dumps(spec))
        specials = {i: str(token.content) for i, token in self._whole.get_added_tokens_decoder().items()}
        self.special_ids = frozenset(specials)
        self.vocab_size = max(self._whole.get_vocab_size(with_added_tokens=True), max(specials, default=-1) + 1)
        self._special_text = _any_of(specials.values())

    def encode_batch(self, texts: Sequence[str], after: Sequence[int | None]) -> list[list[int]]:
        if self._bare is None:
            return _ids(self._whole, texts)
        heads, rests = [], []
        for text, token in zip(texts, after, strict=True):
            starts_section = token is None or (self._every_section and token in self.special_ids)
            cut = 0 if starts_section else _first_match(self._special_text, text)
            heads.append(text[:cut])
            rests.append(text[cut:])
        pairs = zip(_ids(self._bare, heads), _ids(self._whole, rests), strict=True)
        return [head + rest for head, rest in pairs]

    def decode(self, ids: Sequence[int]) -> str:
        return self._whole.decode(list(ids), skip_special_tokens=False)

    def token_id(self, token: str) -> int | None:
        return self._whole.token_to_id(token)

    def adds_bos(self, bos_id: int) -> bool:
        with_specials, without = (self._whole.encode("a", add_special_tokens=add).ids for add in (True, False))
        return len(with_specials) > len(without) and with_specials[0] == bos_id


def _from_json(text: str) -> tokenizers.Tokenizer:
    """Read a tokenizer and switch off the cutting and padding that some files bring along."""
    tokenizer = tokenizers.Tokenizer.from_str(text)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _ids(tokenizer: tokenizers.Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    return [encoding.ids for encoding in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]


def _add_missing(tokenizer: tokenizers.Tokenizer, added: dict[int, dict[str, Any]], file: Path) -> None:
    """Make special what only `tokenizer_config.json` names as such; its ids must be the vocabulary's."""
    known = tokenizer.get_added_tokens_decoder()
    for token_id, spec in sorted(added.items()):
        if token_id not in known:
            flags = {name: bool(spec.get(name, False)) for name in ("single_word", "lstrip", "rstrip", "normalized")}
            tokenizer.add_special_tokens([tokenizers.AddedToken(spec["content"], special=True, **flags)])
        if (found := tokenizer.token_to_id(spec["content"])) != token_id:
            problem = f"token '{spec['content']}' has id {found} here but {token_id} in the other tokenizer files"
            raise TokenizerError(file, problem)


def _remove_prefix(part: Any) -> bool | None:
    """Take out, in place, whatever puts a space before a text.

    Returns None if nothing does, else whether it does so after every special token (True) or only at the start (False).
    """
    found: list[bool] = []
    for holder in ("normalizer", "pre_tokenizer"):
        steps = [part.get(holder)]
        while steps:
            step = steps.pop() or {}
            steps += step.get("normalizers", []) + step.get("pretokenizers", [])
            if step.get("type") == "Prepend" and step["prepend"]:
                step["prepend"] = ""
                found.append(True)
            elif step.get("type") == "Metaspace" and step.get("prepend_scheme", "always") != "never":
                found.append(step.get("prepend_scheme", "always") == "always")
                step["prepend_scheme"] = "never"
                step.pop("add_prefix_space", None)
            elif step.get("type") == "ByteLevel" and step.get("add_prefix_space"):
                step["add_prefix_space"] = False
                found.append(True)
    return any(found) if found else None


class _SentencePieceEngine:
    """A sentencepiece model; special tokens in the text are cut out first, as the library does not look for them."""

    def __init__(self, file: Path, added: dict[int, dict[str, Any]], *, legacy: bool) -> None:
        raw = file.read_bytes()
        self._whole = _load_sentencepiece(raw, file)
        self._bare = _load_sentencepiece(raw + NO_DUMMY_PREFIX, file)
        self._legacy = legacy
        size = self._whole.get_piece_size()
        self._specials = {i: self._whole.id_to_piece(i) for i in range(size) if self._whole.is_control(i)}
        self._specials |= {i: str(spec["content"]) for i, spec in added.items() if i >= size or i in self._specials}
        self._special_ids_of = {text: i for i, text in self._specials.items()}
        self.special_ids = frozenset(self._specials)
        self.vocab_size = max(size, max(self._specials, default=-1) + 1)
        self._special_text = _any_of(self._specials.values())

    def encode_batch(self, texts: Sequence[str], after: Sequence[int | None]) -> list[list[int]]:
        """Sections between special tokens go to the library in two batches: with and without a space put before."""
        parts: list[tuple[int, str | int, bool]] = []  # row, section or special token, put a space before the section
        for row, (text, last) in enumerate(zip(texts, after, strict=True)):
            for section in filter(None, self._special_text.split(text)):
                special = self._special_ids_of.get(section)
                spaced = last is None or self._spaced(section, last)
                parts.append((row, section if special is None else special, spaced))
                last = -1 if special is None else special
        whole = iter(self._whole.encode([part for _, part, spaced in parts if isinstance(part, str) and spaced]))
        bare = iter(self._bare.encode([part for _, part, spaced in parts if isinstance(part, str) and not spaced]))
        out: list[list[int]] = [[] for _ in texts]
        for row, part, spaced in parts:
            out[row] += [part] if isinstance(part, int) else next(whole if spaced else bare)
        return out

    def _spaced(self, section: str, last: int) -> bool:
        """Does a section that follows a token get a space? Only in the first Llama convention, after special tokens."""
        return self._legacy and last in self._specials and not section.startswith(" ")

    def decode(self, ids: Sequence[int]) -> str:
        runs = itertools.groupby(ids, key=lambda i: i in self._specials)
        return "".join(
            "".join(self._specials[i] for i in run) if special else self._bare.decode(list(run))
            for special, run in runs
        )

    def token_id(self, token: str) -> int | None:
        if token in self._special_ids_of:
            return self._special_ids_of[token]
        found = self._whole.piece_to_id(token)
        return found if self._whole.id_to_piece(found) == token else None

    def adds_bos(self, bos_id: int) -> bool:
        """A bare model does not say; the family it comes from (Llama, Mistral) puts BOS before every text."""
        return True


def _sentencepiece_file(folder: Path) -> Path:
    names = sorted(path.name for path in folder.iterdir() if MODEL_NAME.fullmatch(path.name))
    if "tokenizer.model" in names:
        names = ["tokenizer.model"]
    if len(names) > 1:
        raise TokenizerError(folder, f"several tokenizer files ({', '.join(names)}); keep one, as tokenizer.model")
    if names:
        return folder / names[0]
    others = [name for name in ("vocab.json", "tekken.json") if (folder / name).exists()]
    others += sorted(path.name for path in folder.glob("*.tiktoken"))
    hint = f"; {others[0]} alone is not supported, convert it to tokenizer.json" if others else ""
    raise TokenizerError(folder, f"no tokenizer.json and no tokenizer.model{hint}")


def _load_sentencepiece(raw: bytes, path: Path) -> sentencepiece.SentencePieceProcessor:
    if RANK_LINE.match(raw):
        problem = "is a tiktoken rank file, which is not supported; put the model's tokenizer.json beside it"
        raise TokenizerError(path, problem)
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=raw)
    except RuntimeError as error:
        raise TokenizerError(path, f"cannot be read as a sentencepiece model: {error}") from None


def _any_of(texts: Any) -> re.Pattern[str]:
    """A pattern that finds the longest of the texts at each place (and nothing if there are none)."""
    choices = sorted(map(re.escape, texts), key=len, reverse=True)
    return re.compile(f"({'|'.join(choices)})" if choices else "((?!))")


def _first_match(pattern: re.Pattern[str], text: str) -> int:
    found = pattern.search(text)
    return len(text) if found is None else found.start()

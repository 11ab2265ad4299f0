"""Tokenizers that the `tokenizers` library runs: `tokenizer.json`, and what `tokenizer_bytes` builds from others."""

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from data_tools.errors import TokenizerError
from data_tools.tokenizer_specials import AddedToken, ControlTokens, any_of

NOWHERE = "\U0010fffe{}\U0010fffe"
"""What control tokens are called where text must not be read as one: noncharacters, which no text should contain."""


class LibraryEngine:
    """A `tokenizers.Tokenizer`; `control` are the tokens that a text can spell without meaning them."""

    def __init__(
        self, whole: tokenizers.Tokenizer, file: Path, added: Mapping[int, AddedToken], named: Iterable[str]
    ) -> None:
        """added: tokens that stand in other files than the tokenizer's own; named: contents of BOS, EOS and so on."""
        whole.no_truncation()  # some files bring cutting and padding along
        whole.no_padding()
        self._file, self._whole = file, whole
        _add_missing(whole, added, file)
        self._added = _as_added(whole, set(named))
        self.control = ControlTokens(self._added)
        self.special_ids = self.control.ids
        self.vocab_size = max(whole.get_vocab_size(with_added_tokens=True), max(self._added, default=-1) + 1)
        steps = json.loads(_shell(whole).to_str())
        self._every_section = _remove_prefix(steps)
        self._bare = None if self._every_section is None else _with_steps(whole, steps)
        self._added_text = any_of(token.content for token in self._added.values())
        self._kept_text = any_of(token.content for token in self._added.values() if not token.special)
        normalized = [token.content for token in self._added.values() if token.special and token.normalized]
        self._normalized = None
        if normalized and whole.normalizer is not None:
            self._normalized = any_of(filter(None, map(whole.normalizer.normalize_str, normalized)))

    def encode_batch(self, texts: Sequence[str], after: Sequence[int | None]) -> list[list[int]]:
        """Token ids; control tokens in the texts are recognised."""
        return self._encode(texts, after, self._whole, self._bare, self._added_text)

    def encode_plain_batch(self, texts: Sequence[str], after: Sequence[int | None]) -> list[list[int]]:
        """Token ids of texts in which nothing is a control token."""
        whole, bare = self._plain
        ids = self._encode(texts, after, whole, bare, self._kept_text)
        forbidden = self.special_ids - {whole.token_to_id(str(unknown)) for unknown in self._unknown}
        if any(not forbidden.isdisjoint(row) for row in ids):
            raise TokenizerError(self._file, "makes a control token of plain text; use data.special_tokens = control")
        return ids

    def hidden_special(self, text: str) -> str | None:
        """A control token that stands in the text only after the tokenizer has normalized it (case, width)."""
        if self._normalized is None:
            return None
        found = self._normalized.search(self._whole.normalizer.normalize_str(text))
        return None if found is None else found.group()

    def decode(self, ids: Sequence[int]) -> str:
        return self._whole.decode(list(ids), skip_special_tokens=False)

    def token_id(self, token: str) -> int | None:
        return self._whole.token_to_id(token)

    def adds_bos(self, bos_id: int) -> bool:
        with_specials, without = (self._whole.encode("a", add_special_tokens=add).ids for add in (True, False))
        return len(with_specials) > len(without) and with_specials[0] == bos_id

    def _encode(self, texts, after, whole, bare, added_text) -> list[list[int]]:  # type: ignore[no-untyped-def]
        """With `bare`, which puts no space before a text, for the part of a text that goes on after a token."""
        if bare is None:
            return _ids(whole, texts)
        heads, rests = [], []
        for text, token in zip(texts, after, strict=True):
            starts_section = token is None or (self._every_section and token in self._added)
            found = None if starts_section else added_text.search(text)
            cut = 0 if starts_section else len(text) if found is None else found.start()
            heads.append(text[:cut])
            rests.append(text[cut:])
        pairs = zip(_ids(bare, heads), _ids(whole, rests), strict=True)
        return [head + rest for head, rest in pairs]

    @cached_property
    def _plain(self) -> tuple[tokenizers.Tokenizer, tokenizers.Tokenizer | None]:
        """The tokenizer (and its bare form) with control tokens called by names that no text has.

        Switching off the search for them is not enough: a vocabulary may hold their spelling as a piece of text
        (Unigram does, and BPE with whole words).
        """
        spec = json.loads(self._whole.to_str())
        names = {self._added[i].content: NOWHERE.format(i) for i in self.special_ids}
        for token in spec["added_tokens"]:
            if token["content"] in names:
                token |= {"content": names[token["content"]], "special": True}
        _rename(spec["model"], names)
        spec["post_processor"] = None
        whole = _from_spec(spec)
        whole.encode_special_tokens = True  # not even those names
        if self._bare is None:
            return whole, None
        _remove_prefix(spec)
        bare = _from_spec(spec)
        bare.encode_special_tokens = True
        return whole, bare

    @cached_property
    def _unknown(self) -> list[str]:
        """What the model gives for characters that it cannot spell."""
        model = json.loads(self._plain[0].to_str())["model"]
        vocab = model.get("vocab")
        unknown = model.get("unk_token")
        if model.get("unk_id") is not None and isinstance(vocab, list):
            unknown = vocab[model["unk_id"]][0]
        return [unknown] if unknown is not None else []


def read_library_file(file: Path) -> tokenizers.Tokenizer:
    """The tokenizer in a `tokenizer.json`. Raises TokenizerError."""
    try:
        return tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises bare Exception
        raise TokenizerError(file, f"cannot be read as a tokenizer: {error}") from None


def _ids(tokenizer: tokenizers.Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    return [encoding.ids for encoding in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]


def _add_missing(tokenizer: tokenizers.Tokenizer, added: Mapping[int, AddedToken], file: Path) -> None:
    """Cut out of text also what only other files name; its ids must be the vocabulary's."""
    known = tokenizer.get_added_tokens_decoder()
    for token_id, token in sorted(added.items()):
        if token_id not in known:
            flags = {name: getattr(token, name) for name in ("single_word", "lstrip", "rstrip", "normalized")}
            new = tokenizers.AddedToken(token.content, special=token.special, **flags)
            (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([new])
        if (found := tokenizer.token_to_id(token.content)) != token_id:
            problem = f"token '{token.content}' has id {found} here but {token_id} in the other tokenizer files"
            raise TokenizerError(file, problem)


def _as_added(tokenizer: tokenizers.Tokenizer, named: set[str]) -> dict[int, AddedToken]:
    """The library's added tokens as ours; BOS, EOS and their like are control tokens whatever the file says."""
    names = ("content", "lstrip", "rstrip", "single_word", "normalized")
    return {
        i: AddedToken(special=token.special or token.content in named, **{name: getattr(token, name) for name in names})
        for i, token in tokenizer.get_added_tokens_decoder().items()
    }


def _shell(whole: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """A tokenizer without a vocabulary whose steps before the model are those of `whole`."""
    shell = tokenizers.Tokenizer(tokenizers.models.BPE())
    if whole.normalizer is not None:
        shell.normalizer = whole.normalizer
    if whole.pre_tokenizer is not None:
        shell.pre_tokenizer = whole.pre_tokenizer
    return shell


def _with_steps(whole: tokenizers.Tokenizer, steps: dict[str, Any]) -> tokenizers.Tokenizer:
    """A copy of `whole` with other steps before the model."""
    spec = json.loads(whole.to_str())
    return _from_spec(spec | {name: steps[name] for name in ("normalizer", "pre_tokenizer")})


def _from_spec(spec: dict[str, Any]) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(json.dumps(spec))


def _rename(model: dict[str, Any], names: Mapping[str, str]) -> None:
    """Call entries of a model's vocabulary by other names, in place; merges that build or use them are dropped."""
    if isinstance(model["vocab"], list):  # Unigram: (text, score), the id is the place
        model["vocab"] = [[names.get(text, text), score] for text, score in model["vocab"]]
    else:
        model["vocab"] = {names.get(text, text): i for text, i in model["vocab"].items()}
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:
        model["merges"] = [
            (left, right)
            for left, right in model["merges"]
            if left not in names and right not in names and left + right not in names
        ]


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

"""Sentencepiece models, run by their own library; tokens that are cut out of text are found here, not by it."""

import itertools
from collections.abc import Iterator, Mapping, Sequence, Set
from functools import cached_property
from pathlib import Path

import sentencepiece

from data_tools.errors import TokenizerError
from data_tools.tokenizer_specials import AddedToken, ControlTokens, any_of

# Appended to a serialised sentencepiece model it overrides one setting, as protobuf merges a message that stands twice:
# field 3 (normalizer_spec), 2 bytes: field 3 (add_dummy_prefix) = 0.
NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"
# Of sentencepiece_model.proto: field 1 of a model are its pieces; field 3 of a piece is its type.
PIECES, PIECE_TYPE = 1, 3
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4


class PiecesEngine:
    """A sentencepiece model; special tokens in the text are cut out first, as the library does not look for them."""

    def __init__(self, file: Path, added: Mapping[int, AddedToken], *, legacy: bool) -> None:
        """added: tokens that stand in other files; those inside the vocabulary count where they are no ordinary piece.

        legacy: a section after a special token gets a space put before it, as with the first Llama.
        """
        self._raw = file.read_bytes()
        self._whole = load_pieces(self._raw, file)
        self._bare = load_pieces(self._raw + NO_DUMMY_PREFIX, file)
        self._legacy = legacy
        size = self._whole.get_piece_size()
        self._kept_whole = _user_defined(self._raw) & set(added) if any(i < size for i in added) else set()
        cut = {i: AddedToken(self._whole.id_to_piece(i)) for i in range(size) if self._whole.is_control(i)}
        cut |= {i: token for i, token in added.items() if i >= size or i in cut or i in self._kept_whole}
        self._cut = cut
        self.control = ControlTokens(cut)
        self.special_ids = self.control.ids
        self._id_of = {token.content: i for i, token in cut.items()}
        self.vocab_size = max(size, max(cut, default=-1) + 1)
        self._cut_text = any_of(self._id_of)
        self._kept_text = any_of(token.content for token in cut.values() if not token.special)

    def encode_batch(self, texts: Sequence[str], after: Sequence[int | None]) -> list[list[int]]:
        """Token ids; control tokens in the texts are recognised."""
        return self._encode(texts, after, self._cut_text, self._whole, self._bare)

    def encode_plain_batch(self, texts: Sequence[str], after: Sequence[int | None]) -> list[list[int]]:
        """Token ids of texts in which nothing is a control token."""
        return self._encode(texts, after, self._kept_text, *self._plain)

    def _encode(self, texts, after, cut_text, whole, bare) -> list[list[int]]:  # type: ignore[no-untyped-def]
        """Sections between special tokens go to the library in two batches: with and without a space put before."""
        parts: list[tuple[int, str | int, bool]] = []  # row, section or special token, put a space before the section
        for row, (text, last) in enumerate(zip(texts, after, strict=True)):
            for k, section in enumerate(cut_text.split(text)):
                if not section:
                    continue
                special = self._id_of[section] if k % 2 else None
                spaced = last is None or self._spaced(section, last)
                parts.append((row, section if special is None else special, spaced))
                last = -1 if special is None else special
        with_space = iter(whole.encode([part for _, part, spaced in parts if isinstance(part, str) and spaced]))
        without = iter(bare.encode([part for _, part, spaced in parts if isinstance(part, str) and not spaced]))
        out: list[list[int]] = [[] for _ in texts]
        for row, part, spaced in parts:
            out[row] += [part] if isinstance(part, int) else next(with_space if spaced else without)
        return out

    def _spaced(self, section: str, last: int) -> bool:
        """Does a section that follows a token get a space? Only in the first Llama convention, after special tokens."""
        return self._legacy and last in self._cut and not section.startswith(" ")

    @cached_property
    def _plain(self) -> tuple[sentencepiece.SentencePieceProcessor, sentencepiece.SentencePieceProcessor]:
        """The model with its user-defined pieces that are control tokens made control pieces, which no text matches."""
        hidden = self._kept_whole & self.special_ids
        if not hidden:
            return self._whole, self._bare
        raw = b"".join(_retyped(self._raw, hidden))
        path = Path("sentencepiece model")
        return load_pieces(raw, path), load_pieces(raw + NO_DUMMY_PREFIX, path)

    def hidden_special(self, text: str) -> str | None:
        """The library matches no control token in normalized text: there is none to find."""
        return None

    def decode(self, ids: Sequence[int]) -> str:
        runs = itertools.groupby(ids, key=lambda i: i in self._cut)
        return "".join(
            "".join(self._cut[i].content for i in run) if cut else self._bare.decode(list(run)) for cut, run in runs
        )

    def token_id(self, token: str) -> int | None:
        if token in self._id_of:
            return self._id_of[token]
        found = self._whole.piece_to_id(token)
        return found if self._whole.id_to_piece(found) == token else None

    def adds_bos(self, bos_id: int) -> bool:
        """A bare model does not say; the family it comes from (Llama, Mistral) puts BOS before every text."""
        return True


def load_pieces(raw: bytes, path: Path) -> sentencepiece.SentencePieceProcessor:
    """A serialised model. Raises TokenizerError that names `path`."""
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=raw)
    except RuntimeError as error:
        raise TokenizerError(path, f"cannot be read as a sentencepiece model: {error}") from None


def _user_defined(raw: bytes) -> set[int]:
    """Ids of the pieces that the library finds whole in any text."""
    types = [kind for field, _, kind in _fields(raw) if field == PIECES]
    return {i for i, kind in enumerate(types) if kind == USER_DEFINED}


def _retyped(raw: bytes, ids: Set[int]) -> Iterator[bytes]:
    """The model's bytes with some pieces made control pieces: of a field that stands twice the last one counts."""
    i = 0
    for field, message, _ in _fields(raw):
        if field == PIECES and i in ids:
            body = message[1 + len(_varint(_read_varint(message, 1)[0])) :] + bytes([PIECE_TYPE << 3, CONTROL])
            message = message[:1] + _varint(len(body)) + body
        yield message
        i += field == PIECES


def _fields(raw: bytes) -> Iterator[tuple[int, bytes, int]]:
    """Top fields of a serialised model: number, all bytes, and a piece's type (of other fields 0)."""
    at = 0
    while at < len(raw):
        start, (key, at) = at, _read_varint(raw, at)
        size, at = _read_varint(raw, at)  # every top field of the format is a message
        if key >> 3 == PIECES:
            yield PIECES, raw[start : at + size], _piece_type(raw[at : at + size])
        else:
            yield key >> 3, raw[start : at + size], 0
        at += size


def _piece_type(piece: bytes) -> int:
    """Of a piece's fields: text (1), score (2, four bytes), type (3; absent means normal)."""
    kind, at = NORMAL, 0
    while at < len(piece):
        key, at = _read_varint(piece, at)
        if key & 7 == 0:
            value, at = _read_varint(piece, at)
            kind = value if key >> 3 == PIECE_TYPE else kind
        elif key & 7 == 2:
            size, at = _read_varint(piece, at)
            at += size
        else:
            at += 4 if key & 7 == 5 else 8
    return kind


def _read_varint(raw: bytes, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, lowest first, and where it ends."""
    value = shift = 0
    while True:
        byte = raw[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])

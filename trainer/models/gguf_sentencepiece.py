"""Sentencepiece BPE vocabularies: the `.model` file, a tokenizer.json that does the same, and merges from scores.

The `.model` is a protobuf of three messages, of which the fields below are read and written by hand (numbers from
sentencepiece's `sentencepiece_model.proto`); the run-time needs no protobuf library. Only the BPE kind is known, with
text taken as it is (no normalisation table): what Llama 1 and 2, Mistral, Gemma and Phi-3 have.
"""

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf

from trainer.errors import ModelError

SPACE = "▁"  # stands for a space in all pieces
BPE = 2  # TrainerSpec.ModelType
TYPES = gguf.TokenType


@dataclass(frozen=True)
class Pieces:
    """A vocabulary: texts, scores and types by id, and whether a space is put before a text.

    Pieces write a space as ▁, those of type USER_DEFINED as a space.
    """

    tokens: list[str]
    scores: list[float]
    types: list[int]
    space_prefix: bool


def read_model(path: Path) -> Pieces:
    """A sentencepiece `.model`. Raises ModelError for one that is not BPE or changes the text before cutting it."""
    try:
        raw = path.read_bytes()
        fields = list(_fields(raw))
        pieces = [_as_dict(value) for number, value in fields if number == 1]
        trainer = {key: v for number, value in fields if number == 2 for key, v in _fields(value)}
        normalizer = {key: v for number, value in fields if number == 3 for key, v in _fields(value)}
        tokens = [piece[1].decode("utf-8") for piece in pieces]
        scores = [struct.unpack("<f", piece.get(2, b"\0\0\0\0"))[0] for piece in pieces]
    except OSError as error:
        raise ModelError(path, f"cannot be read: {error.strerror or error}") from error
    except (ValueError, IndexError, KeyError, AttributeError, struct.error, TypeError) as error:
        raise ModelError(path, f"is not a sentencepiece model ({error!r})") from error
    if trainer.get(3, 1) != BPE:
        raise ModelError(path, "is a sentencepiece model of another kind than BPE; llama.cpp reads it as t5 only")
    if normalizer.get(2) or normalizer.get(4, 1):
        raise ModelError(path, "normalises text before cutting it, which a GGUF cannot say for this kind of vocabulary")
    types = [piece.get(3, int(TYPES.NORMAL)) for piece in pieces]
    pairs = zip(tokens, types, strict=True)
    tokens = [token.replace(SPACE, " ") if kind == TYPES.USER_DEFINED else token for token, kind in pairs]
    return Pieces(tokens, scores, types, bool(normalizer.get(3, 1)))


def write_model(pieces: Pieces, ids: Mapping[str, int | None]) -> bytes:
    """The `.model` of a vocabulary. ids: `bos`, `eos`, `unk`, `pad`, None where there is none."""
    out = bytearray()
    for token, score, kind in zip(pieces.tokens, pieces.scores, pieces.types, strict=True):
        text = token.replace(" ", SPACE) if kind == TYPES.USER_DEFINED else token
        piece = _bytes(1, text.encode("utf-8")) + b"\x15" + struct.pack("<f", score)  # field 2, four bytes
        out += _bytes(1, piece + (b"" if kind == TYPES.NORMAL else _number(3, kind)))
    byte_fallback = TYPES.BYTE in pieces.types
    numbers = {3: BPE, 4: len(pieces.tokens), 35: int(byte_fallback)}
    numbers |= {number: ids.get(name) for number, name in ((40, "unk"), (41, "bos"), (42, "eos"), (43, "pad"))}
    trainer = b"".join(_number(number, -1 if value is None else value) for number, value in numbers.items())
    for number, name in ((45, "unk"), (46, "bos"), (47, "eos"), (48, "pad")):
        index = ids.get(name)
        trainer += b"" if index is None else _bytes(number, pieces.tokens[index].encode("utf-8"))
    normalizer = _bytes(1, b"identity") + _number(3, int(pieces.space_prefix)) + _number(4, 0) + _number(5, 1)
    return bytes(out) + _bytes(2, trainer) + _bytes(3, normalizer)


def _fields(raw: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of a protobuf message: integers, or bytes for anything with a length or of fixed width."""
    place = 0
    while place < len(raw):
        tag, place = _varint(raw, place)
        kind = tag & 7
        if kind == 0:
            value, place = _varint(raw, place)
            yield tag >> 3, value
            continue
        if kind == 2:
            size, place = _varint(raw, place)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"wire type {kind}")
        if place + size > len(raw):
            raise ValueError("it ends early")
        yield tag >> 3, raw[place : place + size]
        place += size


def _as_dict(raw: bytes) -> dict[int, Any]:
    return dict(_fields(raw))


def _varint(raw: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = raw[place]
        value |= (byte & 0x7F) << shift
        place += 1
        shift += 7
        if byte < 0x80:
            return value, place


def _number(field: int, value: int) -> bytes:
    """A field of integer kind; negative numbers in 64 bits, as protobuf has them."""
    out = bytearray()
    for number in (field << 3, value & 0xFFFFFFFFFFFFFFFF):
        while number >= 0x80:
            out.append(number & 0x7F | 0x80)
            number >>= 7
        out.append(number)
    return bytes(out)


def _bytes(field: int, value: bytes) -> bytes:
    tag = _number(field, 0)[:-1]
    # the kind is the lowest three bits of the first byte: 2 means a length and bytes
    return bytes([tag[0] | 2]) + tag[1:] + _number(0, len(value))[1:] + value


def merges_of(pieces: Pieces) -> list[tuple[str, str]]:
    """The merges that a BPE needs to join what sentencepiece joins, best first.

    Sentencepiece joins any two neighbours whose text is a piece, the one with the highest score first. So every way
    to cut a piece in two pieces is a merge with the piece's score; of equal scores the earlier piece comes first.
    """
    scores = {
        token: score
        for token, score, kind in zip(pieces.tokens, pieces.scores, pieces.types, strict=True)
        if kind == TYPES.NORMAL
    }
    merges = []
    for token in sorted(scores, key=lambda token: -scores[token]):
        for cut in range(len(token) - 1, 0, -1):
            if token[:cut] in scores and token[cut:] in scores:
                merges.append((token[:cut], token[cut:]))
    return merges


def tokenizer_json(pieces: Pieces, unknown: str | None) -> dict[str, Any]:
    """A tokenizer.json (without added tokens and post-processor) that cuts text as the `.model` does."""
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prefix = {"type": "Prepend", "prepend": SPACE}
    restore = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    decoders: list[dict[str, Any]] = [restore, {"type": "ByteFallback"}, {"type": "Fuse"}]
    if pieces.space_prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": {"type": "Sequence", "normalizers": [prefix, spaces]} if pieces.space_prefix else spaces,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {token: index for index, token in enumerate(pieces.tokens)},
            "merges": [list(merge) for merge in merges_of(pieces)],
        },
    }


def from_tokenizer_json(path: Path, tokenizer: dict[str, Any]) -> Pieces:
    """The vocabulary behind a byte-fallback tokenizer.json, with scores that give its merges.

    Raises ModelError when no scores do, or when it changes text otherwise than by ▁ for spaces.
    """
    model = tokenizer["model"]
    problem = "is a tokenizer with byte fallback that is not sentencepiece's BPE"
    space_prefix = _space_prefix(tokenizer)
    if space_prefix is None:
        raise ModelError(path, f"{problem} (its normalizer or pre-tokenizer); put the tokenizer.model beside it")
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    merges = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    rank: dict[str, int] = {}
    for left, right in merges:
        rank.setdefault(left + right, len(rank) + 1)
    scores = [-float(rank.get(token, 0)) for token in tokens]
    types = [_type_of(token, model.get("unk_token")) for token in tokens]
    pieces = Pieces(tokens, scores, types, space_prefix)
    added = {token["content"] for token in tokenizer.get("added_tokens", [])}
    plain = [TYPES.CONTROL if token in added else kind for token, kind in zip(tokens, types, strict=True)]
    if set(merges_of(replace(pieces, types=plain))) != {pair for pair in merges if "".join(pair) not in added}:
        raise ModelError(path, f"{problem} (its merges); put the tokenizer.model beside it")
    return pieces


def _type_of(token: str, unknown: str | None) -> int:
    if token == unknown:
        return int(TYPES.UNKNOWN)
    byte = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
    return int(TYPES.BYTE if byte else TYPES.NORMAL)


def _space_prefix(tokenizer: dict[str, Any]) -> bool | None:
    """Does it put a space before every text? None when it does something else to text, or cuts it in another way."""
    normalizer, pre = tokenizer.get("normalizer") or {}, tokenizer.get("pre_tokenizer")
    steps = normalizer["normalizers"] if normalizer.get("type") == "Sequence" else [normalizer] if normalizer else []
    prefix = [step for step in steps if step["type"] == "Prepend" and step["prepend"] == SPACE]
    spaces = [step for step in steps if step["type"] == "Replace" and step["content"] == SPACE]
    if len(prefix) + len(spaces) != len(steps):
        return None
    if pre is not None and pre["type"] == "Metaspace" and not steps:
        return None if pre.get("split") else pre.get("prepend_scheme", "always") != "never"
    # Gemma's file cuts at spaces, of which its normalizer has left none
    if not spaces or (pre is not None and (pre["type"] != "Split" or pre["pattern"] != {"String": " "})):
        return None
    return bool(prefix)


def joined(pieces: Pieces, tokens: Sequence[str], kinds: Sequence[int]) -> Pieces:
    """The vocabulary with other texts and types, and a score of 0 for what comes after it."""
    scores = [*pieces.scores, *[0.0] * (len(tokens) - len(pieces.scores))]
    return Pieces(list(tokens), scores, list(kinds), pieces.space_prefix)

"""Byte-level BPE from files that do not say how text is split: rank files of tiktoken, and vocab.json with merges.txt.

How text is cut into pieces before any merge is the family's: `pat_str` in tokenizer_config.json gives a regular
expression or the name of a family, else tokenizer_class, the model_type of config.json or the number of ranks tell it.
What none of them tells is refused, since a wrong pattern gives other ids without any other sign.

Sources of the patterns and tokens: the families' own published tokenizers. A rank file has a line a token: its bytes in
base64, a space, its id; two neighbours are merged whose joined bytes have the lowest id.
"""

import base64
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from data_tools.errors import TokenizerError

RANK_LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")
CONFIG = "tokenizer_config.json"

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
ENDS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class Family:
    """How text is split, and the special tokens beside the ranks.

    pattern: what one piece is. digits: each digit is a piece of its own before that. nfc: text is composed first.
    control: names of the tokens that follow the last rank. named: bos_token and so on, where no config says.
    """

    pattern: str
    digits: bool = False
    nfc: bool = False
    control: tuple[str, ...] = ()
    named: Mapping[str, str] = field(default_factory=dict)
    ranks: int | None = None


def _llama3_control() -> tuple[str, ...]:
    """128000 to 128255 as from Llama 3.1 on."""
    known = {0: "begin_of_text", 1: "end_of_text", 4: "finetune_right_pad_id", 6: "start_header_id"}
    known |= {7: "end_header_id", 8: "eom_id", 9: "eot_id", 10: "python_tag"}
    free = (f"reserved_special_token_{k}" for k in range(256 - len(known)))
    return tuple(f"<|{known[i] if i in known else next(free)}|>" for i in range(256))


FAMILIES = {
    "gpt2": Family(
        GPT2,
        control=("<|endoftext|>",),
        named={"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
        ranks=50256,
    ),
    "llama3": Family(
        rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{ENDS}",
        control=_llama3_control(),
        named={"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
        ranks=128000,
    ),
    "qwen": Family(
        rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{ENDS}",
        nfc=True,
        control=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        named={"eos_token": "<|endoftext|>"},
        ranks=151643,
    ),
    "smollm": Family(GPT2, digits=True),
}
CLASSES = {"GPT2Tokenizer": "gpt2", "CodeGenTokenizer": "gpt2", "Qwen2Tokenizer": "qwen", "QWenTokenizer": "qwen"}
MODEL_TYPES = {"gpt2": "gpt2", "qwen": "qwen", "qwen2": "qwen", "qwen3": "qwen"}


def is_rank_file(path: Path) -> bool:
    """Does the file begin with a line of a rank file?"""
    with open(path, "rb") as file:
        return RANK_LINE.match(file.read(4096)) is not None


def family_of(file: Path, config: Mapping[str, Any], model_type: str | None) -> Family:
    """The family of a vocabulary file, see the module's text. Raises TokenizerError where nothing tells it."""
    said = config.get("pat_str")
    if said is not None:
        if isinstance(said, str) and said not in FAMILIES:
            return Family(_checked(said, file.parent / CONFIG))
        if not isinstance(said, str):
            raise TokenizerError(file.parent / CONFIG, "'pat_str' must be a regular expression or a family's name")
        return FAMILIES[said]
    by_class = CLASSES.get(str(config.get("tokenizer_class", "")).removesuffix("Fast"))
    name = by_class or MODEL_TYPES.get(str(model_type)) or _by_ranks(file)
    if name is None:
        problem = 'does not say how text is split before it is merged; add "pat_str" to tokenizer_config.json: '
        raise TokenizerError(file, f"{problem}the split pattern, or a family it is that of ({', '.join(FAMILIES)})")
    return FAMILIES[name]


def from_ranks(file: Path, family: Family) -> tuple[tokenizers.Tokenizer, dict[int, str]]:
    """The tokenizer of a rank file without control tokens, and those of its family by id. Raises TokenizerError."""
    alphabet = byte_alphabet()
    vocab = {"".join(map(alphabet.__getitem__, token)): rank for token, rank in read_ranks(file).items()}
    merges = [
        (rank, vocab[token[:k]], token[:k], token[k:])
        for token, rank in vocab.items()
        for k in range(1, len(token))
        if token[:k] in vocab and token[k:] in vocab
    ]
    merges.sort(key=lambda merge: merge[:2])
    # Words that are a token whole need no merges, as in tiktoken: some tokens cannot be merged from others.
    bpe = models.BPE(vocab=vocab, merges=[merge[2:] for merge in merges], ignore_merges=True)
    control = dict(enumerate(family.control, start=max(vocab.values()) + 1))
    return _with_steps(bpe, family, add_prefix_space=False), control


def from_vocab_and_merges(vocab: Path, family: Family, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """The tokenizer of vocab.json and the merges.txt beside it. Raises TokenizerError."""
    merges = vocab.with_name("merges.txt")
    try:
        bpe = models.BPE.from_file(str(vocab), str(merges))
    except Exception as error:  # the library raises bare Exception
        raise TokenizerError(vocab, f"does not make a tokenizer with {merges.name}: {error}") from None
    return _with_steps(bpe, family, add_prefix_space=bool(config.get("add_prefix_space")))


def read_ranks(file: Path) -> dict[bytes, int]:
    """Bytes to ids of a rank file. Raises TokenizerError with the line that is wrong."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise TokenizerError(file, f"line {number} is not base64 bytes, a space and a rank") from None
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        problem = f"has no token for {len(missing)} of the 256 bytes (first: {missing[0]}), so it cannot spell any text"
        raise TokenizerError(file, f"{problem}; is the file whole?")
    if len(set(ranks.values())) != len(ranks):
        raise TokenizerError(file, "gives one rank to several tokens; is the file whole?")
    return ranks


def byte_alphabet() -> dict[int, str]:
    """The printable character that stands for a byte in vocab.json and merges.txt (GPT-2's table).

    Bytes that print in Latin-1 stand for themselves, the others for characters from 256 on, in order.
    """
    printable = set(chain(range(ord("!"), ord("~") + 1), range(ord("¡"), ord("¬") + 1), range(ord("®"), ord("ÿ") + 1)))
    others = (byte for byte in range(256) if byte not in printable)
    moved = {byte: chr(256 + k) for k, byte in enumerate(others)}
    return {byte: moved.get(byte, chr(byte)) for byte in range(256)}


def model_type(folder: Path) -> str | None:
    """`model_type` of the model's config.json, where there is one that can be read."""
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        return None


def _by_ranks(file: Path) -> str | None:
    """The family that has as many ranks as the file; vocab.json is none."""
    if not is_rank_file(file):
        return None
    count = sum(1 for line in file.read_bytes().splitlines() if line)
    return next((name for name, family in FAMILIES.items() if family.ranks == count), None)


def _checked(pattern: str, path: Path) -> str:
    if re.search(r"\{\d+(,\d*)?\}\+", pattern):
        problem = "'pat_str': '{n,m}+' means something else in the regular expressions used here; write '{n,m}'"
        raise TokenizerError(path, f"{problem}, which splits alike before '|'")
    try:
        tokenizers.Regex(pattern)
    except Exception as error:  # the library raises bare Exception
        raise TokenizerError(path, f"'pat_str' is not a regular expression: {error}") from None
    return pattern


def _with_steps(bpe: models.BPE, family: Family, *, add_prefix_space: bool) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(bpe)
    if family.nfc:
        tokenizer.normalizer = normalizers.NFC()
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if family.digits else []
    if add_prefix_space:  # the library puts the space before it splits by its own pattern, which is GPT-2's
        if family.pattern != GPT2:
            raise TokenizerError(CONFIG, "'add_prefix_space' is known with the pattern of gpt2 only")
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=True))
    else:
        steps += [pre_tokenizers.Split(tokenizers.Regex(family.pattern), "isolated")]
        steps += [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer

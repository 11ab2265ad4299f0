"""Tokenizer files from a GGUF's metadata: byte-level BPE (`gpt2`) and sentencepiece BPE (`llama`).

The files give the token ids that the original tokenizer gives. Where llama.cpp leaves out a step that the models'
own tokenizers have (Unicode NFC), the step is written.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import gguf
import tokenizers

from trainer.errors import ModelError
from trainer.models.gguf_file import Metadata
from trainer.models.gguf_pre import ALIASES, PRE_TOKENIZERS, pre_tokenizer_json
from trainer.models.gguf_sentencepiece import Pieces, tokenizer_json, write_model

KINDS = ("gpt2", "llama")
PADDING = re.compile(r"\[PAD\d+\]")
"""How llama.cpp's converter fills a vocabulary that is smaller than the embedding."""
TYPES = gguf.TokenType
IDS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # ours -> tokenizer.ggml.<this>_token_id


@dataclass(frozen=True)
class TokenizerFiles:
    """Contents of tokenizer.json and tokenizer_config.json, and of tokenizer.model where there is one."""

    tokenizer: dict[str, Any]
    config: dict[str, Any]
    model: bytes | None


def build_tokenizer(metadata: Metadata, config: dict[str, Any]) -> TokenizerFiles:
    """The tokenizer of a GGUF; config: keys of config.json. Raises ModelError for a vocabulary that is not known."""
    path = metadata.path
    kind = metadata.need("tokenizer.ggml.model", str)
    if kind not in KINDS:
        problem = f"tokenizer model '{kind}' is not known; known: gpt2 (byte-level BPE), llama (sentencepiece BPE)"
        raise ModelError(path, problem)
    tokens = metadata.need("tokenizer.ggml.tokens", list)
    types = metadata.need("tokenizer.ggml.token_type", list)
    if len(set(tokens)) != len(tokens) or len(types) != len(tokens):
        raise ModelError(path, f"{len(tokens)} tokens ({len(set(tokens))} different) but {len(types)} token types")
    ids = {name: metadata.get(f"tokenizer.ggml.{key}_token_id", int) for name, key in IDS.items()}
    for name, index in ids.items():
        if index is not None and not 0 <= index < len(tokens):
            raise ModelError(path, f"the {name}_token has id {index}, outside the vocabulary of {len(tokens)}")
    while types and types[-1] == TYPES.UNUSED and PADDING.fullmatch(tokens[-1]):
        tokens, types = tokens[:-1], types[:-1]
    model = None
    if kind == "gpt2":
        tokenizer, adds_bos = _byte_level(metadata, tokens)
    else:
        tokenizer, adds_bos = _sentencepiece(metadata, tokens, types, ids), True
        model = write_model(_pieces(metadata, tokens, types), ids)
    tokenizer["added_tokens"] = list(_added_tokens(tokens, types))
    adds = {"bos": metadata.get("tokenizer.ggml.add_bos_token", bool), "eos": False}
    adds["bos"] = (adds_bos if adds["bos"] is None else adds["bos"]) and ids["bos"] is not None
    adds["eos"] = bool(metadata.get("tokenizer.ggml.add_eos_token", bool)) and ids["eos"] is not None
    tokenizer["post_processor"] = _template({name: (tokens[ids[name]], ids[name]) for name in adds if adds[name]})
    try:
        tokenizers.Tokenizer.from_str(json.dumps(tokenizer))
    # The library raises a bare Exception for a merge of tokens that the vocabulary lacks.
    except Exception as error:
        raise ModelError(path, f"the tokenizer's merges do not fit its vocabulary ({error})") from error
    template = metadata.get("tokenizer.chat_template", str)
    return TokenizerFiles(
        tokenizer,
        {
            # A class of its own name would rebuild the splitter; this one takes tokenizer.json as it is.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": adds["bos"],
            **({"add_eos_token": True} if adds["eos"] else {}),
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": config["max_position_embeddings"],
            **{f"{name}_token": tokens[index] for name, index in ids.items() if index is not None},
            **({} if template is None else {"chat_template": template}),
        },
        model,
    )


def _byte_level(metadata: Metadata, tokens: list[str]) -> tuple[dict[str, Any], bool]:
    """tokenizer.json of kind `gpt2`, and whether BOS is added when the file does not say."""
    name = metadata.need("tokenizer.ggml.pre", str)
    name = ALIASES.get(name, name)
    if name not in PRE_TOKENIZERS:
        known = ", ".join(sorted([*PRE_TOKENIZERS, *ALIASES]))
        raise ModelError(metadata.path, f"pre-tokenizer '{name}' is not known; known: {known}")
    pre = PRE_TOKENIZERS[name]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "normalizer": {"type": "NFC"} if pre.nfc else None,
        "pre_tokenizer": pre_tokenizer_json(pre),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre.ignore_merges,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in metadata.need("tokenizer.ggml.merges", list)],
        },
    }
    return tokenizer, pre.adds_bos


def _pieces(metadata: Metadata, tokens: list[str], types: list[int]) -> Pieces:
    scores = metadata.need("tokenizer.ggml.scores", list)
    if len(scores) < len(tokens):
        raise ModelError(metadata.path, f"{len(tokens)} tokens but {len(scores)} scores")
    spaced = metadata.get("tokenizer.ggml.add_space_prefix", bool)
    return Pieces(tokens, scores[: len(tokens)], types, True if spaced is None else spaced)


def _sentencepiece(
    metadata: Metadata, tokens: list[str], types: list[int], ids: dict[str, int | None]
) -> dict[str, Any]:
    unknown = [index for index, kind in enumerate(types) if kind == TYPES.UNKNOWN]
    if ids["unk"] is None and unknown:
        ids["unk"] = unknown[0]
    return tokenizer_json(_pieces(metadata, tokens, types), None if ids["unk"] is None else tokens[ids["unk"]])


def _template(added: dict[str, tuple[str, int]]) -> dict[str, Any] | None:
    """A post-processor that puts BOS before a text and EOS after it, whichever are in `added` (token and id)."""
    if not added:
        return None
    before = [{"SpecialToken": {"id": added["bos"][0], "type_id": 0}}] if "bos" in added else []
    after = [{"SpecialToken": {"id": added["eos"][0], "type_id": 0}}] if "eos" in added else []
    texts = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
    return {
        "type": "TemplateProcessing",
        "single": [*before, texts[0], *after],
        "pair": [*before, texts[0], *after, *before, texts[1], *after],
        "special_tokens": {token: {"id": token, "ids": [index], "tokens": [token]} for token, index in added.values()},
    }


def _added_tokens(tokens: list[str], types: list[int]) -> Iterable[dict[str, Any]]:
    """Tokens that are found in the text before anything else: control tokens, and those a user added."""
    special = {TYPES.UNKNOWN, TYPES.CONTROL}
    for index, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        if kind in special or kind == TYPES.USER_DEFINED:
            flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
            yield {"id": index, "content": token, **flags, "special": kind in special}

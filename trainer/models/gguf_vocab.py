"""A Hugging Face folder's tokenizer and chat template as the metadata of a GGUF.

Byte-level BPE (tokenizer.json) becomes the kind `gpt2`, sentencepiece BPE (tokenizer.model, or a tokenizer.json with
byte fallback) the kind `llama`. A tokenizer that llama.cpp would read differently is refused by name.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf

from data_tools.tokenizer import load_tokenizer, read_json
from trainer.errors import ModelError
from trainer.models.gguf_pre import PRE_TOKENIZERS, name_of
from trainer.models.gguf_sentencepiece import Pieces, from_tokenizer_json, read_model

TYPES = gguf.TokenType
NAMES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # Hugging Face's -> tokenizer.ggml.<this>
FILLER_SCORE = -10000.0
"""Of rows of the embedding that no token has; llama.cpp's converter writes the same."""


def vocabulary(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The `tokenizer.*` keys of a GGUF. config: keys of config.json.

    Raises ModelError, or TokenizerError for files that cannot be read.
    """
    tokenizer, settings = read_json(folder / "tokenizer.json"), read_json(folder / "tokenizer_config.json")
    added = _added_tokens(folder, tokenizer, settings)
    model = tokenizer.get("model", {})
    if _is_byte_level(tokenizer):
        fields, tokens = _byte_level(folder / "tokenizer.json", tokenizer, added, config["vocab_size"])
    elif (folder / "tokenizer.model").is_file() and model.get("type", "BPE") == "BPE":
        pieces = read_model(folder / "tokenizer.model")
        fields, tokens = _sentencepiece(folder / "tokenizer.model", pieces, added, config["vocab_size"])
    elif model.get("type") == "BPE" and model.get("byte_fallback"):
        pieces = from_tokenizer_json(folder / "tokenizer.json", tokenizer)
        fields, tokens = _sentencepiece(folder / "tokenizer.json", pieces, added, config["vocab_size"])
    else:
        kind = model.get("type", "no tokenizer.json and no tokenizer.model")
        raise ModelError(
            folder, f"tokenizer kind '{kind}' cannot be written; known: byte-level BPE and sentencepiece BPE"
        )
    ids = _special_ids(folder, settings, config, tokens)
    fields |= {f"tokenizer.ggml.{NAMES[name]}_token_id": index for name, index in ids.items()}
    fields["tokenizer.ggml.add_bos_token"] = load_tokenizer(folder).adds_bos and "bos" in ids
    fields["tokenizer.ggml.add_eos_token"] = bool(settings.get("add_eos_token")) and "eos" in ids
    template = _chat_template(folder, settings)
    return fields if template is None else fields | {"tokenizer.chat_template": template}


def _is_byte_level(tokenizer: dict[str, Any]) -> bool:
    """Does it map every byte to a letter, as GPT-2 does? Its decoder says so."""
    decoder = tokenizer.get("decoder") or {}
    kinds = {decoder.get("type"), *(part["type"] for part in decoder.get("decoders", []))}
    return tokenizer.get("model", {}).get("type") == "BPE" and "ByteLevel" in kinds


def _added_tokens(folder: Path, tokenizer: dict[str, Any], settings: dict[str, Any]) -> dict[int, tuple[str, bool]]:
    """Id -> (text, special?) of the tokens that are found before text is cut; tokenizer.json has the last word."""
    found = {index: (text, False) for text, index in read_json(folder / "added_tokens.json").items()}
    for index, token in settings.get("added_tokens_decoder", {}).items():
        found[int(index)] = (token["content"], bool(token.get("special")))
    for token in tokenizer.get("added_tokens", []):
        found[token["id"]] = (token["content"], bool(token.get("special")))
    return found


def _byte_level(
    path: Path, tokenizer: dict[str, Any], added: dict[int, tuple[str, bool]], rows: int
) -> tuple[dict[str, Any], list[str]]:
    name = name_of(tokenizer)
    if name is None:
        known = ", ".join(PRE_TOKENIZERS)
        problem = f"its normalizer and pre-tokenizer have no name in llama.cpp that is known here; known: {known}"
        raise ModelError(path, f"{problem}; {str(tokenizer.get('pre_tokenizer'))[:200]}")
    model = tokenizer["model"]
    texts = {index: text for text, index in model["vocab"].items()} | {i: text for i, (text, _) in added.items()}
    tokens = _filled(path, texts, rows)
    types = [TYPES.NORMAL if index in texts else TYPES.UNUSED for index in range(rows)]
    for index, (_, special) in added.items():
        types[index] = TYPES.CONTROL if special else TYPES.USER_DEFINED
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": name,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [int(kind) for kind in types],
        "tokenizer.ggml.merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]],
    }, tokens


def _sentencepiece(
    path: Path, pieces: Pieces, added: dict[int, tuple[str, bool]], rows: int
) -> tuple[dict[str, Any], list[str]]:
    kinds = dict(enumerate(pieces.types))
    texts = dict(enumerate(pieces.tokens))
    for index, (text, special) in added.items():
        texts[index] = text if special else text.replace("▁", " ")
        if kinds.get(index) != TYPES.UNKNOWN:
            kinds[index] = int(TYPES.CONTROL if special else TYPES.USER_DEFINED)
    tokens = _filled(path, texts, rows)
    scores = dict(enumerate(pieces.scores))
    pieces = replace(pieces, tokens=tokens)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [scores.get(i, 0.0 if i in texts else FILLER_SCORE) for i in range(rows)],
        "tokenizer.ggml.token_type": [kinds.get(i, int(TYPES.UNUSED)) for i in range(rows)],
        "tokenizer.ggml.add_space_prefix": pieces.space_prefix,
    }, tokens


def _filled(path: Path, texts: dict[int, str], rows: int) -> list[str]:
    """A text for every row of the embedding; rows without a token get a text that no input has."""
    if texts and max(texts) >= rows:
        raise ModelError(path, f"has a token with id {max(texts)}, the embedding only {rows} rows; use matching files")
    tokens = [texts.get(index, f"[PAD{index}]") for index in range(rows)]
    if len(set(tokens)) != rows:
        twice = next(token for token in tokens if tokens.count(token) > 1)
        raise ModelError(path, f"token '{twice}' has two ids; a GGUF holds each text once")
    return tokens


def _special_ids(folder: Path, settings: dict[str, Any], config: dict[str, Any], tokens: list[str]) -> dict[str, int]:
    """Ids of BOS, EOS, unknown and padding: what the tokenizer's files name, else what config.json does."""
    named = read_json(folder / "special_tokens_map.json") | settings
    ids = {}
    for name in NAMES:
        token = named.get(f"{name}_token")
        text = token["content"] if isinstance(token, dict) else token
        index = config.get(f"{name}_token_id")
        if text is not None:
            if text not in tokens:
                raise ModelError(folder, f"{name}_token '{text}' is not in the vocabulary; mend tokenizer_config.json")
            ids[name] = tokens.index(text)
        elif isinstance(index, int) and 0 <= index < len(tokens):
            ids[name] = index
    return ids


def _chat_template(folder: Path, settings: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_bytes().decode("utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several by name
        template = {row["name"]: row["template"] for row in template}.get("default")
    return template

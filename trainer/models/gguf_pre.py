r"""Pre-tokenizers: how a byte-level BPE cuts text into words before it merges, by llama.cpp's names for them.

A GGUF holds only a name (`tokenizer.ggml.pre`); a tokenizer.json holds the steps. The table has those of which both
sides are known: the steps are the models' own, and llama.cpp's patterns for these names (src/llama-vocab.cpp) cut the
same way.
"""

from dataclasses import dataclass
from typing import Any

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + REST
QWEN2 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + REST
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_REST_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}|" + _REST_SLASH
GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{CONTRACTIONS}?|"
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{CONTRACTIONS}?|\p{{N}}{{1,3}}|" + _REST_SLASH
)

SAME = {
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+": GPT2,
    GPT2.removesuffix(r"|\s+"): GPT2,  # what it leaves over is a piece of its own anyway
}
"""Other spellings of a pattern."""

Step = tuple[Any, ...]
DIGITS: Step = ("digits",)
BYTES: Step = ("bytes",)


def _split(pattern: str) -> Step:
    return ("split", pattern)


@dataclass(frozen=True)
class PreTokenizer:
    """Steps in order (the last always maps bytes to letters). ignore_merges: a word that is a token needs no merges.
    nfc: text is normalised first; llama.cpp leaves that out. adds_bos: what llama.cpp does if the file does not say."""

    steps: tuple[Step, ...]
    ignore_merges: bool = False
    nfc: bool = False
    adds_bos: bool = False


PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "gpt-2": PreTokenizer((_split(GPT2), BYTES)),
    "smollm": PreTokenizer((DIGITS, _split(GPT2), BYTES)),
    "command-r": PreTokenizer((DIGITS, _split(GPT2), BYTES), nfc=True),
    "llama-bpe": PreTokenizer((_split(LLAMA3), BYTES), ignore_merges=True, adds_bos=True),
    "dbrx": PreTokenizer((_split(LLAMA3), BYTES)),
    "qwen2": PreTokenizer((_split(QWEN2), BYTES), nfc=True),
    "tekken": PreTokenizer((_split(TEKKEN), BYTES), ignore_merges=True, adds_bos=True),
    "gpt-4o": PreTokenizer((_split(GPT4O), BYTES)),
}
ALIASES = {
    "phi-2": "gpt-2",
    "starcoder": "smollm",
    "refact": "smollm",
    "codeshell": "smollm",
    "llama3": "llama-bpe",
    "llama-v3": "llama-bpe",
    "smaug-bpe": "dbrx",
    "deepseek-r1-qwen": "qwen2",
}
"""Other names that llama.cpp treats alike."""


def pre_tokenizer_json(pre: PreTokenizer) -> dict[str, Any]:
    """The `pre_tokenizer` of a tokenizer.json."""
    parts = []
    for step in pre.steps:
        if step == DIGITS:
            parts.append({"type": "Digits", "individual_digits": True})
        elif step == BYTES:
            parts.append({"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False})
        elif step == _split(GPT2):
            continue  # the library's own form of it, below
        else:
            pattern = {"type": "Split", "pattern": {"Regex": step[1]}, "behavior": "Isolated", "invert": False}
            parts.append(pattern)
    parts[-1]["use_regex"] = _split(GPT2) in pre.steps
    return parts[0] if len(parts) == 1 else {"type": "Sequence", "pretokenizers": parts}


def name_of(tokenizer: dict[str, Any]) -> str | None:
    """llama.cpp's name for how this tokenizer.json (byte-level BPE) cuts text; None when it has none in the table."""
    steps = _steps(tokenizer.get("pre_tokenizer"))
    ignore_merges = bool(tokenizer["model"].get("ignore_merges"))
    normalizer = tokenizer.get("normalizer")
    if normalizer is not None and _types(normalizer) - {"NFC", "Sequence"}:
        return None
    fitting = [name for name, pre in PRE_TOKENIZERS.items() if (pre.steps, pre.ignore_merges) == (steps, ignore_merges)]
    # of two names for the same steps, the one whose models normalise as this one does
    fitting.sort(key=lambda name: PRE_TOKENIZERS[name].nfc != (normalizer is not None))
    return fitting[0] if fitting else None


def _types(part: dict[str, Any]) -> set[str]:
    return {part["type"]}.union(*(_types(inner) for inner in part.get("normalizers", [])))


def _steps(part: dict[str, Any] | None) -> tuple[Step, ...] | None:
    """A `pre_tokenizer` in the table's terms; None for one that holds something else."""
    if part is None:
        return None
    found: list[Step] = []
    for step in part["pretokenizers"] if part["type"] == "Sequence" else [part]:
        if step["type"] == "Digits" and step.get("individual_digits"):
            found.append(DIGITS)
        elif step["type"] == "ByteLevel" and not step.get("add_prefix_space"):
            found += [_split(GPT2), BYTES] if step.get("use_regex", True) else [BYTES]
        elif step["type"] == "Split" and step.get("behavior") in ("Isolated", "Removed"):
            pattern = step["pattern"].get("Regex")
            # "Removed" with "invert" keeps the matches: the same words, as these patterns leave nothing between
            if pattern is None or (step["behavior"] == "Removed") != bool(step.get("invert")):
                return None
            found.append(DIGITS if pattern == r"\p{N}" else _split(SAME.get(pattern, pattern)))
        else:
            return None
    return tuple(found)

"""What a model could learn instead of the content: surface features that tell chosen from rejected, copies and leaks.

A preference loss rewards whatever separates the two sides. If length, case, a mark or a phrase does so almost
perfectly, the loss falls without the model learning anything that was meant. `lint_pairs` looks at the rows' text,
`lint_groups` at their tokens. Findings are for a person to read; they never stop a run.

Two numbers say how well a feature separates, both 0.5 for a feature that knows nothing:
- AUC: how often a chosen text of any pair has more of it than a rejected text of any pair, ties counting half
  (Mann-Whitney, by ranks);
- share of pairs: how often chosen has more of it than the rejected one of the same pair, ties counting half.
A feature is reported when either is at least SEPARATES, or at most 1 - SEPARATES.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np

from data_tools.encode import Group
from data_tools.schema import Record, Text

SEPARATES = 0.95
MIN_PAIRS = 20  # by chance, one coin out of 20 is at least 19 times the same in 1 of 25,000 draws
SAMPLE = 2000  # pairs looked at for features, evenly spread: an AUC near 1 needs no more
PHRASE_SAMPLE = 64  # pairs in which phrases are searched; what is found is then counted in the whole sample
MAX_PHRASES = 3
MAX_COMMON_COPIES = 0.01  # share of copied rows up to which they are a note, not a warning

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing to know about the data. `warning`: look before you train; `note`: good to know."""

    severity: Literal["warning", "note"]
    text: str


@dataclass(frozen=True, slots=True)
class Feature:
    """A number of a text. `more`: what a text with more of it is or has, in words that complete "chosen ..."."""

    more: str
    fewer: str
    shortcut: str
    value: Callable[[str], float]


def _share(pattern: str) -> Callable[[str], float]:
    """Matches a character, so that a long text has no more of it for being long."""
    compiled = re.compile(pattern, re.MULTILINE)
    return lambda text: len(compiled.findall(text)) / max(1, len(text))


def _upper_case_share(text: str) -> float:
    letters = "".join(filter(str.isalpha, text))
    return sum(map(str.isupper, letters)) / max(1, len(letters))


FEATURES = (
    Feature("is longer", "is shorter", "length", len),
    Feature("has more upper case", "has less upper case", "upper case", _upper_case_share),
    Feature("has more digits", "has fewer digits", "digits", _share(r"\d")),
    Feature("has more list items", "has fewer list items", "list marks", _share(r"^\s*(?:[-*•]|\d+[.)])\s")),
    Feature("has more Markdown", "has less Markdown", "Markdown marks", _share(r"\*\*|^#+ |`+|^\|")),
    Feature("has more line breaks", "has fewer line breaks", "line breaks", _share(r"\n")),
    Feature("has more exclamation marks", "has fewer exclamation marks", "exclamation marks", _share("[!！]")),
    Feature("has more question marks", "has fewer question marks", "question marks", _share("[?？؟]")),
    Feature(
        "names more option letters (A to E)",
        "names fewer option letters (A to E)",
        "naming a letter",
        _share(r"(?<!\w)[A-E](?!\w)"),
    ),
    Feature(
        "ends a sentence at its end more often",
        "breaks off at its end more often",
        "how the text ends",
        lambda text: float(text.rstrip().endswith((".", "!", "?", "。", "！", "？", "؟", "।"))),
    ),
    Feature(
        "begins with white space more often",
        "begins without white space more often",
        "its first character",
        lambda text: float(text[:1].isspace()),
    ),
    Feature(
        "ends with white space more often",
        "ends without white space more often",
        "its last character",
        lambda text: float(text[-1:].isspace()),
    ),
)


def auc(chosen: np.ndarray, rejected: np.ndarray) -> float:
    """Probability that a random value of `chosen` (P,) exceeds one of `rejected` (Q,), ties counting half.

    The Mann-Whitney statistic over P x Q, from ranks in a sorted array.
    """
    ordered = np.sort(rejected)
    ranks = np.searchsorted(ordered, chosen, "left") + np.searchsorted(ordered, chosen, "right")
    return float(ranks.mean() / 2 / len(ordered))


def lint_pairs(records: Sequence[Record], eval_records: Sequence[Record] = ()) -> list[Finding]:
    """Findings about the rows' text: features and phrases of pairs, copies, and evaluation prompts seen in training.

    SFT records (one completion) are checked for copies and leaks only. Features are looked at in at most SAMPLE pairs
    and only from MIN_PAIRS on.
    """
    pairs = _spread([record for record in records if len(record.completions) == 2], SAMPLE)
    chosen, rejected = ([_completion_text(pair.completions[side]) for pair in pairs] for side in (0, 1))
    findings = _copies(records) + _leaks(records, eval_records)
    if len(pairs) < MIN_PAIRS:
        return findings
    for feature in FEATURES:
        values = ([feature.value(text) for text in texts] for texts in (chosen, rejected))
        findings += _separation(*map(np.array, values), feature.more, feature.fewer, feature.shortcut)
    return findings + _phrases(chosen, rejected)


def lint_groups(groups: Sequence[Group]) -> list[Finding]:
    """Findings about tokens that the text does not show: length in tokens, and completions without the end token.

    Looks at groups with two completions, at most SAMPLE of them and only from MIN_PAIRS on; a `Shard` will do.
    """
    sample = [groups[i] for i in _spread(range(len(groups)), SAMPLE)]
    pairs = [group for group in sample if len(group.lengths) == 3]
    if len(pairs) < MIN_PAIRS:
        return []
    lengths = np.array([pair.lengths for pair in pairs])
    # Where each completion's last token sits; a completion is never empty.
    last = np.array([[pair.ids[sum(pair.lengths[:2]) - 1], pair.ids[-1]] for pair in pairs])
    end_token = Counter(last.ravel().tolist()).most_common(1)[0][0]
    ends = (last == end_token).astype(float)
    return _separation(lengths[:, 1], lengths[:, 2], "has more tokens", "has fewer tokens", "length") + _separation(
        ends[:, 0],
        ends[:, 1],
        f"ends with the usual last token ({end_token}) more often",
        f"lacks the usual last token ({end_token}) more often",
        "the end token (are completions cut, or is one side's end-of-turn missing?)",
    )


def _separation(chosen: np.ndarray, rejected: np.ndarray, more: str, fewer: str, shortcut: str) -> list[Finding]:
    """A finding when the values (P,) of the two sides separate, else none."""
    area = auc(chosen, rejected)
    wins = float((chosen > rejected).mean())
    losses = float((chosen < rejected).mean())
    in_pairs = (1 + wins - losses) / 2
    if max(area, in_pairs, 1 - area, 1 - in_pairs) < SEPARATES:
        return []
    up = area + in_pairs > 1
    text = (
        f"chosen {more if up else fewer} in {max(wins, losses):.0%} of pairs (AUC {max(area, 1 - area):.2f}): a model "
        f"can win by {shortcut} alone; balance the pairs, or check that this is what you want to teach"
    )
    return [Finding("warning", text)]


def _phrases(chosen: list[str], rejected: list[str]) -> list[Finding]:
    """Findings for runs of up to three words that nearly all texts of one side hold and nearly none of the other."""
    few = _spread(range(len(chosen)), PHRASE_SAMPLE)
    held = [Counter(p for i in few for p in set(_word_runs(_words(texts[i])))) for texts in (chosen, rejected)]
    # A share of 0.9 more on one side is AUC 0.95; the few pairs may miss some, so they only need 0.7 here.
    gap = {phrase: held[0][phrase] - held[1][phrase] for phrase in held[0] | held[1]}
    candidates = [phrase for phrase in gap if abs(gap[phrase]) >= 0.7 * len(few)]
    if not candidates:
        return []
    sides = [[f" {' '.join(_words(text))} " for text in texts] for texts in (chosen, rejected)]
    found = []
    for phrase in candidates:
        shares = [sum(f" {phrase} " in text for text in texts) / len(texts) for texts in sides]
        if (1 + abs(shares[0] - shares[1])) / 2 >= SEPARATES:
            found.append((-abs(shares[0] - shares[1]), -len(phrase), phrase, shares))
    return _phrase_findings([(phrase, shares) for _, _, phrase, shares in sorted(found)])


def _phrase_findings(found: list[tuple[str, list[float]]]) -> list[Finding]:
    """The first MAX_PHRASES that share no word: the parts of a reported phrase are no news."""
    findings: list[Finding] = []
    told: set[str] = set()
    for phrase, (in_chosen, in_rejected) in found:
        if told.isdisjoint(phrase.split()) and len(findings) < MAX_PHRASES:
            told.update(phrase.split())
            area = (1 + abs(in_chosen - in_rejected)) / 2
            text = (
                f'the phrase "{phrase}" is in {in_chosen:.0%} of the chosen and {in_rejected:.0%} of the rejected '
                f"texts (AUC {area:.2f}): a model can win by this phrase alone; remove it, or use it on both sides"
            )
            findings.append(Finding("warning", text))
    return findings


def _words(text: str) -> list[str]:
    """Words and single marks, with a mark for the text's two ends, so that an opening or a closing is a phrase too."""
    return ["<start>", *re.findall(r"\w+|[^\w\s]", text), "<end>"]


def _word_runs(words: list[str]) -> Iterable[str]:
    for count in (1, 2, 3):
        for start in range(len(words) - count + 1):
            yield " ".join(words[start : start + count])


def _copies(records: Sequence[Record]) -> list[Finding]:
    """Rows that stand more than once, pairs of two equal sides, and pairs that another row turns around."""
    counts = Counter(_row_key(record.prompt, record.completions) for record in records)
    repeated = [r for r in records if counts[_row_key(r.prompt, r.completions)] > 1]
    extra = len(records) - len(counts)
    pairs = [record for record in records if len(record.completions) == 2]
    equal = [r for r in pairs if r.completions[0] == r.completions[1]]
    turned = [
        r for r in pairs if r.completions[0] != r.completions[1] and _row_key(r.prompt, r.completions[::-1]) in counts
    ]
    findings = []
    if extra:
        severity = "warning" if extra > MAX_COMMON_COPIES * len(records) else "note"
        text = f"{extra} of {len(records)} rows repeat another row (first: {repeated[0].id}): they weigh double"
        findings.append(Finding(severity, f"{text}; remove them"))
    if equal:
        text = f"{len(equal)} pairs have equal chosen and rejected texts (first: {equal[0].id}): they teach nothing"
        findings.append(Finding("warning", f"{text}; remove them"))
    if turned:
        text = f"{len(turned)} pairs stand in another row with chosen and rejected exchanged (first: {turned[0].id})"
        findings.append(Finding("warning", f"{text}: they cancel each other; keep one"))
    return findings


def _leaks(records: Sequence[Record], eval_records: Sequence[Record]) -> list[Finding]:
    """Evaluation prompts that are training prompts too, apart from case and white space."""
    seen = {_folded(record.prompt) for record in records if record.prompt}
    leaked = [record for record in eval_records if record.prompt and _folded(record.prompt) in seen]
    if not leaked:
        return []
    text = (
        f"{len(leaked)} of {len(eval_records)} evaluation rows have a prompt that is in the training data (first: "
        f"{leaked[0].id}): their score says nothing about new prompts; split by prompt, not by row"
    )
    return [Finding("warning", text)]


def _row_key(prompt: Text, completions: Sequence[Text]) -> bytes:
    return hashlib.sha256(repr((prompt, *completions)).encode()).digest()


def _folded(prompt: Text) -> Hashable:
    """The user's and system's words, without the difference of a string from a list of one message."""
    words = prompt if isinstance(prompt, str) else "\n".join(message.content for message in prompt)
    return hashlib.sha256(" ".join(words.casefold().split()).encode()).digest()


def _completion_text(completion: Text) -> str:
    if isinstance(completion, str):
        return completion
    return "\n".join(message.content for message in completion if message.role == "assistant")


def _spread(items: Sequence[Item], at_most: int) -> Sequence[Item]:
    """`items`, or `at_most` of them at even distances."""
    if len(items) <= at_most:
        return items
    return [items[i * len(items) // at_most] for i in range(at_most)]

"""One spelling for what answers are written in (digits, letters, marks, LaTeX, Markdown), and where the answer stands.

Pure functions over text, shared by `verify_option` and `verify_number`. Nothing here knows what a right answer is.
"""

import re
import unicodedata

INVISIBLE = re.compile("[\u00ad\u200b\u200d-\u200f\u202a-\u202e\u2060-\u2069\ufeff\u0640\u064b-\u0655\u0670]")
"""Zero-width and direction marks, the Arabic kashida and vowel marks: nobody sees a difference. A zero-width non-joiner
within a word becomes a space, as careless writers have it."""
DIGITS = {ord(d): str(i) for row in ("۰۱۲۳۴۵۶۷۸۹", "٠١٢٣٤٥٦٧٨٩") for i, d in enumerate(row)}
ONE_SPELLING: dict[int, str | int | None] = {
    **DIGITS,
    **str.maketrans("٫٬٪؛،؟", ".,%;,?"),
    **str.maketrans("يىكةأإآ", "ییکهااا"),
    **str.maketrans("−﹣－‐‑⁻", "------"),
    **str.maketrans("“”„«»「」『』", '"' * 9),
    **str.maketrans("‘’", "''"),
    **str.maketrans("【】〔〕", "[][]"),
    ord("⁄"): "/",
    ord("÷"): "/",
    ord("\u00a0"): " ",
    ord("\u2009"): " ",
    ord("\u202f"): " ",
    ord("ۀ"): "ه",
    ord("ؤ"): "و",
}
SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
VULGAR_FRACTIONS = re.compile("[¼-¾⅐-⅞↉]")
MAX_BOX = 1000
MAX_SENTENCE = 300
"""Characters looked at inside a box and before a statement: texts that repeat themselves must not cost their square."""
MAX_STATEMENTS = 50
"""As many of the last ones are compared with the one that counts."""
THINK_END = re.compile(r"</(?:think|thinking|thought|reasoning)>", re.IGNORECASE)
THINK_START = re.compile(r"<(?:think|thinking|thought|reasoning)>", re.IGNORECASE)
ANSWER_TAG = re.compile(r"<answer>(.*?)(?:</answer>|$)", re.IGNORECASE | re.DOTALL)
LATEX_WRAPPERS = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mathit|mathsf|rm|bf|operatorname)\s*\{([^{}]*)\}")
BOXED = re.compile(r"\\(?:boxed|fbox|framebox)\s*")


def final_part(text: str) -> str | None:
    """The text after the thinking: what follows `</think>`, the last `<answer>` where there is one.

    None for a text that ends inside its thinking: it has not answered yet.
    """
    ends = list(THINK_END.finditer(text))
    if ends:
        text = text[ends[-1].end() :]
    elif THINK_START.search(text):
        return None
    tags = ANSWER_TAG.findall(text)
    return tags[-1] if tags else text


def normalise(text: str) -> str:
    """`text` in one spelling: ASCII digits and marks, no invisible characters, Markdown and LaTeX wrappers gone.

    Persian and Arabic letters that look alike become one; `\\boxed` and `\\frac` stay, their readers need them.
    """
    text = re.sub("[⁰¹²³⁴-⁹⁻]+", lambda m: "^" + m.group().translate(SUPERSCRIPTS), text)
    text = VULGAR_FRACTIONS.sub(lambda m: " " + unicodedata.normalize("NFKC", m.group()) + " ", text)
    text = text.translate(ONE_SPELLING)
    text = unicodedata.normalize("NFKC", text).translate(ONE_SPELLING)
    text = INVISIBLE.sub("", re.sub(r"(?<=\w)\u200c(?=\w)", " ", text).replace("\u200c", ""))
    for _ in range(3):
        text = LATEX_WRAPPERS.sub(r"\1", text)
    text = re.sub(r"\\([$%#&_])", r"\1", text)
    text = re.sub(r"\\(?:left|right|displaystyle|,|!|;|:|quad)(?![A-Za-z])", " ", text)
    text = re.sub(r"\\[()\[\]]", " ", text)
    text = re.sub(r"\*\*+|__+|`+", "", text)
    text = re.sub(r"(?<![\w*])\*(?=\S)([^*\n]{1,200}?)(?<=\S)\*(?![\w*])", r"\1", text)  # *B*, not 2*3
    text = re.sub(r"[^\S\n]+", " ", text.replace("\r\n", "\n").replace("\r", "\n"))
    return re.sub(r"\n\s*\n", "\n\n", text)


def boxed(text: str) -> list[tuple[int, int, str]]:
    """(start, end, content) of every `\\boxed{...}` with balanced braces, and of `\\boxed X`."""
    found = []
    for match in BOXED.finditer(text):
        start = match.end()
        if text[start : start + 1] != "{":
            bare = re.match(r"\S+", text[start:])
            if bare:
                found.append((match.start(), start + bare.end(), bare.group()))
            continue
        depth = 0
        for end in range(start, min(len(text), start + MAX_BOX)):
            depth += (text[end] == "{") - (text[end] == "}")
            if depth == 0:
                found.append((match.start(), end + 1, text[start + 1 : end]))
                break
    return found


NEGATION = re.compile(
    r"(?:\bnot\b|n't\b|\bnever\b|\bcannot\b|\bunlikely\b|\bif\b|\bwhether\b|\bunless\b|\brule[sd]? out\b|\bwrong to\b"
    r"|\b(?:might|may|could|would) (?:think|guess|assume|say)\b|\b(?:tempt|mistaken)\w*\b|\bno\b(?!\.)"
    r"|不|并非|如果|若|假如|排除|以为|误认|(?<!\w)(?:اگر|نه|شاید|چنانچه)(?!\w))",
    re.IGNORECASE,
)
"""Words before a statement, in its own sentence, that take it back or only suppose it."""
SENTENCE_END = re.compile(r"[.!?。！？;](?=\s|$)|[。！？;]|\n")


def sentence_before(text: str, position: int) -> str:
    """What stands between the last end of a sentence and `position`."""
    start = max(0, position - MAX_SENTENCE)
    for end in SENTENCE_END.finditer(text, start, position):
        start = end.end()
    return text[start:position]


def denied(text: str, position: int) -> bool:
    """Whether the sentence that leads up to `position` denies or only supposes what follows.

    A comma, "but", "so" or the like ends the reach of a negation: "it is not A, so the answer is B".
    """
    before = sentence_before(text, position)
    clause = re.split(
        r"[,:]|\b(?:but|so|hence|thus|therefore|then|rather|instead)\b|(?<!\w)(?:بلکه|پس|بنابراین|ولی|اما)(?!\w)"
        r"|但|所以|因此|故|而是",
        before,
        flags=re.IGNORECASE,
    )[-1]
    return bool(NEGATION.search(clause))


def folded(text: str) -> str:
    """A text for comparison: normalised, case and white space folded, without marks at its ends."""
    return " ".join(normalise(text).casefold().split()).strip(" .,;:!?\"'()[]{}。*")

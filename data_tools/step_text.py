"""A rendered answer cut where its steps end, so that every step has a last token of its own.

Each step is tokenized by itself, going on from the token before it: no token lies across the end of a step, whatever
the tokenizer would have made of the whole text. Spaces at a step's end go to the next step, because vocabularies put
them in front of a word; for steps that end in a line feed or a full stop, the tokens are then those of the whole text.
"""

from dataclasses import replace
from itertools import accumulate, pairwise

from data_tools.errors import DataError
from data_tools.render import Rendered
from data_tools.schema import Text
from data_tools.step_rows import LabelledSteps


def cut_steps(row: Rendered, separator: str = "") -> Rendered:
    """The row with one part a step, each of them "scored": its last token is what a label stands at.

    separator: text behind each step, which is part of it then. What follows the last step (the end of the turn) is
    left out, since nothing reads it. Raises DataError where the chat template does not print the answer as it is.
    """
    record = row.record
    completions = []
    for answer, parts, steps in zip(record.completions, row.completions, record.steps, strict=True):
        ((text, _),) = parts
        cuts = _places(text, answer, steps, row.mark)
        if cuts is None:
            problem = "the chat template does not print the answer as it is, so its steps are not found in the text"
            raise DataError(record.path, record.line, field="steps", problem=problem)
        completions.append(tuple((text[a:b] + separator, True) for a, b in pairwise([0, *cuts])))
    return replace(row, completions=tuple(completions))


def _places(text: str, answer: Text, steps: LabelledSteps, mark: str | None) -> list[int] | None:
    """Where each step ends in the rendered text, which may hold marks, trailing spaces left to the next step; None
    where the answer is not in it."""
    whole = answer if isinstance(answer, str) else answer[-1].content
    bare = text if mark is None else text.replace(mark, "")
    start, last = _find(bare, whole)
    if start is None:
        return None
    ends = [len(whole[begin:end].rstrip(" ")) + begin for begin, end in pairwise([0, *steps.ends])]
    places = [min(start + end, last) for end in ends]
    if mark is None:
        return places
    # (characters without marks up to here) for every character of the marked text
    before = list(accumulate((char != mark for char in text), initial=0))
    return [before.index(place) for place in places]


def _find(text: str, answer: str) -> tuple[int | None, int]:
    """Where the answer begins in the text (before it, where a template drops white space in front) and where it ends.

    Templates print more around it: an empty <think> block, the end of the turn. Many take white space off its ends.
    """
    for wanted in (answer, answer.rstrip(), answer.strip()):
        at = 0 if text.startswith(wanted) else text.find(wanted)
        if at >= 0:
            dropped = answer.find(wanted)
            return at - dropped, at + len(wanted)
    return None, 0

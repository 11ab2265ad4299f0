"""Checked rows to token ids: a `Group` is one prompt and its completions, with the spans that are scored."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from data_tools.errors import UserError

OVERLONG = ("drop", "truncate_prompt_left", "truncate_completion")


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """One prompt and its completions as tokens, the unit that training works on.

    ids: (T,) int32, the prompt's tokens, then each completion's.
    lengths: tokens of branch 0 (the prompt; may be 0), branch 1, 2, ...; they sum to T.
    spans: per branch, half-open (start, end) token ranges that are scored, counted from the branch's own start.
    """

    record_id: str
    ids: np.ndarray
    lengths: tuple[int, ...]
    spans: tuple[tuple[tuple[int, int], ...], ...]
    weight: float = 1.0


@dataclass(frozen=True)
class EncodeOptions:
    """What decides how rows become groups, apart from the tokenizer and the template's text."""

    kind: Literal["pair", "sft"] = "pair"
    """Pairs (chosen, rejected) or one completion a row."""
    max_length: int | None = 1024
    """Tokens of the prompt and the longest completion together; None: no limit."""
    overlong: Literal["drop", "truncate_prompt_left", "truncate_completion"] = "drop"
    """What happens to a longer row."""
    chat_template: str | None = None
    """Path of a chat template that replaces the model's own."""

    def __post_init__(self) -> None:
        if self.kind not in ("pair", "sft"):
            raise UserError(f"kind = {self.kind!r}: must be pair or sft")
        if self.overlong not in OVERLONG:
            raise UserError(f"data.overlong = {self.overlong!r}: must be one of {', '.join(OVERLONG)}")
        if self.max_length is not None and self.max_length < 2:
            raise UserError(f"data.max_length = {self.max_length}: must be at least 2")


@dataclass
class EncodeReport:
    """What became of the rows; every count is in rows unless it says otherwise."""

    rows: int = 0
    kept: int = 0
    dropped_overlong: int = 0
    truncated_prompts: int = 0
    truncated_completions: int = 0
    """Completions (not rows) that lost their end."""
    no_bos_unscored: int = 0
    """Rows with an empty prompt: nothing predicts their first token, so it is not scored."""
    longest: int = 0
    """Tokens of the longest kept prompt with its longest completion."""
    dropped_ids: tuple[str, ...] = ()
    """Ids of the first dropped rows."""

    def lines(self) -> list[str]:
        """The counts as sentences for a log; what did not happen is left out."""
        out = [f"{self.kept} of {self.rows} rows kept, longest {self.longest} tokens"]
        if self.dropped_overlong:
            out.append(f"{self.dropped_overlong} over-long rows dropped, first: {', '.join(self.dropped_ids)}")
        if self.truncated_prompts:
            out.append(f"{self.truncated_prompts} prompts cut on the left")
        if self.truncated_completions:
            out.append(f"{self.truncated_completions} completions cut at the end: no end-of-turn token to train")
        if self.no_bos_unscored:
            out.append(f"{self.no_bos_unscored} rows have no prompt and no BOS: their first token is not scored")
        return out

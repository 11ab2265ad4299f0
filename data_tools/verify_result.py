"""What a verifier says about one answer. The verifiers are in `verify_option`, `verify_number` and `verify_code`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

VerdictName = Literal["correct", "wrong", "invalid"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """`correct`, `wrong`, or `invalid`: no single answer could be read, which is not the same as a wrong one.

    extracted: the answer as read (an option's label, a number, a program), None when there is none.
    why: one line for a person. details: what a verifier adds (unit tests: limit, sandbox, output).
    """

    verdict: VerdictName
    extracted: str | None
    why: str
    details: Mapping[str, object] = field(default_factory=dict)


def invalid(why: str) -> Verdict:
    """An answer that could not be read."""
    return Verdict("invalid", None, why)

"""Warnings about how a run behaves, each given once: what preference training is known to do when it goes wrong."""

from dataclasses import dataclass, field

WINDOW = 20
"""Steps that a condition is averaged over before it is named."""
SOLVED_ACCURACY, SOLVED_LOSS = 0.99, 0.02
"""Beyond both, pairs teach nothing more."""


def is_solved(row: dict[str, float]) -> bool:
    """Of one step's metrics, or their means: preference pairs that the model tells apart with nearly no loss."""
    return row.get("rewards/accuracies", 0.0) > SOLVED_ACCURACY and row["loss"] < SOLVED_LOSS


@dataclass
class Health:
    """Watches the rows of metrics; holds the first steps' means and the last steps' values."""

    beta: float | None = None
    """loss.beta where rewards compare with a reference (dpo); None: the first steps are the comparison."""
    _recent: list[dict[str, float]] = field(default_factory=list)
    _first: dict[str, float] | None = None
    _named: set[str] = field(default_factory=set)

    def check(self, row: dict[str, float]) -> list[str]:
        """Warnings that are new with this row."""
        self._recent = [*self._recent[-(WINDOW - 1) :], row]
        if len(self._recent) < WINDOW:
            return []
        means = {name: sum(r.get(name, 0.0) for r in self._recent) / WINDOW for name in row}
        if self._first is None:
            self._first = means
        return [text for key, text in self._conditions(means) if self._is_new(key)]

    def shown(self, row: dict[str, float]) -> list[str]:
        """Names of the metrics worth a place in the progress bar."""
        return [name for name in ("loss", "rewards/accuracies", "rewards/margins", "step_accuracy") if name in row]

    def _is_new(self, key: str) -> bool:
        new = key not in self._named
        self._named.add(key)
        return new

    def _conditions(self, means: dict[str, float]) -> list[tuple[str, str]]:
        found = []
        accuracy, fall = means.get("rewards/accuracies"), self._fall(means)
        if accuracy is not None and fall > 0.1:
            since = "the first steps" if self.beta is None else "the reference"
            remedy = "" if self.beta is None else "add sft to loss.loss_type, use apo_zero, "
            found.append((
                "falling",
                f"the chosen answers are {fall:.2f} nats a token less likely than with {since}: the margin grows by "
                f"pushing the rejected ones down further; {remedy}lower train.learning_rate or train less",
            ))  # fmt: skip
        if accuracy is not None and is_solved(means):
            found.append((
                "saturated",
                f"reward accuracy {accuracy:.2f} at loss {means['loss']:.4f}: the pairs are solved, or something "
                "besides content tells chosen from rejected (see the data lint); more steps teach nothing "
                "(a new run with train.stop_when_solved ends there)",
            ))  # fmt: skip
        if accuracy is not None and "lengths/chosen" in means:
            gap = means["lengths/chosen"] - means["lengths/rejected"]
            if abs(gap) > 0.5 * max(1.0, min(means["lengths/chosen"], means["lengths/rejected"])):
                longer = "longer" if gap > 0 else "shorter"
                remedy = "" if self.beta is None else "; try loss.loss_type sigmoid_norm or loss.ld_alpha"
                found.append((
                    "length",
                    f"chosen answers are {abs(gap):.0f} tokens {longer} than rejected on average: a model "
                    f"may learn that alone{remedy}",
                ))  # fmt: skip
        return found

    def _fall(self, means: dict[str, float]) -> float:
        """By how many nats a token the chosen answers have become less likely, about."""
        tokens = max(1.0, means.get("lengths/chosen", 1.0))
        if self.beta is not None:
            return -means["rewards/chosen"] / self.beta / tokens
        before = self._first.get("logps/chosen", 0.0) / max(1.0, self._first.get("lengths/chosen", 1.0))
        return before - means.get("logps/chosen", 0.0) / tokens

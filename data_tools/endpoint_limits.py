"""When the next request may be sent: rates a minute, and how long to wait before a request is tried again.

Pure arithmetic on times that are given; who waits is the business of `endpoint_client`.
"""

import random
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

MINUTE_S = 60.0
RETRIED = (408, 409, 425, 429)
"""Status codes below 500 that may pass: timeout, conflict, too early, too many requests."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How often and how long."""

    retries: int = 8
    """Tries after the first."""
    first_s: float = 0.5
    """Wait before the first retry; it doubles from there. Each wait is shortened by a random share of up to a half,
    so that clients that failed together do not come back together."""
    longest_s: float = 60.0
    longest_retry_after_s: float = 600.0
    """A server that asks for a longer pause is not waited for."""

    def wait_s(self, retry: int, retry_after: float | None, draw: random.Random) -> float:
        """Seconds before retry 0, 1, ...; at least what the server asked for (and up to a tenth more)."""
        own = min(self.first_s * 2.0 ** min(retry, 60), self.longest_s) * draw.uniform(0.5, 1.0)
        return own if retry_after is None else max(own, retry_after * draw.uniform(1.0, 1.1))


def is_retried(status: int) -> bool:
    """Whether a request answered with this status may be tried again."""
    return status in RETRIED or 500 <= status <= 599


def retry_after_s(headers: Mapping[str, str], now: datetime | None = None) -> float | None:
    """Seconds that a `Retry-After` header asks to wait: a number or an HTTP date (RFC 9110, 10.2.3); None without."""
    value = headers.get("retry-after", "").strip()
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            date = parsedate_to_datetime(value)
        except ValueError:
            return None
        date = date if date.tzinfo else date.replace(tzinfo=UTC)
        seconds = (date - (now or datetime.now(UTC))).total_seconds()
    return max(0.0, seconds) if seconds < float("inf") else None  # not NaN either


class Window:
    """At most `limit` units in any `period_s` seconds. A single amount above the limit is let through alone."""

    def __init__(self, limit: float, period_s: float = MINUTE_S) -> None:
        self.limit, self.period_s = limit, period_s
        self._spent: deque[list[float]] = deque()
        self._sum = 0.0

    def delay_s(self, now: float, amount: float) -> float:
        """Seconds to wait before `amount` may be spent; 0 if it may be now."""
        self._forget(now)
        over, wait = self._sum + amount - self.limit, 0.0
        for when, spent in self._spent:
            if over <= 0:
                break
            over -= spent
            wait = when + self.period_s - now
        return max(0.0, wait)

    def spend(self, now: float, amount: float) -> list[float]:
        """Count `amount`; what is returned may be given to `correct` once the true amount is known."""
        entry = [now, amount]
        self._spent.append(entry)
        self._sum += amount
        return entry

    def correct(self, entry: list[float], amount: float) -> None:
        """Replace an estimate, if it still counts."""
        if any(entry is kept for kept in self._spent):
            self._sum += amount - entry[1]
            entry[1] = amount

    def _forget(self, now: float) -> None:
        while self._spent and self._spent[0][0] + self.period_s <= now:
            self._sum -= self._spent.popleft()[1]
        if not self._spent:
            self._sum = 0.0

"""Runs killed at random instants end as undisturbed ones, bit for bit; `make test-long` does it fifty times."""

from pathlib import Path

import pytest
from fault_injection import inject


@pytest.mark.parametrize(
    ("ranks", "kills"),
    [(1, 4), pytest.param(1, 50, marks=pytest.mark.long), pytest.param(2, 50, marks=pytest.mark.long)],
)
def test_killed_at_random_instants(ranks: int, kills: int, tmp_path: Path) -> None:
    print(inject(tmp_path / "runs", kills=kills, ranks=ranks, seed=ranks))


def test_torchrun_starts_lost_workers_again_and_workers_end_without_it(tmp_path: Path) -> None:
    """Seed 12 kills one worker, which --max-restarts makes good, and then torchrun alone."""
    assert "2 kills (one worker 1, torchrun 1), 2 starts" in inject(tmp_path / "runs", kills=2, ranks=2, seed=12)

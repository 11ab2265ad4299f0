"""Runs killed at random instants end as undisturbed ones, bit for bit; `make test-long` does it fifty times."""

from pathlib import Path

import pytest
from fault_injection import inject


@pytest.mark.parametrize(
    ("ranks", "kills"),
    [(1, 4), (2, 2), pytest.param(1, 50, marks=pytest.mark.long), pytest.param(2, 50, marks=pytest.mark.long)],
)
def test_killed_at_random_instants(ranks: int, kills: int, tmp_path: Path) -> None:
    print(inject(tmp_path / "runs", kills=kills, ranks=ranks, seed=ranks))

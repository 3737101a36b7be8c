"""kill -9 at random moments, of workers, drivers or all at once: the same bytes in the end as without."""

import pytest
from torture import kills, scene


@pytest.mark.parametrize(
    ("seed", "n", "start"),
    [
        (1, 30, "fork"),
        pytest.param(2, 70, "fork", marks=pytest.mark.slow),
        pytest.param(3, 100, "fork", marks=pytest.mark.slow),
        pytest.param(4, 20, "spawn", marks=pytest.mark.slow),
    ],
)
def test_random_kills(seed, n, start):
    """Nothing lost, nothing doubled, nothing damaged, nothing computed again once it is stored."""
    with scene.workplace() as base:
        report = kills.run(base, seed, n, start=start)
    report.assert_sound()
    assert sum(report.counts.get(kind, 0) for kind in ("worker", "driver", "all")) == n

"""How long a durable call, and a constructor, waits before it is tried again."""

import pytest

from qserve.wire.call_record import Terms
from qserve_workers.replica.replica_process import pause_after


@pytest.mark.parametrize(("failures", "seconds"), [(1, 2), (2, 4), (5, 32), (9, 512), (10, 600), (1000, 600)])
def test_the_pause_before_a_retry_doubles_up_to_ten_minutes_and_is_spread(failures: int, seconds: float) -> None:
    pauses = {Terms(backoff_s=2.0).pause_ms(failures) for _ in range(200)}
    assert all(500 * seconds <= pause <= 1000 * seconds for pause in pauses)
    assert max(pauses) - min(pauses) > 200 * seconds


@pytest.mark.parametrize(("failures", "seconds"), [(1, 0.1), (2, 0.2), (7, 6.4), (8, 10), (100_000, 10)])
def test_the_pause_after_failed_constructors_doubles_up_to_ten_seconds(failures: int, seconds: float) -> None:
    assert pause_after(failures) == pytest.approx(seconds)

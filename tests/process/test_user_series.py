"""Metrics of user code in Redis: bounded, whatever replicas have counted."""

import redis

from qserve.broker.history.totals import MOST_SERIES, UserSeries, add_series, add_totals, read_totals
from qserve.broker.keys import Keys


def totals(client: "redis.Redis", keys: Keys) -> dict[str, int]:
    [found] = read_totals(client, keys, ["Model"])
    return found


def series(metric: str, first: int, past: int) -> list[UserSeries]:
    return [UserSeries(metric, {f"user {metric} {n} sum": 5, f"user {metric} {n} 3": 1}) for n in range(first, past)]


def test_replicas_that_come_and_go_cannot_fill_redis(redis_client: "redis.Redis", keys: Keys) -> None:
    """Each has a thousand of its own; those that there are go on being counted, whole."""
    add_totals(redis_client, keys, "Model", {"ends done": 3})
    assert add_series(redis_client, keys, "Model", series("endless", 0, MOST_SERIES)) == 0
    assert add_series(redis_client, keys, "Model", series("endless", 900, 1900)) == 900
    assert add_series(redis_client, keys, "Model", series("other", 0, 1)) == 0

    found = totals(redis_client, keys)
    assert sum(field.startswith("user endless") for field in found) == 2 * MOST_SERIES
    assert [found[f"user endless {n} sum"] for n in (0, 899, 900, 999)] == [5, 5, 10, 10]
    assert found["user other 0 3"] == 1
    assert found["user_metrics dropped"] == 900
    assert found["ends done"] == 3


def test_many_metrics_cannot_fill_redis_either(redis_client: "redis.Redis", keys: Keys) -> None:
    dropped = [add_series(redis_client, keys, "Model", series(f"m{n}", 0, 1000)) for n in range(12)]
    assert dropped[:9] == [0] * 9
    assert dropped[10:] == [1000, 1000]
    assert len(totals(redis_client, keys)) <= 20_002


def test_a_sum_that_is_too_large_begins_anew(redis_client: "redis.Redis", keys: Keys) -> None:
    """What comes behind it is counted all the same."""
    bytes_read, other = UserSeries("bytes", {"user bytes": 2**62}), UserSeries("other", {"user other": 1})
    for _ in range(3):
        assert add_series(redis_client, keys, "Model", [bytes_read, other]) == 0
    assert (totals(redis_client, keys)["user bytes"], totals(redis_client, keys)["user other"]) == (2**62, 3)
    add_series(redis_client, keys, "Model", [UserSeries("bytes", {"user bytes": 2**80}), other])
    add_series(redis_client, keys, "Model", [bytes_read])
    assert (totals(redis_client, keys)["user bytes"], totals(redis_client, keys)["user other"]) == (2**62, 4)

"""Metrics of user code: what they count, and how they are shown."""

import logging
import math
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from prometheus_client import generate_latest
from prometheus_client.openmetrics import exposition
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from prometheus_client.registry import Collector, CollectorRegistry

from qserve.broker.history.totals import MOST_SERIES
from qserve.serve import metrics
from qserve.telemetry import user_metrics
from qserve.telemetry.user_metrics import MICRO, current_gauges, take_counts
from qserve_gateway.admin.metrics_of_users import UserMetrics
from tests.support.waiting import joined


@pytest.fixture(autouse=True)
def _nothing_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(user_metrics, "_registry", type(user_metrics._registry)())


def counted() -> dict[str, int]:
    """As Redis adds it up."""
    return {field: count for series in take_counts()[0] for field, count in series.fields.items()}


def registry_of(collected: UserMetrics) -> CollectorRegistry:
    class Users(Collector):
        def collect(self) -> Iterator[object]:  # type: ignore[override]
            return collected.families()

    registry = CollectorRegistry()
    registry.register(Users())
    return registry


def shown(collected: UserMetrics) -> list[str]:
    lines = generate_latest(registry_of(collected)).decode().splitlines()
    return [line for line in lines if not line.startswith("#")]


def test_what_is_counted_is_shown_with_its_tags_and_its_deployment() -> None:
    counter = metrics.Counter("odd_requests", description="Every second one.", tag_keys=("model",))
    counter.set_default_tags({"model": "a"})
    counter.inc()
    counter.inc(0.5)
    counter.inc(tags={"model": 'b"\n'})
    seconds = metrics.Histogram("load_seconds", boundaries=[0.1, 1])
    for value in (0.05, 0.1, 0.5, 7):
        seconds.observe(value)

    collected = UserMetrics()
    first = counted()
    collected.add_totals("Model", {**first, "ends done": 3})
    assert take_counts() == ([], 0)
    assert sorted(shown(collected)) == sorted(
        [
            'odd_requests_total{deployment="Model",model="a"} 1.5',
            'odd_requests_total{deployment="Model",model="b\\"\\n"} 1.0',
            'load_seconds_bucket{deployment="Model",le="0.1"} 2.0',
            'load_seconds_bucket{deployment="Model",le="1.0"} 3.0',
            'load_seconds_bucket{deployment="Model",le="+Inf"} 4.0',
            'load_seconds_count{deployment="Model"} 4.0',
            'load_seconds_sum{deployment="Model"} 7.65',
        ]
    )


def test_gauges_are_those_of_each_replica() -> None:
    metrics.Gauge("loaded_models", tag_keys=("kind",)).set(3, tags={"kind": "x"})
    collected = UserMetrics()
    for replica in ("Model#1", "Model#2"):
        collected.add_gauges("Model", replica, current_gauges())
    assert 'loaded_models{deployment="Model",kind="x",replica="Model#2"} 3.0' in shown(collected)
    assert len(shown(collected)) == 2


def test_of_two_metrics_of_one_name_the_first_is_shown() -> None:
    metrics.Counter("things", tag_keys=("a",)).inc(tags={"a": "1"})
    mine = counted()
    metrics.Counter("things").inc()
    collected = UserMetrics()
    collected.add_totals("One", mine)
    collected.add_totals("Two", counted())
    assert shown(collected) == ['things_total{a="1",deployment="One"} 1.0']


def test_metrics_that_differ_in_their_description_are_one() -> None:
    """As after a deploy that has changed it."""
    collected, totals = UserMetrics(), dict[str, int]()
    for description in ("before", "after"):
        metrics.Counter("things", description).inc()
        metrics.Histogram("sizes", description, boundaries=[1]).observe(0.5)
        totals |= counted()
    collected.add_totals("One", totals)
    assert len(totals) == 6
    found = shown(collected)
    assert 'things_total{deployment="One"} 2.0' in found
    assert 'sizes_bucket{deployment="One",le="1.0"} 2.0' in found
    assert len(found) == 5


def all_of_one_replica() -> UserMetrics:
    """What was counted and set here, as that of the only replica of One."""
    collected = UserMetrics()
    collected.add_totals("One", counted())
    collected.add_gauges("One", "One#1", current_gauges())
    return collected


def test_no_two_samples_have_one_name() -> None:
    """Prometheus would refuse all metrics of the gateway."""
    metrics.Counter("things").inc()
    metrics.Counter("things_total").inc()
    metrics.Histogram("sizes", boundaries=[1]).observe(1)
    for name in ("things_total", "sizes_count", "free"):
        metrics.Gauge(name).set(1)
    collected = all_of_one_replica()
    names = [line.partition("{")[0] for line in shown(collected)]
    assert sorted(names) == ["free", "sizes_bucket", "sizes_bucket", "sizes_count", "sizes_sum", "things_total"]


def test_metrics_of_two_kinds_under_one_name_are_not_both_shown() -> None:
    """Whoever reads OpenMetrics would refuse all metrics of the gateway."""
    metrics.Counter("tasks").inc()
    metrics.Histogram("weights", boundaries=[1]).observe(1)
    for name in ("tasks", "weights", "free"):
        metrics.Gauge(name).set(1)
    collected = all_of_one_replica()
    text = exposition.generate_latest(registry_of(collected)).decode()  # type: ignore[no-untyped-call]
    families = text_string_to_metric_families(text)  # type: ignore[no-untyped-call]
    assert [family.name for family in families] == ["tasks", "free", "weights"]


def test_mistakes_are_told() -> None:
    with pytest.raises(ValueError, match="name 'my counter' is not possible"):
        metrics.Counter("my counter")
    with pytest.raises(ValueError, match="not 'qserve_' first"):
        metrics.Gauge("qserve_x")
    with pytest.raises(TypeError, match="tag_keys must be a tuple"):
        metrics.Counter("x", tag_keys="model")
    for key in ("le", "replica", "__name__"):
        with pytest.raises(ValueError, match="is not possible"):
            metrics.Gauge("x", tag_keys=(key,))
    with pytest.raises(ValueError, match="each larger than the one before"):
        metrics.Histogram("x", boundaries=[2, 1])
    counter = metrics.Counter("x", tag_keys=("model",))
    with pytest.raises(ValueError, match=r"Missing value for tag key\(s\): model"):
        counter.inc()
    with pytest.raises(ValueError, match="Unrecognized tag key 'other'"):
        counter.inc(tags={"other": "1"})
    with pytest.raises(ValueError, match="value must be >0"):
        counter.inc(-1, tags={"model": "1"})


def test_a_value_that_is_no_finite_number_fails_no_call_and_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    counter, seconds = metrics.Counter("things"), metrics.Histogram("load_seconds", boundaries=[1])
    for value in (math.nan, math.inf, -math.inf, 1e308, float(np.float32("nan"))):
        counter.inc(value)
        seconds.observe(value)
    assert take_counts() == ([], 10)
    assert [message.partition(",")[0] for message in caplog.messages] == [
        "The metric 'things' was given nan",
        "The metric 'load_seconds' was given nan",
    ]
    counter.inc(2)
    seconds.observe(0.5)
    assert sorted(counted().values()) == [1, MICRO / 2, 2 * MICRO]
    metrics.Gauge("loss").set(math.nan)
    assert str(current_gauges()) != "{}"


def test_a_tag_with_endless_values_fills_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """What else is counted goes on being counted, and a histogram is whole or not there."""
    endless = metrics.Histogram("endless", boundaries=[1, 2], tag_keys=("user",))
    users = metrics.Gauge("users", tag_keys=("user",))
    for number in range(100_000):
        endless.observe(1.5, tags={"user": str(number)})
    for number in range(1_100):
        users.set(1, tags={"user": str(number)})
    for value in (0.5, 7):
        endless.observe(value, tags={"user": "0"})
    metrics.Counter("things").inc()
    series, dropped = take_counts()
    assert len(series) == 1_001
    assert list(series[0].fields.values()) == [9_000_000, 1, 1, 1]
    assert dropped == 99_000 + 100
    assert len(current_gauges()) == 1_000
    assert len(caplog.messages) == 2
    assert caplog.messages[0].startswith("The metric 'endless' has more than 1,000 combinations of tags: further ones")

    endless.observe(1, tags={"user": "0"})
    endless.observe(1, tags={"user": "1000000"})
    assert take_counts()[1] == 1
    assert len(caplog.messages) == 2


def test_endless_names_fill_nothing(caplog: pytest.LogCaptureFixture) -> None:
    for number in range(6_000):
        metrics.Counter(f"of_{number}").inc()
    series, dropped = take_counts()
    assert (len(series), dropped) == (5_000, 1_000)
    assert len(caplog.messages) == 1


def test_long_and_broken_values_of_tags_are_shown_as_far_as_they_can_be() -> None:
    counter = metrics.Counter("files", tag_keys=("name",))
    counter.inc(tags={"name": "x" * 1_000_000})
    counter.inc(tags={"name": "caf\udce9"})
    collected = UserMetrics()
    collected.add_totals("One", counted())
    assert shown(collected) == [
        f'files_total{{deployment="One",name="{"x" * 199}…"}} 1.0',
        'files_total{deployment="One",name="caf?"} 1.0',
    ]


def test_what_is_counted_while_something_is_counted_counts_too() -> None:
    requests = metrics.Counter("requests", tag_keys=("path",))
    warnings = metrics.Counter("warnings")

    class Counting(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            warnings.inc()

    def count() -> None:
        for number in range(MOST_SERIES + 1):
            requests.inc(tags={"path": str(number)})

    handler = Counting()
    user_metrics.logger.addHandler(handler)
    try:
        thread = threading.Thread(target=count, daemon=True)
        thread.start()
        joined(thread)
    finally:
        user_metrics.logger.removeHandler(handler)
    assert sum(counted().values()) == (MOST_SERIES + 1) * user_metrics.MICRO

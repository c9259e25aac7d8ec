"""Metrics: how counts become histograms, and traced requests exemplars."""

from collections import Counter
from types import SimpleNamespace
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.openmetrics.exposition import generate_latest

from qserve.broker.history.buckets import BOUNDS_MS
from qserve.broker.keys import Keys
from qserve.settings import Settings
from qserve_gateway.admin.instance_metrics import _Counts
from qserve_gateway.admin.metrics import _GatewayCollector
from qserve_gateway.door.limits import Door
from qserve_gateway.door.request_counts import RequestCounts, Series
from qserve_workers.calls.call_counts import CallCounts


def test_a_traced_request_is_an_exemplar_of_its_bucket() -> None:
    door, client = Door(Settings()), SimpleNamespace(tally=Counter[str](), pending=0, all=list)
    door.counts.count("Echo", 200, 0.003)
    door.counts.count("Echo", 200, 0.004, "abc")
    door.counts.count("Echo", 503, 9.0, "def")
    registry = CollectorRegistry()
    registry.register(_GatewayCollector(door, client))  # type: ignore[arg-type]
    lines = generate_latest(registry).decode().splitlines()  # type: ignore[no-untyped-call]
    traced = [line.split(" # ") for line in lines if " # {" in line]
    assert [(bucket, exemplar.split()[:2]) for bucket, exemplar in traced] == [
        (
            'qserve_http_request_duration_seconds_bucket{deployment="Echo",le="0.005"} 2.0',
            ['{trace_id="abc"}', "0.004"],
        ),
        ('qserve_http_request_duration_seconds_bucket{deployment="Echo",le="10.0"} 3.0', ['{trace_id="def"}', "9.0"]),
    ]


def test_a_deployment_may_have_its_first_response_while_somebody_looks() -> None:
    """Metrics are read on a thread, and requests counted by the event loop."""
    counts = RequestCounts()

    class Watched(str):
        """A name that tells when it is looked at."""

        __slots__ = ()

        def __hash__(self) -> int:
            counts.series.setdefault(("New", 2), Series())
            return super().__hash__()

    counts.series[(Watched("Old"), 2)] = Series()
    counts.series.pop(("New", 2))
    assert counts.latencies().keys() >= {"Old"}
    assert ("New", 2) in counts.series


def test_times_become_a_histogram_of_seconds() -> None:
    counts = _Counts({"run 0": 1, "run 6": 2, "run 42": 3, "run 43": 4, "run_us all": 5, "wait 1": 9})
    found: dict[str, Any] = dict(counts.times("run"))
    assert found["+Inf"] == 10
    assert found["0.0001"] == 1
    assert found["0.000316"] == 1
    assert found["0.001"] == 3
    assert list(found.values())[-2] == 6
    assert len(found) == (len(BOUNDS_MS) + 2) // 3 + 1
    assert counts.of("run_us") == {"all": 5}


def test_batches_become_a_histogram_of_sizes() -> None:
    buckets, calls = _Counts({"batch 1": 5, "batch 3": 2, "batch 4": 1}).sizes()
    assert buckets[:3] == [("1", 5), ("2", 5), ("4", 8)]
    assert buckets[-1] == ("+Inf", 8)
    assert calls == 15


def test_a_sum_never_falls() -> None:
    """Prometheus would take it for a process that was started again."""
    counts = CallCounts(Keys("test"), "Echo", slow_s=1.0)
    counts.waits[0] = counts.runs[0] = 1
    counts.waited_ms, counts.ran_ms = -0.4, 0.2
    counts.take()
    assert (counts._totals["wait_us all"], counts._totals["run_us all"]) == (0, 200)

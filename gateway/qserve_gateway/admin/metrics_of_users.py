"""The metrics that user code has made, as Redis has them; see `qserve.telemetry.user_metrics`."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from qserve.telemetry.user_metrics import MICRO

_MARK = "user "


class UserMetrics:
    """Collects the metrics of all deployments. Where two have one name and are not alike, the first one counts."""

    def __init__(self) -> None:
        self._counters: dict[str, CounterMetricFamily] = {}
        self._gauges: dict[str, GaugeMetricFamily] = {}
        self._histograms: dict[str, HistogramMetricFamily] = {}
        self._labels: dict[str, tuple[str, ...]] = {}

    def add_totals(self, deployment: str, totals: Mapping[str, int]) -> None:
        """Add what replicas of a deployment have counted."""
        places: dict[str, dict[int | str, int]] = {}
        for field, count in totals.items():
            described = _described(field)
            if described is None:
                continue
            if described[0] == "histogram":
                *series, place = described
                places.setdefault(json.dumps(series), {})[place] = count
            else:
                _, name, text, tags = described
                if (labels := self._labels_of(name, tags, "counter")) is not None:
                    family = self._counters.setdefault(name, CounterMetricFamily(name, text, labels=labels))
                    family.add_metric([deployment, *tags.values()], count / MICRO)
        for described_as, counts in places.items():
            self._add_histogram(deployment, json.loads(described_as), counts)

    def add_gauges(self, deployment: str, replica: str, gauges: Mapping[str, float]) -> None:
        """Add the gauges of a replica."""
        for field, value in gauges.items():
            described = _described(field)
            if described is None:
                continue
            _, name, text, tags = described
            if (labels := self._labels_of(name, tags, "gauge", "replica")) is not None:
                family = self._gauges.setdefault(name, GaugeMetricFamily(name, text, labels=labels))
                family.add_metric([deployment, replica, *tags.values()], value)

    def families(self) -> Iterator[Metric]:
        """All of them."""
        yield from self._counters.values()
        yield from self._gauges.values()
        yield from self._histograms.values()

    def _labels_of(self, name: str, tags: Mapping[str, str], kind: str, *more: str) -> tuple[str, ...] | None:
        """The labels of a metric; None if another one has its name."""
        labels = ("deployment", *more, *tags)
        return labels if self._labels.setdefault(name, (kind, *labels)) == (kind, *labels) else None

    def _add_histogram(self, deployment: str, series: list[Any], counts: Mapping[int | str, int]) -> None:
        _, name, text, tags, boundaries = series
        if (labels := self._labels_of(name, tags, f"histogram {boundaries}")) is None:
            return
        total, buckets = 0, list[tuple[str, float]]()
        for place, bound in enumerate([*boundaries, "+Inf"]):
            total += counts.get(place, 0)
            buckets.append((str(bound), float(total)))
        family = self._histograms.setdefault(name, HistogramMetricFamily(name, text, labels=labels))
        family.add_metric([deployment, *tags.values()], buckets, sum_value=counts.get("sum", 0) / MICRO)


def _described(field: str) -> list[Any] | None:
    """What a field says of its series; None if it is no metric of user code."""
    if field.startswith(_MARK):
        with contextlib.suppress(ValueError):
            described: list[Any] = json.loads(field.removeprefix(_MARK))
            return described
    return None

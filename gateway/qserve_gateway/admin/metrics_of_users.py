"""The metrics that user code has made, as Redis has them; see `qserve.telemetry.user_metrics`."""

import contextlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from qserve.telemetry.user_metrics import MICRO

_MARK = "user "
_SUFFIXES = {"counter": ("_total", "_created"), "gauge": ("",), "histogram": ("_bucket", "_count", "_sum", "_created")}
"""What stands behind the names of a metric's samples; OpenMetrics wants the names themselves to differ, too."""


class UserMetrics:
    """Collects the metrics of all deployments.

    Where two have one name and are not alike, or their samples would have one name, the first one counts. What differs
    only in its description is one metric.
    """

    def __init__(self) -> None:
        self._counters: dict[str, tuple[CounterMetricFamily, Counter[tuple[str, ...]]]] = {}
        self._gauges: dict[str, GaugeMetricFamily] = {}
        self._histograms: dict[str, HistogramMetricFamily] = {}
        self._labels: dict[tuple[str, str], tuple[str, ...]] = {}
        self._samples: dict[str, tuple[str, str]] = {}

    def add_totals(self, deployment: str, totals: Mapping[str, int]) -> None:
        """Add what replicas of a deployment have counted."""
        places: dict[str, Counter[int | str]] = {}
        texts: dict[str, str] = {}
        for field, count in totals.items():
            described = _described(field)
            if described is None:
                continue
            if described[0] == "histogram":
                _, name, text, *series, place = described
                texts.setdefault(name, text)
                places.setdefault(json.dumps([name, *series]), Counter())[place] += count
            else:
                _, name, text, tags = described
                name = name.removesuffix("_total")
                if (labels := self._labels_of(name, tags, "counter")) is not None:
                    made = self._counters.get(name)
                    if made is None:
                        made = self._counters[name] = (CounterMetricFamily(name, text, labels=labels), Counter())
                    made[1][(deployment, *tags.values())] += count
        for described_as, counts in places.items():
            name, *series = json.loads(described_as)
            self._add_histogram(deployment, name, texts[name], series, counts)

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
        for family, sums in self._counters.values():
            for labels, count in sums.items():
                family.add_metric(labels, count / MICRO)
            yield family
        yield from self._gauges.values()
        yield from self._histograms.values()

    def _labels_of(self, name: str, tags: Mapping[str, str], kind: str, *more: str) -> tuple[str, ...] | None:
        """The labels of a metric; None if another one has its name, or that of one of its samples."""
        labels, metric = ("deployment", *more, *tags), (kind, name)
        samples = {name, *(f"{name}{suffix}" for suffix in _SUFFIXES[kind.partition(" ")[0]])}
        if any(self._samples.setdefault(sample, metric) != metric for sample in samples):
            return None
        return labels if self._labels.setdefault(metric, labels) == labels else None

    def _add_histogram(
        self, deployment: str, name: str, text: str, series: list[Any], counts: Mapping[int | str, int]
    ) -> None:
        tags, boundaries = series
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

"""Metrics of user code, under Ray Serve's names: `from qserve.serve import metrics`.

They count in replicas. Every ten seconds what a replica has counted is added up in Redis, and the gateway's
`/-/metrics` shows it with a label `deployment`.
"""

import bisect
import json
import logging
import math
import re
import threading
from collections import Counter as Tally
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Final

from qserve.broker.history.totals import MOST_SERIES, UserSeries

logger = logging.getLogger(__name__)

MICRO: Final = 1_000_000
"""Sums are kept in whole millionths, because what is added up are whole numbers."""
_MOST_COUNTED: Final = 5_000
"""How many series of counters and histograms a process has in all."""
_MOST_GAUGES: Final = 1_000
"""The same for gauges, all of which a replica tells whenever one has changed."""
_MOST_TOLD: Final = 100
"""Of so many metrics the log says that they were given values that cannot be counted."""
_LONGEST_TAG: Final = 200
"""Values of tags that have more characters are cut."""
_TAKEN: Final = ("deployment", "replica", "le")
_is_name = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*").fullmatch


class _Room:
    """Which series there are: a bounded number, whatever values user code gives to tags."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._known: set[str] = set()
        self._of_metric: Tally[str] = Tally()
        self._told: set[str] = set()

    def is_for(self, metric: str, series: str) -> bool:
        """Whether a series is one of those that are counted."""
        if series in self._known:
            return True
        if self._of_metric[metric] >= MOST_SERIES:
            self._tell(metric, f"The metric {metric!r} has more than {MOST_SERIES:,} combinations of tags")
            return False
        if len(self._known) >= self._most:
            self._tell("", f"The metrics of this process have more than {self._most:,} combinations of tags together")
            return False
        self._known.add(series)
        self._of_metric[metric] += 1
        return True

    def _tell(self, metric: str, problem: str) -> None:
        """Say it once: `metric` is one of few, or of all that there are."""
        if metric not in self._told:
            self._told.add(metric)
            logger.warning(
                "%s: further ones are not counted. Tags are for what has few values, not for ids or texts of users. "
                "qserve_user_metrics_dropped_total says whether values are dropped.",
                problem,
            )


class _Registry:
    """What this process has counted since the last time that it was taken. Thread-safe."""

    def __init__(self) -> None:
        # Reentrant: the collector may run here, and a `__del__` that counts, or a handler that logs what is told here.
        self._lock = threading.RLock()
        self._counted: dict[str, UserSeries] = {}
        self._counted_room = _Room(_MOST_COUNTED)
        self._gauges: dict[str, float] = {}
        self._gauge_room = _Room(_MOST_GAUGES)
        self._told: set[str] = set()
        self._dropped = 0

    def add(self, metric: str, counts: Mapping[str, int]) -> None:
        """Add to the fields of a series, of which every value counts in the first one."""
        first = next(iter(counts))
        with self._lock:
            series = self._counted.get(first)
            if series is None:
                if not self._counted_room.is_for(metric, first):
                    self._dropped += 1
                    return
                series = self._counted.setdefault(first, UserSeries(metric, {}))
            fields = series.fields
            for field, count in counts.items():
                fields[field] = fields.get(field, 0) + count

    def drop(self, metric: str, value: float) -> None:
        """Count nothing for a value that no sum can take in, and say so once for each metric."""
        with self._lock:
            self._dropped += 1
            if metric in self._told or len(self._told) >= _MOST_TOLD:
                return
            self._told.add(metric)
        logger.warning(
            "The metric %r was given %r, which is no finite number: such values are not counted. "
            "qserve_user_metrics_dropped_total says whether values are dropped.",
            metric,
            value,
        )

    def set(self, metric: str, field: str, value: float) -> None:
        with self._lock:
            if self._gauge_room.is_for(metric, field):
                self._gauges[field] = value
            else:
                self._dropped += 1

    def take(self) -> tuple[list[UserSeries], int]:
        with self._lock:
            counted, self._counted = list(self._counted.values()), {}
            dropped, self._dropped = self._dropped, 0
            return counted, dropped

    def gauges(self) -> dict[str, float]:
        with self._lock:
            return dict(self._gauges)


_registry: Final = _Registry()


def take_counts() -> tuple[list[UserSeries], int]:
    """What was counted since the last time, and how many values were dropped."""
    return _registry.take()


def current_gauges() -> dict[str, float]:
    """The value of every gauge of this process."""
    return _registry.gauges()


class _Metric:
    """What all kinds of metrics have in common.

    Args:
        name: Letters, digits, "_" and ":"; not beginning with "qserve_".
        description: What it says, for people.
        tag_keys: The tags that each value has.

    Raises:
        ValueError: The name is not possible.
    """

    _kind = ""
    _reserved: ClassVar[tuple[str, ...]] = ("qserve_",)

    def __init__(self, name: str, description: str = "", tag_keys: Sequence[str] | None = None) -> None:
        if _is_name(name) is None or name.startswith(self._reserved):
            raise ValueError(
                f"The metric's name {name!r} is not possible: letters, digits, '_' and ':', and not 'qserve_' first."
            )
        if isinstance(tag_keys, str):
            raise TypeError(f"tag_keys must be a tuple of strings, as in ({tag_keys!r},).")
        self._name = name
        self._head = [self._kind, name, description]
        self._tag_keys = tuple(tag_keys or ())
        self._default_tags: dict[str, str] = {}
        self._check(dict.fromkeys(self._tag_keys, ""))

    @property
    def info(self) -> dict[str, Any]:
        """Its name, description, and tags."""
        return {
            "name": self._name,
            "description": self._head[2],
            "tag_keys": self._tag_keys,
            "default_tags": self._default_tags,
        }

    def set_default_tags(self, default_tags: Mapping[str, str]) -> None:
        """The tags of values that are not given any.

        Raises:
            ValueError: One is not among `tag_keys`.
        """
        self._check(default_tags)
        self._default_tags = dict(default_tags)

    def _check(self, tags: Mapping[str, str]) -> None:
        for key in tags:
            if key not in self._tag_keys:
                raise ValueError(f"Unrecognized tag key {key!r}. The metric has {', '.join(self._tag_keys) or 'none'}.")
            if _is_name(key) is None or key in _TAKEN or key.startswith("__"):
                raise ValueError(f"The tag key {key!r} is not possible: {', '.join(_TAKEN)} have other meanings.")

    def _field(self, tags: Mapping[str, str] | None, *more: Any) -> str:
        """The name of a series in the totals of the deployment."""
        self._check(tags or {})
        given = {**self._default_tags, **(tags or {})}
        if missing := [key for key in self._tag_keys if key not in given]:
            raise ValueError(f"Missing value for tag key(s): {', '.join(missing)}.")
        return "user " + json.dumps(
            [*self._head, {key: _tag_value(given[key]) for key in sorted(given)}, *more], separators=(",", ":")
        )

    def _millionths(self, value: float) -> int | None:
        """A value as it is added up; None, for which the registry cares, where it cannot be."""
        try:
            return round(value * MICRO)
        except (ValueError, OverflowError):  # a measurement that went wrong is no reason to fail the call
            _registry.drop(self._name, value)
            return None


def _tag_value(given: object) -> str:
    text = str(given)
    if len(text) > _LONGEST_TAG:
        text = f"{text[: _LONGEST_TAG - 1]}…"
    # Half a surrogate pair, as in the names of some files, can be shown nowhere.
    return text if text.isascii() else text.encode(errors="replace").decode()


class Counter(_Metric):
    """A number that only grows."""

    _kind = "counter"

    def inc(self, value: float = 1.0, tags: Mapping[str, str] | None = None) -> None:
        """Add to it. What is no finite number is not counted.

        Raises:
            ValueError: The value is not positive, or tags are missing or unknown.
        """
        if -math.inf < value <= 0:
            raise ValueError(f"value must be >0, got {value}")
        field, millionths = self._field(tags), self._millionths(value)
        if millionths is not None:
            _registry.add(self._name, {field: millionths})


class OwnCounter(Counter):
    """A number of qserve's own that only grows and is counted where user code runs."""

    _reserved = ()

    def __init__(self, name: str, description: str) -> None:
        super().__init__(name, description)
        self._untagged = self._field(None)

    def count(self) -> None:
        """Add one to it."""
        _registry.add(self._name, {self._untagged: MICRO})


class Gauge(_Metric):
    """A number that goes up and down; each replica has its own."""

    _kind = "gauge"

    def set(self, value: float, tags: Mapping[str, str] | None = None) -> None:
        """Give it a value.

        Raises:
            ValueError: Tags are missing or unknown.
        """
        _registry.set(self._name, self._field(tags), float(value))


class Histogram(_Metric):
    """How many values are how large.

    Args:
        boundaries: Upper bounds of its buckets, rising.

    Raises:
        ValueError: The name or the boundaries are not possible.
    """

    _kind = "histogram"

    def __init__(
        self,
        name: str,
        description: str = "",
        boundaries: Sequence[float] | None = None,
        tag_keys: Sequence[str] | None = None,
    ) -> None:
        super().__init__(name, description, tag_keys)
        self._boundaries = [float(each) for each in boundaries or ()]
        if not self._boundaries or sorted(set(self._boundaries)) != self._boundaries or self._boundaries[0] <= 0:
            raise ValueError("boundaries must be numbers above 0, each larger than the one before.")

    def observe(self, value: float, tags: Mapping[str, str] | None = None) -> None:
        """Count a value. What is no finite number is not counted.

        Raises:
            ValueError: Tags are missing or unknown.
        """
        place = bisect.bisect_left(self._boundaries, value)
        total, millionths = self._field(tags, self._boundaries, "sum"), self._millionths(value)
        if millionths is not None:
            _registry.add(self._name, {total: millionths, self._field(tags, self._boundaries, place): 1})

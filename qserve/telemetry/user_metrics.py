"""Metrics of user code, under Ray Serve's names: `from qserve.serve import metrics`.

They count in replicas. Every ten seconds what a replica has counted is added up in Redis, and the gateway's
`/-/metrics` shows it with a label `deployment`.
"""

import bisect
import json
import logging
import re
import threading
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Final

logger = logging.getLogger(__name__)

MICRO: Final = 1_000_000
"""Sums are kept in whole millionths, because what is added up are whole numbers."""
_MOST_SERIES: Final = 1_000
"""How many combinations of tags a process has; others are not counted."""
_TAKEN: Final = ("deployment", "replica", "le")
_is_name = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*").fullmatch


class _Registry:
    """What this process has counted since the last time that it was taken. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, int] = {}
        self._gauges: dict[str, float] = {}
        self._known: set[str] = set()

    def add(self, counts: Mapping[str, int]) -> None:
        with self._lock:
            for field, count in counts.items():
                if self._has_room_for(field):
                    self._counts[field] = self._counts.get(field, 0) + count

    def set(self, field: str, value: float) -> None:
        with self._lock:
            if self._has_room_for(field):
                self._gauges[field] = value

    def take(self) -> dict[str, int]:
        with self._lock:
            counts, self._counts = self._counts, {}
            return counts

    def gauges(self) -> dict[str, float]:
        with self._lock:
            return dict(self._gauges)

    def _has_room_for(self, field: str) -> bool:
        if field in self._known:
            return True
        if len(self._known) == _MOST_SERIES:
            self._known.add("")
            logger.warning("More than %d combinations of tags: further ones are not counted.", _MOST_SERIES)
        if len(self._known) > _MOST_SERIES:
            return False
        self._known.add(field)
        return True


_registry: Final = _Registry()


def take_counts() -> dict[str, int]:
    """What was counted since the last time, as fields of the totals of the deployment."""
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
        self._head = [self._kind, name, description]
        self._tag_keys = tuple(tag_keys or ())
        self._default_tags: dict[str, str] = {}
        self._check(dict.fromkeys(self._tag_keys, ""))

    @property
    def info(self) -> dict[str, Any]:
        """Its name, description, and tags."""
        _, name, description = self._head
        return {
            "name": name,
            "description": description,
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
            [*self._head, {key: str(given[key]) for key in sorted(given)}, *more], separators=(",", ":")
        )


class Counter(_Metric):
    """A number that only grows."""

    _kind = "counter"

    def inc(self, value: float = 1.0, tags: Mapping[str, str] | None = None) -> None:
        """Add to it.

        Raises:
            ValueError: The value is not positive, or tags are missing or unknown.
        """
        if value <= 0:
            raise ValueError(f"value must be >0, got {value}")
        _registry.add({self._field(tags): round(value * MICRO)})


class OwnCounter(Counter):
    """A number of qserve's own that only grows and is counted where user code runs."""

    _reserved = ()

    def __init__(self, name: str, description: str) -> None:
        super().__init__(name, description)
        self._untagged = self._field(None)

    def count(self) -> None:
        """Add one to it."""
        _registry.add({self._untagged: MICRO})


class Gauge(_Metric):
    """A number that goes up and down; each replica has its own."""

    _kind = "gauge"

    def set(self, value: float, tags: Mapping[str, str] | None = None) -> None:
        """Give it a value.

        Raises:
            ValueError: Tags are missing or unknown.
        """
        _registry.set(self._field(tags), float(value))


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
        """Count a value.

        Raises:
            ValueError: Tags are missing or unknown.
        """
        place = bisect.bisect_left(self._boundaries, value)
        counted = self._field(tags, self._boundaries, place)
        _registry.add({counted: 1, self._field(tags, self._boundaries, "sum"): round(value * MICRO)})

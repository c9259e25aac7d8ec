"""The times of schedules: the five fields of cron, or a number of seconds."""

import itertools
import math
import re
import zoneinfo
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta, tzinfo
from typing import NamedTuple

_FIELDS = (("minute", 0, 59), ("hour", 0, 23), ("day", 1, 31), ("month", 1, 12), ("weekday", 0, 7))
_JANUARY_ON = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_SUNDAY_ON = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
_NAMES = {name: str(number) for number, name in (*enumerate(_JANUARY_ON, 1), *enumerate(_SUNDAY_ON))}
_every = re.compile(r"every\s+(\d+(?:\.\d+)?)\s*(s|m|h)").fullmatch
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}
_DAYS_AHEAD = 366 * 8 + 2
"""The 29th of February may be eight years away."""
_LONGEST_S = _DAYS_AHEAD * 86_400.0
_ROUNDED_OFF_MS = 0.001
"""More than a Unix time of today loses as a float."""
_WINDOWS_S = (60.0, 3600.0, 86_400.0, 31 * 86_400.0, 366 * 86_400.0, _LONGEST_S)


class When(NamedTuple):
    """The moments at which a schedule is due.

    Attributes:
        every_s: Seconds from one moment to the next, counted from 1970 so that all processes agree; 0: see `fields`.
        fields: Minutes, hours, days, months and weekdays (Sunday is 0).
        any_day: A day matches if its date or its weekday does, because both are restricted.
    """

    every_s: float
    fields: tuple[frozenset[int], ...] = ()
    any_day: bool = False
    zone: tzinfo = UTC

    def next_after(self, moment: float) -> float:
        """The first moment after a Unix time; infinity if there is none.

        A time that the clocks skip counts as the one that is as much later as they go forward, one that they repeat
        counts once.
        """
        if self.every_s:
            return self._multiple(moment, 1)
        day = datetime.fromtimestamp(moment, self.zone).replace(hour=0, minute=0, second=0, microsecond=0, fold=0)
        yesterday = day - timedelta(days=1)
        late = self._first_on(yesterday, moment) if yesterday.utcoffset() != day.utcoffset() else math.inf
        for _ in range(_DAYS_AHEAD):
            if (found := min(late, self._first_on(day, moment))) < math.inf:
                return found
            day += timedelta(days=1)
        return math.inf

    def last_between(self, after: float, until: float) -> float | None:
        """The last moment after one Unix time and not after another; None if there is none."""
        if self.every_s:
            last = self._multiple(until)
            return last if last > after else None
        for window in _WINDOWS_S:
            found = self.next_after(max(after, until - window))
            if found <= until:
                while (following := self.next_after(found)) <= until:
                    found = following
                return found
            if after >= until - window:
                return None
        return None

    def _multiple(self, moment: float, more: int = 0) -> float:
        """The last multiple of the interval that is not after a Unix time, or one of the next ones.

        In whole milliseconds, as what was submitted last is kept: else a moment could seem to come after itself.
        """
        every_ms = round(self.every_s * 1000)
        return (math.floor(moment * 1000 + _ROUNDED_OFF_MS) // every_ms + more) * every_ms / 1000

    def _first_on(self, day: datetime, moment: float) -> float:
        """The first moment of a day after a Unix time; where clocks are changed, it may come on the next day."""
        if not self._is_day(day):
            return math.inf
        times = itertools.product(sorted(self.fields[1]), sorted(self.fields[0]))
        moments = (day.replace(hour=hour, minute=minute).timestamp() for hour, minute in times)
        following = (found for found in moments if found > moment)
        if day.utcoffset() == (day + timedelta(days=1)).utcoffset():
            return next(following, math.inf)
        return min(following, default=math.inf)  # a skipped time may come after a later one

    def _is_day(self, day: datetime) -> bool:
        _, _, days, months, weekdays = self.fields
        by_day, by_weekday = day.day in days, day.isoweekday() % 7 in weekdays
        return day.month in months and (by_day or by_weekday if self.any_day else by_day and by_weekday)


def parse_when(text: str) -> When:
    """Parse the time of a schedule.

    Args:
        text: "every 30s" (s, m or h); or cron's five fields, with a time zone after them if it is not UTC.

    Raises:
        ValueError: The text cannot be understood, or no moment matches it.
    """
    if match := _every(text.strip()):
        seconds = float(match[1]) * _SECONDS[match[2]]
        if seconds < 1:
            raise ValueError(f"{text!r}: the shortest interval is one second")
        if seconds > _LONGEST_S:
            raise ValueError(f"{text!r}: the longest interval is {_DAYS_AHEAD} days")
        return When(seconds)
    parts = text.split()
    if len(parts) not in (5, 6):
        raise ValueError(
            f"{text!r} is not a schedule: write 'every 30s', or 'minute hour day month weekday' as for cron"
        )
    try:
        zone = zoneinfo.ZoneInfo(parts[5]) if len(parts) > 5 else UTC
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError) as exc:
        raise ValueError(f"{text!r}: there is no time zone {parts[5]!r} here") from exc
    minutes, hours, days, months, weekdays = (
        _parse_field(text, part, *field) for part, field in zip(parts, _FIELDS, strict=False)
    )
    weekdays = frozenset(day % 7 for day in weekdays)
    any_day = not parts[2].startswith("*") and not parts[4].startswith("*")
    when = When(0.0, (minutes, hours, days, months, weekdays), any_day, zone)
    if when.next_after(0.0) == math.inf:
        raise ValueError(f"{text!r} describes a time that never comes")
    return when


def _parse_field(text: str, part: str, name: str, least: int, most: int) -> frozenset[int]:
    found: set[int] = set()
    for piece in part.lower().split(","):
        span, _, step = piece.partition("/")
        try:
            first, last = (least, most) if span == "*" else _span(span, step, most)
            every = int(step) if step or "/" in piece else 1
        except ValueError as exc:
            raise ValueError(f"{text!r}: {piece!r} cannot be the {name}") from exc
        if not (least <= first <= last <= most and every > 0):
            raise ValueError(f"{text!r}: the {name} must be {least} to {most}, not {piece!r}")
        found.update(range(first, last + 1, every))
    return frozenset(found)


def _span(span: str, step: str, most: int) -> Sequence[int]:
    first, dash, last = span.partition("-")
    return _number(first), _number(last) if dash else most if step else _number(first)


def _number(text: str) -> int:
    return int(_NAMES.get(text, text))

"""Redis' clock, estimated without trusting this host's wall clock."""

import time

from qserve.broker.connection import Connection

_JUMP_MS = 1000.0
SAMPLE_EVERY_S = 2.0
"""Often enough to notice a clock that jumps forward and soon back again: what stood in inboxes has expired then."""


class RedisClock:
    """How old an entry is, by Redis' own clock.

    When that clock jumps, entries from before the jump have no age any more: they are never called expired, and the
    caller's own timer decides.

    Attributes:
        round_trip_s: How long the last question took.
    """

    def __init__(self) -> None:
        self._offset_ms: float | None = None
        self._trusted_from_ms = 0.0
        self.round_trip_s = 0.0

    async def sample(self, connection: Connection) -> bool:
        """Compare the clocks once; returns whether that of Redis has jumped."""
        before = time.monotonic()
        seconds, microseconds = await connection.call("TIME")
        after = time.monotonic()
        self.round_trip_s = after - before
        redis_ms = int(seconds) * 1000 + int(microseconds) / 1000
        offset_ms = redis_ms - (before + after) / 2 * 1000
        known = offset_ms if self._offset_ms is None else self._offset_ms
        has_jumped = abs(offset_ms - known) > _JUMP_MS + (after - before) * 1000
        if has_jumped:
            self._trusted_from_ms = redis_ms
        self._offset_ms = offset_ms
        return has_jumped

    def at_ms(self, moment: float) -> int:
        """What Redis' clock shows when the monotonic clock shows `moment`; 0 where that cannot be known."""
        return 0 if self._offset_ms is None else int(moment * 1000 + self._offset_ms)

    def age_ms(self, entry_time_ms: int) -> float:
        """Milliseconds since an entry was put; 0 where that cannot be known."""
        if self._offset_ms is None or entry_time_ms < self._trusted_from_ms:
            return 0.0
        return time.monotonic() * 1000 + self._offset_ms - entry_time_ms

"""Replicas that come up and die at once, again and again: their successors wait, as those of failed constructors do."""

from typing import Final

from qserve_workers.pool.crew import TrackedReplica

_GOOD_RUN_S: Final = 10.0
"""A replica that was up for so long has not died at once."""
_AT_ONCE: Final = 3
"""For each replica there is to be, so many are replaced without a pause: a call that kills is given to three."""


class CrashLoop:
    """Counts replicas that died, or fell ill, soon after they had come up and without having run a call to its end.

    One that has run calls was of use, and its successor will be, too: it may have died of its last call.
    """

    def __init__(self) -> None:
        self._in_a_row = 0

    def note(self, replica: TrackedReplica, now: float) -> None:
        """A replica that was up, and was not told to leave, is to be replaced."""
        if replica.up_since is None or replica.leaving:
            return
        was_of_use = replica.handled > 0 or now - replica.up_since > _GOOD_RUN_S
        self._in_a_row = 0 if was_of_use else self._in_a_row + 1

    def failures(self, wanted: int) -> int:
        """As many failed constructors would make the next replica wait as it is to wait now."""
        return max(0, self._in_a_row - _AT_ONCE * wanted)

"""How many connections this process can have, by the number of files that it may open."""

import logging
import resource
from typing import Final

logger = logging.getLogger(__name__)

_OTHERS: Final = 60
"""Files beside connections of clients: those to Redis, memory that is shared, the admin listener, the console."""
_FOR_REFUSED: Final = 4
"""A part of the files in so many is for connections that are one too many, until they have had their answer."""


def possible_connections(wanted: int) -> int:
    """Have the limit of open files raised to what so many connections need, as far as that is allowed.

    Without room for a file a connection is reset, and nobody is told. So it is better to accept fewer.

    Returns:
        How many connections there can be.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted * _FOR_REFUSED // (_FOR_REFUSED - 1) + _OTHERS
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return wanted
    allowed = needed if hard == resource.RLIM_INFINITY else min(hard, needed)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    possible = max(1, min(wanted, (allowed - _OTHERS) * (_FOR_REFUSED - 1) // _FOR_REFUSED + 1))
    if possible < wanted:
        logger.warning(
            "This gateway may open %d files (`ulimit -n`), so it accepts %d connections instead of "
            "QSERVE_HTTP_MAX_CONNECTIONS=%d; more are answered with 503. Raise the limit (a unit of systemd has "
            "LimitNOFILE=), or start more gateways.",
            *(allowed, possible, wanted),
        )
    return possible

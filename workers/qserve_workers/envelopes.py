"""Keeps a Celery worker alive when there is something in its queues that is no message of Celery's.

kombu lets the error end the worker, and with it all of its replicas.
"""

import logging
from typing import Any

from kombu.transport import redis

logger = logging.getLogger(__name__)


class _Wary:
    def _brpop_read(self, **options: Any) -> Any:
        try:
            return super()._brpop_read(**options)  # type: ignore[misc]
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as exc:
            # It has left the list already; what was taken off before it could be read is gone.
            logger.warning("dropped what was no message in Celery's queue: %r", exc)
            return True


def drop_what_is_no_message() -> None:
    """Let every channel of this process drop what it cannot read."""
    for transport in (redis.Transport, redis.SentinelTransport):
        if not issubclass(transport.Channel, _Wary):
            wary: Any = type(transport.Channel.__name__, (_Wary, transport.Channel), {})
            transport.Channel = wary

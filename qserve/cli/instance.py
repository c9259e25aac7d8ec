"""Reaching the instance that a command is about."""

from collections.abc import Iterator
from contextlib import contextmanager

from qserve.doctor import require_usable
from qserve.local import find_settings
from qserve.messages import Signer
from qserve.state import State


@contextmanager
def connected() -> Iterator[State]:
    """The state of the instance, after a look at whether its server can be used.

    Raises:
        NoInstanceError: None runs on this machine, and none is named.
        BrokerUnavailable, ConfigurationError: Its server cannot be used.
    """
    settings = find_settings()
    state = State(settings.redis_url, settings.keys, Signer(settings.secrets))
    try:
        require_usable(state.redis)
        yield state
    finally:
        state.close()

"""Finding the instance that a command is about."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from qserve.errors import NoInstanceError
from qserve.settings import Settings

if TYPE_CHECKING:
    from qserve.state import State


def find_redis_url() -> str:
    """The URL from the option or environment, else that of the instance running on this machine.

    Raises:
        NoInstanceError: There is neither.
    """
    url = Settings().redis_url
    if not url:
        raise NoInstanceError(
            "No qserve instance is running on this machine. Start one with `qserve run MODULE`, or name the Redis "
            "server of another one with --redis-url or QSERVE_REDIS_URL."
        )
    return url


@contextmanager
def connected() -> Iterator["State"]:
    """The state of the instance, after a look at whether its server can be used."""
    from qserve.doctor import require_usable
    from qserve.messages import Signer
    from qserve.state import State

    settings = Settings()
    state = State(find_redis_url(), settings.keys, Signer(settings.secrets))
    try:
        require_usable(state.redis)
        yield state
    finally:
        state.close()

"""Translates what Redis and redis-py raise into our errors; theirs are not known outside of this folder."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from redis.exceptions import (
    AuthenticationError,
    ConnectionError,  # noqa: A004
    NoPermissionError,
    NoScriptError,
    OutOfMemoryError,
    RedisError,
    ResponseError,
    TimeoutError,  # noqa: A004
)

from qserve.broker.server.address import Broker, database_problem, tls_problem
from qserve.errors import BrokerUnavailable, ConfigurationError

if TYPE_CHECKING:
    import redis
    import redis.asyncio

_PASSING: Final = ("NOREPLICAS", "MISCONF", "UNBLOCKED", "BUSY ", "CLUSTERDOWN")
"""How errors begin that have nothing to do with the command."""
_MOVING: Final = ("TRYAGAIN", "ASK ", "UNBLOCKED the stream key no longer exists")
"""How errors begin that a cluster answers while it moves a slot key by key."""
_NOT_ALLOWED: Final = "ACL failure in script"
"""Stands in the error of a script that has tried what its user may not do."""


ASK_AGAIN_S: Final = 0.02
"""How soon a command goes out again that was refused because its keys are being moved one by one."""
MOVES_WITHIN_S: Final = 10.0
"""For how long that is done."""


class CommandRefused(ResponseError):
    """Redis has answered a command with an error, which is the text of this one."""


class NotTaken(BrokerUnavailable):
    """Redis has not carried a command out, because another server of its cluster has, or will have, the keys."""


def is_moving(answer: Exception) -> bool:
    """Whether a command was refused, and nothing done, because a cluster is moving its keys one by one."""
    return str(answer).startswith(_MOVING)


class StillMoving(NotTaken):
    """The same, and it takes too long to wait for."""


def refused(exc: Exception) -> str:
    """What to say where Redis does not let this process in, or does not let it do its work."""
    why = str(exc).rstrip(".")
    return (
        f"Redis refuses this process: {why}. Check user and password in QSERVE_REDIS_URL; "
        "`qserve redis-acl` prints what its user has to be allowed"
    )


def broker_of(client: "redis.Redis | redis.asyncio.Redis") -> Broker:
    """What a client of `qserve.broker.server.redis_clients` connects to."""
    broker: Broker = client.connection_pool.connection_kwargs["broker"]
    return broker


@contextlib.contextmanager
def our_errors(client: "redis.Redis | redis.asyncio.Redis") -> Iterator[None]:
    """Within the block, what Redis and redis-py raise becomes an error of ours.

    Raises:
        BrokerUnavailable: It cannot be reached, or does not take the command now.
        ConfigurationError: It refuses us, lacks our database, or the TLS options do not fit.
        CommandRefused: It refuses the command.
    """
    try:
        yield
    except NoScriptError:
        raise
    except (AuthenticationError, NoPermissionError) as exc:
        raise ConfigurationError(refused(exc)) from exc
    except OutOfMemoryError as exc:
        said = str(exc).rstrip(".")
        text = f"Redis has no memory left and refused the change: {said}. Raise its maxmemory, or delete what may go"
        raise BrokerUnavailable(text) from exc
    except (ConnectionError, TimeoutError, OSError) as exc:
        if problem := tls_problem(exc, broker_of(client).place):
            raise ConfigurationError(". ".join(problem)) from exc
        text = f"Redis cannot be reached: {str(exc).rstrip('.')}. Check that it runs, and what QSERVE_REDIS_URL says"
        raise BrokerUnavailable(text) from exc
    except RedisError as exc:
        if str(exc).startswith(_PASSING):
            raise BrokerUnavailable(f"Redis does not take this now: {exc}. Try again in a moment") from exc
        if _NOT_ALLOWED in str(exc):
            raise ConfigurationError(refused(exc)) from exc
        if problem := database_problem(exc, broker_of(client)):
            raise ConfigurationError(". ".join(problem)) from exc
        raise CommandRefused(str(exc)) from exc

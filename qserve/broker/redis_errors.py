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

from qserve.broker.server.address import Broker, tls_problem
from qserve.errors import BrokerUnavailable, ConfigurationError

if TYPE_CHECKING:
    import redis
    import redis.asyncio

_PASSING: Final = ("NOREPLICAS", "MISCONF", "UNBLOCKED", "BUSY ")
"""How errors begin that have nothing to do with the command."""


class CommandRefused(ResponseError):
    """Redis has answered a command with an error, which is the text of this one."""


def broker_of(client: "redis.Redis | redis.asyncio.Redis") -> Broker:
    """What a client of `qserve.broker.server.redis_clients` connects to."""
    broker: Broker = client.connection_pool.connection_kwargs["broker"]
    return broker


@contextlib.contextmanager
def our_errors(client: "redis.Redis | redis.asyncio.Redis") -> Iterator[None]:
    """Within the block, what Redis and redis-py raise becomes an error of ours.

    Raises:
        BrokerUnavailable: It cannot be reached, or does not take the command now.
        ConfigurationError: It refuses us, or the TLS options do not fit.
        CommandRefused: It refuses the command.
    """
    try:
        yield
    except NoScriptError:
        raise
    except (AuthenticationError, NoPermissionError) as exc:
        raise ConfigurationError(f"Redis refuses us: {exc}") from exc
    except OutOfMemoryError as exc:
        raise BrokerUnavailable(f"Redis has no memory left and refused the change: {exc}") from exc
    except (ConnectionError, TimeoutError, OSError) as exc:
        if problem := tls_problem(exc, broker_of(client).place):
            raise ConfigurationError(". ".join(problem)) from exc
        raise BrokerUnavailable(f"Redis cannot be reached: {exc}") from exc
    except RedisError as exc:
        if str(exc).startswith(_PASSING):
            raise BrokerUnavailable(f"Redis does not take this now: {exc}") from exc
        raise CommandRefused(str(exc)) from exc

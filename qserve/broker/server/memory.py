"""How much of their memory the servers of an instance use."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from redis.exceptions import RedisError

from qserve.broker.redis_errors import broker_of
from qserve.broker.server import redis_clients
from qserve.broker.server.address import host_and_port

if TYPE_CHECKING:
    from redis import Redis

_TIMEOUT_S = 2.0


class Memory(NamedTuple):
    """Of one server.

    Attributes:
        server: Its host and port, or socket.
        used: Bytes.
        limit: `maxmemory`, or all that its machine has where that is not set.
    """

    server: str
    used: int
    limit: int


def read_memory(redis: "Redis") -> Iterator[Memory]:
    """Ask the server, or every primary of a cluster; one that does not tell is left out."""
    broker = broker_of(redis)
    if not broker.nodes:
        yield from _read(redis, broker.place)
        return
    for address in redis_clients.primaries_of_cluster(broker, {})[0]:
        with redis_clients.client_at(broker, address, _TIMEOUT_S) as server:
            yield from _read(server, host_and_port(address))


def _read(redis: "Redis", server: str) -> Iterator[Memory]:
    try:
        info: dict[str, Any] = redis.info("memory")
    except (RedisError, OSError):
        return
    limit = int(info.get("maxmemory", 0)) or int(info.get("total_system_memory", 0))
    if "used_memory" in info and limit:
        yield Memory(server, int(info["used_memory"]), limit)

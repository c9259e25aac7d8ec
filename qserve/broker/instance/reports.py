"""What processes say of themselves: nodes, gateways, workers and replicas, each in a hash that everybody may read.

Reports are not signed, so nothing is decided by them alone.
"""

import asyncio
from collections.abc import Callable, Iterator, Mapping
from logging import getLogger
from typing import TYPE_CHECKING, Any, TypeVar, cast

import msgspec

from qserve.broker.connection import Answer, Connection, ignore_answer
from qserve.broker.instance.presence import NODE_TTL_MS
from qserve.broker.keys import Keys
from qserve.broker.redis_errors import our_errors
from qserve.wire.messages import UNREADABLE, encode
from qserve.wire.spec import GatewayInfo, NodeInfo, ReplicaInfo, WorkerInfo

if TYPE_CHECKING:
    import redis
    import redis.asyncio

logger = getLogger(__name__)

Info = TypeVar("Info", NodeInfo, GatewayInfo, WorkerInfo, ReplicaInfo)


def decode_infos(fields: Mapping[bytes, bytes], kind: type[Info]) -> Iterator[tuple[str, Info]]:
    """The reports of a hash by id; one that cannot be read is left out, with a warning in the log."""
    for id_, body in fields.items():
        try:
            yield id_.decode(), msgspec.msgpack.decode(body, type=kind)
        except UNREADABLE as exc:
            logger.warning("Ignoring an unreadable %s of %r: %s", kind.__name__, id_, exc)


# Gateways and replicas, over the connection of their calls


async def report_gateway(connection: Connection, keys: Keys, info: GatewayInfo) -> None:
    """Count a gateway among the live ones. Raises like `Connection.call`."""
    await connection.call("HSET", keys.gateways, info.id, encode(info))


def send_gateway_report(
    connection: Connection, keys: Keys, info: GatewayInfo, on_answer: Callable[[Answer], None]
) -> None:
    """Like `report_gateway`, without waiting for it."""
    connection.send(on_answer, "HSET", keys.gateways, info.id, encode(info))


def withdraw_gateway(connection: Connection, keys: Keys, gateway: str, on_answer: Callable[[Answer], None]) -> None:
    """No longer count a gateway, so that no deploy waits for it."""
    connection.send(on_answer, "HDEL", keys.gateways, gateway)


def send_replica_report(connection: Connection, keys: Keys, deployment: str, replica: str, info: ReplicaInfo) -> None:
    """Let everybody know how a replica fares: now, before its worker can say so, and without waiting for it."""
    connection.send_now(ignore_answer, "HSET", keys.replicas(deployment), replica, encode(info))


def report_replica(client: "redis.Redis", keys: Keys, deployment: str, info: ReplicaInfo) -> None:
    """Like `send_replica_report`, from a thread beside the event loop. Raises like `report_node`."""
    with our_errors(client):
        client.hset(keys.replicas(deployment), info.id, encode(info))


# Nodes, on an event loop


async def report_node(client: "redis.asyncio.Redis", keys: Keys, info: NodeInfo) -> None:
    """Say that a node lives, and what it is.

    Raises:
        BrokerUnavailable, ConfigurationError, CommandRefused: Redis cannot be told.
    """
    with our_errors(client):
        await client.set(keys.alive(info.id), 1, px=NODE_TTL_MS)
        await cast("Any", client.hset(keys.nodes, info.id, encode(info)))
    if keys.shards > 1:  # where replicas look; a shard that is down keeps nobody from telling the others
        said = (client.set(each.alive(info.id), 1, px=NODE_TTL_MS) for each in keys.all())
        await asyncio.gather(*said, return_exceptions=True)


async def withdraw_node(client: "redis.asyncio.Redis", keys: Keys, node: str) -> None:
    """Forget a node that ends; raises like `report_node`."""
    with our_errors(client):
        await cast("Any", client.hdel(keys.nodes, node))
        await cast("Any", client.hdel(keys.drained, node))
        await client.delete(keys.alive(node))
    if keys.shards > 1:
        await asyncio.gather(*(client.delete(each.alive(node)) for each in keys.all()), return_exceptions=True)


async def forget_dead(client: "redis.asyncio.Redis", keys: Keys) -> None:
    """Forget nodes and gateways that have ended without a word; raises like `report_node`.

    One that only seemed dead says again and again what it is.
    """
    with our_errors(client):
        for name in (keys.nodes, keys.gateways):
            for process in await cast("Any", client.hkeys(name)):
                if not await client.exists(keys.alive(process.decode())):
                    await cast("Any", client.hdel(name, process))


async def read_replicas(client: "redis.asyncio.Redis", keys: Keys, deployment: str) -> dict[str, ReplicaInfo]:
    """The replicas of a deployment by id, as they describe themselves; raises like `report_node`."""
    with our_errors(client):
        fields: Any = await cast("Any", client.hgetall(keys.replicas(deployment)))
    return dict(decode_infos(fields, ReplicaInfo))


async def forget_worker(client: "redis.asyncio.Redis", keys: Keys, deployment: str, node: str) -> None:
    """Remove what the worker of a node, which has ended, and its replicas said; raises like `report_node`."""
    with our_errors(client):
        await cast("Any", client.hdel(keys.workers(deployment), node))
        for replica, info in (await read_replicas(client, keys, deployment)).items():
            if info.node == node:
                await cast("Any", client.hdel(keys.replicas(deployment), replica))


# Workers, from their parent process


def report_worker(client: "redis.Redis", keys: Keys, deployment: str, worker: str, info: WorkerInfo | None) -> None:
    """Let everybody know how far a worker is; None: that it has nothing to say any more. Raises like `report_node`."""
    with our_errors(client):
        if info is None:
            client.hdel(keys.workers(deployment), worker)
        else:
            client.hset(keys.workers(deployment), worker, encode(info))


def report_death(client: "redis.Redis", keys: Keys, deployment: str, replica: str, how: str) -> None:
    """Add to what a replica has said how it died, unless it has named a problem itself. Raises like `report_node`."""
    with our_errors(client):
        body = cast("bytes | None", client.hget(keys.replicas(deployment), replica))
    for _, info in decode_infos({replica.encode(): body} if body else {}, ReplicaInfo):
        if not info.problem:
            report_replica(client, keys, deployment, msgspec.structs.replace(info, problem=how))


def replicas_now(client: "redis.Redis", keys: Keys, deployment: str) -> dict[str, ReplicaInfo]:
    """Like `read_replicas`, for a process without an event loop of its own."""
    with our_errors(client):
        fields: Any = client.hgetall(keys.replicas(deployment))
    return dict(decode_infos(fields, ReplicaInfo))

"""Following the desired state, on an event loop: what it is now, and every change after that."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from logging import getLogger
from typing import Any, Literal

import redis.asyncio
from redis.exceptions import RedisError

from qserve.background import CHANCE
from qserve.broker.instance.state import META_FIELDS, check_shards, checked, decode_deployed, decode_http, names_of
from qserve.broker.keys import Keys
from qserve.broker.redis_errors import our_errors
from qserve.broker.server import redis_clients
from qserve.errors import BrokerUnavailable
from qserve.wire.messages import Signer
from qserve.wire.spec import Deployed, HttpSettings

logger = getLogger(__name__)

_FOLLOW_BLOCK_MS = 5_000
_LOOK_EVERY_S = 30.0
_RECONNECT_S = (0.05, 1.0)
_MOST_AT_ONCE = 100

ChangeKind = Literal["deploy", "delete", "http", "schedule", "pause", "node", "sleep", "wake", "resync"]

_OF_ONE_DEPLOYMENT = frozenset({"deploy", "delete", "pause", "sleep", "wake"})
_OF_NO_DEPLOYMENT = frozenset({"schedule", "node"})


@dataclass(frozen=True)
class Change:
    """One entry of the state log; `resync` stands for whatever was missed while Redis was away."""

    kind: ChangeKind
    log_id: str
    name: str = ""
    generation: int = 0


@dataclass(frozen=True)
class Snapshot:
    """The whole desired state, at least as new as `log_id`.

    Attributes:
        instances: Which history of the state it belongs to, in each shard; "" where there is none yet.
        missing: Shards that could not be read.
    """

    deployments: Mapping[str, Deployed] = field(default_factory=dict)
    http: HttpSettings = field(default_factory=HttpSettings)
    log_id: str = "0-0"
    instances: tuple[str, ...] = ()
    missing: frozenset[int] = frozenset()

    def forgotten(self, known: "Snapshot") -> list[str]:
        """What stands now in place of each history that was known and is gone: another one, or ""."""
        both = zip(known.instances, self.instances, strict=False)
        return [now for before, now in both if before and before != now]


async def read_snapshot(client: redis.asyncio.Redis, keys: Keys, signer: Signer) -> Snapshot:
    """The desired state now. A spec that no key of ours signed is left out, with an error in the log.

    Raises:
        BrokerUnavailable, ConfigurationError: The home cannot be read, or has been used with another number of shards.
    """
    with our_errors(client):
        log_id = await last_log_id(client, keys)  # first: what follows is at least as new
        http_frame = await _ask(client, "GET", keys.http_options)
        if keys.shards > 1:
            check_shards(keys, await _ask(client, "GET", keys.shard_count))
    shards = list(dict.fromkeys((keys, *keys.all())))
    found = await asyncio.gather(*(_read_shard(client, each) for each in shards), return_exceptions=True)
    deployments: dict[str, Deployed] = {}
    instances, missing = [], set()
    for each, part in zip(shards, found, strict=True):
        if isinstance(part, BrokerUnavailable) and each is not keys:
            missing.add(each.shard)
            instances.append("")
            continue
        if isinstance(part, BaseException):
            raise part
        instance, metas = part
        instances.append(instance)
        for name, meta in metas.items():
            deployed = checked(partial(decode_deployed, signer, name, meta), f"the spec of deployment {name!r}")
            if deployed is not None:
                deployments[name] = deployed
    http = checked(lambda: decode_http(signer, http_frame), "the HTTP settings") or HttpSettings()
    return Snapshot(deployments, http, log_id, tuple(instances), frozenset(missing))


async def _read_shard(client: redis.asyncio.Redis, keys: Keys) -> tuple[str, dict[str, list[bytes | None]]]:
    """The history of the state in a shard, and the meta hash of each deployment there."""
    with our_errors(client):
        pipeline = client.pipeline(transaction=False)
        pipeline.smembers(keys.deployments)
        pipeline.get(keys.instance)
        members, instance = await pipeline.execute()
        names = names_of(members)
        for name in names:
            pipeline.hmget(keys.meta(name), META_FIELDS)
        metas = await pipeline.execute() if names else []
    return (instance or b"").decode(), dict(zip(names, metas, strict=True))


async def read_changes(
    client: redis.asyncio.Redis,
    keys: Keys,
    signer: Signer,
    known: Snapshot,
    changes: Sequence[Change],
    again: Collection[str] = (),
) -> Snapshot | None:
    """The state after the next changes of the one that is known; None if all of it has to be read.

    What a deploy costs does so not depend on how much else is deployed.

    Args:
        again: Deployments that are read although no change names them: how far one has come is not in the log.
    """
    if not all(change.kind in _OF_ONE_DEPLOYMENT | _OF_NO_DEPLOYMENT for change in changes):
        return None
    if keys.shards > 1 or not any(known.instances):
        return None
    log_id = changes[-1].log_id if changes else known.log_id
    names = list(dict.fromkeys((*again, *(each.name for each in changes if each.kind in _OF_ONE_DEPLOYMENT))))
    if changes and not names:
        return replace(known, log_id=log_id)
    with our_errors(client):
        pipeline = client.pipeline(transaction=False)
        pipeline.get(keys.instance)
        for name in names:
            pipeline.hmget(keys.meta(name), META_FIELDS)
        instance, *metas = await pipeline.execute()
    if ((instance or b"").decode(),) != known.instances:
        return None
    deployments = {name: deployed for name, deployed in known.deployments.items() if name not in names}
    for name, meta in zip(names, metas, strict=True):
        found = checked(partial(decode_deployed, signer, name, meta), f"the spec of deployment {name!r}")
        if found is not None:
            deployments[name] = found
    return replace(known, deployments=deployments, log_id=log_id)


async def follow(redis_url: str, keys: Keys, from_id: str = "$") -> AsyncGenerator[Change, None]:
    """Yield every change after log entry `from_id`, without end.

    Reconnects by itself; after that comes a Change of kind "resync", upon which a snapshot must be read again. So it
    does now and then where the log is not that of the shards in which the state is, and in place of many changes at
    once, of which the log may have lost some.
    """
    position, connected_before, delay = from_id, False, _RECONNECT_S[0]
    looked_at = time.monotonic()
    while True:
        client = connect_asyncio(redis_url)
        try:
            if connected_before or position == "$":
                position = await last_log_id(client, keys)
            if connected_before:
                yield Change("resync", position)
            connected_before = True
            while True:
                changes = await _read_log(client, keys, position)
                if len(changes) == _MOST_AT_ONCE:
                    position = changes[-1][0]
                    yield Change("resync", position)
                    continue
                for entry_id, fields in changes:
                    delay, position = _RECONNECT_S[0], entry_id
                    yield _decode_change(entry_id, fields)
                if keys.shards > 1 and time.monotonic() - looked_at > _LOOK_EVERY_S:
                    looked_at = time.monotonic()
                    yield Change("resync", position)
        except (RedisError, OSError) as exc:
            logger.debug("Lost the state log (%s), trying again in %.2f s.", exc, delay)
        finally:
            with contextlib.suppress(RedisError, OSError):
                await client.aclose()
        await asyncio.sleep(delay * CHANCE.uniform(0.5, 1.0))
        delay = min(2 * delay, _RECONNECT_S[1])


def connect_asyncio(redis_url: str) -> redis.asyncio.Redis:
    """A redis-py client for an event loop that never repeats a command by itself."""
    return redis_clients.asyncio_client(redis_url, _FOLLOW_BLOCK_MS / 1000 + 2)


async def read_meta(client: redis.asyncio.Redis, keys: Keys, deployment: str) -> list[bytes | None]:
    """What `decode_deployed` takes, for one deployment; raises like `ask`."""
    found: list[bytes | None] = await ask(client, "HMGET", keys.meta(deployment), *META_FIELDS)
    return found


async def has_schedules(client: redis.asyncio.Redis, keys: Keys) -> bool:
    """Whether anything is to be submitted on a schedule; raises like `ask`."""
    return bool(await ask(client, "EXISTS", keys.schedules))


async def _read_log(client: redis.asyncio.Redis, keys: Keys, position: str) -> list[tuple[str, dict[bytes, bytes]]]:
    answer = await _ask(
        client, "XREAD", "COUNT", _MOST_AT_ONCE, "BLOCK", _FOLLOW_BLOCK_MS, "STREAMS", keys.log, position
    )
    return [(entry_id.decode(), fields) for entry_id, fields in answer[0][1]] if answer else []


async def last_log_id(client: redis.asyncio.Redis, keys: Keys) -> str:
    """The id of the newest entry of the state log; what is read after this call is at least as new."""
    newest = await _ask(client, "XREVRANGE", keys.log, "+", "-", "COUNT", 1)
    return newest[0][0].decode() if newest else "0-0"


async def ask(client: redis.asyncio.Redis, *command: Any) -> Any:
    """Return the answer to a command.

    Raises:
        BrokerUnavailable, ConfigurationError: Redis cannot be asked.
    """
    with our_errors(client):
        return await _ask(client, *command)


async def _ask(client: redis.asyncio.Redis, *command: Any) -> Any:
    return await client.execute_command(*command)  # type: ignore[no-untyped-call]


def _decode_change(entry_id: str, fields: dict[bytes, bytes]) -> Change:
    kind: Any = fields.get(b"kind", b"").decode(errors="replace")
    generation = fields.get(b"gen", b"")
    name = fields.get(b"name", b"").decode(errors="replace")
    return Change(kind, entry_id, name, int(generation) if generation.isdigit() else 0)

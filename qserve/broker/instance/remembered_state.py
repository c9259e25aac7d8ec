"""What a process remembers of the desired state, for the day on which the server has forgotten it."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from logging import getLogger
from typing import TYPE_CHECKING

from redis.exceptions import ResponseError

from qserve.broker.instance.change_log import Change, Snapshot, ask, read_changes, read_snapshot
from qserve.broker.keys import GROUP, Keys
from qserve.broker.redis_errors import our_errors
from qserve.broker.scripts import RESTORE
from qserve.errors import BrokerUnavailable, ConfigurationError
from qserve.wire.messages import Signer, encode
from qserve.wire.options import script_fields
from qserve.wire.spec import Deployed, SignedSpec

if TYPE_CHECKING:
    import redis.asyncio

logger = getLogger(__name__)


class RememberedState:
    """The newest snapshot that a process has followed.

    A server that comes back without its data has no history of the state, or another one: that nothing is deployed
    there then is no wish to undeploy everything.

    Args:
        restores: Whether to put back what the server has forgotten; else nothing changes until somebody deploys.
    """

    def __init__(self, keys: Keys, signer: Signer, *, restores: bool) -> None:
        self._keys = keys
        self._signer = signer
        self._restores = restores
        self._known = Snapshot()
        self._told = False

    async def compare(self, client: "redis.asyncio.Redis", found: Snapshot) -> Snapshot:
        """The state to follow: what was found, or what is known where the server has lost it.

        Raises:
            BrokerUnavailable: It cannot be put back now.
        """
        if found.missing:
            found = self._complete(found)
        forgotten = found.forgotten(self._known)
        if not forgotten:
            self._known = found
            return found
        if self._restores and await self._restore(client):
            self._known = await read_snapshot(client, self._keys, self._signer)
        elif all(forgotten):
            self._known = found
        else:
            if not self._told:
                self._told = True
                logger.error("Redis has lost what was deployed. Going on as before; deploy again to change anything.")
            return replace(self._known, log_id=found.log_id)
        return self._known

    def _complete(self, found: Snapshot) -> Snapshot:
        """Fill in what is known of the shards that cannot be read now."""
        known = self._known
        if not known.instances:
            raise BrokerUnavailable(
                f"{len(found.missing)} shards of the Redis cluster cannot be read: see qserve doctor"
            )
        gone = {
            name: deployed for name, deployed in known.deployments.items() if self._keys.of(name).shard in found.missing
        }
        instances = tuple(
            before if shard in found.missing else now
            for shard, (before, now) in enumerate(zip(known.instances, found.instances, strict=True))
        )
        return replace(found, deployments={**found.deployments, **gone}, instances=instances, missing=frozenset())

    async def after(
        self, client: "redis.asyncio.Redis", changes: Sequence[Change], again: Collection[str] = ()
    ) -> Snapshot | None:
        """The state after the next changes; None if it is to be read as a whole, and compared.

        Args:
            again: Deployments that are read although no change names them.

        Raises:
            BrokerUnavailable, ConfigurationError: It cannot be read.
        """
        found = await read_changes(client, self._keys, self._signer, self._known, changes, again)
        self._known = found or self._known
        return found

    async def _restore(self, client: "redis.asyncio.Redis") -> bool:
        try:
            count = await restore(client, self._keys, self._signer, self._known.deployments.values())
            http = self._signer.seal(encode(self._known.http))
            await ask(client, "SET", self._keys.http_options, http, "NX")
            # Last: whoever finds the history finds all of it.
            shards = dict.fromkeys((self._keys, *self._keys.all()))
            for keys, instance in zip(shards, self._known.instances, strict=True):
                if instance:
                    await ask(client, "SET", keys.instance, instance, "NX")
        except (ConfigurationError, ResponseError) as exc:  # gateways need not have the right to deploy; nodes have
            logger.info("This process may not put back what Redis has lost: %s", exc)
            return False
        if count:
            logger.warning("Redis has lost what was deployed; %d deployments were put back", count)
        return True


async def restore(client: "redis.asyncio.Redis", keys: Keys, signer: Signer, known: Iterable[Deployed]) -> int:
    """Put back deployments that the server has forgotten, as they were; returns how many.

    Raises:
        BrokerUnavailable: Redis cannot be reached.
    """
    count = 0
    for deployed in known:
        spec = deployed.spec
        its = keys.of(spec.name)
        names = (its.meta(spec.name), its.deployments, its.log, its.calls(spec.name))
        frame = signer.seal(encode(SignedSpec(deployed.generation, spec)))
        arguments = (spec.name, deployed.generation, frame, GROUP, deployed.state, deployed.error)
        with our_errors(client):
            fields = (*script_fields(spec), *(("paused", deployed.paused) if deployed.paused else ()))
            count += await RESTORE.run_async(client, names, *arguments, *fields)
    return count

"""Deployments with `min_replicas=0`: which of them nobody needs, and which are needed again."""

import asyncio
import logging
import time
from collections.abc import Mapping

from qserve.broker.instance.sleeping import calls_ever, needed, put_to_sleep, wake
from qserve.broker.keys import Keys
from qserve.broker.redis_errors import CommandRefused
from qserve.broker.server import redis_clients
from qserve.errors import QServeError
from qserve.wire.spec import HEALTHY, Deployed

logger = logging.getLogger("qserve.node")

_LOOK_S = 1.0
_SHORTEST_LOOK_S = 0.1


class Sleepers:
    """Puts deployments to sleep, and wakes them. Every node does both; whichever comes first does it for all.

    Args:
        redis: A client for commands that may wait.
    """

    def __init__(self, redis: redis_clients.AsyncClient, keys: Keys) -> None:
        self._redis = redis
        self._keys = keys
        self._awake: dict[str, Deployed] = {}
        self._asleep: tuple[str, ...] = ()
        self._quiet: dict[str, tuple[int, int, float]] = {}
        """Name -> generation, calls so far, and since when they are that many."""
        self._changed = asyncio.Event()

    def match(self, deployments: Mapping[str, Deployed]) -> None:
        """Take up what is deployed now."""
        sleepers = {name: it for name, it in deployments.items() if it.spec.autoscaling and it.spec.autoscaling.sleeps}
        self._awake = {name: it for name, it in sleepers.items() if not it.asleep}
        self._asleep = tuple(sorted(sleepers.keys() - self._awake.keys()))
        self._quiet = {name: seen for name, seen in self._quiet.items() if name in self._awake}
        self._changed.set()

    async def run(self) -> None:
        """Look after them, until cancelled."""
        while True:
            if not self._awake and not self._asleep:
                self._changed.clear()
                await self._changed.wait()
            try:
                if self._awake:
                    await self._look_who_is_idle()
                if self._asleep:
                    await self._wait_for_calls()
                else:
                    await asyncio.sleep(self._pause_s())
            except (QServeError, CommandRefused) as exc:
                logger.debug("Cannot look which deployments are needed: %s", exc)
                await asyncio.sleep(_LOOK_S)

    def _pause_s(self) -> float:
        shortest = min((_delay_s(it) for it in self._awake.values()), default=_LOOK_S)
        return min(_LOOK_S, max(_SHORTEST_LOOK_S, shortest / 4))

    async def _look_who_is_idle(self) -> None:
        awake = self._awake
        for name, calls in (await calls_ever(self._redis, self._keys, list(awake))).items():
            deployed, now = awake[name], time.monotonic()
            seen = self._quiet.get(name)
            if seen is None or seen[:2] != (deployed.generation, calls) or deployed.state != HEALTHY:
                self._quiet[name] = (deployed.generation, calls, now)
            elif now - seen[2] >= _delay_s(deployed):
                quiet_ms = int(1000 * _delay_s(deployed))
                if await put_to_sleep(
                    *(self._redis, self._keys, name, deployed.generation), seen=calls, quiet_ms=quiet_ms
                ):
                    logger.info("Deployment %s: no calls for %g s, so its replicas leave", name, _delay_s(deployed))
                self._quiet[name] = (deployed.generation, calls, now)

    async def _wait_for_calls(self) -> None:
        for name in await needed(self._redis, self._keys, self._asleep, int(1000 * self._pause_s())):
            if await wake(self._redis, self._keys, name):
                logger.info("Deployment %s: a call wakes it", name)


def _delay_s(deployed: Deployed) -> float:
    policy = deployed.spec.autoscaling
    assert policy is not None
    return (
        policy.downscale_to_zero_delay_s if policy.downscale_to_zero_delay_s is not None else policy.downscale_delay_s
    )

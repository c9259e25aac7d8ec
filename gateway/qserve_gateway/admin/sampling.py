"""Records every ten seconds how long the queues are, also of deployments that have no replica to do so."""

import asyncio
import logging
from collections.abc import Sequence

from qserve.broker.history.buckets import BUCKET_S, sample_queues
from qserve.broker.instance.state import State
from qserve.broker.redis_errors import CommandRefused
from qserve.errors import QServeError

logger = logging.getLogger(__name__)


class Sampler:
    """Of all gateways of an instance, one at a time does this.

    Attributes:
        deployments: The names of those to look at.
    """

    def __init__(self, state: State, gateway: str) -> None:
        self.deployments: Sequence[str] = ()
        self._state = state
        self._gateway = gateway

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            try:
                await asyncio.to_thread(self._look)
            except (QServeError, CommandRefused) as exc:
                logger.debug("cannot note how the queues are: %s", exc)
            await asyncio.sleep(BUCKET_S)

    def _look(self) -> None:
        sample_queues(self._state.redis, self._state.keys, self._gateway, self.deployments)

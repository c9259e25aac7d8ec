"""Deployments whose capacity is known: limited by how many calls run at once, or by the processor."""

import asyncio
import time
from typing import Any

from starlette.requests import Request

from qserve import serve
from qserve.serve import Deployment

HOLD_S = 0.020
PLACES, REPLICAS = 4, 2
BOUND = 100
"""`max_queued_requests` of these deployments: calls queued and running."""


class Slots:
    """Sleeps 20 ms, in a few calls at once; its limit is not the processor."""

    async def __call__(self, request: Request) -> str:
        return await self.hold(request.query_params["n"])

    async def hold(self, number: str) -> str:
        await asyncio.sleep(HOLD_S)
        return number


class Burner:
    """Uses 20 ms of processor time, one call at a time."""

    def __call__(self, request: Request) -> str:
        return self.hold(request.query_params["n"])

    def hold(self, number: str) -> str:
        end = time.thread_time() + HOLD_S
        while time.thread_time() < end:
            pass
        return number


def _bounded(name: str, code: type[Any], places: int) -> Deployment[Any]:
    limited = serve.deployment(
        name=name, num_replicas=REPLICAS, max_concurrent_queries=places, max_queued_requests=BOUND
    )
    return limited(code)


Flooded = _bounded("Flooded", Slots, PLACES)
Neighbour = _bounded("Neighbour", Slots, PLACES)
Burning = _bounded("Burning", Burner, 1)

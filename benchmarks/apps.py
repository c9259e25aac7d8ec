"""Deployments for the benchmark alone."""

import asyncio
import time

from qserve import serve


@serve.deployment(route_prefix=None, max_concurrent_queries=1000)
class Sleeper:
    async def __call__(self) -> None:
        await asyncio.sleep(0.1)


@serve.deployment(route_prefix="/plain")
class Plain:
    def __call__(self) -> str:
        return "ok"


class Burn:
    """Uses 20 ms of CPU time in a plain `def`, however busy the machine is."""

    def __call__(self) -> None:
        end = time.thread_time() + 0.020
        while time.thread_time() < end:
            pass


Burner = serve.deployment(name="Burner", route_prefix=None)(Burn)
Burners = serve.deployment(name="Burners", route_prefix=None, num_replicas=2)(Burn)

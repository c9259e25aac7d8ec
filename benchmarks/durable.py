"""Durable calls submitted and collected per second, from one client: `python -m benchmarks.durable`."""

import asyncio
import time

from examples.noop import Noop
from qserve.calls.handle import get_handle
from qserve.testing import instance

CALLS, IN_FLIGHT, ROUNDS = 10_000, 500, 3


async def submit_and_collect(name: str) -> float:
    """Calls per second, each awaited by the process that has submitted it."""
    handle = get_handle(name, sync=False).options(durable=True)
    room = asyncio.Semaphore(IN_FLIGHT)

    async def one() -> None:
        async with room:
            await (await handle.remote())

    started = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(CALLS)))
    return CALLS / (time.perf_counter() - started)


def main() -> None:
    """Measure a handler that does nothing on one replica."""
    with instance({"location": None}):
        Noop.deploy()
        for _ in range(ROUNDS):
            print(f"{asyncio.run(submit_and_collect(Noop.name)):,.0f} durable calls/s")


if __name__ == "__main__":
    main()

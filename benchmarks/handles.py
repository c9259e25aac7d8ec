"""Calls through handles from a process of its own: `python -m benchmarks.handles` prints the figures as JSON."""

import asyncio
import json
import statistics
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import qserve
from qserve import Ref, serve

WAVE = 1000
"""Calls in flight at once: far more than a replica runs, far fewer than its queue holds."""


def async_pipelined(total: int = 60_000) -> float:
    """Calls per second from one event loop that keeps hundreds of calls in flight."""
    handle = serve.get_deployment("Noop").get_handle(sync=False)

    async def pipeline(calls: int) -> None:
        # Between half a wave and a whole one is on its way all the time; `gather` would add a task for each.
        flying: deque[Ref[Any]] = deque()
        for _ in range(calls):
            flying.append(await handle.remote())
            if len(flying) == WAVE:
                for _ in range(WAVE // 2):
                    await flying.popleft()
        while flying:
            await flying.popleft()

    async def run() -> float:
        await pipeline(WAVE)
        began = time.perf_counter()
        await pipeline(total)
        return total / (time.perf_counter() - began)

    return asyncio.run(run())


def sync_pipelined(total: int = 20_000) -> float:
    """Calls per second with waves of `remote()`, then one `get`."""
    handle = serve.get_deployment("Noop").get_handle()
    qserve.get([handle.remote() for _ in range(WAVE)])
    began = time.perf_counter()
    for _ in range(total // WAVE):
        qserve.get([handle.remote() for _ in range(WAVE)])
    return total / (time.perf_counter() - began)


def one_by_one_ms(total: int = 3_000) -> float:
    """Median time of `qserve.get(handle.remote())`."""
    handle = serve.get_deployment("Noop").get_handle()
    times = []
    for _ in range(total):
        began = time.perf_counter()
        qserve.get(handle.remote())
        times.append((time.perf_counter() - began) * 1000)
    return statistics.median(times)


def thousand_sleepers_s() -> float:
    """Seconds for 1,000 calls of 100 ms on one replica that may run 1,000 at once."""
    handle = serve.get_deployment("Sleeper").get_handle(sync=False)

    async def run() -> float:
        await asyncio.gather(*[await handle.remote() for _ in range(1000)])
        began = time.perf_counter()
        await asyncio.gather(*[await handle.remote() for _ in range(1000)])
        return time.perf_counter() - began

    return asyncio.run(run())


def burn_per_s(name: str, total: int = 150) -> float:
    """Calls per second of 20 ms CPU time each."""
    handle = serve.get_deployment(name).get_handle()
    qserve.get([handle.remote() for _ in range(4)])
    began = time.perf_counter()
    qserve.get([handle.remote() for _ in range(total)])
    return total / (time.perf_counter() - began)


MEASURES: dict[str, Callable[[], float]] = {
    "async_pipelined": async_pipelined,
    "sync_pipelined": sync_pipelined,
    "one_by_one_ms": one_by_one_ms,
    "thousand_sleepers_s": thousand_sleepers_s,
    "one_burner_per_s": lambda: burn_per_s("Burner"),
    "two_burners_per_s": lambda: burn_per_s("Burners", 300),
}


def main() -> None:
    deployed = serve.list_deployments()
    wanted = {"Noop": list(MEASURES)[:3], "Sleeper": ["thousand_sleepers_s"], "Burners": list(MEASURES)[4:]}
    names = [measure for deployment, measures in wanted.items() if deployment in deployed for measure in measures]
    print(json.dumps({name: statistics.median(MEASURES[name]() for _ in range(3)) for name in names}))


if __name__ == "__main__":
    main()

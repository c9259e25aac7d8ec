"""Many models in few replicas: how often a call finds its model loaded, when the caller names it and when not."""

import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from benchmarks import processes
from benchmarks.rows import Row
from qserve import serve
from qserve.calls.handle import AsyncDeploymentHandle
from tests.support.serving import free_port

MODELS, REPLICAS, KEPT = 20, 4, 5
LOAD_S, RUN_S = 0.050, 0.005
_CALLS, _AT_ONCE = 3_000, 16
_LOADS: list[str] = []


class Zoo:
    """Says whether it had the model."""

    @serve.multiplexed(max_num_models_per_replica=KEPT)
    async def load(self, model: str) -> str:
        _LOADS.append(model)
        await asyncio.sleep(LOAD_S)
        return model

    async def __call__(self, request: Any, model: str) -> tuple[bool, int]:
        before = _LOADS.count(model)
        await self.load(model)
        await asyncio.sleep(RUN_S)
        return _LOADS.count(model) == before, os.getpid()


Named = serve.deployment(name="named", num_replicas=REPLICAS)(Zoo)
Unnamed = serve.deployment(name="unnamed", num_replicas=REPLICAS)(Zoo)


def measure() -> list[Row]:
    """Measure 20 models over 4 replicas with room for 5 each."""
    port = free_port()
    command = [sys.executable, "-m", "qserve.cli", "run", "benchmarks.models", "--port", str(port)]
    ready = f"http://127.0.0.1:{port}/-/routes"
    with tempfile.TemporaryDirectory() as runtime_dir, processes.running(command, ready, runtime_dir):
        environment = processes.environment(runtime_dir)
        caller = [sys.executable, "-m", "benchmarks.models"]
        done = subprocess.run(caller, check=True, capture_output=True, text=True, env=environment, cwd=processes.ROOT)
    found = json.loads(done.stdout)
    hits = found["named"][0]
    return [
        Row(
            "20 models, 4 replicas with room for 5 each: the caller names the model",
            _told(found["named"]),
            ">= 95 %",
            hits >= 0.95,
        ),
        Row("- the replicas do not know before they run the call", _told(found["unnamed"])),
        Row("- the caller names it, and every second call is for one of the models", _told(found["hot"])),
        Row("- of these, the calls for other models", _told(found["others"])),
    ]


def _told(found: tuple[float, float, float, float]) -> str:
    hits, p50, p99, rate = found
    return f"{hits:.1%} found it loaded, p50 {p50:.1f} ms, p99 {p99:.1f} ms, {rate:,.0f}/s"


def main() -> None:
    """Print the figures of the running instance as JSON."""
    print(json.dumps(asyncio.run(_all())))


async def _all() -> dict[str, tuple[float, float, float, float]]:
    names = [f"m{number}" for number in range(MODELS)]
    chance = random.Random(1)

    def evenly() -> str:
        return chance.choice(names)

    def one_is_hot() -> str:
        return names[0] if chance.random() < 0.5 else chance.choice(names[1:])

    found = {}
    for name in ("unnamed", "named"):
        handle = serve.get_deployment(name).get_handle(sync=False)
        await _drive(handle, name == "named", evenly)
        found[name] = _figures(*await _drive(handle, name == "named", evenly))
    seen, took_s = await _drive(handle, True, one_is_hot)
    found["hot"] = _figures(seen, took_s)
    found["others"] = _figures([each for each in seen if each[0] != names[0]], took_s)
    return found


async def _drive(
    handle: AsyncDeploymentHandle[Any], names_it: bool, choose: Callable[[], str]
) -> tuple[list[tuple[str, bool, float]], float]:
    seen: list[tuple[str, bool, float]] = []
    left = iter(range(_CALLS))

    async def one_after_the_other() -> None:
        for _ in left:
            model = choose()
            chosen = handle.options(multiplexed_model_id=model) if names_it else handle
            began = time.perf_counter()
            had_it, _ = await (await chosen.remote(None, model))
            seen.append((model, had_it, time.perf_counter() - began))

    began = time.perf_counter()
    await asyncio.gather(*(one_after_the_other() for _ in range(_AT_ONCE)))
    return seen, time.perf_counter() - began


def _figures(seen: list[tuple[str, bool, float]], took_s: float) -> tuple[float, float, float, float]:
    times = sorted(s * 1000 for _, _, s in seen)
    hits = statistics.fmean(had_it for _, had_it, _ in seen)
    return hits, times[len(times) // 2], times[len(times) * 99 // 100], len(seen) / took_s


if __name__ == "__main__":
    main()

"""A run in which callers change their minds: thousands of calls, half of them cancelled at a random moment."""

import asyncio
import time
from collections.abc import Awaitable
from dataclasses import dataclass
from random import Random
from typing import Any

import qserve
from qserve.calls.handle import get_handle
from qserve.errors import CallCancelled, QServeError
from tests.faults.chaos.cluster import Cluster, Setup
from tests.faults.chaos.ledger import proof
from tests.faults.chaos.play import Plan, Result, Run, came_true

_AT_ONCE = 200
_LONGEST_S = 0.03
_LIMIT_S = 60.0


@dataclass(frozen=True)
class CancelStorm:
    """Cancelled refs, cancelled tasks that await one, and refs that other threads cancel."""

    name: str = "cancels"
    title: str = "half of all calls are cancelled at a random moment"
    calls: int = 20_000
    short_calls: int = 1_000

    def length(self, plan: Plan) -> float:
        """About 500 calls a second."""
        return plan.seconds(self.calls, self.short_calls) / 400 + 10

    def play(self, plan: Plan) -> Result:
        """Call, cancel, and look at what the others got."""
        result = Result(self.name, self.title, plan.seed)
        dice = plan.dice(self.name)
        with plan.stage.cluster(Setup(replicas=1), None) as cluster:
            calls = int(plan.seconds(self.calls, self.short_calls))
            asyncio.run(_storm(calls, dice, result))
            _nothing_is_left(cluster, result)
        result.faults = sum(count for (_, end), count in result.judgement.outcomes.items() if end == "cancelled")
        return result


async def _storm(calls: int, dice: Random, result: Result) -> None:
    at_once = asyncio.Semaphore(_AT_ONCE)
    handles = {name: get_handle(name, sync=False).options(timeout_s=_LIMIT_S) for name in ("Safe", "Once")}

    async def one(number: int) -> None:
        async with at_once:
            name = dice.choice(["Safe", "Once"])
            order = {"id": f"cancel-{number}", "nonce": f"{dice.getrandbits(64):x}", "seconds": dice.choice([0, 0.01])}
            spoiled = dice.choice([_nobody, _nobody, _nobody, _ref, _task, _thread])
            await _judge(name.lower(), order, spoiled(handles[name], order, dice.uniform(0, _LONGEST_S)), result)

    await asyncio.gather(*(one(number) for number in range(calls)))


async def _judge(nature: str, order: dict[str, Any], call: Awaitable[str], result: Result) -> None:
    judgement, started = result.judgement, time.monotonic()
    judgement.calls += 1
    right = proof(order["id"], order["nonce"])
    try:
        value = await asyncio.wait_for(call, _LIMIT_S)
    except (asyncio.CancelledError, CallCancelled):
        judgement.outcomes[nature, "cancelled"] += 1
    except TimeoutError:
        judgement.outcomes[nature, "none"] += 1
        judgement.blame("lost", f"{nature} {order} after {time.monotonic() - started:.1f} s")
    except QServeError as exc:
        judgement.outcomes[nature, str(exc.status)] += 1
        judgement.blame("wrong-code", f"{nature} {order}: {exc!r}")
    else:
        judgement.outcomes[nature, "ok"] += 1
        if value != right:
            judgement.blame("swapped", f"{nature} {order}: {value}")


async def _nobody(handle: Any, order: dict[str, Any], _after_s: float) -> str:
    try:
        return str(await (await handle.remote(order)))
    except (asyncio.CancelledError, CallCancelled) as exc:
        raise qserve.TaskError("a call was cancelled that nobody has cancelled") from exc


async def _ref(handle: Any, order: dict[str, Any], after_s: float) -> str:
    ref = await handle.remote(order)
    asyncio.get_running_loop().call_later(after_s, ref.cancel)
    return str(await ref)


async def _task(handle: Any, order: dict[str, Any], after_s: float) -> str:
    task = asyncio.ensure_future(_nobody_minds(handle, order))
    asyncio.get_running_loop().call_later(after_s, task.cancel)
    return await task


async def _nobody_minds(handle: Any, order: dict[str, Any]) -> str:
    return str(await (await handle.remote(order)))


async def _thread(handle: Any, order: dict[str, Any], after_s: float) -> str:
    ref = await handle.remote(order)

    def cancel() -> None:
        time.sleep(after_s)
        ref.cancel()

    asyncio.get_running_loop().run_in_executor(None, cancel)
    return str(await ref)


def _nothing_is_left(cluster: Cluster, result: Result) -> None:
    def left() -> int:
        return sum(int(cluster.redis.xlen(cluster.keys.calls(name))) for name in ("Safe", "Once"))

    if not came_true(lambda: left() == 0, 15):
        result.failures.append(f"{left()} entries are left in the queues")


RUNS: tuple[Run, ...] = (CancelStorm(),)

"""The load: processes that call over HTTP and through handles, at a given rate whatever becomes of the calls.

`python -m tests.faults.chaos.load JSON` is one of them: it writes its ledger, prints "calling" when it begins, stops
sending after the given seconds, or when its standard input closes, and ends when every call has its outcome or is 30 s
late.
"""

import asyncio
import random
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import msgspec
import uvloop

from qserve.calls.handle import get_handle
from qserve.errors import QServeError
from tests.faults.chaos.http_calls import Broken, HttpClient, Response
from tests.faults.chaos.ledger import BROKEN, INDETERMINATE, OK, RESET, ClientLedger, Order, value_of

KINDS: tuple[str, ...] = ("http-safe", "http-once", "http-stream", "http-durable")
KINDS += ("handle-safe", "handle-once", "handle-stream", "handle-durable")
CALLS = {"http-safe": 24.0, "http-once": 24.0, "http-stream": 2.5}
CALLS |= {"handle-safe": 24.0, "handle-once": 23.0, "handle-stream": 2.5}
"""Half safe, half not, 5 % streams."""
DURABLE = {"handle-durable": 75.0, "http-durable": 25.0}
LATE_S = 30.0
"""How long after its deadline a call that has no outcome is waited for."""
DURABLE_LIMIT_S = 120.0
MOST_UNDER_WAY = 4000
"""Of one process; a load that has more has been stuck for long, and would only burden the machine."""


@dataclass(frozen=True)
class Load:
    """What is called how often.

    Attributes:
        rate: Calls per second, of all processes together.
        processes: How many send them.
        kinds: Share of each kind of call.
        durations: Seconds that calls take in their replica, with the share of each.
        fates: What else happens in the replica, with the share of calls it happens to; see `app`.
        timeout_s: Deadline of calls that are not durable.
        sizes: Bytes of the values that calls carry, there and back, with the share of each.
    """

    rate: float = 400
    processes: int = 2
    kinds: dict[str, float] = field(default_factory=lambda: CALLS)
    durations: tuple[tuple[float, float], ...] = ((0.7, 0.02), (0.2, 0.3), (0.1, 3.0))
    fates: tuple[tuple[float, str], ...] = ()
    timeout_s: float = 30.0
    sizes: tuple[tuple[float, int], ...] = ()


class Task(msgspec.Struct):
    """The command line of one process."""

    name: str
    seed: int
    load: Load
    seconds: float
    gateways: list[str]
    ledger: str


class Caller:
    """One process of the load."""

    def __init__(self, task: Task, ledger: ClientLedger) -> None:
        self._task = task
        self._load = task.load
        self._ledger = ledger
        self._dice = random.Random(task.seed)
        self._gateways = {url: HttpClient(url, self._surplus) for url in task.gateways}
        timeout_s = task.load.timeout_s
        self._handles = {name: get_handle(name, sync=False).options(timeout_s=timeout_s) for name in ("Safe", "Once")}
        self._streams = get_handle("Once").options(method_name="stream", stream=True, timeout_s=timeout_s)
        self._durable = get_handle("Once", sync=False).options(durable=True)
        self._under_way: set[asyncio.Task[None]] = set()
        self._stopped = asyncio.Event()

    async def run(self) -> None:
        """Send until the time is over, then wait for what is under way."""
        stop = asyncio.get_running_loop().connect_read_pipe(lambda: _Watch(self._stopped), sys.stdin)
        await stop
        print("calling", flush=True)  # noqa: T201  whoever started this waits for it
        end = next_at = time.monotonic()
        end += self._task.seconds
        number = 0
        while (now := time.monotonic()) < end and not self._stopped.is_set():
            while next_at <= now:
                next_at += self._dice.expovariate(self._load.rate / self._load.processes)
                if len(self._under_way) < MOST_UNDER_WAY:
                    self._send(number)
                    number += 1
            await asyncio.sleep(min(next_at, end) - now)
        longest = DURABLE_LIMIT_S if any("durable" in kind for kind in self._load.kinds) else self._load.timeout_s
        if self._under_way:
            await asyncio.wait(self._under_way, timeout=longest + LATE_S)

    def _send(self, number: int) -> None:
        load = self._load
        kind = self._dice.choices(list(load.kinds), list(load.kinds.values()))[0]
        seconds = self._dice.choices([s for _, s in load.durations], [share for share, _ in load.durations])[0]
        luck, fate = self._dice.random(), ""
        for share, each in load.fates:
            if 0 <= luck < share:
                fate = each
            luck -= share
        size = (
            self._dice.choices([s for _, s in load.sizes], [share for share, _ in load.sizes])[0] if load.sizes else 0
        )
        order = Order(f"{self._task.name}.{number}", f"{self._dice.getrandbits(64):x}", seconds, fate, size)
        task = asyncio.create_task(self._call(kind, order))
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)

    async def _call(self, kind: str, order: Order) -> None:
        protocol, _, nature = kind.partition("-")
        gateway = self._dice.choice(list(self._gateways))
        timeout_s = DURABLE_LIMIT_S if nature == "durable" else self._load.timeout_s
        via = gateway if protocol == "http" else "handle"
        self._ledger.sent(order, kind, via, time.monotonic(), timeout_s)
        body: str | bytes = b""
        try:
            if protocol == "http":
                body = await self._over_http(nature, order, gateway)
            else:
                body = await self._through_handle(nature, order)
            body = _without_value(order, body)
            outcome, detail = OK, ""
        except Broken as exc:
            outcome, detail = (BROKEN if exc.begun else RESET), str(exc)
        except _Refused as exc:
            detail = exc.response.body[:200].decode("utf-8", "replace")
            outcome = _outcome(exc.response.status, detail)
        except TimeoutError as exc:
            outcome, detail = "504", f"{type(exc).__name__}: {exc}"
        except QServeError as exc:
            detail = f"{type(exc).__name__}: {exc}"
            outcome = _outcome(exc.status, detail)
        self._ledger.answered(order.id, time.monotonic(), outcome, body, detail)

    # Over HTTP

    async def _over_http(self, nature: str, order: Order, gateway: str) -> bytes:
        query = urlencode(order._asdict())
        # The gateway answers 504 at the deadline itself; its answer is waited for a while longer.
        patience_s = self._load.timeout_s + LATE_S
        if order.size:
            method, name = ("PUT", "Safe") if nature == "safe" else ("POST", "Once")
            value = value_of(order.id, order.nonce, order.size)
            response = await self._gateways[gateway].ask(method, f"/{name}?{query}", {}, patience_s, value)
        elif nature == "safe":
            response = await self._gateways[gateway].ask("GET", f"/Safe?{query}", {}, patience_s)
        elif nature == "once":
            response = await self._gateways[gateway].ask("POST", f"/Once?{query}", {}, patience_s)
        elif nature == "stream":
            headers = {"x-serve-call-method": "stream"}
            response = await self._gateways[gateway].ask("POST", f"/Once?{query}", headers, patience_s)
        else:
            return await self._durable_over_http(order, query, gateway)
        return _good(response).body

    async def _durable_over_http(self, order: Order, query: str, gateway: str) -> bytes:
        headers = {"prefer": "respond-async"}
        response = _good(await self._gateways[gateway].ask("POST", f"/Once?{query}", headers, LATE_S), 202)
        location = response.headers["location"]
        self._ledger.accepted(order.id, time.monotonic(), location.rpartition("/")[2])
        while True:  # at any gateway, also while one or Redis is away: the call is not
            gateway = self._dice.choice(list(self._gateways))
            try:
                response = await self._gateways[gateway].ask("GET", f"{location}?wait=20&response=true", {}, 40)
            except (Broken, TimeoutError):
                await asyncio.sleep(0.2)
                continue
            if response.status == 503:
                await asyncio.sleep(0.5)
            elif response.status != 202:
                return _good(response).body

    # Through handles

    async def _through_handle(self, nature: str, order: Order) -> str | bytes:
        wanted = order._asdict()
        if order.size:
            return await self._with_value(nature, order, wanted)
        if nature == "stream":
            return "".join([part async for part in self._streams.remote(wanted)])
        if nature == "durable":
            ref = await self._durable.remote(wanted)
            self._ledger.accepted(order.id, time.monotonic(), ref.id)
            return str(await ref)
        handle = self._handles["Safe" if nature == "safe" else "Once"]
        return str(await (await handle.remote(wanted)))

    async def _with_value(self, nature: str, order: Order, wanted: dict[str, Any]) -> bytes:
        handle = self._handles["Safe" if nature == "safe" else "Once"]
        value: Any = value_of(order.id, order.nonce, order.size)
        if nature == "safe":  # a replica makes the value, and it is handed on
            value = await handle.value.remote(wanted)
        answer: bytes = await (await handle.remote(wanted, value))
        return answer

    def _surplus(self, data: bytes) -> None:
        now = time.monotonic()
        order = Order(f"surplus-{self._task.name}-{now:.6f}", "-", 0)
        self._ledger.sent(order, "http-surplus", "http", now, 0)
        self._ledger.answered(order.id, now, "surplus", data, data[:200].decode("latin-1"))


def _without_value(order: Order, body: str | bytes) -> str | bytes:
    """The answer alone, if the value that came with it is the right one."""
    if not order.size or not isinstance(body, bytes):
        return body
    found = memoryview(body)
    at = len(found) - order.size
    return bytes(found[:at]) if found[at:] == value_of(order.id, order.nonce, order.size) else b"a wrong value"


def _outcome(status: int, detail: str) -> str:
    return INDETERMINATE if detail.startswith("Indeterminate") else str(status)


class _Refused(Exception):
    def __init__(self, response: Response) -> None:
        super().__init__(response.status)
        self.response = response


def _good(response: Response, status: int = 200) -> Response:
    if response.status != status:
        raise _Refused(response)
    return response


class _Watch(asyncio.Protocol):
    """Whoever started this process closes its standard input to make it stop, or by ending."""

    def __init__(self, closed: asyncio.Event) -> None:
        self._closed = closed

    def connection_lost(self, _exc: Exception | None) -> None:
        self._closed.set()


def main(argument: str) -> None:
    """One process of the load."""
    task: Any = msgspec.json.decode(argument, type=Task)
    asyncio.Runner(loop_factory=uvloop.new_event_loop).run(_main(task))


async def _main(task: Task) -> None:
    with Path(task.ledger).open("w", buffering=1 << 16) as file:  # noqa: ASYNC230  before anything else happens
        await Caller(task, ClientLedger(file)).run()


if __name__ == "__main__":
    main(sys.argv[1])

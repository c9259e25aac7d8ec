"""What the suite calls: two deployments that write down every start and end, and answer with a proof.

`Safe` may run a call again after its replica died, `Once` may not. Every replica appends to a ledger of its own in
the folder QSERVE_CHAOS_LEDGERS; a write(2) that has returned survives the end of the process.
"""

import asyncio
import os
import time
from collections.abc import AsyncIterator
from functools import cache
from pathlib import Path

from starlette.requests import Request

from qserve import serve
from tests.faults.chaos.ledger import END, PARTS, START, Order, proof, run_line, value_of

LEDGERS = "QSERVE_CHAOS_LEDGERS"


class Ledger:
    """Answers an order with its proof, after the time it asks for.

    Args:
        version: Shown in the replica's ledger.
        broken: The constructor raises, as that of a bad release does.
    """

    def __init__(self, version: str = "1", broken: bool = False) -> None:
        self._version = version
        if broken:
            raise RuntimeError(f"version {version} cannot be constructed")

    async def __call__(self, order: Request | dict[str, object], value: bytes = b"") -> str | bytes:
        """One answer, with the value that came with the order."""
        wanted = _order(order)
        if wanted.size and isinstance(order, Request):
            value = await order.body()
        self._note(wanted, START)
        await asyncio.sleep(wanted.seconds)
        _meet(wanted.fate)
        self._note(wanted, END)
        answer = proof(wanted.id, wanted.nonce)
        if not wanted.size:
            return answer
        if value != value_of(wanted.id, wanted.nonce, wanted.size):
            return "the value of an order did not arrive as it was sent"
        return answer.encode() + value

    def value(self, order: dict[str, object]) -> bytes:
        """The value of an order, for a caller that hands it on."""
        wanted = _order(order)
        return value_of(wanted.id, wanted.nonce, wanted.size)

    async def stream(self, order: Request | dict[str, object]) -> AsyncIterator[str]:
        """The answer in parts."""
        wanted = _order(order)
        self._note(wanted, START)
        for part in range(PARTS):
            await asyncio.sleep(wanted.seconds / PARTS)
            yield proof(wanted.id, wanted.nonce, part)
        self._note(wanted, END)

    def _note(self, order: Order, what: str) -> None:
        context = serve.get_replica_context()
        line = run_line(order.id, what, time.monotonic(), context.attempt, os.getpid(), self._version)
        os.write(_ledger(), line)


@cache
def _ledger() -> int:
    path = Path(os.environ[LEDGERS]) / f"replica-{os.getpid()}"
    return os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY)


def _order(order: Request | dict[str, object]) -> Order:
    given = dict(order.query_params) if isinstance(order, Request) else order
    fate, size = str(given.get("fate", "")), int(str(given.get("size", 0)))
    return Order(str(given["id"]), str(given["nonce"]), float(str(given["seconds"])), fate, size)


def _meet(fate: str) -> None:
    if fate == "abort":
        os.abort()
    elif fate == "exit":
        os._exit(3)
    elif fate == "block":
        time.sleep(60)
    elif fate == "raise":
        raise ValueError("the order wanted this")


Safe = serve.deployment(name="Safe", idempotent=True, timeout_s=30)(Ledger)
Once = serve.deployment(name="Once", timeout_s=30)(Ledger)

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
from tests.faults.chaos.ledger import END, PARTS, START, Order, proof, run_line

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

    async def __call__(self, order: Request | dict[str, object]) -> str:
        """One answer."""
        wanted = _order(order)
        self._note(wanted, START)
        await asyncio.sleep(wanted.seconds)
        _meet(wanted.fate)
        self._note(wanted, END)
        return proof(wanted.id, wanted.nonce)

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
    return Order(str(given["id"]), str(given["nonce"]), float(str(given["seconds"])), str(given.get("fate", "")))


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

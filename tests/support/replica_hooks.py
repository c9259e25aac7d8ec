"""Hooks of a replica that note what they see, and deployments whose code sees what they have set."""

import json
import os
from collections.abc import AsyncIterator, Iterator
from contextvars import ContextVar

from fastapi import FastAPI, Request, WebSocket

from qserve import serve
from qserve.hooks import ReplicaCall, ReplicaHook

HOOKS = "tests.support.replica_hooks:Noting,tests.support.replica_hooks:Raising"
NOTES = "TEST_REPLICA_HOOK_NOTES"

seen: ContextVar[str] = ContextVar("seen", default="nothing")


class Noting(ReplicaHook):
    """Sets a variable of the context to the call's id, and notes how each call went."""

    def before(self, call: ReplicaCall) -> str:
        seen.set(call.call_id)
        self._note("before", call, "")
        return call.call_id

    def after(self, call: ReplicaCall, state: str) -> None:
        assert state == call.call_id == seen.get()
        self._note("after", call, "")

    def error(self, call: ReplicaCall, state: str, error: BaseException) -> None:
        assert state == call.call_id == seen.get()
        self._note("error", call, type(error).__name__)

    def _note(self, event: str, call: ReplicaCall, error: str) -> None:
        facts = {"id": call.call_id, "kind": call.kind, "method": call.method, "durable": call.durable}
        line = json.dumps({"event": event, "error": error, "deployment": call.deployment, **facts}) + "\n"
        descriptor = os.open(os.environ[NOTES], os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        os.write(descriptor, line.encode())
        os.close(descriptor)


class Raising(ReplicaHook):
    """Always raises."""

    def before(self, call: ReplicaCall) -> None:
        raise SystemExit("before")

    def after(self, call: ReplicaCall, state: None) -> None:
        raise RuntimeError("after")

    def error(self, call: ReplicaCall, state: None, error: BaseException) -> None:
        raise RuntimeError("error")


class Plain:
    """A plain deployment, each of whose methods says what the hook has set."""

    async def __call__(self, request: Request) -> str:
        return seen.get()

    async def coroutine(self) -> str:
        return seen.get()

    def thread(self) -> str:
        return seen.get()

    def generator(self) -> Iterator[str]:
        yield seen.get()
        yield seen.get()

    async def async_generator(self) -> AsyncIterator[str]:
        yield seen.get()
        yield seen.get()

    async def batched(self, which: int) -> tuple[str, int]:
        return seen.get(), await self.together(which)

    @serve.batch(max_batch_size=2, batch_wait_timeout_s=5.0)
    async def together(self, which: list[int]) -> list[int]:
        return [len(which)] * len(which)

    async def fail(self) -> None:
        raise ZeroDivisionError

    def panic(self) -> None:
        raise KeyboardInterrupt


app = FastAPI()


@app.get("/coroutine")
async def coroutine() -> str:
    return seen.get()


@app.get("/thread")
def thread() -> str:
    return seen.get()


@app.get("/fails")
async def fails() -> None:
    raise ZeroDivisionError


@app.websocket("/fails")
async def failing_socket(socket: WebSocket) -> None:
    await socket.accept()
    raise ZeroDivisionError


@app.websocket("/socket")
async def socket(socket: WebSocket) -> None:
    await socket.accept()
    await socket.send_text(seen.get())
    await socket.close()


@serve.ingress(app)
class Ingress:
    """A deployment with an application."""
